"""Rotary position embedding of the transformer: four axes (T, H, W, L), interleaved pairs.

Formula: Su et al., RoFormer (arXiv 2104.09864), one block of head dimensions an axis as in FLUX.
Reference: diffusers' Flux2PosEmbed and apply_rotary_emb.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from ..errors import InputError


def four_axes(ids: mx.array, *, text: bool) -> mx.array:
    """Bring position ids to four columns (T, H, W, L) and a batch axis.

    The checkpoints have four axes. Ids of three columns are taken as (T, H, W); L is the token's index for text and
    0 for images.

    Args:
        ids: (N, 3), (N, 4), (B, N, 3) or (B, N, 4).
        text: whether the tokens are text.

    Returns:
        (B, N, 4); B is 1 where the ids had no batch axis.

    Raises:
        InputError: for another shape.
    """
    if ids.ndim == 2:
        ids = ids[None]
    if ids.ndim != 3 or ids.shape[-1] not in (3, 4):
        raise InputError(f"position ids must be (B, N, 4) or (B, N, 3), got {ids.shape}")
    if ids.shape[-1] == 4:
        return ids
    batch, tokens, _ = ids.shape
    index = mx.arange(tokens) if text else mx.zeros((tokens,), mx.int32)
    index = mx.broadcast_to(index.astype(ids.dtype)[None, :, None], (batch, tokens, 1))
    return mx.concatenate([ids, index], axis=-1)


def rope_table(ids: mx.array, axes_dims: Sequence[int], theta: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines of every token's rotation angles.

    Axis a has axes_dims[a] / 2 frequencies theta^(-2j / axes_dims[a]). Angles are computed in float64, as the
    reference does, and in NumPy: MLX's float64 cosine has float32's precision.

    Args:
        ids: (B, N, 4) positions.

    Returns:
        (cos, sin), each (B, N, sum(axes_dims) / 2) in float32.
    """
    positions = np.array(ids, np.float64)
    angles = [
        positions[..., axis, None] * float(theta) ** (-np.arange(0, dims, 2) / dims)
        for axis, dims in enumerate(axes_dims)
    ]
    angle = np.concatenate(angles, axis=-1)
    return mx.array(np.cos(angle).astype(np.float32)), mx.array(np.sin(angle).astype(np.float32))


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the interleaved pairs (x[2p], x[2p + 1]) of each head in float32; the result has x's dtype.

    Args:
        x: (B, heads, N, head_dim).
        cos, sin: (B or 1, N, head_dim / 2) from rope_table.

    Raises:
        InputError: for tables of another head_dim.
    """
    if 2 * cos.shape[-1] != x.shape[-1]:
        raise InputError(
            f"the rotation tables are for a head_dim of {2 * cos.shape[-1]}, and the model's is {x.shape[-1]}; give "
            "compute_rope the model's axes_dims (params.axes_dims_rope)"
        )
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    cos, sin = cos[:, None, :, :, None], sin[:, None, :, :, None]
    return _rotate_pairs(pairs[..., :1], pairs[..., 1:], cos, sin, IS_EVEN).reshape(x.shape)


IS_EVEN = mx.array([True, False])


# Compiled it is one kernel; uncompiled, every product would be written out in float32. The other number of a pair comes
# by broadcasting: reversed pairs have a negative stride, which compiled kernels before MLX 0.32 read out of bounds.
@partial(mx.compile, shapeless=True)
def _rotate_pairs(even: mx.array, odd: mx.array, cos: mx.array, sin: mx.array, is_even: mx.array) -> mx.array:
    """even and odd (..., 1) times the columns (cos, sin) and (-sin, cos) of the rotation: (..., 2)."""
    of_even, of_odd = mx.where(is_even, cos, sin), mx.where(is_even, -sin, cos)
    return (even.astype(mx.float32) * of_even + odd.astype(mx.float32) * of_odd).astype(even.dtype)
