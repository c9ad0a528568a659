"""NVFP4: two E2M1 codes a byte with FP8 scales."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from .marks import by_rows, untile

# The 16 values of E2M1: sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode_nvfp4(layer: str, weight: Any, scale: mx.array, scale_2: mx.array, comfy: bool) -> Any:
    """NVFP4 to floats: two E2M1 codes a byte, an FP8 scale of every 16, and one of all.

    ComfyUI's files have the first code in the upper half of the byte, and the scales in tiles; ModelOpt's have it in
    the lower half, and the scales row by row.
    """
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    blocks = -(-columns // 16)
    if comfy:
        scale = untile(layer, scale, rows, blocks)
    elif scale.shape != (rows, blocks):
        raise CheckpointError(f"{layer}: scales {scale.shape} for {rows} x {columns} weights of NVFP4")
    scale = mx.repeat(scale.astype(mx.float32) * scale_2.astype(mx.float32), 16, axis=1)[:, :columns]

    def convert(weight: mx.array, scale: mx.array) -> mx.array:
        upper, lower = weight >> 4, weight & 15
        codes = mx.stack([upper, lower] if comfy else [lower, upper], axis=-1).reshape(scale.shape)
        return mx.array(_E2M1)[codes] * scale

    return by_rows(weight, scale, convert)
