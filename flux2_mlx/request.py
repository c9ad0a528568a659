"""The request: a call, checked and resolved before anything is computed.

GenerationOptions, BatchOptions, Inputs -> resolve -> Request: Settings of each image, StepPlan of each step, arrays
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ._version import __version__
from .checkpoints.checkpoint import Checkpoint
from .checks import check_prompt
from .errors import InputError
from .fields import changed, is_of_type, option
from .imaging.edits import Edit
from .imaging.inpaint import Inpaint
from .imaging.preprocess import init_array
from .inputs import INPUTS, Inputs, Reference, Size
from .options import BatchOptions, GenerationOptions, ModelOptions
from .paths import without_home
from .refusals import check_enhance, check_group, check_reuse, check_room
from .sampling.latents import PIXELS_PER_TOKEN, initial_noise, pack_channels_first
from .samplings import Sampling, image_sizes, resolve_samplings, small_size, warn_of_sampling


def paths_of(cls: type) -> list[str]:
    """The options that can be paths."""
    return [f.name for f in fields(cls) if f.metadata.get("is_path")]


@dataclass(frozen=True, kw_only=True)
class Settings(ModelOptions, GenerationOptions):
    """All that one image depends on, defaults filled in; written into its file and read back by ``--from-image``.

    ``inputs`` names what else the call was given (of INPUTS), which no file carries; ``original_prompt`` enhance's.
    """

    prompt: str = option(check=check_prompt)
    model: str = changed(ModelOptions, "model")
    seed: int = changed(GenerationOptions, "seed")
    width: int = changed(GenerationOptions, "width")
    height: int = changed(GenerationOptions, "height")
    num_steps: int = changed(GenerationOptions, "num_steps")
    guidance: float = changed(GenerationOptions, "guidance")
    schedule: str = changed(GenerationOptions, "schedule")
    noise: str = changed(GenerationOptions, "noise")
    dtype: str = changed(ModelOptions, "dtype")
    max_sequence_length: int = changed(GenerationOptions, "max_sequence_length")
    original_prompt: str | None = option(None)
    inputs: tuple[str, ...] = option(())
    version: str = option(__version__)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], given: Sequence[str] = ()) -> Settings:
        """The settings that ``metadata`` gave, as read from an image's file.

        Args:
            given: the inputs that the caller gives again.

        Raises:
            InputError: for a setting that is missing or of the wrong kind, and for an image that needs more than its
                settings to be generated again.
        """
        defaults = {f.name: None if f.default is MISSING else f.default for f in fields(cls)}
        values: dict[str, Any] = {name: metadata.get(name, default) for name, default in defaults.items()}
        wrong = [f.name for f in fields(cls) if not is_of_type(cls, f, values[f.name])]
        if wrong:
            raise InputError(f"the image's settings cannot be read: {', '.join(wrong)}")
        absent = [str(name) for name in values["inputs"] if name not in given]
        if absent:
            flags = [INPUTS.get(name, "") for name in absent]
            way_out = f"; give it again ({', '.join(flags)})" if all(flags) else ", and cannot be repeated"
            raise InputError(f"the image was generated from more than its file carries ({', '.join(absent)}){way_out}")
        return cls(**values)

    def metadata(self) -> dict[str, Any]:
        """The settings as JSON values, for an image's file: paths in the home folder by their last part alone."""
        own = {name: getattr(self, name) for name in paths_of(type(self))}
        hidden = {
            name: list(map(without_home, value)) if isinstance(value, tuple) else value and without_home(value)
            for name, value in own.items()
        }
        return super().metadata() | hidden

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


@dataclass(frozen=True)
class Request:
    """A resolved call: one Settings an image, and what the images share.

    Attributes:
        settings: one for each image.
        samplings: the sampling of every image, or with hires both: of the small image, unless one is given, and of the
            large one.
        prompt_embeds: (1, L, D) for each image; None where prompts are to be encoded.
        latents: (1, S, C) for each image; None where seeds give the noise.
        references: the reference images, without those of strength 0.
        init_image: (1, H, W, 3) in -1..1, for img2img and inpainting; of hires' small size where hires enlarges it.
        init_latents: (1, h, w, C) of each image, of any size, in place of an init image.
        inpaint: composites the result into the init image.
        edit: brings the result back to the first reference.
        mask_tokens: (1, S, 1) in 0..1, how much of each token is inpainted.
        uses_cfg: whether the CFG scale is above 1.
        batch: the call's options that settings do not have.
    """

    settings: list[Settings]
    samplings: list[Sampling]
    prompt_embeds: list[mx.array] | None
    latents: list[mx.array] | None
    references: list[Reference]
    init_image: mx.array | None
    init_latents: list[mx.array] | None
    inpaint: Inpaint | None
    edit: Edit | None
    mask_tokens: mx.array | None
    uses_cfg: bool
    batch: BatchOptions


def resolve(
    options: GenerationOptions,
    batch: BatchOptions,
    inputs: Inputs,
    *,
    checkpoint: Checkpoint,
    model: ModelOptions,
    default_length: int,
    limit: int,
    peak: Callable[[GenerationOptions, Sequence[Size]], int],
    shares_cfg: bool = False,
) -> Request:
    """Check a call and fill in the defaults; nothing is computed yet.

    Args:
        model: the model's options, which go into the images' settings.
        default_length: tokens of a prompt unless the options say it.
        limit: the bytes of memory that there are.
        peak: bytes that an image needs, its size and length resolved, with references of these sizes.
        shares_cfg: whether two processes share the passes of CFG.

    Raises:
        InputError: for a value that cannot be used.
    """
    embeds = resolve_embeds(inputs, checkpoint.transformer.txt_embed_dim)
    prompts = inputs.prompts if embeds is None else [""] * len(embeds)
    if not prompts:
        raise InputError("prompt must be a string or a non-empty list of strings, got an empty list")
    for text in prompts:
        check_prompt(text)
    inputs = inputs.opened()
    inpaint = inputs.inpaint(options)
    references = inputs.references(options.reference_strength)
    side = checkpoint.autoencoder.sample_size
    size, sizes = image_sizes(options, inputs, inpaint, side)
    length = options.max_sequence_length or default_length
    if embeds is not None:
        length = embeds.shape[1] + checkpoint.text_encoder.dropped_tokens
    resolved = replace(options, height=size[0], width=size[1], max_sequence_length=length)
    if references:
        check_room(lambda some: peak(resolved, some), size, sizes, int(inpaint is not None), limit)
    samplings = resolve_samplings(
        resolved, checkpoint.is_distilled, size, side, has_init=inputs.has_init, inpaints=inpaint is not None
    )
    sampling = samplings[-1]
    if options.reuse is not None:
        check_reuse(options.reuse, sampling.guidance, checkpoint, has_references=bool(sizes))
    check_enhance(batch, checkpoint, has_embeds=embeds is not None, shares_cfg=shares_cfg)
    if shares_cfg:
        check_group(options.seed is not None, sampling.guidance)
    warn_of_sampling(options, sampling.guidance, [step for own in samplings for step in own.steps], checkpoint.name)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    strength = "strength" if options.hires is None else "hires_strength"
    sampled = {"guidance": sampling.guidance, strength: sampling.strength, "num_steps": sampling.num_steps}
    own = {"prompt": prompts[0], "seed": seed, "inputs": inputs.names}
    first = Settings(**vars(model) | vars(resolved) | sampled | own)
    count = len(prompts) * batch.num_images
    image_of = [k // batch.num_images for k in range(count)]
    channels = checkpoint.transformer.in_channels
    begun = size if options.hires is None else small_size(size, options.hires)
    init_image = None if inputs.init_image is None or inpaint is not None else init_array(inputs.init_image, begun)
    init_latents = None if inputs.init_latents is None else given_init(inputs.init_latents, count, channels // 4)
    return Request(
        settings=[replace(first, prompt=prompts[image_of[k]], seed=seed + k) for k in range(count)],
        samplings=samplings,
        prompt_embeds=None if embeds is None else [embeds[image_of[k]][None] for k in range(count)],
        latents=None if inputs.latents is None else given_latents(inputs.latents, count, size, channels),
        references=references,
        init_image=init_image if inpaint is None else inpaint.array(size),
        init_latents=init_latents,
        inpaint=inpaint,
        edit=inputs.edit(options, size),
        mask_tokens=None if inpaint is None else inpaint.mask_tokens(size),
        uses_cfg=sampling.guidance > 1,
        batch=batch,
    )


def resolve_embeds(inputs: Inputs, width: int) -> mx.array | None:
    """The embeddings (B, L, width) that stand for prompts, if they do."""
    if (inputs.prompt is None) == (inputs.prompt_embeds is None):
        raise InputError("give either prompt or prompt_embeds")
    if inputs.prompt_embeds is None:
        return None
    embeds = as_array("prompt_embeds", inputs.prompt_embeds)
    if embeds.ndim != 3 or embeds.shape[-1] != width:
        raise InputError(f"prompt_embeds must be (B, L, {width}), got {embeds.shape}")
    return embeds


def as_array(name: str, value: Any) -> mx.array:
    """An array of MLX, NumPy or torch as MLX's."""
    try:
        return value if isinstance(value, mx.array) else mx.array(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be an array, got {type(value).__name__}") from None


def request_noise(settings: Settings, size: Size, channels: int) -> mx.array:
    return initial_noise(settings.seed, *size, channels, settings.noise)


def given_init(value: Any, count: int, channels: int) -> list[mx.array]:
    """(1, h, w, channels) of each image; one may be for all of them."""
    latents = as_array("init_latents", value)
    if latents.shape[-1] != channels or len(latents) not in (1, count):
        raise InputError(f"init_latents must be (1 or {count}, H/8, W/8, {channels}), got {latents.shape}")
    return [latents[k % len(latents)][None] for k in range(count)]


def given_latents(value: Any, count: int, size: Size, channels: int) -> list[mx.array]:
    """(1, S, C) of each image."""
    latents = as_array("latents", value)
    rows, columns = (side // PIXELS_PER_TOKEN for side in size)
    if latents.shape == (count, channels, rows, columns):
        latents = pack_channels_first(latents)
    if latents.shape != (count, rows * columns, channels):
        raise InputError(
            f"latents must be {(count, channels, rows, columns)} or {(count, rows * columns, channels)}, "
            f"got {latents.shape}"
        )
    return [latents[k][None].astype(mx.float32) for k in range(count)]
