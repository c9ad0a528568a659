"""Flux2Pipeline: from a prompt and a seed to an image, one stage after another.

    prompt -> tokenizer -> text encoder -> prompt embeddings (B, L, 7680)
    seed -> noise (1, S, 128) -> steps of the transformer -> latents
    latents -> denormalize, unpack -> decoder -> image

Reference: diffusers' Flux2KleinPipeline, whose argument names are accepted beside this library's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from inspect import signature
from operator import attrgetter
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .adapters.lora import Lora
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checks import check_prompt
from .conditioning.enhance import Enhancer
from .conditioning.references import ReferenceEncoder
from .conditioning.text import PromptEncoder
from .conditioning.tokenizer import Qwen3Tokenizer
from .decoding import LatentDecoder
from .device import machine_memory
from .dtypes import dtype_of, vae_dtype_of, with_dtype_names
from .errors import InputError
from .fields import check_choice, nearest
from .generation import Generator
from .inputs import Inputs
from .models.autoencoder import AutoEncoder
from .models.flux2 import FluxKlein
from .models.qwen3 import Qwen3TextEncoder
from .options import (
    OUTPUT_TYPES,
    BatchOptions,
    CheckpointOptions,
    GenerationOptions,
    ModelOptions,
    RuntimeOptions,
    seed_of,
)
from .quantization.spec import Quantization
from .refusals import refuse_to
from .request import resolve
from .results import Result, Step, watch
from .runtime.plan import Plan, make_plan
from .runtime.residency import STAGES, Stages
from .samplings import output_size, workload_of

CALL_OPTIONS = ("output_type", "callback_on_step_end", "return_dict")  # options of pipe(...) beside stream's
ImageLike = Image.Image | str | os.PathLike  # an image, or its file


class Flux2Pipeline:
    """A checkpoint ready to generate. Stages are loaded when first needed, and unloaded where memory is short.

    Attributes:
        stages: owns the modules and what of them is in memory; see runtime.residency.Stages.
        checkpoint: the checkpoint of the weights.
        text_encoder, transformer, autoencoder: the modules, which an unloading replaces; do not keep them.
        dtype, vae_dtype: the transformer's dtype and the autoencoder's; see device.stage_dtype for the text encoder's.
        quantize: how each stage's matrices are packed that the checkpoint holds dense.
        memory: what stays loaded: "resident" (everything), "staged" (the stage at work), "streamed" (of text encoder
            and transformer the block at work), or "auto" (what fits).
        memory_limit: bytes that loaded stages and their activations may take together.
        group: the two processes that share the two passes of CFG, if any.
        loras: those that are loaded, by name; see load_lora.
        tokenizer: Qwen3's tokenizer with the chat template.
        enhance: writes a short prompt out, pipe.enhance("a red fox"); see conditioning.enhance.Enhancer.
        preview_decoder: TAEF2 for Step.preview, if its weights were given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str | mx.Dtype | None = None,
        vae_dtype: str | mx.Dtype | None = None,
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
            raise InputError(f"CFG has two passes to share, and the group has {group.size()} processes")
        self.stages = Stages(
            checkpoint,
            dtype=dtype_of(dtype),
            vae_dtype=vae_dtype_of(vae_dtype),
            quantize=quantize or {},
            memory=memory,
            memory_limit=machine_memory() if memory_limit is None else int(memory_limit),
            progress=progress,
        )
        self.tokenizer = Qwen3Tokenizer(checkpoint.tokenizer, checkpoint.text_encoder.max_tokens)
        self.group = group
        self.enhance = Enhancer(self.stages, self.tokenizer, uses_disk=cache)
        self._prompts = PromptEncoder(self.stages, self.tokenizer, uses_disk=cache)
        self._decoder = LatentDecoder(self.stages, preview_decoder)
        self.preview_decoder = self._decoder.preview_decoder
        encoders = self.enhance, self._prompts, ReferenceEncoder(self.stages)
        self._generator = Generator(self.stages, *encoders, self._decoder, group)

    # Attributes of the stages, which the pipeline has too.
    checkpoint = property(attrgetter("stages.checkpoint"))
    dtype = property(attrgetter("stages.dtype"))
    vae_dtype = property(attrgetter("stages.vae_dtype"))
    quantize = property(attrgetter("stages.quantize"))
    memory = property(attrgetter("stages.memory"))
    loras = property(attrgetter("stages.loras"))

    @property
    def text_encoder(self) -> Qwen3TextEncoder:
        return self.stages.text_encoder

    @property
    def transformer(self) -> FluxKlein:
        return self.stages.transformer

    @property
    def autoencoder(self) -> AutoEncoder:
        return self.stages.autoencoder

    memory_limit = property(
        lambda self: self.stages.memory_limit, lambda self, limit: setattr(self.stages, "memory_limit", limit)
    )

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
        vae_dtype: str | mx.Dtype | None = None,
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
            model: a released name, "nano" (the miniature in this package), a folder in the diffusers layout or as mflux
                saves one, a safetensors or GGUF file with a transformer, a Hub id, or "owner/name/file" there.
            revision: branch, tag or commit on the Hub.
            transformer, text_encoder, vae: in place of the model's own: a file, a folder, a Hub id, "owner/name/file".
                The text encoder may be "small": Qwen3-0.6B and its adapter, for the 4B models.
            tokenizer: a folder with tokenizer.json.
            distilled: whether the transformer is for few steps without CFG, where the model does not say it.
            kv_cache: whether it was trained to cache its references, as klein-9b-kv, where the model does not say it.
            dtype: "bfloat16", "float16" or "float32"; None takes what suits the machine.
            vae_dtype: the autoencoder's, "float32" or "bfloat16"; None takes float32 on a GPU, see device.stage_dtype.
            quantize: quantize the dense matrices to this many bits (2, 3, 4, 5, 6, 8) or a format ("mxfp4",
                "mxfp8", "nvfp4"); below 8 bits the most sensitive layers get a third of a bit a weight more at most.
            quantize_text_encoder: the same for the text encoder, where it is to differ; "none" leaves it.
            group_size: weights that share a scale, of bits: 32, 64 or 128; None takes 64.
            cache: keep prompt embeddings on disk (at most 1 GB); False for weights that are changed by hand.
            memory, memory_limit: see Flux2Pipeline; a limit of None takes what the machine has now.
            group: two processes, from mx.distributed.init, that generate the same and share the two passes of CFG.
            preview_decoder: TAEF2's weights for Step.preview, a safetensors file or "owner/name/file" on the Hub.
            progress: show bars on standard error while weights are read and images generated.
            torch_dtype: diffusers' name for dtype; torch's own dtypes are understood.

        Raises:
            CheckpointError: for a checkpoint that cannot be used, with the way out.
            InputError: for an unknown dtype or memory, a limit that is none, or a group of other than two.
        """
        given = with_dtype_names(locals())
        options, runtime = CheckpointOptions.collect(given), RuntimeOptions.collect(given)
        quantization = options.quantization()  # refuses bad values before anything is downloaded
        checkpoint = open_checkpoint(**options.source)
        dtypes: dict[str, Any] = {"dtype": options.dtype, "vae_dtype": options.vae_dtype}
        return cls(checkpoint, quantize=quantization, group=group, **dtypes, **vars(runtime))

    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        references: Sequence[tuple[int, int]] = (),
        step_cache: float | None = None,
        reuse: str | None = None,
        hires: float | None = None,
        hires_tile: int | None = None,
        region: Sequence[str] = (),
        enhance: bool = False,
    ) -> Plan:
        """The memory plan of one image, with the mode that "auto" chooses; nothing is loaded.

        Args:
            height, width, max_sequence_length, step_cache, reuse, hires, hires_tile, region, enhance: see stream.
            references: (height, width) of each reference image, as it is encoded: at most a megapixel.

        Raises:
            InputError: for a size or a length that cannot be.
        """
        options, side = GenerationOptions.collect(locals()), self.checkpoint.autoencoder.sample_size
        size, length = output_size(height, width, references, side, hires), self.tokenizer.length(max_sequence_length)
        workload = workload_of(options, size, length, references, side, has_kv_cache=self.checkpoint.has_kv_cache)
        modules = self.text_encoder, self.transformer, self.autoencoder
        writer = self.enhance.language_model() if enhance else None
        return make_plan(*modules, workload, writer, dtype=self.dtype, limit=self.memory_limit, memory=self.memory)

    def encode(self, prompts: Sequence[str], max_sequence_length: int | None = None) -> list[mx.array]:
        """Encode prompts of calls to come, negative ones too, which then need no text encoder: (1, L, D) each, kept
        until the next call of this.

        Args:
            max_sequence_length: as ``stream`` takes it.

        Raises:
            InputError: for what is no prompt, or a length that cannot be.
        """
        GenerationOptions(max_sequence_length=max_sequence_length)
        length = self.tokenizer.length(max_sequence_length)
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
        """Load a LoRA (LoKr, LoHa, DoRA) beside those that are loaded; images to come are generated with it.

        Args:
            where: a safetensors file, a folder with one, a Hub id, or "owner/name/file".
            name: its name for set_lora and unload_lora; None takes ``where``.
            scale: its strength.
            merge: fuse it into the transformer's weights, which then are read again, instead of a product of its own
                in every layer: steps take no longer, but a change of scale does. Packed weights are left alone.
            partial: load a file that fits only in part, without its other keys, instead of refusing it.

        Raises:
            CheckpointError: for a file that does not fit, naming its keys, or fusing into weights that are packed.
            InputError: for a name that is taken, or a scale that is none.
        """
        where = os.fspath(where)
        return self.stages.load_lora(where, where if name is None else name, scale, merge=merge, partial=partial)

    def set_lora(self, name: str, scale: float) -> None:
        """Change the scale (strength) of a LoRA.

        Raises:
            InputError: for a name that is not loaded, or a scale that is none.
        """
        self.stages.scale_lora(name, scale)

    def unload_lora(self, name: str | None = None) -> None:
        """Generate without a LoRA again, or without any unless it is named; the weights are what they were.

        Raises:
            InputError: for a name that is not loaded.
        """
        self.stages.unload_lora(name)

    # ------------------------------------------------------------------------------------------------ generating

    @property
    def options(self) -> ModelOptions:
        """The model's options, as they go into images' settings."""
        return ModelOptions.of(self.stages)

    to = refuse_to

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
            TypeError: for an unknown option.
            FloatingPointError, DeviceError: where latents are not finite, or the GPU or memory gives out.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        known = list(signature(type(self).stream).parameters)[2:]
        for name in options.keys() - known:
            raise TypeError(f"pipe(...) has no option {name!r}{nearest(name, [*known, *CALL_OPTIONS])}")
        steps = self.stream(prompt, **options)
        if callback_on_step_end is not None:
            steps = watch(steps, partial(callback_on_step_end, self))
        result = Result.collect(steps, output_type)
        return result if return_dict else (result.images,)  # type: ignore[return-value]  # the caller asked for the tuple

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str = "",
        region: Sequence[str] = (),
        image: ImageLike | Sequence[ImageLike] | None = None,
        reference_strength: Sequence[float] = (),
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        force_guidance: bool = False,
        step_cache: float | None = None,
        reuse: str | None = None,
        hires: float | None = None,
        hires_strength: float | None = None,
        hires_tile: int | None = None,
        seed: int | None = None,
        num_images: int | None = None,
        enhance: bool = False,
        enhance_seed: int | None = None,
        batch_size: int | None = None,
        schedule: str = "flux2",
        sigmas: Sequence[float] | None = None,
        noise: str = "torch",
        max_sequence_length: int | None = None,
        init_image: ImageLike | None = None,
        init_latents: mx.array | np.ndarray | None = None,
        strength: float | None = None,
        mask: ImageLike | None = None,
        mask_blur: float = 0.0,
        mask_padding: int | None = None,
        expand: Mapping[str, int] | None = None,
        color_match: bool = False,
        edit_composite: float | None = None,
        prompt_embeds: mx.array | None = None,
        latents: mx.array | np.ndarray | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int | None = None,
        generator: Any = None,
    ) -> Iterator[Step]:
        """Generate images, and yield every step, so that a caller can preview, stop, save or time; those of images that
        share a pass in turn. Arguments are checked at once; the work begins with the first step asked for.

        Args:
            prompt: one or several; each is encoded once.
            negative_prompt: what CFG steers away from.
            region: prompts for parts of the image, each "PROMPT@left,top,right,bottom" in shares of its sides.
            image: reference images, as diffusers takes them, or their files; so are init_image and mask.
            reference_strength: of each image in turn, from 0, which leaves it out, to 2; 1 where none is given.
            height, width: in pixels, multiples of 16, from 64 up to 4 megapixels, with hires 8; None takes the first
                reference's (of one side given, the other by its aspect), or what the checkpoint is for, mostly 1024.
            num_steps: None takes 4 for distilled models and 50 for base models.
            guidance: CFG's scale, None takes 4.0 for base models; distilled models ignore it.
            guidance_interval: noise levels (low, high) between which CFG applies; None for all.
            guidance_rescale: CFG rescale against oversaturation, from 0 (none) to 1 (full); see apply_cfg.
            force_guidance: apply CFG to a distilled model, too.
            step_cache: First Block Cache, for tens of steps: those that differ by less, as 0.1, are one block long.
            reuse: "text" or "references", whose keys and values later steps take from the first (distilled models).
            hires: hires fix: generate the image this much smaller first, from above 1 to 4, enlarge its latents, and
                denoise them at the full size. An init_image takes the small one's place, and gives the size.
            hires_strength: denoising strength of that second pass, None takes 0.5; see strength.
            hires_tile: most pixels a side of the tiles it is computed in; None for tiles beyond 4 megapixels alone.
            seed: the first image's seed, the k-th has seed + k; random unless given.
            num_images: images of each prompt.
            enhance, enhance_seed: write prompts out before, with references or a mask as edits; see pipe.enhance.
            batch_size: the most images in a pass, where memory allows; None: one, of a streamed transformer what fits.
            schedule: noise schedule, "flux2" (the official one), "linear", "comfy" or "power".
            sigmas: a noise schedule of your own instead, shifted as diffusers does.
            noise: "torch" equals torch's CPU generator; "mlx" takes mx.random.
            max_sequence_length: tokens that a prompt is padded or cut to; None takes 512, or the tokenizer's most.
            init_image: img2img: the image to start from, noised. Its size is the default before the first reference's;
                to another size it is scaled and cropped, never stretched.
            init_latents: in place of an init_image: (B, H/8, W/8, 32) as output_type="latent" and Step.unpacked() give
                them, one or one for each image; nothing is encoded. To another size they are scaled (bicubic).
            strength: denoising strength; 1 keeps nothing of the init_image. None takes 0.75 (with a mask 1, with fewer
                than 4 steps less). Of n steps the first n - n * strength are left out, rounded down as in diffusers.
            mask: inpainting: white is generated anew, black comes back as it was, grey is blended; "alpha" for what is
                transparent in the init_image, which the transformer sees as the first reference, as in diffusers. The
                result has the init_image's own size, whatever height and width it is generated at.
            mask_blur: radius, in the init_image's pixels, of a Gaussian blur of the mask.
            mask_padding: inpaint a crop around the mask with this margin, at full resolution, and paste it back.
            expand: outpainting: pixels to add to the init_image at "left", "top", "right" and "bottom".
            color_match: have colours follow the first reference's where the edit changed nothing, in finished images.
            edit_composite: bring its pixels back there; more than this share of a channel's range, as 0.1, is the
                edit's. A mask says where the edit is, in place of the one that is found, which Result.masks has.
            prompt_embeds: (B, L, D) in place of prompts.
            latents: (B, 128, H/16, W/16) in diffusers' order, or (B, S, 128), in place of noise.
            num_inference_steps, guidance_scale, num_images_per_prompt, generator: diffusers' names.

        Yields:
            Step: num_steps of them for each image, fewer from an init_image and a strength below 1; with hires both.

        Raises:
            InputError: for a value that cannot be used.
            FloatingPointError, DeviceError: where latents are not finite, or the GPU or memory gives out.
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
            peak=lambda own, references: self.plan(references=references, **own.planned).peak,
            shares_cfg=self.group is not None,
        )
        return self._generator.generate(request)

    def unload(self, stage: str | None = None) -> None:
        """Give a stage's memory back ("text_encoder", "transformer", "autoencoder"; all unless named). Its weights
        are read again when it is next needed.

        Raises:
            InputError: for an unknown stage.
        """
        if stage is not None:
            check_choice("stage", stage, STAGES)
        self.stages.unload(stage)
