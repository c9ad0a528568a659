"""FP8 with float scales: one for the tensor, one a row, or one a block. The codes are floats by the time they come here
(see files.load_safetensors), so this is any float weight with float scales.
"""

from __future__ import annotations

from typing import Any

from .marks import Format, StoredLayer, is_integer, times_scales

MARKS = ("float8_e4m3fn", "float8_e5m2")


def matches(layer: StoredLayer) -> bool:
    return layer.mark in (None, *MARKS) and not is_integer(layer.weight)


def decode(layer: StoredLayer) -> Any:
    return times_scales(layer, layer.only_scale()) if layer.scales else layer.weight


FP8 = Format(MARKS, matches, decode)
