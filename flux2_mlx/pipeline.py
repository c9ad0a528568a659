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
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ._version import __version__
from .adapters.lora import Lora, attach, attached, check_scale, merging, open_lora
from .checkpoints.checkpoint import (
    Checkpoint,
    load_autoencoder,
    load_preview_decoder,
    load_text_encoder,
    load_transformer,
    materialize,
    open_checkpoint,
    read_through,
    to_be_converted,
)
from .conditioning.tokenizer import Qwen3Tokenizer
from .disk_cache import read_prompt, write_prompt
from .imaging.files import init_array, reference_array, reference_size, to_pil, to_unit
from .imaging.inpaint import MAX_MARGIN, Repainting, check_expand, repainting_of
from .imaging.preview import preview_map, preview_of
from .models.autoencoder import AutoEncoder
from .models.config import CheckpointError, InputError
from .models.first_block_cache import StepCache
from .models.flux2 import FluxKlein, Kept, Reuse
from .models.qwen3 import Qwen3TextEncoder
from .models.taef2 import TinyDecoder
from .quantization.layers import Quantization, options_of, parse_options, tune
from .runtime.activations import (
    decoder_bytes,
    default_dtype,
    encoder_bytes,
    kept_bytes,
    machine_memory,
    preview_bytes,
    reused_tokens,
    stage_dtype,
    text_encoder_bytes,
    transformer_bytes,
    weight_bytes,
    weights_of,
    wired,
    within,
)
from .runtime.plan import MODES, Plan, Stage, make_plan, stage_of
from .runtime.streaming import is_streamed, stream
from .sampling.latents import (
    NOISES,
    PIXELS_PER_TOKEN,
    image_ids,
    initial_noise,
    pack_channels_first,
    pack_latents,
    text_ids,
    unpack_latents,
)
from .sampling.samplers import SCHEDULES, check_sigmas, custom_sigmas, euler_step, guide, noised, schedule_sigmas

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
STAGES = ("text_encoder", "transformer", "autoencoder")
OUTPUT_TYPES = ("pil", "np", "latent")
# What a call may be given that no file carries, and the command's option for it.
INPUTS = {"image": "--image", "init_image": "--init-image", "mask": "--mask", "prompt_embeds": "", "latents": ""}
STRENGTH = 0.75  # of an init image without a mask, unless given, or less where the steps are fewer than four
MIN_SIDE = 64
MAX_PIXELS = 4 * 1024 * 1024
MAX_STEPS = 1000  # noise levels that the models were trained on
MAX_POSITIONS = 40960  # of Qwen3
MAX_IMAGES = 10_000
MAX_GUIDANCE = 100
REUSED = ("text", "references")
TENS_OF_STEPS = 10  # from which on a step may be near enough to the one before


# Of the passes of a step: its only one or the prompt's, and in turn with it the negative prompt's.
Caches = tuple[StepCache | None, StepCache | None]


@dataclass(frozen=True)
class Settings:
    """What decides one picture; written into its file and read back by ``--from-image``.

    ``inputs`` names what the call was given besides (of INPUTS), which no file carries.
    """

    prompt: str
    model: str
    seed: int
    width: int
    height: int
    num_steps: int
    guidance: float
    schedule: str
    noise: str
    dtype: str
    max_sequence_length: int
    negative_prompt: str = ""
    sigmas: tuple[float, ...] | None = None
    revision: str | None = None
    transformer: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    distilled: bool | None = None
    kv_cache: bool | None = None
    lora: tuple[str, ...] = ()
    lora_merge: bool = False
    lora_partial: bool = False
    quantize: int | str | None = None
    quantize_text_encoder: int | str | None = None
    group_size: int | None = None
    strength: float | None = None
    guidance_interval: tuple[float, ...] | None = None
    guidance_rescale: float = 0.0
    force_guidance: bool = False
    step_cache: float | None = None
    reuse: str | None = None
    mask_blur: float = 0.0
    mask_padding: int | None = None
    expand: Mapping[str, int] | None = field(default=None, hash=False)
    inputs: tuple[str, ...] = ()
    version: str = __version__

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], given: Sequence[str] = ()) -> Settings:
        """The settings that ``metadata`` gave, as read from a picture's file.

        Args:
            given: which of the inputs the caller has again.

        Raises:
            InputError: for a setting that is missing or of the wrong kind, and for a picture that needs more than its
                settings to be drawn again.
        """
        defaults = {field.name: None if field.default is MISSING else field.default for field in fields(cls)}
        values: dict[str, Any] = {name: metadata.get(name, default) for name, default in defaults.items()}
        for name in ("sigmas", "guidance_interval", "inputs", "lora"):  # JSON has no tuples
            values[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
        number, optional = (int, float), type(None)
        kinds: dict[str, Any] = {"seed": int, "width": int, "height": int, "num_steps": int, "max_sequence_length": int}
        kinds |= {"guidance": number, "sigmas": (tuple, optional), "inputs": tuple, "distilled": (bool, optional)}
        kinds |= {"kv_cache": (bool, optional), "lora": tuple, "lora_merge": bool, "lora_partial": bool}
        kinds |= {"strength": (*number, optional), "guidance_interval": (tuple, optional), "guidance_rescale": number}
        kinds |= {
            "force_guidance": bool,
            "step_cache": (*number, optional),
            "reuse": (str, optional),
            "mask_blur": number,
            "mask_padding": (int, optional),
        }
        kinds |= {"expand": (Mapping, optional)}
        kinds |= dict.fromkeys(("revision", "transformer", "text_encoder", "vae", "tokenizer"), (str, optional))
        kinds |= dict.fromkeys(("quantize", "quantize_text_encoder", "group_size"), (int, str, optional))
        wrong = [name for name, value in values.items() if not isinstance(value, kinds.get(name, str))]
        for name in ("sigmas", "guidance_interval") if not wrong else ():
            if not all(isinstance(value, number) for value in values[name] or ()):
                wrong = [name]
        if wrong:
            raise InputError(f"the picture's settings cannot be read: {', '.join(wrong)}")
        absent = [str(name) for name in values["inputs"] if name not in given]
        if absent:
            options = [INPUTS.get(name, "") for name in absent]
            way_out = f"; give it again ({', '.join(options)})" if all(options) else ", and cannot be repeated"
            raise InputError(f"the picture was drawn from more than its file carries ({', '.join(absent)}){way_out}")
        return cls(**values)

    def metadata(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    def parameters(self) -> str:
        """The settings in the "parameters" form that other tools read; of a folder it names the last part alone."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        schedule = self.schedule if self.sigmas is None else "custom"
        lines.append(
            f"Steps: {self.num_steps}, Sampler: Euler, Schedule type: {schedule}, CFG scale: {self.guidance:g}, "
            f"Seed: {self.seed}, Size: {self.width}x{self.height}, Model: {Path(self.transformer or self.model).name}, "
            f"Version: flux2_mlx {self.version}"
        )
        return "\n".join(lines)


@dataclass
class Stats:
    """Seconds, and peak bytes of MLX arrays (weights included), of each part of a run.

    Parts: "load" (weights into memory), "text_encoder", "references", "denoise", "decode", and "preview", where a
    preview decoder draws.

    Attributes:
        steps: numbers of the pictures' steps that were "computed", and that "reused" earlier ones; see step_cache.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=lambda: {"computed": 0, "reused": 0})

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        mx.reset_peak_memory()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            self.peak_bytes[part] = max(self.peak_bytes.get(part, 0), mx.get_peak_memory())


@dataclass(frozen=True)
class Step:
    """One finished step of one picture.

    Attributes:
        image: which picture of the run, from 0.
        index: steps done, 1 to settings.num_steps.
        sigma: the noise level that is left, 0 after the last step.
        latents: (1, S, 128) tokens at that level, float32.
        denoised: (1, S, 128) the picture as this step foresees it; equals latents after the last step.
        settings: of this picture.
        stats: of the run so far.
    """

    image: int
    index: int
    sigma: float
    latents: mx.array
    denoised: mx.array
    settings: Settings
    stats: Stats
    _decode: Callable[[mx.array, Settings, Stats], mx.array] = field(repr=False)
    _preview: Callable[[mx.array, Settings, Stats], Image.Image] = field(repr=False)
    _repainting: Repainting | None = field(repr=False)

    @property
    def is_last(self) -> bool:
        return self.index == self.settings.num_steps

    def array(self) -> np.ndarray:
        """The foreseen picture, decoded: (H, W, 3) float32 in 0..1; what a mask was given with is of its own size.

        Decoding may unload the transformer, see ``Flux2Pipeline.memory``; the next step loads it again.

        Raises:
            FloatingPointError: where the decoder's output is not finite.
        """
        if self._repainting is not None:
            return np.asarray(self.picture(), np.float32) / 255
        return np.array(self._decode(self.denoised, self.settings, self.stats)[0])

    def picture(self) -> Image.Image:
        """The foreseen picture, decoded to 8-bit RGB; see ``array``."""
        return self._pasted(to_pil(np.array(self._decode(self.denoised, self.settings, self.stats)[0])))

    def preview(self) -> Image.Image:
        """The foreseen picture without the decoder: an eighth of the resolution, enlarged, or by preview_decoder."""
        return self._pasted(self._preview(self.denoised, self.settings, self.stats))

    def _pasted(self, drawn: Image.Image) -> Image.Image:
        return drawn if self._repainting is None else self._repainting.paste(drawn)


@dataclass(frozen=True)
class Result:
    """Finished pictures.

    Attributes:
        images: PIL pictures; (B, H, W, 3) float32 in 0..1 for output_type "np"; (B, H/8, W/8, 32) decoder input for
            "latent".
        settings: one a picture, prompt by prompt.
        seconds, peak_bytes: of each part; see Stats.
        steps: how many were "computed", and how many "reused" earlier ones; see Stats.
    """

    images: Any
    settings: list[Settings]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    steps: dict[str, int]

    @property
    def seeds(self) -> list[int]:
        return [settings.seed for settings in self.settings]


@dataclass(frozen=True)
class _Run:
    """A validated call: one Settings a picture, and what the pictures share."""

    pictures: list[Settings]
    sigmas: list[float]
    prompt_embeds: list[mx.array] | None  # one (1, L, D) a picture
    latents: list[mx.array] | None  # one (1, S, C) a picture
    references: list[mx.array]  # (1, H, W, 3)
    init: mx.array | None  # (1, H, W, 3)
    repainting: Repainting | None
    repainted: mx.array | None  # (1, S, 1), how much of each token
    start: int  # the first step that is done
    uses_guidance: bool
    batch_size: int | None


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
        _check_memory(memory, memory_limit)
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

        Raises:
            CheckpointError: for a checkpoint that cannot be used, with the way out.
            InputError: for an unknown dtype or memory, a limit that is none, or a group of other than two.
        """
        dtype_of(dtype)  # refused before anything is downloaded
        _check_memory(memory, memory_limit)
        packed = parse_options(quantize, quantize_text_encoder, group_size)
        checkpoint = open_checkpoint(
            model,
            revision=revision,
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
            tokenizer=tokenizer,
            distilled=distilled,
            kv_cache=kv_cache,
        )
        return cls(
            checkpoint,
            dtype=dtype,
            quantize=packed,
            cache=cache,
            memory=memory,
            memory_limit=memory_limit,
            group=group,
            preview_decoder=preview_decoder,
            progress=progress,
        )

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
        if max_sequence_length is not None:
            _between("max_sequence_length", max_sequence_length, 1, MAX_POSITIONS)
        height, width = drawn_size(height, width, references, self.checkpoint.autoencoder.sample_size)
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
        _between("max_sequence_length", length, 1, MAX_POSITIONS)
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

    def __call__(
        self, prompt: str | Sequence[str] | None = None, *, output_type: str = "pil", **options: Any
    ) -> Result:
        """Draw pictures.

        Args:
            prompt: one or several.
            output_type: "pil"; "np" for float32 arrays in 0..1; "latent" for what the decoder takes.
            options: those of ``stream``.

        Raises:
            InputError: for a value that cannot be used.
            FloatingPointError: where the latents stop being finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        images: list[Any] = []
        settings: list[Settings] = []
        stats = Stats()
        for step in self.stream(prompt, **options):
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
        return Result(joined, settings, stats.seconds, stats.peak_bytes, stats.steps)

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str = "",
        image: Image.Image | Sequence[Image.Image] | None = None,
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
        init_image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | str | None = None,
        mask_blur: float = 0.0,
        mask_padding: int | None = None,
        expand: Mapping[str, int] | None = None,
        prompt_embeds: mx.array | None = None,
        latents: mx.array | np.ndarray | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int | None = None,
    ) -> Iterator[Step]:
        """Draw pictures, and yield every step, so that a caller can preview, stop, save or time. Pictures that share a
        pass through the transformer are yielded in turn, step by step.

        Arguments are checked at once; the work begins with the first step asked for.

        Args:
            prompt: one or several; each is encoded once, and not again while the last call's are kept.
            negative_prompt: what guidance leads away from.
            image: reference pictures, as diffusers takes them.
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

        Yields:
            Step, num_steps a picture, with an init_image those that are done.

        Raises:
            InputError: for a value that cannot be used.
            FloatingPointError: where the latents stop being finite.
        """
        num_steps = _either("num_steps", num_steps, "num_inference_steps", num_inference_steps)
        guidance = _either("guidance", guidance, "guidance_scale", guidance_scale)
        num_images = _either("num_images", num_images, "num_images_per_prompt", num_images_per_prompt)
        run = self._validate(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            height=height,
            width=width,
            num_steps=num_steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            force_guidance=force_guidance,
            step_cache=step_cache,
            reuse=reuse,
            seed=seed,
            num_images=1 if num_images is None else num_images,
            batch_size=batch_size,
            schedule=schedule,
            sigmas=sigmas,
            noise=noise,
            max_sequence_length=max_sequence_length,
            init_image=init_image,
            strength=strength,
            mask=mask,
            mask_blur=mask_blur,
            mask_padding=mask_padding,
            expand=expand,
            prompt_embeds=prompt_embeds,
            latents=latents,
        )
        return self._drawn(run)

    def _validate(
        self,
        *,
        prompt: str | Sequence[str] | None,
        negative_prompt: str,
        image: Image.Image | Sequence[Image.Image] | None,
        height: int | None,
        width: int | None,
        num_steps: int | None,
        guidance: float | None,
        guidance_interval: tuple[float, float] | None,
        guidance_rescale: float,
        force_guidance: bool,
        step_cache: float | None,
        reuse: str | None,
        seed: int | None,
        num_images: int,
        batch_size: int | None,
        schedule: str,
        sigmas: Sequence[float] | None,
        noise: str,
        max_sequence_length: int | None,
        init_image: Image.Image | None,
        strength: float | None,
        mask: Image.Image | str | None,
        mask_blur: float,
        mask_padding: int | None,
        expand: Mapping[str, int] | None,
        prompt_embeds: mx.array | None,
        latents: mx.array | np.ndarray | None,
    ) -> _Run:
        """Check a call's arguments and fill in the defaults; nothing is computed yet."""
        distilled, params = self.checkpoint.is_distilled, self.checkpoint.transformer
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("give either prompt or prompt_embeds")
        if prompt_embeds is not None:
            prompt_embeds = _array("prompt_embeds", prompt_embeds)
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != params.txt_embed_dim:
                raise InputError(f"prompt_embeds must be (B, L, {params.txt_embed_dim}), got {prompt_embeds.shape}")
            max_sequence_length = prompt_embeds.shape[1]
            prompts = [""] * prompt_embeds.shape[0]
        else:
            prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [cast(str, prompt)]
        if not prompts:
            raise InputError("prompt must be a string or a non-empty list of strings, got an empty list")
        for text in [*prompts, negative_prompt]:
            check_prompt(text)
        is_seeded = seed is not None
        seed = secrets.randbelow(2**32) if seed is None else seed
        check_options(
            height=height,
            width=width,
            num_steps=num_steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            step_cache=step_cache,
            reuse=reuse,
            seed=seed,
            num_images=num_images,
            batch_size=batch_size,
            schedule=schedule,
            sigmas=sigmas,
            noise=noise,
            max_sequence_length=max_sequence_length,
            strength=strength,
            mask_blur=mask_blur,
            mask_padding=mask_padding,
            expand=expand,
        )
        pictures: list[Any] = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        repainting = repainting_of(init_image, mask, mask_blur, mask_padding, expand)
        references = [reference_array(picture) for picture in pictures]
        sizes = [(picture.shape[1], picture.shape[2]) for picture in references]
        begun = init_image if repainting is None else repainting.picture
        models = [*([] if begun is None else [reference_size(begun)]), *sizes]
        height, width = drawn_size(height, width, models, self.checkpoint.autoencoder.sample_size)
        if repainting is not None:
            repainting.check_aspect(height, width)
            sizes = [(height, width), *sizes]
        guidance = usual_guidance(distilled) if guidance is None else guidance
        if max_sequence_length is None:
            max_sequence_length = self.tokenizer.default_length
        if references:
            needed = 0 if repainting is None else 1
            self._check_room(height, width, max_sequence_length, sizes, needed, step_cache, reuse)
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        levels = noise_levels(distilled, tokens, num_steps, schedule, sigmas)
        if distilled and guidance > 1 and not force_guidance:
            warnings.warn(
                f"{self.checkpoint.name} is distilled and draws without guidance; guidance {guidance:g} is ignored "
                "(force_guidance, --force-guidance apply it)",
                stacklevel=3,
            )
            guidance = 1.0
        if reuse is not None:
            self._check_reuse(reuse, guidance, has_references=bool(sizes))

        if self.group is not None and not is_seeded:
            raise InputError("two processes that share the passes of guidance need the same seed, and none is given")
        if self.group is not None and guidance <= 1:
            raise InputError(
                "two processes share the passes of guidance, and there is none; they can share pictures: --jobs FILE"
            )

        total = len(prompts) * num_images
        start = 0
        if init_image is not None:
            usual = usual_strength(len(levels) - 1, repaints=repainting is not None)
            strength = usual if strength is None else float(strength)
            start = first_step(strength, len(levels) - 1)
        elif strength is not None:
            raise InputError("strength belongs to init_image, and none is given")
        if guidance > 1 and guidance_interval is not None:
            low, high = guidance_interval
            if not any(low <= sigma <= high for sigma in levels[start:-1]):
                told = ", ".join(f"{sigma:.3g}" for sigma in levels[start:-1][:8])
                warnings.warn(f"no noise level is in guidance_interval: {told}; there is no guidance", stacklevel=3)
        done = len(levels) - 1 - start
        if step_cache and done < TENS_OF_STEPS:
            warnings.warn(
                f"step_cache is for tens of steps: of {done}, each differs much from the one before, so that few "
                "are reused, or the picture becomes another",
                stacklevel=3,
            )
        given_inputs: dict[str, Any] = {"image": image, "init_image": init_image, "mask": mask}
        given_inputs |= {"prompt_embeds": prompt_embeds, "latents": latents}
        settings = [
            Settings(
                prompt=prompts[k // num_images],
                model=self.checkpoint.name,
                seed=int(seed) + k,
                width=int(width),
                height=int(height),
                num_steps=len(levels) - 1,
                guidance=float(guidance),
                schedule=schedule,
                noise=noise,
                dtype=_dtype_name(self.dtype),
                max_sequence_length=int(max_sequence_length),
                negative_prompt=negative_prompt,
                sigmas=None if sigmas is None else tuple(float(s) for s in sigmas),
                revision=self.checkpoint.revision,
                strength=strength,
                guidance_interval=None if guidance_interval is None else tuple(map(float, guidance_interval)),
                guidance_rescale=float(guidance_rescale),
                force_guidance=bool(force_guidance),
                step_cache=None if step_cache is None else float(step_cache),
                reuse=reuse,
                mask_blur=float(mask_blur),
                mask_padding=None if mask_padding is None else int(mask_padding),
                expand=None if expand is None else {side: int(pixels) for side, pixels in expand.items()},
                inputs=tuple(name for name, value in given_inputs.items() if value is not None),
                lora=tuple(map(str, self.loras.values())),
                lora_merge=any(lora.merge for lora in self.loras.values()),
                lora_partial=any(lora.partial for lora in self.loras.values()),
                **self.checkpoint.options,
                **options_of(self.quantize),
            )
            for k in range(total)
        ]
        given = None
        if latents is not None:
            given = _given_latents(_array("latents", latents), total, height, width, params.in_channels)
        embeds = None
        if prompt_embeds is not None:
            embeds = [prompt_embeds[k // num_images][None] for k in range(total)]
        init = repainted = None
        if repainting is not None:
            init, repainted = repainting.array((height, width)), repainting.tokens((height, width))
        elif init_image is not None:
            init = init_array(init_image, (height, width))
        return _Run(
            settings,
            levels,
            embeds,
            given,
            references,
            init,
            repainting,
            repainted,
            start,
            uses_guidance=guidance > 1,
            batch_size=batch_size,
        )

    def _check_room(
        self,
        height: int,
        width: int,
        length: int,
        references: Sequence[tuple[int, int]],
        needed: int,
        step_cache: float | None,
        reuse: str | None,
    ) -> None:
        """Refuse more references than there is memory for. A picture that is itself too large, or with the first ones
        that it cannot do without, is warned of later.

        Raises:
            InputError: with the number that fits.
        """

        def peak(count: int) -> int:
            return self.plan(height, width, length, references[:count], step_cache, reuse).peak

        wanted = peak(len(references))
        if wanted <= self.memory_limit:
            return
        fitting = [count for count in range(needed, len(references)) if peak(count) <= self.memory_limit]
        if fitting:
            raise InputError(
                f"{len(references) - needed} references and a picture of {width} x {height} need about "
                f"{wanted / 1e9:.2f} GB of memory, and there are {self.memory_limit / 1e9:.2f}; the first "
                f"{fitting[-1] - needed} fit"
            )

    def _check_reuse(self, reuse: str, guidance: float, *, has_references: bool) -> None:
        """Refuse to reuse what this model, or this call, does not have, or would lose too much by.

        Raises:
            InputError: with the reason.
        """
        name = self.checkpoint.name
        if not self.checkpoint.is_distilled:
            raise InputError(
                f"reuse is for the few steps of distilled models, and {name} is a base model, whose many steps have "
                "step_cache (--step-cache)"
            )
        if guidance > 1:
            raise InputError(f"reuse is for distilled models without guidance, and guidance is {guidance:g}")
        if reuse == "references" and not has_references:
            raise InputError("reuse of references belongs to image (--image), and none is given")
        if self.checkpoint.has_kv_cache and has_references:
            more = "" if reuse == "references" else ", and reuse of the text beside them costs too much of the picture"
            raise InputError(f"{name} keeps its references already, as klein-9b-kv does{more}")

    def _drawn(self, run: _Run) -> Iterator[Step]:
        with wired(self.memory_limit):
            try:
                yield from self._steps(run)
            except GeneratorExit:  # the caller stops before the end: give back what the steps worked on
                mx.clear_cache()
                raise

    def _steps(self, run: _Run) -> Iterator[Step]:
        """Encode, then draw picture after picture."""
        stats = Stats()
        first = run.pictures[0]
        prompts = [] if run.prompt_embeds else [settings.prompt for settings in run.pictures]
        negative = [first.negative_prompt] if run.uses_guidance else []
        encoded = self._encode([*prompts, *negative], first.max_sequence_length, stats)
        given = [*run.references, *([] if run.init is None else [run.init])]
        references = self._encode_pictures(given, stats)
        sizes = [(pixels.shape[1], pixels.shape[2]) for pixels in run.references]
        init = None if run.init is None else references.pop().astype(mx.float32)
        if init is not None and run.repainting is not None:
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
        two_passes = run.uses_guidance and self.group is None
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

        sigmas = run.sigmas[run.start :]
        low, high = first.guidance_interval or (0, 1)
        self._prepare("transformer", "", stats, *working, held=held)  # before the bar of the steps, for its own
        with self._bar("drawing", len(run.pictures) * (len(sigmas) - 1), unit="step") as bar:
            for start in range(0, len(run.pictures), count):
                pictures = list(enumerate(run.pictures))[start : start + count]
                txt = mx.concatenate(
                    [run.prompt_embeds[k] if run.prompt_embeds else encoded[drawn.prompt] for k, drawn in pictures]
                )
                away = mx.broadcast_to(encoded[first.negative_prompt], txt.shape) if run.uses_guidance else txt
                x = noise = mx.concatenate(
                    [run.latents[k] if run.latents else _noise(drawn, params.in_channels) for k, drawn in pictures]
                )
                if init is not None:
                    x = noised(init, noise, sigmas[0])
                caches: Caches = None, None
                reuse = None if first.reuse is None else Reuse(first.reuse, image_tokens)
                was_guided = None
                for i, (sigma, sigma_next) in enumerate(pairwise(sigmas), run.start + 1):
                    # Again, since a caller may have decoded a picture in between and so unloaded the transformer.
                    there = count * kept_bytes(params, reused, self.dtype) if reuse is not None and reuse.kept else 0
                    left = (part - there for part in working)
                    needed = self._prepare("transformer", "", stats, *left, held=held + there)
                    with self._working("denoise", needed, stats):
                        is_guided = run.uses_guidance and low <= sigma <= high
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
                        if init is not None and run.repainted is not None:
                            x = _masked(x, noised(init, noise, sigma_next), run.repainted)
                            denoised = _masked(denoised, init, run.repainted)
                        finite = mx.isfinite(x).all()
                        mx.eval(x, denoised, finite)
                        if i == first.num_steps:
                            reuse = None
                    if not finite.item():
                        raise FloatingPointError(_not_finite(f"step {i} of {first.num_steps}", first.dtype))
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
                            run.repainting,
                        )

    def _pictures_in_a_pass(self, run: _Run, tokens: int, kept: int, rows: int, cached: int, reused: int) -> int:
        """How many pictures are drawn at a time, each with so many rows of tokens."""
        most = run.batch_size
        if most is None:
            stage = self._transformer_stage(tokens, kept, rows, cached, reused)
            most = len(run.pictures) if stage.is_streamed(self.memory, self.memory_limit) else 1
        most = min(most, len(run.pictures))
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
            raise FloatingPointError(_not_finite("the decoder", _dtype_name(stage_dtype("autoencoder", self.dtype))))
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
            _one_of("stage", stage, STAGES)
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


def check_options(
    *,
    height: int | None,
    width: int | None,
    num_steps: int | None,
    guidance: float | None,
    guidance_interval: Sequence[float] | None,
    guidance_rescale: float,
    step_cache: float | None,
    reuse: str | None,
    seed: int,
    num_images: int,
    batch_size: int | None,
    schedule: str,
    sigmas: Sequence[float] | None,
    noise: str,
    max_sequence_length: int | None,
    strength: float | None,
    mask_blur: float,
    mask_padding: int | None,
    expand: Mapping[str, int] | None,
) -> None:
    """Refuse options of Flux2Pipeline.stream that no model could draw with; None stands for the model's default.

    Raises:
        InputError: naming the value and what is possible.
    """
    check_size(height, width)
    if num_steps is not None:
        _between("num_steps", num_steps, 1, MAX_STEPS)
    if sigmas is not None:
        check_sigmas(sigmas)
        if num_steps not in (None, len(sigmas)):
            raise InputError(f"num_steps is {num_steps}, but {len(sigmas)} sigmas are given")
    if guidance is not None and not (isinstance(guidance, (int, float)) and 0 <= guidance <= MAX_GUIDANCE):
        raise InputError(f"guidance must be a number from 0 to {MAX_GUIDANCE}, got {guidance!r}")
    if guidance_interval is not None:
        ends = list(guidance_interval) if isinstance(guidance_interval, (list, tuple)) else []
        if not (len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends) and 0 <= ends[0] <= ends[1] <= 1):
            raise InputError(
                f"guidance_interval must be two noise levels, 0 <= low <= high <= 1, got {guidance_interval!r}"
            )
    if not (isinstance(guidance_rescale, (int, float)) and 0 <= guidance_rescale <= 1):
        raise InputError(f"guidance_rescale must be a number from 0 to 1, got {guidance_rescale!r}")
    if step_cache is not None and not (isinstance(step_cache, (int, float)) and 0 <= step_cache < math.inf):
        raise InputError(f"step_cache must be a number of at least 0, got {step_cache!r}")
    if reuse is not None:
        _one_of("reuse", reuse, REUSED)
        if step_cache is not None:
            raise InputError("step_cache is for tens of steps and reuse for a few; give one of them")
    _between("seed", seed, 0, None)
    _between("num_images", num_images, 1, MAX_IMAGES)
    if batch_size is not None:
        _between("batch_size", batch_size, 1, MAX_IMAGES)
    if max_sequence_length is not None:
        _between("max_sequence_length", max_sequence_length, 1, MAX_POSITIONS)
    if strength is not None and not (isinstance(strength, (int, float)) and 0 < strength <= 1):
        raise InputError(f"strength must be a number above 0, up to 1, got {strength!r}")
    if not (isinstance(mask_blur, (int, float)) and 0 <= mask_blur <= MAX_MARGIN):
        raise InputError(f"mask_blur must be a number of pixels from 0 to {MAX_MARGIN}, got {mask_blur!r}")
    if mask_padding is not None:
        _between("mask_padding", mask_padding, 0, MAX_MARGIN)
    check_expand(expand)
    _one_of("schedule", schedule, SCHEDULES)
    _one_of("noise", noise, NOISES)


def usual_guidance(distilled: bool) -> float:
    return 1.0 if distilled else 4.0


def noise_levels(
    distilled: bool, tokens: int, num_steps: int | None, schedule: str, sigmas: Sequence[float] | None
) -> list[float]:
    """Those of a picture with so many image tokens: the custom ones, else of so many steps, or the model's usual."""
    if sigmas is not None:
        return custom_sigmas(sigmas, tokens)
    return schedule_sigmas(schedule, (4 if distilled else 50) if num_steps is None else num_steps, tokens)


def usual_strength(steps: int, *, repaints: bool) -> float:
    return 1.0 if repaints else min(STRENGTH, most_kept(steps))


def first_step(strength: float, steps: int) -> int:
    """The step to begin with, of so many, where a picture is drawn anew with a strength; diffusers' rounding. The last
    one is always done.
    """
    first = min(int(steps - steps * strength), steps - 1)
    if first == 0 and strength < 1 < steps:
        warnings.warn(
            f"strength {strength:g} of {steps} steps is rounded to all of them and keeps next to nothing of the init "
            f"image; {most_kept(steps):g} is the most that keeps some",
            stacklevel=4,
        )
    return first


def most_kept(steps: int) -> float:
    """The greatest strength, in hundredths, that leaves out one of so many steps; 1 where there is one alone."""
    return math.floor(100 * (steps - 1) / steps) / 100 if steps > 1 else 1.0


def check_size(height: int | None, width: int | None) -> None:
    """Refuse a picture's size that cannot be drawn; None is a side that is not known yet.

    Raises:
        InputError: unless both are multiples of 16, at least 64, and together at most 4 megapixels.
    """
    for name, value in (("height", height), ("width", width)):
        if value is None:
            continue
        _between(name, value, MIN_SIDE, None)
        if value % PIXELS_PER_TOKEN:
            low = value // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
            raise InputError(
                f"{name} must be a multiple of {PIXELS_PER_TOKEN}, got {value}; the nearest are {low} and "
                f"{low + PIXELS_PER_TOKEN}"
            )
    if height is not None and width is not None and height * width > MAX_PIXELS:
        raise InputError(
            f"{width} x {height} is {height * width / 2**20:.2f} megapixels; at most {MAX_PIXELS // 2**20} "
            "(2048 x 2048) can be drawn"
        )


def drawn_size(
    height: int | None, width: int | None, references: Sequence[tuple[int, int]], side: int
) -> tuple[int, int]:
    """The size (height, width) of a picture: what is given, else the first of those that it is drawn from, by its
    aspect where one side is given, else ``side``.

    Raises:
        InputError: see check_size.
    """
    check_size(height, width)
    if references:
        tall, wide = references[0]
        if height is None:
            height = tall if width is None else _multiple(width * tall / wide)
        if width is None:
            width = _multiple(height * wide / tall)
    height, width = height or side, width or side
    check_size(height, width)
    return height, width


def _multiple(side: float) -> int:
    """The nearest side that can be drawn."""
    return max(MIN_SIDE, round(side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN)


def check_prompt(prompt: Any) -> None:
    """Refuse what is no text: another type, or a string with halves of characters, as undecodable input leaves them.

    Raises:
        InputError: naming the value.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be a string, got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not Unicode text: {prompt[error.start]!r} at {error.start}") from None


def _between(name: str, value: int, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if most is not None and value > most:
        raise InputError(f"{name} must be at most {most}, got {value}")


def _check_memory(memory: str, limit: int | None) -> None:
    _one_of("memory", memory, MODES)
    if limit is not None and not (isinstance(limit, (int, float)) and 1 <= limit < 2**63):
        raise InputError(f"memory_limit must be a number of bytes, got {limit!r}")


def _array(name: str, value: Any) -> mx.array:
    """An array of MLX, NumPy or torch as MLX's."""
    try:
        return value if isinstance(value, mx.array) else mx.array(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be an array, got {type(value).__name__}") from None


def _not_finite(where: str, dtype: str) -> str:
    wider = {"float16": "try bfloat16", "bfloat16": "try float32"}.get(dtype)
    way_out = f"{wider} (--dtype, dtype=), and if that fails too, check" if wider else "check"
    return f"{where}: values are not finite in {dtype}; {way_out} the checkpoint's files"


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _either(name: str, value: Any, other_name: str, other: Any) -> Any:
    """One argument under two names."""
    if value is not None and other is not None and value != other:
        raise InputError(f"{name} ({value}) and {other_name} ({other}) are the same setting; give one of them")
    return other if value is None else value


def _masked(x: mx.array, kept: mx.array, repainted: mx.array) -> mx.array:
    """x where it is repainted, else what is kept: all (1, S, C) but repainted, (1, S, 1) in 0..1."""
    return repainted * x + (1 - repainted) * kept


def _noise(settings: Settings, channels: int) -> mx.array:
    return initial_noise(settings.seed, settings.height, settings.width, channels, settings.noise)


def _given_latents(latents: mx.array, count: int, height: int, width: int, channels: int) -> list[mx.array]:
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    if latents.shape == (count, channels, rows, columns):
        latents = pack_channels_first(latents)
    if latents.shape != (count, rows * columns, channels):
        raise InputError(
            f"latents must be {(count, channels, rows, columns)} or {(count, rows * columns, channels)}, "
            f"got {latents.shape}"
        )
    return [latents[k][None].astype(mx.float32) for k in range(count)]


def dtype_of(dtype: str | mx.Dtype | None) -> mx.Dtype:
    """The dtype of that name; None takes what suits the machine.

    Raises:
        InputError: for another one.
    """
    if dtype is None:
        return default_dtype()
    if isinstance(dtype, str):
        _one_of("dtype", dtype, tuple(DTYPES))
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return dtype


def _dtype_name(dtype: mx.Dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
