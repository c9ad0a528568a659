"""Integers of 8 bits with float scales, as ComfyUI writes them. Only marked ones are read: others may be rotated."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .marks import Format, StoredLayer, times_scales

INT8_MARK = "int8_tensorwise"


def matches(layer: StoredLayer) -> bool:
    return layer.mark == INT8_MARK or layer.weight.dtype == mx.int8


def decode(layer: StoredLayer) -> Any:
    scale = layer.only_scale()
    if layer.mark != INT8_MARK or layer.weight.dtype != mx.int8:
        raise layer.unread()
    return times_scales(layer, scale)


INT8 = Format((INT8_MARK,), matches, decode)
