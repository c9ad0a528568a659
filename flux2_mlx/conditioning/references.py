"""Reference and init images: images to clean tokens, their positions, and their keys and values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from ..models.flux2 import FluxKlein
from ..models.kv_cache import KV
from ..runtime.activations import Pass, encoder_bytes
from ..runtime.residency import Need, Stages
from ..runtime.stats import Stats
from ..sampling.latents import pack_latents, text_ids


class ReferenceEncoder:
    """Encodes images that are given, and owns the two caches of what becomes of them.

    Caches:
        _tokens: clean tokens (1, R, C) of the last call's images, by the content of their pixels; each call with
            images replaces it.
        _kv: keys and values of the last call's references, with the contents of their tokens and positions (models
            that were trained for it, klein-9b-kv); other references replace it, and ``evict`` clears it: where memory
            is short, and when the transformer's weights change.
    """

    def __init__(self, stages: Stages):
        self.stages = stages
        self._tokens: dict[bytes, mx.array] = {}
        self._kv: tuple[list[bytes], list[KV]] = [], []
        stages.evict = self.evict

    def evict(self) -> None:
        """Give back the references' keys and values."""
        self._kv = [], []

    def encode(self, images: Sequence[mx.array], stats: Stats) -> list[mx.array]:
        """Clean, normalized tokens (1, R, C) of images (1, H, W, 3) in -1..1."""
        stages = self.stages
        keys = [_digest(repr(pixels.shape).encode() + np.array(pixels).tobytes()) for pixels in images]
        tokens = {key: self._tokens[key] for key in keys if key in self._tokens}
        for key, pixels in zip(keys, images, strict=True):
            if key in tokens:
                continue
            height, width = pixels.shape[1:3]
            needed = partial(encoder_bytes, stages.checkpoint.autoencoder, height, width, stages.vae_dtype)
            with (
                stages.use("autoencoder", Need(needed()), stats, what="references", part="encoder") as encoder,
                stages.tiles(needed) as tile_bytes,
            ):
                tokens[key] = stages.autoencoder.bn.normalize(pack_latents(encoder(pixels, tile_bytes)))
                mx.eval(tokens[key])
        if images:
            self._tokens = tokens
        return [tokens[key] for key in keys]

    def encode_kv(self, references: Sequence[mx.array], position_ids: Sequence[mx.array], stats: Stats) -> list[KV]:
        """Keys and values of references, (1, R, C) tokens at (1, R, 4) positions, in every block of the transformer."""
        stages = self.stages
        clean = [tokens.astype(mx.float32) for tokens in references]
        contents = [_digest(np.array(part).tobytes()) for part in (*clean, *position_ids)]
        known, kv = self._kv
        if known == contents:
            return kv
        del kv
        self.evict()
        tokens = mx.concatenate(list(references), axis=1)
        recorded_bytes = stages.kv_bytes(tokens.shape[1])  # the KV that the pass records
        need = Need(*(part + recorded_bytes for part in stages.transformer_need(Pass(0, 0, tokens.shape[1]))))
        with stages.use("transformer", need, stats, what="references") as transformer:
            kv = transformer.encode_reference_kv(tokens, *self.rope(0, position_ids))
            mx.eval(kv)
        self._kv = contents, kv
        return kv

    def rope(self, length: int, position_ids: Sequence[mx.array], texts: int = 1) -> tuple[mx.array, mx.array]:
        """Rotation tables of prompts of ``length`` tokens, each from position 0, and of image tokens at these
        positions, each (1, S, 4).
        """
        checkpoint, ids = self.stages.checkpoint, mx.concatenate(list(position_ids), axis=1)
        params, text = checkpoint.transformer, text_ids(length)[:, checkpoint.text_encoder.dropped_tokens :]
        text = mx.concatenate([text] * texts, axis=1)
        return FluxKlein.compute_rope(text, ids, params.axes_dims_rope, params.rope_theta)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
