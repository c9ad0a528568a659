"""The adapter that makes a smaller Qwen3 stand for the text encoder that a transformer was trained with.

Features: every layer's output normalized on its own, a feed-forward network of each token, and beside it attention
among all tokens, both ways and with padding, at learned positions. The result is the sum of both. In float32.

Reference: AiArtLab's qwen3-0.6b-4b-adapter, whose keys are the attribute names here, as mflux computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .attention import attention
from .config import TextAdapterConfig

EPS = 1e-5  # of all norms, torch's default


class SlicedNorm(nn.Module):
    """LayerNorm of each slice without weights, then of all features with them: (B, L, slices * width) to the same."""

    def __init__(self, dims: int, slices: int):
        super().__init__()
        self.slices = slices
        self.all = nn.LayerNorm(dims, EPS)

    def __call__(self, x: mx.array) -> mx.array:
        slices = x.reshape(*x.shape[:-1], self.slices, -1)
        return self.all(mx.fast.layer_norm(slices, None, None, EPS).reshape(x.shape))


class Attention(nn.Module):
    """torch's MultiheadAttention of x with itself, no token masked: (B, L, dims) to the same."""

    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = mx.zeros((3 * dims, dims))
        self.in_proj_bias = mx.zeros(3 * dims)
        self.out_proj = nn.Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        batch, tokens, _ = x.shape
        qkv = mx.addmm(self.in_proj_bias, x, self.in_proj_weight.T).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        return self.out_proj(attention(q, k, v))


class Block(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(dims, EPS), nn.LayerNorm(dims, EPS)
        self.attn = Attention(dims, heads)
        self.ffn = [nn.Linear(dims, 4 * dims), nn.GELU("tanh"), nn.Linear(4 * dims, dims)]

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.n1(x))
        return x + in_turn(self.ffn, self.n2(x))


class Mixer(nn.Module):
    """What a token's embedding takes from the other tokens: (B, L, input_size) to (B, L, output_size)."""

    def __init__(self, config: TextAdapterConfig):
        super().__init__()
        dims = config.attn_dim
        self.norm = nn.LayerNorm(config.input_size, EPS)
        self.inp = nn.Linear(config.input_size, dims)
        self.pos = mx.zeros((1, config.max_tokens, dims))
        self.blocks = [Block(dims, config.attn_heads) for _ in range(config.attn_blocks)]
        self.out = nn.Linear(dims, config.output_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.inp(self.norm(x)) + self.pos[:, : x.shape[1]]
        return self.out(in_turn(self.blocks, x))


class TextAdapter(nn.Module):
    """Outputs of a smaller Qwen3's layers (B, L, input_size) to prompt embeddings (B, L, output_size), in float32; L is
    max_tokens at most.
    """

    def __init__(self, config: TextAdapterConfig):
        super().__init__()
        self.mlp = [
            SlicedNorm(config.input_size, config.slices),
            nn.Linear(config.input_size, config.hidden_size),
            nn.GELU("tanh"),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU("tanh"),
            nn.Linear(config.hidden_size, config.output_size),
        ]
        self.attn = Mixer(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x.astype(mx.float32)
        return in_turn(self.mlp, x) + self.attn(x)


def in_turn(layers: Sequence[nn.Module], x: mx.array) -> mx.array:
    for layer in layers:
        x = layer(x)
    return x
