"""Generation: a resolved request to the steps of its images.

request -> Conditioning (prompt embeddings, references, rope) -> for each batch: noise, velocity, Euler steps -> Step
"""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from .collectives import all_gather
from .conditioning.enhance import Enhancer
from .conditioning.references import ReferenceEncoder
from .conditioning.text import PromptEncoder
from .decoding import LatentDecoder
from .device import wired_limit
from .imaging.edits import Edit
from .imaging.preprocess import image_array
from .models.first_block_cache import FirstBlockCache
from .models.kv_cache import KV, FrozenKV
from .regions import parse_region
from .request import Request, Settings, request_noise
from .results import Step
from .runtime.activations import Pass, Workload
from .runtime.residency import Need, Stages
from .runtime.stats import Stats, not_finite
from .sampling.denoiser import CachedDenoiser, Denoiser, FrozenDenoiser, Velocity, strength_bias
from .sampling.guidance import Guidance, batched, distributed, sequential
from .sampling.latents import image_ids
from .sampling.regions import WHOLE, Regions, make_regions
from .sampling.samplers import GuidedVelocity, MaskBlend, add_noise, sample_euler
from .sampling.tiles import Following, TiledVelocity, low_pass
from .samplings import Sampling, warn


@dataclass(frozen=True)
class Canvas:
    """One sampling of the images, and what depends on its size.

    Attributes:
        ropes: rotation tables of text, image and references; of an image in tiles those of each tile.
        bias: what the references' strengths add to attention's scores; see Denoiser.
        regions: who attends to whom, where there are regions; one for each of ``ropes``.
        one: the size of a pass; in Conditioning for one image without CFG.
    """

    sampling: Sampling
    ropes: list[tuple[mx.array, mx.array]]
    bias: mx.array | None
    regions: list[Regions | None]
    one: Pass


@dataclass(frozen=True)
class Conditioning:
    """The transformer's inputs beside the noisy tokens, for all images of a request.

    Attributes:
        embeddings: embeddings (1, L, D) of each image's prompt.
        of_regions: embeddings (1, L, D) of each region's prompt, which follow the image's own.
        negative: embeddings (1, L, D) of the negative prompt, where there is CFG.
        init: clean tokens (1, S, C) of the init image, if any.
        init_latent: what hires enlarges in the place of a small image, (1, h, w, C / 4) of the init image, if any.
        references: clean tokens (1, R, C) of the references that go through every pass.
        reference_kv: keys and values of the references, in place of their tokens (klein-9b-kv).
        edit: the request's, with its reference's tokens.
        canvases: the samplings, one after another.
    """

    embeddings: list[mx.array]
    of_regions: list[mx.array]
    negative: mx.array | None
    init: mx.array | None
    init_latent: mx.array | None
    references: list[mx.array]
    reference_kv: list[KV] | None
    edit: Edit | None
    canvases: list[Canvas]


@dataclass
class Generator:
    """Generates the images of requests.

    Attributes:
        group: two processes that compute one pass of CFG each, if there are two.
    """

    stages: Stages
    enhancer: Enhancer
    prompts: PromptEncoder
    references: ReferenceEncoder
    decoder: LatentDecoder
    group: mx.distributed.Group | None = None

    def generate(self, request: Request) -> Iterator[Step]:
        """Every step of every image; those of images that share a pass in turn.

        Raises:
            FloatingPointError: where the latents stop being finite.
        """
        steps = self._generate(request)
        with wired_limit(self.stages.memory_limit):
            try:
                while True:
                    with self.stages.turn():  # between two steps another thread may have its turn
                        step = next(steps, None)
                    if step is None:
                        return
                    yield step
            except GeneratorExit:  # the caller stops before the end: give back what the steps worked on
                steps.close()
                del step
                mx.clear_cache()
                raise

    def _generate(self, request: Request) -> collections.abc.Generator[Step, None, None]:
        stats = Stats()
        request = self._enhanced(request, stats)
        conditioning = self._condition(request, stats)
        two_passes = request.uses_cfg and self.group is None
        largest = self._largest(conditioning.canvases)
        # With regions the two passes have texts of different lengths.
        is_batched = two_passes and not largest.is_masked and self.stages.fits(replace(largest, rows=2))
        rows, turns = 2 if is_batched else 1, 2 if two_passes and not is_batched else 1
        count = self._images_per_pass(request, replace(largest, rows=rows, caches=turns * largest.caches))
        canvases = [
            replace(canvas, one=replace(canvas.one, rows=count * rows, caches=turns * canvas.one.caches))
            for canvas in conditioning.canvases
        ]
        # The transformer is loaded now, so that its progress bar comes before that of the steps.
        self.stages.prepare("transformer", self._need(self._largest(canvases)), stats)
        total = len(request.settings) * sum(len(canvas.sampling.steps) for canvas in canvases)
        with self.stages.bar("generating", total, unit="step") as bar:
            for start in range(0, len(request.settings), count):
                images = range(start, min(start + count, len(request.settings)))
                z = conditioning.init_latent
                if request.init_latents is not None:
                    z = mx.concatenate([request.init_latents[k] for k in images])
                for canvas in canvases:
                    size = canvas.sampling.size
                    init = conditioning.init if z is None else self.decoder.pack(z, size)
                    latents = yield from self._sample(
                        request, conditioning, canvas, init, images, is_batched, stats, bar
                    )
                    z = self.decoder.unpack(latents, size)  # from which hires goes on

    def _enhanced(self, request: Request, stats: Stats) -> Request:
        """The request with its prompts written out, if that is asked for."""
        if not request.batch.enhance:
            return request
        is_edit = bool(request.references) or request.inpaint is not None
        prompts = [settings.prompt for settings in request.settings]
        texts = self.enhancer.write(prompts, edit=is_edit, seed=request.batch.enhance_seed, stats=stats)
        settings = [
            replace(own, prompt=texts[own.prompt], original_prompt=own.prompt)
            if texts[own.prompt] != own.prompt
            else own
            for own in request.settings
        ]
        return replace(request, settings=settings)

    def _sample(
        self,
        request: Request,
        conditioning: Conditioning,
        canvas: Canvas,
        init: mx.array | None,
        images: range,
        is_batched: bool,
        stats: Stats,
        bar: Any,
    ) -> collections.abc.Generator[Step, None, mx.array]:
        """The steps of the images that share a pass, in one sampling.

        Args:
            init: clean tokens (1 or B, S, C) to start from, if any.

        Returns:
            their latents (B, S, C).
        """
        first, channels = request.settings[0], self.stages.checkpoint.transformer.in_channels
        steps, size, one = canvas.sampling.steps, canvas.sampling.size, canvas.one
        total = request.samplings[-1].steps[-1].index
        frozen = None if first.reuse is None else FrozenKV(first.reuse, one.image)

        def use() -> AbstractContextManager[Any]:
            is_frozen = frozen is not None and bool(frozen.kv)
            return self.stages.use("transformer", self._need(one, is_frozen), stats, what="denoise")

        references = conditioning.references, conditioning.reference_kv
        tiling = canvas.sampling.tiling
        txt = mx.concatenate([conditioning.embeddings[k] for k in images])
        negative = txt if conditioning.negative is None else mx.broadcast_to(conditioning.negative, txt.shape)
        of_regions = [mx.broadcast_to(own, txt.shape) for own in conditioning.of_regions]
        txt = mx.concatenate([txt, *of_regions], axis=1) if of_regions else txt
        mx.eval(txt, negative)  # a later step may be asked for in another thread
        denoisers = [
            Denoiser(use, rope, one.image, *references, canvas.bias, regions)
            for rope, regions in zip(canvas.ropes, canvas.regions, strict=True)
        ]
        velocities = [self._velocity(first, own, frozen, txt, negative, is_batched) for own in denoisers]
        velocity: GuidedVelocity = velocities[0]
        if tiling is not None and init is not None:
            velocity = TiledVelocity(tiling, velocities, self._following(init, canvas.sampling))
        x = noise = mx.concatenate(
            [
                request.latents[k] if request.latents else request_noise(request.settings[k], size, channels)
                for k in images
            ]
        )
        blend = None
        if init is not None:
            x = add_noise(init, noise, steps[0].sigma)
            blend = None if request.mask_tokens is None else MaskBlend(init, noise, request.mask_tokens)
        for step, latents, denoised in sample_euler(velocity, x, steps, blend):
            if not mx.isfinite(latents).all().item():
                raise FloatingPointError(not_finite(f"step {step.index} of {total}", first.dtype))
            caches = [own.cond.cache for own in velocities if isinstance(own.cond, CachedDenoiser)]
            is_reused = bool(caches) and all(cache is not None and cache.is_used for cache in caches)
            stats.steps["reused" if is_reused else "computed"] += len(images)
            for row, k in enumerate(images):
                own, foreseen = latents[row : row + 1], denoised[row : row + 1]
                mx.eval(own, foreseen)  # a caller may look at them in another thread
                bar.update()
                yield Step(
                    k,
                    step.index,
                    total,
                    1000 * step.sigma,
                    step.sigma_next,
                    size,
                    own,
                    foreseen,
                    request.settings[k],
                    stats,
                    self.decoder,
                    request.inpaint,
                    conditioning.edit,
                )
        return latents

    def _following(self, init: mx.array, sampling: Sampling) -> Following:
        """What an image in tiles follows: a smaller image, enlarged to clean tokens (1 or B, S, C)."""
        size = sampling.size
        unpack, pack = partial(self.decoder.unpack, size=size), partial(self.decoder.pack, size=size)
        target, filters = unpack(init), low_pass(size, sampling.small)
        mx.eval(target, *filters)  # a later step may be asked for in another thread
        return Following(target, *filters, unpack, pack)

    def _velocity(
        self,
        first: Settings,
        denoiser: Denoiser,
        frozen: FrozenKV | None,
        txt: mx.array,
        negative: mx.array,
        is_batched: bool,
    ) -> Guidance:
        """The velocity of a step: the denoiser, wrapped in the caches that the request asks for, then in CFG."""
        threshold = first.step_cache
        cond: Velocity = denoiser
        uncond: Velocity = denoiser
        if frozen is not None:
            cond = FrozenDenoiser(denoiser, frozen)
        elif threshold is not None:
            leader = CachedDenoiser(denoiser, lambda: FirstBlockCache(threshold, group=self.group))
            cond = leader
            uncond = CachedDenoiser(denoiser, lambda: FirstBlockCache(threshold, leader=leader.cache))
        if self.group is not None:
            passes = distributed(cond, self.group)
        else:
            passes = batched(cond) if is_batched else sequential(cond, uncond)
        return Guidance(cond, passes, txt, negative, first.guidance, first.guidance_rescale)

    def _condition(self, request: Request, stats: Stats) -> Conditioning:
        """Encode prompts, references and the init image."""
        first = request.settings[0]
        length, size = first.max_sequence_length, (first.height, first.width)
        prompts = [] if request.prompt_embeds else [settings.prompt for settings in request.settings]
        regions = [parse_region(text) for text in first.region]
        negative = [first.negative_prompt] if request.uses_cfg else []
        encoded = self.prompts.encode([*prompts, *(own.prompt for own in regions), *negative], length, stats)
        embeddings = request.prompt_embeds or [encoded[prompt] for prompt in prompts]
        if request.references and self.stages.checkpoint.is_bonsai:
            warn(
                f"{self.stages.checkpoint.name} is Bonsai Image, which was trained to draw from text alone: edits come "
                "out poor; klein-4b edits"
            )
        init_images = [] if request.init_image is None else [request.init_image]
        edit = request.edit
        edited = [] if edit is None or edit.mask is not None else [image_array(edit.reference)]
        pictures = [own.pixels for own in request.references]
        references = self.references.encode([*pictures, *edited, *init_images], stats)
        sizes = [(pixels.shape[1], pixels.shape[2]) for pixels in pictures]
        places, strengths = [own.place for own in request.references], [own.strength for own in request.references]
        init = references.pop().astype(mx.float32) if init_images else None
        init_latent = None
        if init is not None and first.hires is not None:
            init_latent = self.decoder.unpack(init, (init_images[0].shape[1], init_images[0].shape[2]))
        if edit is not None and edited:
            edit = replace(edit, tokens=references.pop())
        if init is not None and request.inpaint is not None:
            references, sizes = [init, *references], [size, *sizes]
            places, strengths = [0, *(place + 1 for place in places)], [1.0, *strengths]
        position_ids = [image_ids(*own, reference=place) for own, place in zip(sizes, places, strict=True)]
        tokens, reference_kv = [own.shape[1] for own in references], None
        if references and self.stages.checkpoint.has_kv_cache:
            reference_kv = self.references.encode_kv(references, position_ids, stats)
            references, position_ids = [], []

        def canvas(sampling: Sampling) -> Canvas:
            has_kv = self.stages.checkpoint.has_kv_cache
            tiling = sampling.tiling
            workload = Workload(
                *sampling.size, length, sizes, has_kv, frozen=first.reuse, tiling=tiling, regions=len(regions)
            )
            one = workload.denoising(caches=0 if first.step_cache is None else 1)
            texts, text, boxes = 1 + len(regions), embeddings[0].shape[1], [own.box for own in regions]
            ids = [image_ids(*sampling.size)] if tiling is None else tiling.position_ids(sampling.small)
            ropes = [self.references.rope(length, [own, *position_ids], texts) for own in ids]
            places = [WHOLE] if tiling is None else tiling.places
            seen = [
                make_regions(boxes, sampling.size, text, one.references, one.kv, place) if boxes else None
                for place in places
            ]
            return Canvas(sampling, ropes, strength_bias(texts * text + one.image, tokens, strengths), seen, one)

        return Conditioning(
            embeddings,
            [encoded[own.prompt] for own in regions],
            encoded[first.negative_prompt] if negative else None,
            init,
            init_latent,
            references,
            reference_kv,
            edit,
            [canvas(sampling) for sampling in request.samplings],
        )

    def _need(self, one: Pass, is_frozen: bool = False) -> Need:
        """The bytes of a pass beside the weights.

        Args:
            is_frozen: whether frozen keys and values are in memory already.
        """
        frozen_bytes = one.rows * self.stages.kv_bytes(one.frozen_tokens) if is_frozen else 0
        activations, attention = (part - frozen_bytes for part in self.stages.transformer_need(one))
        return Need(activations, attention, pinned=self.stages.kv_bytes(one.kv) + frozen_bytes)

    def _largest(self, canvases: Sequence[Canvas]) -> Pass:
        """The pass that needs most: of hires that of the large image, unless it is one of a tile."""
        return max((canvas.one for canvas in canvases), key=self.stages.transformer_need)

    def _images_per_pass(self, request: Request, one: Pass) -> int:
        """How many images go through the transformer together, each with the rows of ``one``."""
        most = request.batch.batch_size
        if most is None:  # a streamed transformer is read once for all of them
            most = len(request.settings) if self.stages.streams_transformer(one) else 1
        counts = range(min(most, len(request.settings)), 1, -1)
        fitting = next((count for count in counts if self.stages.fits(replace(one, rows=count * one.rows))), 1)
        if self.group is None:
            return fitting
        # The processes must take the same number, though one of them may have room for more.
        return int(np.array(all_gather(mx.array([fitting]), self.group)).min())
