"""The options of generating."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .device import default_dtype
from .errors import InputError
from .imaging.inpaint import MAX_MARGIN, check_expand
from .runtime.plan import MODES
from .sampling.latents import NOISES, PIXELS_PER_TOKEN
from .sampling.schedules import SCHEDULES, check_sigmas

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
OUTPUT_TYPES = ("pil", "np", "latent")
MIN_SIDE = 64
MAX_PIXELS = 4 * 1024 * 1024
MAX_STEPS = 1000  # noise levels that the models were trained on
MAX_POSITIONS = 40960  # of Qwen3
MAX_IMAGES = 10_000
MAX_GUIDANCE = 100
REUSED = ("text", "references")


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
        check_whole("num_steps", num_steps, 1, MAX_STEPS)
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
        check_choice("reuse", reuse, REUSED)
        if step_cache is not None:
            raise InputError("step_cache is for tens of steps and reuse for a few; give one of them")
    check_whole("seed", seed, 0, None)
    check_whole("num_images", num_images, 1, MAX_IMAGES)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1, MAX_IMAGES)
    if max_sequence_length is not None:
        check_whole("max_sequence_length", max_sequence_length, 1, MAX_POSITIONS)
    if strength is not None and not (isinstance(strength, (int, float)) and 0 < strength <= 1):
        raise InputError(f"strength must be a number above 0, up to 1, got {strength!r}")
    if not (isinstance(mask_blur, (int, float)) and 0 <= mask_blur <= MAX_MARGIN):
        raise InputError(f"mask_blur must be a number of pixels from 0 to {MAX_MARGIN}, got {mask_blur!r}")
    if mask_padding is not None:
        check_whole("mask_padding", mask_padding, 0, MAX_MARGIN)
    check_expand(expand)
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("noise", noise, NOISES)


def check_size(height: int | None, width: int | None) -> None:
    """Refuse a picture's size that cannot be drawn; None is a side that is not known yet.

    Raises:
        InputError: unless both are multiples of 16, at least 64, and together at most 4 megapixels.
    """
    for name, value in (("height", height), ("width", width)):
        if value is None:
            continue
        check_whole(name, value, MIN_SIDE, None)
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


def check_whole(name: str, value: int, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if most is not None and value > most:
        raise InputError(f"{name} must be at most {most}, got {value}")


def check_memory(memory: str, limit: int | None) -> None:
    check_choice("memory", memory, MODES)
    if limit is not None and not (isinstance(limit, (int, float)) and 1 <= limit < 2**63):
        raise InputError(f"memory_limit must be a number of bytes, got {limit!r}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def one_of_two(name: str, value: Any, other_name: str, other: Any) -> Any:
    """One argument under two names."""
    if value is not None and other is not None and value != other:
        raise InputError(f"{name} ({value}) and {other_name} ({other}) are the same setting; give one of them")
    return other if value is None else value


def dtype_of(dtype: str | mx.Dtype | None) -> mx.Dtype:
    """The dtype of that name; None takes what suits the machine.

    Raises:
        InputError: for another one.
    """
    if dtype is None:
        return default_dtype()
    if isinstance(dtype, str):
        check_choice("dtype", dtype, tuple(DTYPES))
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return dtype


def dtype_name(dtype: mx.Dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
