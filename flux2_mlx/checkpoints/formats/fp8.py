"""FP8 and int8 with scales per tensor, row or block."""

from __future__ import annotations

import mlx.core as mx

from ...errors import CheckpointError


def spread_scales(layer: str, scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Scales of rows (out, 1) or of equal blocks, repeated to where they apply; the last blocks may be cut off."""
    if scale.ndim != len(shape) or scale.size > shape[0] * shape[1]:
        raise CheckpointError(f"{layer} is {shape} and its scales {scale.shape}; they do not belong together")
    for axis, size in enumerate(shape):
        if scale.shape[axis] in (1, size):
            continue
        block = 1 << max(0, -(-size // scale.shape[axis]) - 1).bit_length()  # blocks are powers of two
        if -(-size // block) != scale.shape[axis]:
            raise CheckpointError(f"{layer} is {shape} and its scales {scale.shape}; they do not belong together")
        scale = mx.repeat(scale, block, axis=axis)
        scale = scale[:size] if axis == 0 else scale[:, :size]
    return scale
