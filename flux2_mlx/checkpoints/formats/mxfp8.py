"""MXFP8: FP8 with a power of two for every 32 values."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from ...lazy import INTEGERS
from .marks import MXFP8, untile


def mxfp8_scale(layer: str, weight: Any, scales: dict[str, mx.array]) -> mx.array:
    """Scales (rows, blocks) of MXFP8: one for every 32 values of FP8, a power of two in E8M0 (OCP Microscaling Formats
    1.0, 5.4.1), so an exponent as float32 has it. ComfyUI's files have them in tiles; other writers' are by rows.
    """
    scale = scales.get("weight_scale")
    if scale is None or scale.dtype != mx.uint8 or len(scales) > 1 or weight.dtype in INTEGERS or weight.ndim != 2:
        raise CheckpointError(f"{layer} is marked {MXFP8}, but is not FP8 with one weight_scale, in bytes")
    rows, columns = weight.shape
    exponents = untile(layer, scale, rows, -(-columns // 32))
    if (exponents == 255).any().item():
        raise CheckpointError(f"{layer}.weight_scale is not a finite number")
    return mx.maximum(exponents.astype(mx.uint32) << 23, 1 << 22).view(mx.float32)  # 0 is 2^-127
