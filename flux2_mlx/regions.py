"""The text of a region: its prompt, and where it holds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .checks import check_prompt
from .errors import InputError
from .sampling.regions import Box

MAX_REGIONS = 16  # each has a text of its own in the transformer


class Region(NamedTuple):
    """A prompt for a part of the image."""

    prompt: str
    box: Box


def parse_region(text: str) -> Region:
    """PROMPT@left,top,right,bottom, as shares of the image's sides; the last @ counts.

    Raises:
        InputError: for what is none.
    """
    prompt, _, numbers = text.rpartition("@")
    try:
        left, top, right, bottom = map(float, numbers.split(","))
    except ValueError:
        left = top = right = bottom = math.nan
    if not (prompt.strip() and 0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise InputError(
            'region must be "PROMPT@left,top,right,bottom" in shares of the image, 0 <= left < right <= 1 and 0 <= top '
            f"< bottom <= 1, got {text!r}"
        )
    return Region(prompt, (left, top, right, bottom))


def check_regions(value: Any) -> None:
    """Refuse what is no list of regions.

    Raises:
        InputError: with the value.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise InputError(f'region must be a list of strings "PROMPT@left,top,right,bottom", got {value!r}')
    if len(value) > MAX_REGIONS:
        raise InputError(f"region is given {len(value)} times; at most {MAX_REGIONS} can be")
    for text in value:
        check_prompt(text)
        parse_region(text)
