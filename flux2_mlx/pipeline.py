"""Flux2Pipeline: from a prompt and a seed to a picture, one stage after another.

    prompt -> tokenizer -> text encoder -> prompt embeddings (B, L, 7680)
    seed -> noise (1, S, 128) -> steps of the transformer -> latents
    latents -> denormalize, unpack -> decoder -> picture

Reference: diffusers' Flux2KleinPipeline, whose argument names are accepted beside this library's own.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ._version import __version__
from .adapters.lora import Lora, attach, attached, check_scale, merging, open_lora
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.files import read_through
from .checkpoints.load import (
    load_autoencoder,
    load_preview_decoder,
    load_text_encoder,
    load_transformer,
    materialize,
    to_be_converted,
)
from .conditioning.tokenizer import Qwen3Tokenizer
from .device import machine_memory, stage_dtype, weight_bytes, weights_of, wired, within
from .disk_cache import read_prompt, write_prompt
from .errors import CheckpointError, InputError
from .fields import check_choice, nearest
from .imaging.preprocess import to_pil, to_unit
from .imaging.preview import preview_map, preview_of
from .inputs import Inputs
from .models.autoencoder import AutoEncoder
from .models.first_block_cache import StepCache
from .models.flux2 import FluxKlein
from .models.kv_cache import Kept, Reuse
from .models.qwen3 import Qwen3TextEncoder
from .models.taef2 import TinyDecoder
from .options import (
    OUTPUT_TYPES,
    BatchOptions,
    CheckpointOptions,
    GenerationOptions,
    ModelOptions,
    RuntimeOptions,
    check_prompt,
    dtype_name,
    dtype_of,
    seed_of,
)
from .quantization.layers import tune
from .quantization.spec import Quantization, options_of
from .request import Request, Settings, image_sigmas, output_size, request_noise, resolve
from .results import Result, Step
from .runtime.activations import (
    decoder_bytes,
    encoder_bytes,
    kept_bytes,
    preview_bytes,
    reused_tokens,
    text_encoder_bytes,
    transformer_bytes,
)
from .runtime.plan import Plan, Stage, make_plan, stage_of
from .runtime.stats import Stats, not_finite
from .runtime.streaming import is_streamed, stream
from .sampling.guidance import guide
from .sampling.latents import PIXELS_PER_TOKEN, image_ids, pack_latents, text_ids, unpack_latents
from .sampling.samplers import euler_step, noised

STAGES = ("text_encoder", "transformer", "autoencoder")
OWN = ("output_type", "callback_on_step_end", "return_dict")  # options of pipe(...) that stream has not
ImageLike = Image.Image | str | os.PathLike  # an image, or its file


# Of the passes of a step: its only one or the prompt's, and in turn with it the negative prompt's.
Caches = tuple[StepCache | None, StepCache | None]


class Flux2Pipeline:
    """A checkpoint ready to draw. Stages are loaded when first needed, and unloaded where memory is short.

    Attributes:
        text_encoder, transformer, autoencoder: the modules; their weights are lazy until a stage is prepared.
        dtype: of the transformer. In float16 the text encoder and the autoencoder stay in bfloat16, whose range
            their activations need.
        quantize: how each stage's matrices are packed that the checkpoint holds dense; stages that are not named stay.
        cache: whether prompt embeddings are kept on disk, so that a prompt that was drawn before needs no text encoder.
            To be False for a text_encoder whose weights were changed by hand.
        memory: what stays loaded: "resident" (everything), "staged" (the stage at work), "streamed" (of text encoder
            and transformer the block at work), or "auto" (what fits; a stage that does not fit alone is streamed).
            Stages that are unloaded or streamed go back to the checkpoint's files.
        memory_limit: bytes that loaded stages and their intermediates may take together. MLX computes ahead, and keeps
            freed buffers, as far as it allows.
        group: the two processes that share the two passes of guidance, if any.
        loras: those that are loaded, by name; see load_lora.
        preview_decoder: TAEF2 for Step.preview, if its weights were given.
        progress: whether loading and drawing show bars on standard error.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str | mx.Dtype | None = None,
        quantize: Mapping[str, Quantization] | None = None,
        cache: bool = True,
        memory: str = "auto",
        memory_limit: int | None = None,
        group: mx.distributed.Group | None = None,
        preview_decoder: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ):
        RuntimeOptions(memory=memory, memory_limit=memory_limit)
        if group is not None and group.size() != 2:
            raise InputError(f"guidance has two passes to share, and the group has {group.size()} processes")
        self.checkpoint = checkpoint
        self.dtype = dtype_of(dtype)
        self.quantize = dict(quantize or {})
        self.cache = cache
        self.memory = memory
        self.group = group
        self.progress = progress
        self.memory_limit = machine_memory() if memory_limit is None else int(memory_limit)
        self.tokenizer = Qwen3Tokenizer(checkpoint.tokenizer)
        self.text_encoder: Qwen3TextEncoder
        self.transformer: FluxKlein
        self.autoencoder: AutoEncoder
        self._loaded: dict[str, set[int]] = {}  # of each stage, id of the modules that are in memory
        self._embeddings: dict[tuple[str, int], mx.array] = {}  # of the last call
        self._ahead: dict[tuple[str, int], mx.array] = {}  # of the last encode
        self._pictures: dict[bytes, mx.array] = {}  # tokens of those given to the last call, by content
        self._kept: tuple[list[bytes], list[Kept]] = [], []  # of the last call's references: contents, keys and values
        self.loras: dict[str, Lora] = {}
        self._preview_map: np.ndarray | None = None
        self.preview_decoder: TinyDecoder | None = None
        if preview_decoder is not None:
            self.preview_decoder = load_preview_decoder(preview_decoder, stage_dtype("autoencoder", self.dtype))
        for stage in STAGES:
            self._open(stage)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "klein-4b",
        *,
        revision: str | None = None,
        transformer: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        distilled: bool | None = None,
        kv_cache: bool | None = None,
        dtype: str | mx.Dtype | None = None,
        quantize: int | str | None = None,
        quantize_text_encoder: int | str | None = None,
        group_size: int | None = None,
        cache: bool = True,
        memory: str = "auto",
        memory_limit: int | None = None,
        group: mx.distributed.Group | None = None,
        preview_decoder: str | os.PathLike[str] | None = None,
        progress: bool = False,
        torch_dtype: Any = None,
    ) -> Flux2Pipeline:
        """Open a checkpoint. Configs, file headers, names and shapes are checked now; weights are read when needed.

        Args:
            model: a released name ("klein-4b", "klein-9b", "klein-base-4b", "klein-base-9b", "klein-9b-kv"), "nano"
                (the miniature in this package), a folder in the diffusers layout or as mflux saves one, a safetensors
                or GGUF file with a transformer, a Hub id, or "owner/name/file" there.
            revision: branch, tag or commit on the Hub.
            transformer, text_encoder, vae: instead of the model's own: a file, a folder, a Hub id, or
                "owner/name/file".
            tokenizer: a folder with tokenizer.json.
            distilled: whether the transformer draws in few steps without guidance, where the model does not say it.
            kv_cache: whether the transformer was trained to keep its references, as klein-9b-kv was, where the model
                does not say it.
            dtype: "bfloat16", "float16" or "float32"; None takes what suits the machine.
            quantize: pack the matrices of the transformer and the text encoder, as they are loaded, into so many bits
                (2, 3, 4, 5, 6, 8) or a format ("mxfp4", "mxfp8", "nvfp4"). With fewer than 8 bits the transformer's
                most sensitive layers get more, a third of a bit a weight at most. What the checkpoint holds packed
                stays so.
            quantize_text_encoder: the same for the text encoder alone, where it is to differ; "none" leaves it.
            group_size: weights that share a scale where they are packed into bits: 32, 64 or 128; unless given 64.
            cache: keep prompt embeddings on disk (in FLUX2_MLX_CACHE, or the platform's folder for caches; the latest,
                at most 1 GB), so that a prompt that was drawn before needs no text encoder.
            memory: "resident", "staged" or "streamed" keeps everything, a stage, or a block at a time loaded; "auto"
                takes what fits.
            memory_limit: bytes that loaded stages and their intermediates may take together; None takes what the
                machine has now.
            group: two processes, from mx.distributed.init, that are asked for the same pictures and share the two
                passes of guidance.
            preview_decoder: TAEF2's weights for Step.preview, a safetensors file or "owner/name/file" on the Hub.
            progress: show bars on standard error while weights are read and steps are drawn.
            torch_dtype: diffusers' name for dtype; torch's own dtypes are understood.

        Raises:
            CheckpointError: for a checkpoint that cannot be used, with the way out.
            InputError: for an unknown dtype or memory, a limit that is none, or a group of other than two.
        """
        given = dict(locals())
        for name in ("dtype", "torch_dtype"):
            given[name] = None if given[name] is None else dtype_name(dtype_of(given[name]))
        options, runtime = CheckpointOptions.collect(given), RuntimeOptions.collect(given)
        packed = options.quantization()  # refused before anything is downloaded
        checkpoint = open_checkpoint(**options.source)
        return cls(checkpoint, dtype=options.dtype, quantize=packed, group=group, **vars(runtime))

    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        references: Sequence[tuple[int, int]] = (),
        step_cache: float | None = None,
        reuse: str | None = None,
    ) -> Plan:
        """What one picture needs, and what becomes of the mode "auto"; nothing is loaded.

        Args:
            height, width, max_sequence_length, step_cache, reuse: as stream takes them.
            references: (height, width) of each reference picture, as it is encoded: at most a megapixel.

        Raises:
            InputError: for a size or a length that cannot be drawn.
        """
        GenerationOptions.collect(locals())
        height, width = output_size(height, width, references, self.checkpoint.autoencoder.sample_size)
        return make_plan(
            self.text_encoder,
            self.transformer,
            self.autoencoder,
            dtype=self.dtype,
            height=height,
            width=width,
            length=max_sequence_length or self.tokenizer.default_length,
            references=references,
            keeps_references=self.checkpoint.has_kv_cache,
            caches_steps=step_cache is not None,
            reuse=reuse,
            limit=self.memory_limit,
            memory=self.memory,
        )

    def encode(self, prompts: Sequence[str], max_sequence_length: int | None = None) -> list[mx.array]:
        """Encode prompts of calls to come, which then need no text encoder; kept until the next call of this.

        Args:
            prompts: negative ones too.
            max_sequence_length: as ``stream`` takes it.

        Returns:
            the embeddings (1, L, D) of each.

        Raises:
            InputError: for what is no prompt, or a length that cannot be.
        """
        length = self.tokenizer.default_length if max_sequence_length is None else max_sequence_length
        GenerationOptions(max_sequence_length=length)
        for prompt in prompts:
            check_prompt(prompt)
        encoded = self._encode(prompts, length, Stats())
        self._ahead = {(text, length): embeds for text, embeds in encoded.items()}
        return [encoded[text] for text in prompts]

    # ------------------------------------------------------------------------------------------------ LoRAs

    def load_lora(
        self,
        where: str | os.PathLike[str],
        *,
        name: str | None = None,
        scale: float = 1.0,
        merge: bool = False,
        partial: bool = False,
    ) -> Lora:
        """Load a LoRA (LoKr, LoHa, DoRA) beside those that are loaded; pictures to come are drawn with it.

        Args:
            where: a safetensors file, a folder with one, a Hub id, or "owner/name/file".
            name: to speak of it later; unless given, ``where``.
            scale: how much of its change is made.
            merge: add it to the transformer's weights, which then are read again, instead of a product of its own in
                every layer: steps take no longer, but a change of scale does. Packed weights are left alone.
            partial: pass over what fits no layer, instead of refusing the file.

        Returns:
            what was loaded, with a summary.

        Raises:
            CheckpointError: for a file that does not fit, with all of its keys that fit nothing; or for merging into
                weights that the checkpoint holds packed.
            InputError: for a name that is taken, or a scale that is none.
        """
        where = os.fspath(where)
        name = where if name is None else name
        if name in self.loras:
            raise InputError(f"a LoRA {name!r} is loaded; set_lora changes its scale, and name= names another")
        weights = self.checkpoint.sources["transformer"].weights
        model = FluxKlein(self.checkpoint.transformer)
        lora = open_lora(where, model, weights, scale=scale, merge=merge, partial=partial)
        self._change_loras({**self.loras, name: lora})
        return lora

    def set_lora(self, name: str, scale: float) -> None:
        """Change how much of a LoRA's change is made.

        Raises:
            InputError: for a name that is not loaded, or a scale that is none.
        """
        check_scale(scale)
        self._change_loras({**self.loras, name: replace(self._lora(name), scale=float(scale))})

    def unload_lora(self, name: str | None = None) -> None:
        """Draw without a LoRA again, or without any unless it is named; the weights are what they were.

        Raises:
            InputError: for a name that is not loaded.
        """
        if name is not None:
            self._lora(name)
        self._change_loras({} if name is None else {own: lora for own, lora in self.loras.items() if own != name})

    def _lora(self, name: str) -> Lora:
        if name not in self.loras:
            raise InputError(f"no LoRA {name!r} is loaded, only {', '.join(self.loras) or 'none'}")
        return self.loras[name]

    def _change_loras(self, loras: dict[str, Lora]) -> None:
        merged = tuple(lora for lora in loras.values() if lora.merge)
        if merged != self.checkpoint.sources["transformer"].changes:
            checkpoint = merging(self.checkpoint, merged)
            checkpoint.sources["transformer"].weights()  # or what is packed would be refused when it is too late
            self.checkpoint, self.loras = checkpoint, loras
            self.unload("transformer")
            return
        self.loras = loras
        self._kept = [], []
        attach(self.transformer, self._beside())
        if self._loaded["transformer"] and not is_streamed(self.transformer):
            mx.eval(attached(self.transformer))

    def _beside(self) -> list[Lora]:
        """The LoRAs that are not merged."""
        return [lora for lora in self.loras.values() if not lora.merge]

    # ------------------------------------------------------------------------------------------------ drawing

    @property
    def options(self) -> ModelOptions:
        """What is opened, as images' files tell it."""
        return ModelOptions(
            model=self.checkpoint.name,
            revision=self.checkpoint.revision,
            dtype=dtype_name(self.dtype),
            lora=tuple(map(str, self.loras.values())),
            lora_merge=any(lora.merge for lora in self.loras.values()),
            lora_partial=any(lora.partial for lora in self.loras.values()),
            **self.checkpoint.options,
            **options_of(self.quantize),
        )

    def to(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse diffusers' way to a device and a dtype, with this library's."""
        raise InputError(
            "MLX computes on the GPU where there is one, so leave .to(...) out; mx.set_default_device chooses another "
            "device, and from_pretrained(..., dtype=) the dtype"
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Flux2Pipeline, int, float, dict[str, mx.array]], Any] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Result:
        """Generate images.

        Args:
            prompt: one or several.
            output_type: "pil"; "np" for float32 arrays in 0..1; "latent" for what the decoder takes.
            callback_on_step_end: called as diffusers does, with the pipeline, the number of the step from 0, its
                timestep (1000 times its noise level) and {"latents": those after it, of one image}. It may watch and
                stop (by an exception), not change the latents.
            return_dict: False returns (images,), as diffusers does.
            options: those of ``stream``.

        Returns:
            a Result, unless return_dict is False.

        Raises:
            InputError: for a value that cannot be used.
            TypeError: for an option that there is not.
            FloatingPointError: where the latents stop being finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        known = list(signature(type(self).stream).parameters)[2:]
        for name in options.keys() - known:
            raise TypeError(f"pipe(...) has no option {name!r}{nearest(name, [*known, *OWN])}")
        images: list[Any] = []
        settings: list[Settings] = []
        stats = Stats()
        for step in self.stream(prompt, **options):
            if callback_on_step_end is not None:
                self._call_back(callback_on_step_end, step)
            if not step.is_last:
                continue
            stats = step.stats
            settings.append(step.settings)
            if output_type == "pil":
                images.append(step.picture())
            elif output_type == "np":
                images.append(step.array())
            else:
                images.append(self._unpack(step.latents, step.settings))
        joined: Any = images
        if output_type == "np":
            joined = np.stack(images)
        elif output_type == "latent":
            joined = mx.concatenate(images)
        if not return_dict:
            return (joined,)  # type: ignore[return-value]  # as who asks for it knows
        return Result(joined, settings, stats.seconds, stats.peak_bytes, stats.steps)

    def _call_back(self, callback: Callable[..., Any], step: Step) -> None:
        settings = step.settings
        sigmas = image_sigmas(settings, self.checkpoint.is_distilled, (settings.height, settings.width))
        returned = callback(self, step.index - 1, 1000 * sigmas[step.index - 1], {"latents": step.latents})
        if isinstance(returned, Mapping) and returned.get("latents", step.latents) is not step.latents:
            raise InputError("callback_on_step_end cannot change latents; FluxSampler is for loops of your own")

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str = "",
        image: ImageLike | Sequence[ImageLike] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        force_guidance: bool = False,
        step_cache: float | None = None,
        reuse: str | None = None,
        seed: int | None = None,
        num_images: int | None = None,
        batch_size: int | None = None,
        schedule: str = "flux2",
        sigmas: Sequence[float] | None = None,
        noise: str = "torch",
        max_sequence_length: int | None = None,
        init_image: ImageLike | None = None,
        strength: float | None = None,
        mask: ImageLike | None = None,
        mask_blur: float = 0.0,
        mask_padding: int | None = None,
        expand: Mapping[str, int] | None = None,
        prompt_embeds: mx.array | None = None,
        latents: mx.array | np.ndarray | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int | None = None,
        generator: Any = None,
    ) -> Iterator[Step]:
        """Draw pictures, and yield every step, so that a caller can preview, stop, save or time. Pictures that share a
        pass through the transformer are yielded in turn, step by step.

        Arguments are checked at once; the work begins with the first step asked for.

        Args:
            prompt: one or several; each is encoded once, and not again while the last call's are kept.
            negative_prompt: what guidance leads away from.
            image: reference images, as diffusers takes them, or their files; so are init_image and mask.
            height, width: in pixels, multiples of 16, from 64 up to 4 megapixels; unless given the first reference's
                size (of one side given, the other by that reference's aspect), or what the checkpoint is for, 1024 for
                the released ones.
            num_steps: 4 for distilled models and 50 for base models unless given.
            guidance: scale of classifier-free guidance, 4.0 for base models unless given; distilled models ignore it.
                Its two passes are one where memory allows.
            guidance_interval: noise levels (low, high) between which there is guidance; unless given all.
            guidance_rescale: how far guidance is brought back to the spread of the velocity without it, 0 to 1.
            force_guidance: guide a distilled model all the same.
            step_cache: leave out all blocks but the first in steps that differ by less than this from one before, as
                0.1, and foresee what they would change; see models.step_cache.StepCache. The first step and the last
                are computed, and so are those where guidance begins and ends. None and 0 compute every step. It is for
                tens of steps: of four, each differs much from the one before. Pictures in a pass are decided on
                together, so that a picture is not quite its single one.
            reuse: "text" or "references": what the picture sees of these tokens in the first step stands for them in
                the later ones, which leave them out; see models.transformer.Reuse. For distilled models without
                guidance; None computes every token in every step.
            seed: of the first picture, the k-th has seed + k; random unless given.
            num_images: pictures of each prompt.
            batch_size: the most pictures in one pass through the transformer, where memory allows; None takes one, and
                as many as fit where the transformer is streamed, which is then read once for them.
            schedule: "flux2" (the official one), "linear" or "comfy".
            sigmas: custom noise levels instead, shifted as diffusers does.
            noise: "torch" equals torch's CPU generator; "mlx" draws from mx.random.
            max_sequence_length: tokens that a prompt is padded or cut to; unless given 512, or what the
                tokenizer takes where that is less.
            init_image: a picture to begin from, noised, in place of noise alone. Its size comes before the first
                reference's; to another size it is scaled and cropped, never stretched.
            strength: how much of it is drawn anew, up to 1 for all of it (0.75 unless given, less with fewer than 4
                steps): of n steps the first n - n * strength are left out, rounded down as diffusers does. With a
                mask 1 unless given.
            mask: what of the init_image is repainted: white is, black comes back as it was, grey is blended; "alpha"
                for what is transparent in it. The transformer sees the whole init_image as the first reference, as in
                diffusers; those of ``image`` follow. The new picture has the init_image's own size, whatever height and
                width it is drawn at: unless given, at most a megapixel.
            mask_blur: radius, in the init_image's pixels, of a Gaussian blur of the mask.
            mask_padding: draw only what the mask shows and so many of the init_image's pixels around it, at the size
                that the whole would be drawn at.
            expand: pixels to add to the init_image at "left", "top", "right" and "bottom", and to repaint.
            prompt_embeds: (B, L, D) in place of prompts.
            latents: (B, 128, H/16, W/16) in diffusers' order, or (B, S, 128), in place of noise.
            num_inference_steps, guidance_scale, num_images_per_prompt: diffusers' names for num_steps, guidance and
                num_images.
            generator: diffusers' way to say the seed: a torch.Generator, whose initial seed it is, or a whole number.

        Yields:
            Step, num_steps a picture, with an init_image those that are done.

        Raises:
            InputError: for a value that cannot be used.
            FloatingPointError: where the latents stop being finite.
        """
        given = dict(locals()) | {"generator": seed_of(generator)}
        request = resolve(
            GenerationOptions.collect(given),
            BatchOptions.collect(given),
            Inputs(**{f.name: given[f.name] for f in fields(Inputs)}),
            checkpoint=self.checkpoint,
            model=self.options,
            default_length=self.tokenizer.default_length,
            limit=self.memory_limit,
            peak=self._peak,
            shares_cfg=self.group is not None,
        )
        return self._drawn(request)

    def _peak(self, options: GenerationOptions, references: Sequence[tuple[int, int]]) -> int:
        """Bytes that an image needs, its size and the length of its prompt resolved."""
        return self.plan(references=references, **options.planned).peak

    def _drawn(self, run: Request) -> Iterator[Step]:
        with wired(self.memory_limit):
            try:
                yield from self._steps(run)
            except GeneratorExit:  # the caller stops before the end: give back what the steps worked on
                mx.clear_cache()
                raise

    def _steps(self, run: Request) -> Iterator[Step]:
        """Encode, then draw picture after picture."""
        stats = Stats()
        first = run.settings[0]
        prompts = [] if run.prompt_embeds else [settings.prompt for settings in run.settings]
        negative = [first.negative_prompt] if run.uses_cfg else []
        encoded = self._encode([*prompts, *negative], first.max_sequence_length, stats)
        given = [*run.references, *([] if run.init_image is None else [run.init_image])]
        references = self._encode_pictures(given, stats)
        sizes = [(pixels.shape[1], pixels.shape[2]) for pixels in run.references]
        init = None if run.init_image is None else references.pop().astype(mx.float32)
        if init is not None and run.inpaint is not None:
            references, sizes = [init, *references], [(first.height, first.width), *sizes]
        params = self.checkpoint.transformer
        reference_tokens = sum(tokens.shape[1] for tokens in references)
        image_tokens = (first.height // PIXELS_PER_TOKEN) * (first.width // PIXELS_PER_TOKEN)
        live = first.max_sequence_length + image_tokens  # tokens of a step
        grids = [image_ids(*size, reference=k) for k, size in enumerate(sizes)]
        kept, kept_tokens, seen = None, 0, [image_ids(first.height, first.width)]
        if self.checkpoint.has_kv_cache and references:
            kept, kept_tokens = self._keep(references, grids, stats), reference_tokens
            references = []
        else:
            live += reference_tokens
            seen += grids
        cos, sin = self._rope(first.max_sequence_length, seen)
        held = kept_bytes(params, kept_tokens, self.dtype)

        def velocity(
            x: mx.array, txt: mx.array, sigma: float, cache: StepCache | None, reuse: Reuse | None = None
        ) -> mx.array:
            """Of pictures' tokens, (B, S, 128), with a prompt's embeddings (B, L, D) for each."""
            seen = [mx.broadcast_to(tokens, (len(x), *tokens.shape[1:])) for tokens in references]
            img = mx.concatenate([x, *seen], axis=1)
            v = self.transformer.forward_with_rope(img, txt, mx.array([sigma]), cos, sin, kept, cache, reuse)
            return v[:, :image_tokens].astype(mx.float32)

        cached = 0 if first.step_cache is None else image_tokens  # of each row of a pass
        reused = reused_tokens(first.reuse, first.max_sequence_length, reference_tokens)
        two_passes = run.uses_cfg and self.group is None
        both = two_passes and self._has_room(live, kept_tokens, 2, cached, reused)
        rows = 2 if both else 1  # of a picture in a pass
        cached *= 2 if two_passes and not both else 1
        count = self._pictures_in_a_pass(run, live, kept_tokens, rows, cached, reused)
        working = transformer_bytes(params, live, self.dtype, count * rows, kept_tokens, cached, reused)

        def guided(x: mx.array, txt: mx.array, away: mx.array, sigma: float, caches: Caches) -> mx.array:
            """The velocity with guidance: both passes in one, on two machines, or in turn."""
            if both:
                v = velocity(mx.concatenate([x, x]), mx.concatenate([txt, away]), sigma, caches[0])
                v, v_away = mx.split(v, 2)
            elif self.group is not None:
                own = velocity(x, (txt, away)[self.group.rank()], sigma, caches[0])
                v, v_away = mx.split(mx.distributed.all_gather(own, group=self.group), 2)
            else:
                v = velocity(x, txt, sigma, caches[0])
                mx.eval(v)  # or intermediates of both passes would be in memory
                v_away = velocity(x, away, sigma, caches[1])
            return guide(v, v_away, first.guidance, first.guidance_rescale)

        def fresh() -> Caches:
            """Of the passes in turn, so that the next step is computed; none where there is no step cache."""
            if first.step_cache is None:
                return None, None
            leader = StepCache(first.step_cache, image_tokens, group=self.group)
            return leader, StepCache(first.step_cache, image_tokens, leader=leader)

        self._prepare("transformer", "", stats, *working, held=held)  # before the bar of the steps, for its own
        with self._bar("drawing", len(run.settings) * len(run.steps), unit="step") as bar:
            for start in range(0, len(run.settings), count):
                pictures = list(enumerate(run.settings))[start : start + count]
                txt = mx.concatenate(
                    [run.prompt_embeds[k] if run.prompt_embeds else encoded[drawn.prompt] for k, drawn in pictures]
                )
                away = mx.broadcast_to(encoded[first.negative_prompt], txt.shape) if run.uses_cfg else txt
                x = noise = mx.concatenate(
                    [
                        run.latents[k] if run.latents else request_noise(drawn, params.in_channels)
                        for k, drawn in pictures
                    ]
                )
                if init is not None:
                    x = noised(init, noise, run.steps[0].sigma)
                caches: Caches = None, None
                reuse = None if first.reuse is None else Reuse(first.reuse, image_tokens)
                was_guided = None
                for plan in run.steps:
                    i, sigma, sigma_next = plan.index, plan.sigma, plan.sigma_next
                    # Again, since a caller may have decoded a picture in between and so unloaded the transformer.
                    there = count * kept_bytes(params, reused, self.dtype) if reuse is not None and reuse.kept else 0
                    left = (part - there for part in working)
                    needed = self._prepare("transformer", "", stats, *left, held=held + there)
                    with self._working("denoise", needed, stats):
                        is_guided = plan.is_guided
                        if i == first.num_steps:
                            caches = None, None
                        elif is_guided != was_guided:
                            caches, was_guided = fresh(), is_guided
                        if is_guided:
                            v = guided(x, txt, away, sigma, caches)
                        else:
                            v = velocity(x, txt, sigma, caches[0], reuse)
                        x = euler_step(x, v, sigma, sigma_next)
                        denoised = x - sigma_next * v
                        if init is not None and run.mask_tokens is not None:
                            x = _masked(x, noised(init, noise, sigma_next), run.mask_tokens)
                            denoised = _masked(denoised, init, run.mask_tokens)
                        finite = mx.isfinite(x).all()
                        mx.eval(x, denoised, finite)
                        if i == first.num_steps:
                            reuse = None
                    if not finite.item():
                        raise FloatingPointError(not_finite(f"step {i} of {first.num_steps}", first.dtype))
                    is_reused = caches[0] is not None and caches[0].is_used
                    stats.steps["reused" if is_reused else "computed"] += len(pictures)
                    for row, (k, drawn) in enumerate(pictures):
                        part = slice(row, row + 1)
                        bar.update()
                        yield Step(
                            k,
                            i,
                            sigma_next,
                            x[part],
                            denoised[part],
                            drawn,
                            stats,
                            self._decode,
                            self._preview,
                            run.inpaint,
                        )

    def _pictures_in_a_pass(self, run: Request, tokens: int, kept: int, rows: int, cached: int, reused: int) -> int:
        """How many pictures are drawn at a time, each with so many rows of tokens."""
        most = run.batch_size
        if most is None:
            stage = self._transformer_stage(tokens, kept, rows, cached, reused)
            most = len(run.settings) if stage.is_streamed(self.memory, self.memory_limit) else 1
        most = min(most, len(run.settings))
        counts = range(most, 1, -1)
        fitting = next((count for count in counts if self._has_room(tokens, kept, count * rows, cached, reused)), 1)
        if self.group is None:
            return fitting
        both = mx.distributed.all_gather(mx.array([fitting]), group=self.group)  # which have to take the same
        return int(np.array(both).min())

    # ------------------------------------------------------------------------------------------------ stages

    def _encode(self, prompts: Sequence[str], length: int, stats: Stats) -> dict[str, mx.array]:
        """Prompt embeddings (1, L, D) of each distinct prompt; those of the last call, and of the last encode, are not
        computed again.
        """
        known = self._embeddings | self._ahead
        kept = {text: known[text, length] for text in prompts if (text, length) in known}
        new = [text for text in dict.fromkeys(prompts) if text not in kept]
        if new:
            config = self.checkpoint.text_encoder
            ids, mask = self.tokenizer(new, length)
            largest = int(np.array(ids).max())
            if largest >= config.vocab_size:
                raise CheckpointError(
                    f"{self.checkpoint.tokenizer}: the tokenizer gives token {largest}, but the text encoder knows "
                    f"{config.vocab_size}; they do not belong together"
                )
            rows = {text: (ids[row : row + 1], mask[row : row + 1]) for row, text in enumerate(new)}
            keys = {text: self._prompt_key(*row) for text, row in rows.items()} if self.cache else {}
            for text, key in keys.items():
                embeds = read_prompt(*key)
                if embeds is not None:
                    kept[text] = embeds
                    del rows[text]
            if rows:
                working = text_encoder_bytes(config, length, stage_dtype("text_encoder", self.dtype))
                needed = self._prepare("text_encoder", "", stats, working)
                with self._reading_ahead(), self._working("text_encoder", needed, stats):
                    for text, row in rows.items():
                        kept[text] = self.text_encoder(*row)
                        mx.eval(kept[text])
                        if self.cache:
                            write_prompt(*keys[text], kept[text])
        if prompts:
            self._embeddings = {(text, length): embeds for text, embeds in kept.items()}
        return kept

    def _prompt_key(self, ids: mx.array, mask: mx.array) -> tuple[Sequence[Path], object]:
        """All that the embeddings of these tokens depend on: files of weights, and the rest."""
        source = self.checkpoint.sources["text_encoder"]
        module = {name: (array.shape, array.dtype) for name, array in weights_of(self.text_encoder).items()}
        tokens = np.array(ids).tobytes(), np.array(mask).tobytes()
        return source.files, (__version__, mx.default_device(), source.config, module, tokens)

    def _encode_pictures(self, pictures: Sequence[mx.array], stats: Stats) -> list[mx.array]:
        """Clean, normalized tokens (1, R, 128) of each given picture (1, H, W, 3); those of the last call are not
        computed again.
        """
        keys = [
            hashlib.sha256(repr(pixels.shape).encode() + np.array(pixels).tobytes()).digest() for pixels in pictures
        ]
        tokens = {key: self._pictures[key] for key in keys if key in self._pictures}
        for key, pixels in zip(keys, pictures, strict=True):
            if key in tokens:
                continue
            height, width = pixels.shape[1:3]
            working = encoder_bytes(self.checkpoint.autoencoder, height, width, stage_dtype("autoencoder", self.dtype))
            needed = self._prepare("autoencoder", "encoder", stats, working)
            with self._working("references", needed, stats):
                tokens[key] = self.autoencoder.bn.normalize(pack_latents(self.autoencoder.encoder(pixels)))
                mx.eval(tokens[key])
        if pictures:
            self._pictures = tokens
        return [tokens[key] for key in keys]

    def _keep(self, references: Sequence[mx.array], grids: Sequence[mx.array], stats: Stats) -> list[Kept]:
        """Keys and values of references, (1, R, 128) tokens at (1, R, 4) positions, in every block of the transformer;
        those of the last call are not computed again.
        """
        contents = [
            hashlib.sha256(np.array(part).tobytes()).digest()
            for part in (*(tokens.astype(mx.float32) for tokens in references), *grids)
        ]
        known, kept = self._kept
        if known == contents:
            return kept
        del kept
        self._kept = [], []
        tokens = mx.concatenate(list(references), axis=1)
        params, count = self.checkpoint.transformer, tokens.shape[1]
        growing = kept_bytes(params, count, self.dtype)
        working = [part + growing for part in transformer_bytes(params, count, self.dtype)]
        needed = self._prepare("transformer", "", stats, *working)
        with self._working("references", needed, stats):
            kept = self.transformer.keep_references(tokens, *self._rope(0, grids))
            mx.eval(kept)
        self._kept = contents, kept
        return kept

    def _rope(self, length: int, grids: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """Tables for so many text tokens and for image tokens at these positions."""
        params, positions = self.checkpoint.transformer, mx.concatenate(list(grids), axis=1)
        return FluxKlein.compute_rope(text_ids(length), positions, params.axes_dims_rope, params.rope_theta)

    def _decode(self, latents: mx.array, settings: Settings, stats: Stats) -> mx.array:
        """Sampled tokens (1, S, 128) to a picture (1, H, W, 3) in 0..1, float32."""
        dtype = stage_dtype("autoencoder", self.dtype)
        working = decoder_bytes(self.checkpoint.autoencoder, settings.height, settings.width, dtype)
        needed = self._prepare("autoencoder", "decoder", stats, working)
        with self._working("decode", needed, stats):
            decoded = self.autoencoder.decoder(self._unpack(latents, settings))
            image, finite = to_unit(decoded), mx.isfinite(decoded).all()
            mx.eval(image, finite)
        if not finite.item():
            raise FloatingPointError(not_finite("the decoder", dtype_name(stage_dtype("autoencoder", self.dtype))))
        return image

    def _preview(self, latents: mx.array, settings: Settings, stats: Stats) -> Image.Image:
        """Sampled tokens (1, S, 128) as a coarse picture, or by the preview decoder."""
        if self.preview_decoder is not None:
            dtype = stage_dtype("autoencoder", self.dtype)
            z = unpack_latents(latents, settings.height, settings.width).astype(dtype)
            with self._working("preview", preview_bytes(settings.height, settings.width, dtype), stats):
                return to_pil(np.array(mx.clip(self.preview_decoder(z)[0].astype(mx.float32), 0, 1)))
        if self._preview_map is None:
            self._preview_map = preview_map(self.checkpoint, self.dtype)
        return preview_of(latents, self._preview_map, settings.height, settings.width)

    def _unpack(self, latents: mx.array, settings: Settings) -> mx.array:
        return unpack_latents(self.autoencoder.bn.denormalize(latents), settings.height, settings.width)

    @contextmanager
    def _working(self, part: str, working_bytes: int, stats: Stats) -> Iterator[None]:
        with within(self.memory_limit, working_bytes), stats.measure(part):
            yield

    def _prepare(
        self, name: str, part: str, stats: Stats, intermediates: int, attention: int = 0, *, held: int = 0
    ) -> int:
        """Bring a stage, or a part of one, into memory; other stages out of it as far as the mode and the limit say.
        What is too large even alone is streamed, if it has blocks, or loaded all the same, with a UserWarning.

        Args:
            intermediates, attention: see plan.stage_of.
            held: bytes of what is in memory already and stays there.

        Returns:
            the intermediates' bytes, the largest unpacked matrix among them.
        """
        dtype, module = stage_dtype(name, self.dtype), self._module(name, part)
        stage = stage_of(name.replace("_", " "), module, dtype, intermediates, attention)
        streams = stage.is_streamed(self.memory, self.memory_limit - held)
        if self._loaded[name] and streams != is_streamed(module):  # as for a picture of another size
            self._open(name)
            module = self._module(name, part)
        weights, is_loaded = stage.streamed if streams else stage.weights, id(module) in self._loaded[name]
        self._make_room(name, stage.working + (weights if streams or not is_loaded else 0), held)
        if is_loaded:
            return stage.working
        needed = weights + stage.working + (mx.get_active_memory() if self.memory == "resident" else held)
        if needed > self.memory_limit:
            warnings.warn(
                f"the {stage.name} needs about {needed / 1e9:.1f} GB and this machine gives "
                f"{self.memory_limit / 1e9:.1f} GB; it will be slow, or fail, for want of memory",
                stacklevel=2,
            )
        if streams and to_be_converted(module):
            warnings.warn(
                f"the {stage.name} is streamed and its weights are converted in every pass over them; "
                "python -m flux2_mlx.convert does it once",
                stacklevel=2,
            )
        loading = stream(module, partial(self._built, name), dtype) if streams else materialize(module)
        with (
            self._bar(f"loading {stage.name}", weights, unit="B", unit_scale=True) as bar,
            self._working("load", 0, stats),
        ):
            try:
                for count in loading:
                    bar.update(count)
                if not streams:
                    tune(module, dtype)
            except BaseException:
                self._open(name)  # half of a packed layer would go unnoticed
                raise
        mx.clear_cache()  # what was read to be converted
        self._loaded[name].add(id(module))
        return stage.working

    def _has_room(self, tokens: int, kept: int, batch: int, cached: int, reused: int) -> bool:
        """Whether the transformer can take so many rows of tokens in one pass, beside the keys and values of ``kept``
        references and what is cached or reused of earlier steps, and nothing is unloaded or streamed for that which
        would not be for one.
        """
        limit = self.memory_limit - kept_bytes(self.checkpoint.transformer, kept, self.dtype)
        stage, all_rows = (self._transformer_stage(tokens, kept, rows, cached, reused) for rows in (1, batch))
        weights = stage.streamed if stage.is_streamed(self.memory, limit) else stage.weights
        alone = weights + stage.working
        others = [name for name in STAGES if name != "transformer" and self._loaded[name]]
        others_bytes = sum(weight_bytes(getattr(self, name)) for name in others)
        if self.memory in ("staged", "streamed") or (self.memory == "auto" and others_bytes + alone > limit):
            others_bytes = 0
        return others_bytes + weights + all_rows.working <= limit

    def _transformer_stage(self, tokens: int, kept: int, batch: int, cached: int = 0, reused: int = 0) -> Stage:
        working = transformer_bytes(self.checkpoint.transformer, tokens, self.dtype, batch, kept, cached, reused)
        return stage_of("transformer", self.transformer, self.dtype, *working)

    def _module(self, name: str, part: str) -> nn.Module:
        stage: nn.Module = getattr(self, name)
        return getattr(stage, part) if part else stage

    def _make_room(self, name: str, wanted: int, held: int) -> None:
        """Unload other stages: none, all, or as far as it takes to have so many bytes; then forget the references that
        are kept, unless they are held.
        """
        room = {"resident": math.inf, "auto": self.memory_limit}.get(self.memory, 0)
        for other in STAGES:
            if mx.get_active_memory() + wanted <= room:
                break
            if other != name and self._loaded[other]:
                self._open(other)
                mx.clear_cache()
        if not held and mx.get_active_memory() + wanted > self.memory_limit:
            self._kept = [], []

    @contextmanager
    def _reading_ahead(self) -> Iterator[None]:
        """Meanwhile read the transformer's files, which are wanted next, unless it is loaded or they leave no room."""
        stop = Event()
        if not self._loaded["transformer"]:
            files = self.checkpoint.sources["transformer"].files
            room = self.memory_limit - mx.get_active_memory()
            Thread(target=read_through, args=(files, room, stop), daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    def _bar(self, what: str, total: int, **options: Any) -> tqdm:
        return tqdm(desc=what, total=total, leave=False, disable=not self.progress, **options)

    def unload(self, stage: str | None = None) -> None:
        """Give a stage's memory back ("text_encoder", "transformer", "autoencoder"; all unless named). Its weights
        are read again when it is next needed.

        Raises:
            InputError: for an unknown stage.
        """
        if stage is not None:
            check_choice("stage", stage, STAGES)
        for name in STAGES if stage is None else (stage,):
            self._open(name)
            if name == "transformer":
                self._kept = [], []
        mx.clear_cache()

    def _open(self, stage: str) -> None:
        """Build a stage with lazy weights; those of an earlier build are given back."""
        setattr(self, stage, self._built(stage))
        self._loaded[stage] = set()

    def _built(self, stage: str) -> Any:
        """A stage's module with lazy weights."""
        dtype, how = stage_dtype(stage, self.dtype), self.quantize.get(stage)
        if stage == "autoencoder":
            return load_autoencoder(self.checkpoint, dtype)
        if stage == "text_encoder":
            return load_text_encoder(self.checkpoint, dtype, how)
        transformer = load_transformer(self.checkpoint, dtype, how)
        attach(transformer, self._beside())
        return transformer


def _masked(x: mx.array, kept: mx.array, repainted: mx.array) -> mx.array:
    """x where it is repainted, else what is kept: all (1, S, C) but repainted, (1, S, 1) in 0..1."""
    return repainted * x + (1 - repainted) * kept
