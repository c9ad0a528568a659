"""Attention, in parts of its queries where it is large: rows of attention do not depend on one another.

A part that one call computes is bounded twice. Its work, because macOS stops a kernel that keeps the GPU from its
display; and where its scores are written out, their memory. The other large kernels, products with weights, need no
parts: they grow with the tokens, not with their square. Of 2048 x 2048 pixels with two references (25,088 tokens) the
largest, ``to_out`` of a single block, is 1.9 TFLOP in klein-4b and 3.4 in klein-9b; attention would be 7.7 and 10.3.
"""

from __future__ import annotations

import mlx.core as mx

from ..device import writes_scores
from .kv_cache import BlockKV
from .rope import rotate

ALL = slice(None)  # tokens

# FLOP of one call, its two products. Apple rates the GPU of an M1 at 2.6 TFLOP a second, and macOS was seen to stop
# what took some seconds (ml-explore/mlx 3267, 3583). From some 9,000 tokens on, where a call is divided, keys and
# values alone fill a command buffer of MLX's, so that no two calls share one.
FLOP_AT_ONCE = 10**12
# Scores that exist at one time where they are written out, in elements: 256 MB in float32.
SCORES_AT_ONCE = 2**26
# Parts are multiples of it, so that they end where kernels' tiles do (12 rows in OpenBLAS on an EPYC, 32 on Metal): a
# row in an incomplete tile is rounded differently.
QUERIES = 192


def queries_at_once(heads: int, queries: int, keys: int, head_dim: int, dtype: mx.Dtype) -> int:
    """How many of the queries one call takes, in nearly equal parts.

    Args:
        heads: of all rows of the batch.
        queries, keys: tokens.
    """
    most = FLOP_AT_ONCE // (4 * heads * keys * head_dim)
    if writes_scores(dtype):
        most = min(most, SCORES_AT_ONCE // (heads * keys))
    most = most // QUERIES * QUERIES or max(1, most)
    parts = -(-queries // most)
    return min(queries, most, -(-queries // parts // QUERIES) * QUERIES)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """softmax(q k^T / sqrt(head_dim)) v, the heads joined.

    Args:
        q: (B, heads, N, head_dim).
        k, v: (B, KV heads, keys, head_dim).
        mask: (B or 1, 1, N or 1, keys), true where a query attends to a key, or in q's dtype and added to the scores;
            None means everywhere. MLX's fused kernels for Metal read it through its strides, so that one row for all
            queries is written out nowhere.

    Returns:
        (B, N, heads * head_dim).
    """
    batch, heads, queries, head_dim = q.shape
    rows = queries_at_once(batch * heads, queries, k.shape[2], head_dim, q.dtype)
    parts: list[mx.array] = []
    for start in range(0, queries, rows):
        part = q[:, :, start : start + rows]
        if parts:
            part = mx.depends(part, parts[-1])  # one after another, so that the scores of one part exist
        own_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start : start + rows]
        out = mx.fast.scaled_dot_product_attention(part, k, v, scale=head_dim**-0.5, mask=own_mask)
        parts.append(out.transpose(0, 2, 1, 3))
    joined = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
    return joined.reshape(batch, queries, -1)


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    kv: BlockKV | None = None,
    queries: slice = ALL,
) -> mx.array:
    """Rotate q and k, attend, join the heads.

    Args:
        q: (B, heads, queries, head_dim).
        k, v: (B, heads, N, head_dim).
        cos, sin: (B or 1, N, head_dim / 2), of the N tokens.
        kv: takes the rotated k and v, and gives what is attended to, and its mask; without it, these.
        queries: which of the N tokens q is of.

    Returns:
        (B, queries, heads * head_dim).
    """
    q, k = rotate(q, cos[:, queries], sin[:, queries]), rotate(k, cos, sin)
    if kv is None:
        return attention(q, k, v)
    mask = kv.mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, queries]
    return attention(q, *kv.update_and_fetch(k, v), mask)
