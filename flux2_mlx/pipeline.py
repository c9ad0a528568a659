"""Flux2Pipeline: from a prompt and a seed to a picture, one stage after another.

    prompt -> tokenizer -> text encoder -> prompt embeddings (B, L, 7680)
    seed -> noise (1, S, 128) -> steps of the transformer -> latents
    latents -> denormalize, unpack -> decoder -> picture

Reference: diffusers' Flux2KleinPipeline, whose argument names are accepted beside this library's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np
from PIL import Image

from .adapters.lora import Lora, check_scale, open_lora
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .conditioning.references import ReferenceEncoder
from .conditioning.text import PromptEncoder
from .conditioning.tokenizer import Qwen3Tokenizer
from .decoding import LatentDecoder
from .device import machine_memory
from .errors import InputError
from .fields import check_choice, nearest
from .generation import Generator
from .inputs import Inputs
from .models.autoencoder import AutoEncoder
from .models.flux2 import FluxKlein
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
from .quantization.spec import Quantization, options_of
from .request import Settings, image_sigmas, output_size, resolve
from .results import Result, Step
from .runtime.activations import Workload
from .runtime.plan import Plan, make_plan
from .runtime.residency import STAGES, Stages
from .runtime.stats import Stats

OWN = ("output_type", "callback_on_step_end", "return_dict")  # options of pipe(...) that stream has not
ImageLike = Image.Image | str | os.PathLike  # an image, or its file


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
        self.stages = Stages(
            checkpoint,
            dtype=dtype_of(dtype),
            quantize=quantize or {},
            memory=memory,
            memory_limit=machine_memory() if memory_limit is None else int(memory_limit),
            progress=progress,
        )
        self.tokenizer = Qwen3Tokenizer(checkpoint.tokenizer)
        self._prompts = PromptEncoder(self.stages, self.tokenizer, uses_disk=cache)
        self._decoder = LatentDecoder(self.stages, preview_decoder)
        references = ReferenceEncoder(self.stages)
        self._generator = Generator(self.stages, self._prompts, references, self._decoder, group)

    # What the stages own, under the pipeline's names.

    @property
    def checkpoint(self) -> Checkpoint:
        return self.stages.checkpoint

    @property
    def text_encoder(self) -> Qwen3TextEncoder:
        return self.stages.text_encoder

    @property
    def transformer(self) -> FluxKlein:
        return self.stages.transformer

    @property
    def autoencoder(self) -> AutoEncoder:
        return self.stages.autoencoder

    @property
    def dtype(self) -> mx.Dtype:
        return self.stages.dtype

    @property
    def quantize(self) -> Mapping[str, Quantization]:
        return self.stages.quantize

    @property
    def loras(self) -> Mapping[str, Lora]:
        return self.stages.loras

    @property
    def memory(self) -> str:
        return self.stages.memory

    @property
    def memory_limit(self) -> int:
        return self.stages.memory_limit

    @memory_limit.setter
    def memory_limit(self, limit: int) -> None:
        self.stages.memory_limit = limit

    @property
    def progress(self) -> bool:
        return self.stages.progress

    @property
    def cache(self) -> bool:
        return self._prompts.uses_disk

    @property
    def group(self) -> mx.distributed.Group | None:
        return self._generator.group

    @property
    def preview_decoder(self) -> TinyDecoder | None:
        return self._decoder.preview_decoder

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
        workload = Workload(
            height,
            width,
            max_sequence_length or self.tokenizer.default_length,
            references,
            self.checkpoint.has_kv_cache,
            caches_steps=step_cache is not None,
            frozen=reuse,
        )
        modules = self.text_encoder, self.transformer, self.autoencoder
        return make_plan(*modules, workload, dtype=self.dtype, limit=self.memory_limit, memory=self.memory)

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
        return self._prompts.encode_ahead(prompts, length)

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
        self.stages.set_loras({**self.loras, name: lora})
        return lora

    def set_lora(self, name: str, scale: float) -> None:
        """Change how much of a LoRA's change is made.

        Raises:
            InputError: for a name that is not loaded, or a scale that is none.
        """
        check_scale(scale)
        self.stages.set_loras({**self.loras, name: replace(self._lora(name), scale=float(scale))})

    def unload_lora(self, name: str | None = None) -> None:
        """Draw without a LoRA again, or without any unless it is named; the weights are what they were.

        Raises:
            InputError: for a name that is not loaded.
        """
        if name is not None:
            self._lora(name)
        self.stages.set_loras({} if name is None else {own: lora for own, lora in self.loras.items() if own != name})

    def _lora(self, name: str) -> Lora:
        if name not in self.loras:
            raise InputError(f"no LoRA {name!r} is loaded, only {', '.join(self.loras) or 'none'}")
        return self.loras[name]

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
                images.append(self._decoder.unpack(step.latents, step.settings))
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
        return self._generator.generate(request)

    def _peak(self, options: GenerationOptions, references: Sequence[tuple[int, int]]) -> int:
        """Bytes that an image needs, its size and the length of its prompt resolved."""
        return self.plan(references=references, **options.planned).peak

    def unload(self, stage: str | None = None) -> None:
        """Give a stage's memory back ("text_encoder", "transformer", "autoencoder"; all unless named). Its weights
        are read again when it is next needed.

        Raises:
            InputError: for an unknown stage.
        """
        if stage is not None:
            check_choice("stage", stage, STAGES)
        self.stages.unload(stage)
