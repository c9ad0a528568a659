"""Bytes of each stage's activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..device import on_gpu, writes_scores
from ..models.attention import queries_at_once
from ..models.autoencoder import MOST_TILE_BYTES, TILE_BYTES
from ..models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config
from ..sampling.latents import PIXELS_PER_TOKEN
from ..sampling.tiles import Tiling

# Latents of a whole image that there are while its tiles are computed: what is sampled, its noise, the smaller image's
# as tokens and as a latent, the velocity before and after a tile, and what the step before gave its caller, twice; and
# the tiles' RoPE tables, which have as many numbers a token as a latent and are those of overlapping tiles.
WHOLE_LATENTS = 10


@dataclass(frozen=True)
class Pass:
    """One pass through the transformer, in tokens.

    Attributes:
        text, image, references: tokens of each row that go through the blocks.
        rows: rows of the batch.
        kv: reference tokens that are attended to by cached keys and values alone (klein-9b-kv).
        caches: First Block Caches a row: 1, or 2 where CFG computes its passes in turn.
        frozen: "text" or "references": later passes take their keys and values from the first; see FrozenKV.
        whole: tokens of the image that ``image`` is a tile of, if it is one.
        is_masked: whether there is a mask with a row for each token, of regions.
    """

    text: int
    image: int
    references: int = 0
    rows: int = 1
    kv: int = 0
    caches: int = 0
    frozen: str | None = None
    whole: int = 0
    is_masked: bool = False

    @property
    def tokens(self) -> int:
        return self.text + self.image + self.references

    @property
    def frozen_tokens(self) -> int:
        return {"text": self.text, "references": self.references}.get(self.frozen or "", 0)

    @property
    def first(self) -> Pass:
        """The first pass, in which nothing is frozen yet."""
        return replace(self, frozen=None)

    @property
    def after_first(self) -> Pass:
        """A pass after the first, which has frozen tokens as keys and values alone."""
        gone: dict[str, Any] = {self.frozen: 0} if self.frozen else {}
        return replace(self, frozen=None, kv=self.kv + self.frozen_tokens, **gone)


@dataclass(frozen=True)
class Workload:
    """What the memory and the time of an image depend on.

    Attributes:
        height, width: the image's size in pixels.
        text: tokens of each prompt.
        reference_sizes: (height, width) of each reference image, as it is encoded.
        has_kv_cache: whether the references' keys and values are kept in place of their tokens (klein-9b-kv).
        caches_steps: whether there is a First Block Cache, counted for both passes of CFG.
        frozen: "text", "references" or None; see Pass.
        tiling: the tiles in which hires computes the image; None for the undivided one.
        small: (height, width) of the image that hires begins with, where it may need more than a tile.
        regions: how many have prompts of their own.
    """

    height: int
    width: int
    text: int
    reference_sizes: Sequence[tuple[int, int]] = ()
    has_kv_cache: bool = False
    caches_steps: bool = False
    frozen: str | None = None
    tiling: Tiling | None = None
    small: tuple[int, int] | None = None
    regions: int = 0

    @property
    def tiles(self) -> int:
        """How many passes a step of denoising takes."""
        return 1 if self.tiling is None else len(self.tiling)

    @property
    def references(self) -> int:
        """Tokens of all references."""
        return sum(height * width for height, width in self.reference_sizes) // PIXELS_PER_TOKEN**2

    @property
    def kv(self) -> int:
        """Reference tokens that are kept as keys and values."""
        return self.references if self.has_kv_cache else 0

    def denoising(self, rows: int = 1, caches: int = 0) -> Pass:
        """A pass of denoising, of the image or of each of its tiles.

        Args:
            caches: First Block Caches a row and pass.
        """
        size = (self.height, self.width) if self.tiling is None else self.tiling.size
        whole = 0 if self.tiling is None else self.tiling.tokens
        image, references = math.prod(size) // PIXELS_PER_TOKEN**2, self.references - self.kv
        text, frozen = self.text * (1 + self.regions), None if self.kv else self.frozen
        more = caches * self.tiles, frozen, whole, self.regions > 0
        return Pass(text, image, references, rows, self.kv, *more)

    def passes(self, caches: int) -> list[Pass]:
        """A pass of denoising, and with tiles one of the image that hires begins with."""
        small = [] if self.small is None else [replace(self, height=self.small[0], width=self.small[1], tiling=None)]
        return [own.denoising(caches=caches) for own in (self, *small)]


def text_encoder_bytes(config: Qwen3Config, length: int, dtype: mx.Dtype) -> int:
    """Activations of encoding one prompt of ``length`` tokens: those of a feed-forward layer, or where attention writes
    its scores and these are more, the scores of one call with what they are made of. An adapter's, which are in
    float32, if these are more: its input and output, and two layers of its feed-forward part.
    """
    feed_forward = length * (3 * config.intermediate_size + config.hidden_size) * dtype.size
    if config.adapter is not None:
        adapter = config.adapter
        wide = adapter.input_size + adapter.output_size + 2 * adapter.hidden_size
        feed_forward = max(feed_forward, length * wide * mx.float32.size)
    if not writes_scores(dtype):
        return feed_forward
    heads, rows = config.num_attention_heads, length * config.hidden_size
    rows += 2 * length * (heads + config.num_key_value_heads) * config.head_dim
    scores = heads * queries_at_once(heads, length, length, config.head_dim, dtype) * length
    return max(feed_forward, (scores + rows) * dtype.size + length**2)


def language_model_bytes(config: Qwen3Config, layers: int, tokens: int, dtype: mx.Dtype) -> int:
    """Activations of writing text: those of encoding so many tokens, given ones and written ones, keys and values of
    all of them in every layer, and logits, also as float32 and sorted.
    """
    kv = 2 * layers * tokens * config.num_key_value_heads * config.head_dim * dtype.size
    return text_encoder_bytes(replace(config, adapter=None), tokens, dtype) + kv + 16 * config.vocab_size


def transformer_bytes(params: FluxKleinParams, one: Pass, dtype: mx.Dtype) -> tuple[int, int]:
    """Activations of one pass through the transformer, in bytes: (those beside an unpacked matrix, those of attention,
    during which no matrix is unpacked).

    In units of one row of the hidden size a token, the first are
        10 a token: a single block's input, norm, q, k, v, gate and up, and what they give (11 in float16, whose
           residual stream is in float32);
        2 a token and a token of ``kv``, where there is any: keys and values of both, joined;
        3 an image token and cache: the changes that a First Block Cache holds.
    Beside a tile are latents of the whole image in float32.
    A mask of regions has a number a token and key beside them, which is enough for one of truth values in the making.
    Attention has two units less a token, one less where it is computed in parts, and the scores of one call where they
    are written out, as on the CPU: heads * queries * keys. Of frozen tokens later passes have the keys and values
    alone, which are counted beside the pass that needs more.
    """
    if one.frozen_tokens:
        frozen_bytes = one.rows * kv_bytes(params, one.frozen_tokens, dtype)
        passes = [transformer_bytes(params, own, dtype) for own in (one.first, one.after_first)]
        activations, attention = (max(parts) + frozen_bytes for parts in zip(*passes, strict=True))
        return activations, attention
    tokens, units = one.tokens, 11 if dtype == mx.float16 else 10
    beside = (2 * (tokens + one.kv if one.kv else 0) + 3 * one.caches * one.image) * params.hidden_size
    beside += WHOLE_LATENTS * one.whole * params.in_channels * mx.float32.size // dtype.size
    mask = tokens * (tokens + one.kv) if one.is_masked else 0
    activations = (one.rows * (units * tokens * params.hidden_size + beside) + mask) * dtype.size
    if not writes_scores(dtype):
        return activations, 0
    heads, keys = one.rows * params.num_heads, tokens + one.kv
    queries = queries_at_once(heads, tokens, keys, params.head_dim, dtype)
    units -= 2 if queries == tokens else 1
    rest = one.rows * (units * tokens * params.hidden_size + beside)
    return activations, (rest + mask + heads * queries * keys) * dtype.size


def training_bytes(
    params: FluxKleinParams, tokens: int, dtype: mx.Dtype, batch: int, *, recompute: bool, packed: bool
) -> int:
    """Activations of the loss of images with so many text and image tokens each, and of its gradients, as measured
    on the CPU backend, where attention's backward pass writes out its scores; a fused one needs less.

    Args:
        recompute: whether blocks are computed again in the backward pass; then their inputs are kept, and the
            insides of one, else of all.
        packed: whether matrices are packed; the backward pass unpacks those of one block, or of all.
    """
    unit, blocks = batch * tokens * params.hidden_size * dtype.size, params.depth + params.depth_single
    scores = tokens * params.num_heads / params.hidden_size  # of one block, in units
    single = (4 * params.hidden_size + 3 * params.mlp_hidden) * params.hidden_size * dtype.size if packed else 0
    half = 8 if dtype.size < 4 else 0  # units that a half-precision run computes in float32 all the same
    if recompute:
        return int(unit * (blocks + max(40, 30 + 3 * scores) + half) + single)
    doubles = 2 * params.depth + params.depth_single  # a double block has two streams' matrices
    return int(unit * (16 + blocks * (22 + 1.3 * scores) + half) + doubles * single)


def kv_bytes(params: FluxKleinParams, tokens: int, dtype: mx.Dtype) -> int:
    """Keys and values of so many tokens in every block."""
    return 2 * (params.depth + params.depth_single) * tokens * params.hidden_size * dtype.size


def preview_bytes(height: int, width: int, dtype: mx.Dtype) -> int:
    """Activations of TAEF2's decoder: four times its activations at the image's size; on the CPU backend, which
    writes out what a convolution sees, thirteen times.
    """
    return (4 if on_gpu() else 13) * height * width * 64 * dtype.size


def decoder_bytes(
    config: AutoEncoderConfig, height: int, width: int, dtype: mx.Dtype, tile_bytes: int = TILE_BYTES
) -> int:
    """Activations of decoding an image in tiles of at most ``tile_bytes``; the widest has the image's size and the
    second of the channels.
    """
    return _tiled_bytes(height * width * config.decoder_channels[1], dtype, tile_bytes, 46)


def encoder_bytes(
    config: AutoEncoderConfig, height: int, width: int, dtype: mx.Dtype, tile_bytes: int = TILE_BYTES
) -> int:
    """Activations of encoding an image in tiles of at most ``tile_bytes``; the widest has the image's size and the
    first of the channels.
    """
    return _tiled_bytes(height * width * config.block_out_channels[0], dtype, tile_bytes, 52)


def _tiled_bytes(widest: int, dtype: mx.Dtype, tile_bytes: int, on_cpu: int) -> int:
    """Bytes of a layer that is computed in tiles: its widest activation, and what is made of a tile beside it.

    On the CPU backend that is a norm's float32, the unfolded input of a 3x3 convolution, and of several tiles the next
    one in and out. On a GPU it is a convolution's input as the norm gives it, with its halo, and padded; both sides of
    Metal's Winograd F(6x6, 3x3), 64 numbers for 36; and its output without and with the bias. Of several tiles two are
    at work there.

    Args:
        widest: elements of the activation.
        on_cpu: bytes an element of a tile on the CPU backend.
    """
    tile = min(widest, tile_bytes // dtype.size)
    many = tile < widest
    if on_gpu():
        return widest * dtype.size + (2 if many else 1) * int(tile * dtype.size * (3 + 2 * 64 / 36 + 2))
    return widest * dtype.size + tile * (on_cpu + (2 * dtype.size if many else 0))


def largest_tile(needed: Callable[[int], int], room: int) -> int:
    """Bytes of the autoencoder's largest tile: on a GPU as many as memory allows, since each tile is handed over to it
    on its own; on the CPU TILE_BYTES.

    Args:
        needed: the activations' bytes with tiles of so many.
        room: the bytes that they may take.
    """
    tile_bytes = MOST_TILE_BYTES if on_gpu() else TILE_BYTES
    while tile_bytes > TILE_BYTES and needed(tile_bytes) > room:
        tile_bytes //= 2
    return tile_bytes
