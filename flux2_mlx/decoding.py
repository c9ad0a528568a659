"""Latents to images: the decoder at full size, and coarse previews."""

from __future__ import annotations

import os
from functools import partial

import mlx.core as mx
import numpy as np
from PIL import Image

from .checkpoints.load import load_all, load_preview_decoder
from .device import memory_limit
from .dtypes import dtype_name
from .imaging.preprocess import to_pil, to_unit
from .imaging.preview import preview_map, render_preview
from .inputs import Size
from .runtime.activations import decoder_bytes, preview_bytes
from .runtime.residency import Need, Stages
from .runtime.stats import Stats, not_finite
from .sampling.latents import PIXELS_PER_TOKEN, pack_latents, resize_latents, unpack_latents


class LatentDecoder:
    """Decodes sampled tokens (1, S, C).

    Args:
        preview_decoder: TAEF2's weights for previews, a safetensors file or "owner/name/file" on the Hub.

    Attributes:
        preview_decoder: TAEF2, if its weights were given.

    Caches:
        _preview_map: the linear map of coarse previews, fitted when one is first wanted; it never changes.
    """

    def __init__(self, stages: Stages, preview_decoder: str | os.PathLike[str] | None):
        self.stages = stages
        self.dtype = stages.vae_dtype
        self.preview_decoder = None if preview_decoder is None else load_preview_decoder(preview_decoder, self.dtype)
        if self.preview_decoder is not None:
            load_all(self.preview_decoder)  # in this thread, since any may look at a preview
        self._preview_map: np.ndarray | None = None

    def unpack(self, latents: mx.array, size: Size) -> mx.array:
        """The decoder's input (B, H/8, W/8, 32) from sampled tokens: denormalized and unpacked."""
        return unpack_latents(self.stages.latent_statistics().denormalize(latents), *size)

    def pack(self, z: mx.array, size: Size) -> mx.array:
        """Clean, normalized tokens (B, S, C) at a size (height, width) from the decoder's input at any size."""
        height, width = (2 * side // PIXELS_PER_TOKEN for side in size)
        return self.stages.latent_statistics().normalize(pack_latents(resize_latents(z, height, width)))

    def decode(self, latents: mx.array, size: Size, stats: Stats) -> mx.array:
        """An image (1, H, W, 3) in 0..1, float32, of a size (height, width).

        Raises:
            FloatingPointError: where the decoder's output is not finite.
        """
        config = self.stages.checkpoint.autoencoder
        needed = partial(decoder_bytes, config, *size, self.dtype)
        with (
            self.stages.use("autoencoder", Need(needed()), stats, what="decode", part="decoder") as decoder,
            self.stages.tiles(needed) as tile_bytes,
        ):
            decoded = decoder(self.unpack(latents, size), tile_bytes)
            image, finite = to_unit(decoded), mx.isfinite(decoded).all()
            mx.eval(image, finite)
        if not finite.item():
            raise FloatingPointError(not_finite("the decoder", dtype_name(self.dtype)))
        return image

    def preview(self, latents: mx.array, size: Size, stats: Stats) -> Image.Image:
        """A coarse image, an eighth of the resolution, enlarged; or by the preview decoder."""
        if self.preview_decoder is not None:
            z = unpack_latents(latents, *size).astype(self.dtype)
            activation_bytes = preview_bytes(*size, self.dtype)
            with (
                self.stages.turn(),
                memory_limit(self.stages.memory_limit, activation_bytes),
                stats.measure("preview"),
            ):
                return to_pil(np.array(mx.clip(self.preview_decoder(z)[0].astype(mx.float32), 0, 1)))
        if self._preview_map is None:
            self._preview_map = preview_map(self.stages.checkpoint, self.dtype)
        return render_preview(latents, self._preview_map, *size)
