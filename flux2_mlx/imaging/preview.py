"""Cheap previews at an eighth of the image's size: a linear map from a token's 128 latent channels to 2 x 2 pixels.

The map is fitted once for each autoencoder, on its own latents of a few random images, and cached on disk.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.load import load_all, load_autoencoder
from ..disk_cache import digest_of, read_table, write_table
from ..models.autoencoder import AutoEncoder
from ..sampling.latents import PIXELS_PER_TOKEN, pack_latents, unpack_latents
from .preprocess import image_array, to_unit

IMAGES, SIDE = 16, 96  # number and side in pixels of the images that the map is fitted on
NOISE = 0.3  # added to their latents, of variance 1, so that the map ignores channels without information
RIDGE = 1e-2
CELL = 2  # preview pixels a token, in each direction


def preview_map(checkpoint: Checkpoint, dtype: mx.Dtype) -> np.ndarray:
    """The map (C + 1, 12) from C latent channels and a constant 1 to 2 x 2 RGB pixels in 0..1: from the disk cache, or
    fitted and written there.

    Args:
        dtype: the autoencoder's.
    """
    source = checkpoint.sources["vae"]
    name = f"preview-{digest_of(source.all_files, (IMAGES, SIDE, NOISE, RIDGE))}"
    try:
        cached = np.array(read_table(name).get("map"), np.float32)
    except (TypeError, ValueError):
        cached = np.zeros(0, np.float32)
    if cached.shape == (checkpoint.transformer.in_channels + 1, 3 * CELL**2) and np.isfinite(cached).all():
        return cached
    fitted = fit_map(load_all(load_autoencoder(checkpoint, dtype)))
    write_table(name, {"map": fitted.tolist()})
    return fitted


def fit_map(autoencoder: AutoEncoder) -> np.ndarray:
    """The map, by ridge regression of decoded pixels on the noisy latents of random images that gave them."""
    rows, pixels = [], []
    side = SIDE // PIXELS_PER_TOKEN
    for k in range(IMAGES):
        rng = np.random.default_rng(k)
        tokens = autoencoder.bn.normalize(pack_latents(autoencoder.encoder(image_array(random_image(rng)))))
        tokens = tokens.astype(mx.float32) + mx.array(NOISE * rng.standard_normal(tokens.shape, np.float32))
        decoded = to_unit(autoencoder.decoder(unpack_latents(autoencoder.bn.denormalize(tokens), SIDE, SIDE)))
        cell = PIXELS_PER_TOKEN // CELL
        small = np.array(decoded).reshape(side, CELL, cell, side, CELL, cell, 3).mean((2, 5))
        rows.append(np.array(tokens[0]))
        pixels.append(small.transpose(0, 2, 1, 3, 4).reshape(side * side, -1))
    inputs, outputs = _append_one(np.concatenate(rows)), np.concatenate(pixels)
    penalty = RIDGE * len(inputs) * np.eye(inputs.shape[1])
    solved = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs)
    return np.asarray(solved, np.float32)


def random_image(rng: np.random.Generator) -> Image.Image:
    """SIDE x SIDE pixels: a soft gradient or blocks of pure colours, with three rectangles of hard edges on it."""
    if rng.random() < 0.5:
        blocks = Image.fromarray(rng.integers(0, 2, (3, 3, 3), np.uint8) * 255)
        pixels = np.array(blocks.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    else:
        soft = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        pixels = np.array(soft.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    for _ in range(3):
        top, left = rng.integers(0, SIDE - 16, 2)
        height, width = rng.integers(8, SIDE // 2, 2)
        pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def render_preview(tokens: mx.array, linear_map: np.ndarray, height: int, width: int) -> Image.Image:
    """A coarse image, scaled up to height x width pixels, from tokens (1, S, C) and the map of preview_map."""
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    cells = _append_one(np.array(tokens[0].astype(mx.float32))) @ linear_map
    cells = cells.reshape(rows, columns, CELL, CELL, 3).transpose(0, 2, 1, 3, 4)
    pixels = (np.clip(cells, 0, 1) * 255).round().astype(np.uint8).reshape(rows * CELL, columns * CELL, 3)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _append_one(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.ones((len(rows), 1), rows.dtype)], axis=1)
