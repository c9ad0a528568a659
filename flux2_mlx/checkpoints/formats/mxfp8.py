"""MXFP8: FP8 with a power of two for every 32 values.

One byte in E8M0 (OCP Microscaling Formats 1.0, 5.4.1) is the exponent as float32 has it. ComfyUI's files have these
scales in tiles; other writers have them by rows, without a mark, and so are not read.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from .marks import MARK, Format, StoredLayer, is_integer, times_scales, untile

MXFP8_MARK = "mxfp8"


def matches(layer: StoredLayer) -> bool:
    scale = layer.scales.get("weight_scale")
    return layer.mark == MXFP8_MARK or (scale is not None and is_integer(scale))


def decode(layer: StoredLayer) -> Any:
    if layer.mark != MXFP8_MARK:
        raise CheckpointError(f"{layer.name} has scales in bytes (MXFP8), but no {MARK} mark that says their layout")
    scale, weight = layer.scales.get("weight_scale"), layer.weight
    is_fp8 = not is_integer(weight) and weight.ndim == 2
    if scale is None or scale.dtype != mx.uint8 or len(layer.scales) > 1 or not is_fp8:
        raise CheckpointError(f"{layer.name} is marked {MXFP8_MARK}, but is not FP8 with one weight_scale, in bytes")
    rows, columns = weight.shape
    exponents = untile(layer.name, scale, rows, -(-columns // 32))
    if (exponents == 255).any().item():
        raise CheckpointError(f"{layer.name}.weight_scale is not a finite number")
    floats = mx.maximum(exponents.astype(mx.uint32) << 23, 1 << 22).view(mx.float32)  # (rows, blocks); 0 is 2^-127
    return times_scales(layer, floats)


MXFP8 = Format((MXFP8_MARK,), matches, decode)
