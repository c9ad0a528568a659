"""A call, checked and resolved: sizes, sigmas, the first step, defaults."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ._version import __version__
from .errors import InputError
from .families import BASE, DISTILLED
from .imaging.inpaint import Inpaint
from .options import MIN_SIDE, check_size
from .sampling.latents import PIXELS_PER_TOKEN, initial_noise, pack_channels_first
from .sampling.schedules import StepPlan, custom_sigmas, schedule_sigmas

# What a call may be given that no file carries, and the command's option for it.
INPUTS = {"image": "--image", "init_image": "--init-image", "mask": "--mask", "prompt_embeds": "", "latents": ""}
STRENGTH = 0.75  # of an init image without a mask, unless given, or less where the steps are fewer than four
TENS_OF_STEPS = 10  # from which on a step may be near enough to the one before


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


@dataclass(frozen=True)
class Request:
    """A call, checked and resolved.

    Attributes:
        settings: one an image.
        steps: of every image.
        prompt_embeds: (1, L, D) an image, in place of prompts.
        latents: (1, S, C) an image, in place of noise.
        references: (1, H, W, 3) each, in -1..1.
        init_image: (1, H, W, 3) in -1..1, if any.
        inpaint: what the mask of the init image says, if there is one.
        mask_tokens: (1, S, 1), how much of each token is generated anew.
        uses_cfg: whether there is classifier-free guidance.
        batch_size: the most images in a pass; None for one, or as many as fit where the transformer is streamed.
    """

    settings: list[Settings]
    steps: list[StepPlan]
    prompt_embeds: list[mx.array] | None
    latents: list[mx.array] | None
    references: list[mx.array]
    init_image: mx.array | None
    inpaint: Inpaint | None
    mask_tokens: mx.array | None
    uses_cfg: bool
    batch_size: int | None


def usual_guidance(distilled: bool) -> float:
    return (DISTILLED if distilled else BASE).guidance


def noise_levels(
    distilled: bool, tokens: int, num_steps: int | None, schedule: str, sigmas: Sequence[float] | None
) -> list[float]:
    """Those of a picture with so many image tokens: the custom ones, else of so many steps, or the model's usual."""
    if sigmas is not None:
        return custom_sigmas(sigmas, tokens)
    return schedule_sigmas(
        schedule, (DISTILLED if distilled else BASE).num_steps if num_steps is None else num_steps, tokens
    )


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


def as_array(name: str, value: Any) -> mx.array:
    """An array of MLX, NumPy or torch as MLX's."""
    try:
        return value if isinstance(value, mx.array) else mx.array(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be an array, got {type(value).__name__}") from None


def request_noise(settings: Settings, channels: int) -> mx.array:
    return initial_noise(settings.seed, settings.height, settings.width, channels, settings.noise)


def given_latents(latents: mx.array, count: int, height: int, width: int, channels: int) -> list[mx.array]:
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    if latents.shape == (count, channels, rows, columns):
        latents = pack_channels_first(latents)
    if latents.shape != (count, rows * columns, channels):
        raise InputError(
            f"latents must be {(count, channels, rows, columns)} or {(count, rows * columns, channels)}, "
            f"got {latents.shape}"
        )
    return [latents[k][None].astype(mx.float32) for k in range(count)]
