"""Checks of the values of options, each of which refuses what cannot be, with the value and the way out."""

from __future__ import annotations

from typing import Any

from .errors import InputError
from .sampling.latents import PIXELS_PER_TOKEN

MIN_SIDE = 64
MAX_PIXELS = 4 * 1024 * 1024  # of a pass, up to which FLUX.2 is meant to generate
MAX_HIRES_PIXELS = 2 * MAX_PIXELS  # of what hires draws in tiles
MAX_PROMPT = 100_000  # characters; encoding takes hundreds of bytes for each, and at most 40,960 tokens are read
MIN_MEMORY = 10**6  # bytes; less is a number of GB
MAX_REFERENCE = 2  # strength


def check_side(name: str, value: int) -> None:
    """Refuse a side in pixels that no image can have.

    Raises:
        InputError: unless it is a multiple of 16, at least 64.
    """
    if value < MIN_SIDE:
        raise InputError(f"{name} must be a whole number of at least {MIN_SIDE}, got {value}")
    if value % PIXELS_PER_TOKEN:
        low = value // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
        raise InputError(
            f"{name} must be a multiple of {PIXELS_PER_TOKEN}, got {value}; the nearest are {low} and "
            f"{low + PIXELS_PER_TOKEN}"
        )


def check_size(height: int | None, width: int | None, hires: float | None = None) -> None:
    """Refuse an image's size that cannot be generated; None is a side that is not known yet.

    Raises:
        InputError: unless both are multiples of 16, at least 64, and together at most 4 megapixels, or 8 with hires.
    """
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            check_side(name, value)
    if height is None or width is None:
        return
    pixels = height * width
    if pixels > (MAX_PIXELS if hires is None else MAX_HIRES_PIXELS):
        most = "4 (2048 x 2048)" if hires is None else "8 (4096 x 2048)"
        more = ", or 8 with hires (--hires 2)" if hires is None and pixels <= MAX_HIRES_PIXELS else ""
        raise InputError(
            f"{width} x {height} is {pixels / 2**20:.2f} megapixels; at most {most} can be generated{more}"
        )


def check_prompt(prompt: Any) -> None:
    """Refuse what is no text: another type, or a string with halves of characters, as undecodable input leaves them.

    Raises:
        InputError: naming the value.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be a string, got {prompt!r}")
    if len(prompt) > MAX_PROMPT:
        raise InputError(f"a prompt has at most {MAX_PROMPT:,} characters, and this one has more; shorten it")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not Unicode text: {prompt[error.start]!r} at {error.start}") from None


def check_interval(value: Any) -> None:
    ends = list(value) if isinstance(value, (list, tuple)) else []
    if not (len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends) and 0 <= ends[0] <= ends[1] <= 1):
        raise InputError(f"guidance_interval must be two noise levels, 0 <= low <= high <= 1, got {value!r}")


def check_strengths(value: Any) -> None:
    given = list(value) if isinstance(value, (list, tuple)) else [None]
    if not all(isinstance(one, (int, float)) and 0 <= one <= MAX_REFERENCE for one in given):
        raise InputError(
            f"reference_strength must be numbers from 0 to {MAX_REFERENCE}, one for each reference image, got {value!r}"
        )


def check_limit(value: Any) -> None:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and MIN_MEMORY <= value < 2**63):
        raise InputError(
            f"memory_limit must be a number of bytes, at least {MIN_MEMORY}, got {value!r}; 8 GB are 8e9 "
            "(--memory-limit 8)"
        )


def gigabytes(text: str) -> int:
    """GB of 10^9 bytes in bytes."""
    size = float(text) * 1e9
    if not 1 <= size < 2**63:
        raise ValueError
    return int(size)
