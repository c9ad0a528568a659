"""TAEF2, a tiny decoder for previews: 32 latent channels at an eighth of the size to RGB, NHWC, 1.3 M parameters.

Features: blocks of three 3x3 convolutions with ReLU and a residual; those at the lowest resolution first add a branch
with a GroupNorm, which sees the whole image; nearest upsampling between them. It takes normalized latents, as the
transformer gives them.

Reference: madebyollin's taesd, whose indices in ``decoder`` are those of ``layers`` here.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .layers import random_state_kept

CHANNELS, LATENT_CHANNELS = 64, 32
POOLED, POOL_GROUPS = 4 * CHANNELS, 4


class Clamp(nn.Module):
    """3 tanh(x / 3): within -3..3, and nearly x about 0."""

    def __call__(self, x: mx.array) -> mx.array:
        return 3 * mx.tanh(x / 3)


def conv(channels_in: int, channels_out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)


class Block(nn.Module):
    """(B, h, w, 64) to the same shape; with ``pools``, values depend on the whole image through the GroupNorm."""

    def __init__(self, pools: bool):
        super().__init__()
        self.conv = [conv(CHANNELS, CHANNELS), nn.ReLU(), conv(CHANNELS, CHANNELS), nn.ReLU(), conv(CHANNELS, CHANNELS)]
        self.pool = [
            nn.Conv2d(CHANNELS, POOLED, 1, bias=False),
            nn.GroupNorm(POOL_GROUPS, POOLED, pytorch_compatible=True),
            nn.ReLU(),
            nn.Conv2d(POOLED, CHANNELS, 1, bias=False),
        ][: 4 if pools else 0]

    def __call__(self, x: mx.array) -> mx.array:
        pooled = x
        for layer in self.pool:
            pooled = layer(pooled)
        if self.pool:
            x = x + pooled
        out = x
        for layer in self.conv:
            out = layer(out)
        return nn.relu(out + x)


class TinyDecoder(nn.Module):
    """Normalized latents (B, h, w, 32) to RGB (B, 8h, 8w, 3) in about 0..1."""

    @random_state_kept()
    def __init__(self) -> None:
        super().__init__()
        self.layers: list[nn.Module] = [Clamp(), conv(LATENT_CHANNELS, CHANNELS), nn.ReLU()]
        for stage in range(3):
            blocks = [Block(pools=stage == 0) for _ in range(3)]
            self.layers += [*blocks, nn.Upsample(2.0, mode="nearest"), conv(CHANNELS, CHANNELS, bias=False)]
        self.layers += [Block(pools=False), conv(CHANNELS, 3)]

    def __call__(self, z: mx.array) -> mx.array:
        for layer in self.layers:
            z = layer(z)
        return z
