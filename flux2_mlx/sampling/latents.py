"""Latents: packing between images and tokens, position ids, and the noise that an image starts from.

An image of H x W pixels has a latent of (H/8, W/8, 32); its 2x2 patches are packed to (H/16, W/16, 128), and the
rows of that grid are the S = H/16 * W/16 image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

PIXELS_PER_TOKEN = 16  # 8 in the autoencoder, 2 in the packing


def patchify(z: mx.array) -> mx.array:
    """(B, 2h, 2w, C) to (B, h, w, 4C); packed channel 4c + 2i + j is channel c at row i, column j of the patch."""
    batch, height, width, channels = z.shape
    z = z.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return z.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def unpatchify(x: mx.array) -> mx.array:
    """The inverse of patchify: (B, h, w, 4C) to (B, 2h, 2w, C)."""
    batch, height, width, packed = x.shape
    x = x.reshape(batch, height, width, packed // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, packed // 4)


def pack_latents(z: mx.array) -> mx.array:
    """Latent to tokens: (B, H/8, W/8, 32) to (B, S, 128), row by row."""
    x = patchify(z)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
    """Tokens to latent: (B, S, 128) to (B, height/8, width/8, 32).

    Args:
        latents: packed tokens, row by row.
        height, width: the image's size in pixels, multiples of 16.
    """
    batch, _, channels = latents.shape
    return unpatchify(latents.reshape(batch, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN, channels))


def resize_latents(z: mx.array, height: int, width: int) -> mx.array:
    """A latent (B, h, w, C) to (B, height, width, C), float32: scaled (bicubic) to cover it, cropped around the centre.

    z is the decoder's input: the statistics of packed latents differ among the four places of a patch, so that what is
    normalized would be smoothed across four scales.
    """
    batch, rows, columns, channels = z.shape
    scale = min(rows / height, columns / width)
    down, across = resizing(rows, height, scale), resizing(columns, width, scale)
    z = (mx.array(down) @ z.astype(mx.float32).reshape(batch, rows, -1)).reshape(-1, columns, channels)
    return (mx.array(across) @ z).reshape(batch, height, width, channels)


def resizing(source: int, target: int, scale: float) -> np.ndarray:
    """(target, source) weights of Keys' cubic convolution (a = -1/2) around the middle, widened where it shrinks.

    Source: R. Keys, Cubic convolution interpolation for digital image processing, 1981.

    Args:
        scale: places of the source a place of the target.
    """
    centres = source / 2 + (np.arange(target) + 0.5 - target / 2) * scale
    x = np.abs(np.arange(source) + 0.5 - centres[:, None]) / max(scale, 1)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def text_ids(length: int) -> mx.array:
    """Positions (T, H, W, L) of text tokens: (1, length, 4), L counting up and the others 0."""
    ids = np.zeros((1, length, 4), np.int32)
    ids[0, :, 3] = np.arange(length)
    return mx.array(ids)


def image_ids(height: int, width: int, reference: int | None = None) -> mx.array:
    """Positions (T, H, W, L) of an image's tokens: (1, S, 4), row by row.

    Args:
        height, width: the image's size in pixels.
        reference: None for the image that is generated (T = 0); k for the k-th reference image (T = 10 + 10 k).
    """
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    ids = np.zeros((rows, columns, 4), np.int32)
    ids[..., 0] = 0 if reference is None else 10 + 10 * reference
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None]
    return mx.array(ids.reshape(1, -1, 4))


def torch_randn(shape: Sequence[int], seed: int) -> np.ndarray:
    """Standard normal numbers, as torch.randn gives them on the CPU from a fresh generator with this seed.

    MT19937 seeded with the low 32 bits; 24-bit uniforms; Box-Muller on blocks of 16, the last block from new numbers
    where the count is no multiple of 16. Fewer than 16 numbers come from pairs of 53-bit uniforms in double precision.
    Source: PyTorch's normal_fill and CPUGeneratorImpl. Agrees to 1e-6 (torch has its own float32 log, sin and cos).

    Returns:
        float32 array of the shape.
    """
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    count = math.prod(shape)

    def words(n: int) -> np.ndarray:
        return generator.randint(0, 2**32, size=n, dtype=np.uint32)  # the whole range: one word a number, as it comes

    def uniforms(n: int) -> np.ndarray:
        return (words(n) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def normals(u: np.ndarray) -> np.ndarray:  # (blocks, 16)
        radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, :8]))
        angle = np.float32(2 * np.pi) * u[:, 8:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    if count < 16:
        high, low = words(4 * math.ceil(count / 2)).astype(np.uint64).reshape(-1, 2).T
        u1, u2 = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53).reshape(-1, 2).T
        radius, angle = np.sqrt(-2 * np.log1p(-u2)), 2 * np.pi * u1
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return pairs.reshape(-1)[:count].astype(np.float32).reshape(shape)

    u = uniforms(count)
    out = np.empty(count, np.float32)
    whole = count - count % 16
    out[:whole] = normals(u[:whole].reshape(-1, 16)).reshape(-1)
    if whole < count:
        out[-16:] = normals(uniforms(16).reshape(1, 16))[0]
    return out.reshape(shape)


NOISES = ("torch", "mlx")


def initial_noise(seed: int, height: int, width: int, channels: int = 128, noise: str = "torch") -> mx.array:
    """The noise of one image: (1, S, channels) tokens in float32. It depends on nothing but its arguments.

    Args:
        seed: the image's own seed.
        height, width: the image's size in pixels, multiples of 16.
        noise: "torch" gives the noise of diffusers with a CPU generator, generated as (1, channels, H/16, W/16) from
            the seed's low 32 bits; "mlx" that of mx.random, from its low 64 bits.
    """
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    if noise == "mlx":
        return mx.random.normal((1, rows * columns, channels), key=mx.random.key(seed % 2**64))
    return pack_channels_first(mx.array(torch_randn((1, channels, rows, columns), seed)))


def pack_channels_first(x: mx.array) -> mx.array:
    """Packed latents in torch's order to tokens: (B, C, h, w) to (B, h * w, C)."""
    return x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
