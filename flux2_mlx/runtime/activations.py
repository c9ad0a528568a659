"""Memory: what this machine gives MLX, what each stage needs, and keeping to it."""

from __future__ import annotations

import mlx.core as mx

from ..device import on_gpu
from ..models.autoencoder import STRIP_BYTES
from ..models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config


def text_encoder_bytes(config: Qwen3Config, length: int, dtype: mx.Dtype) -> int:
    """Intermediates of encoding one prompt of ``length`` tokens: those of a feed-forward layer, or on the CPU, where
    they are more, attention's scores with what they are made of.
    """
    feed_forward = length * (3 * config.intermediate_size + config.hidden_size) * dtype.size
    if on_gpu():
        return feed_forward
    heads, rows = config.num_attention_heads, length * config.hidden_size
    rows += 2 * length * (heads + config.num_key_value_heads) * config.head_dim
    return max(feed_forward, (heads * length**2 + rows) * dtype.size + length**2)


def transformer_bytes(
    params: FluxKleinParams,
    tokens: int,
    dtype: mx.Dtype,
    batch: int = 1,
    kept: int = 0,
    cached: int = 0,
    reused: int = 0,
) -> tuple[int, int]:
    """Intermediates of one step over ``tokens`` text and image tokens: ten times the input of a single block, keys and
    values together with those of ``kept`` reference tokens, three changes of ``cached`` image tokens (see StepCache);
    and those of attention, during which no matrix is unpacked, where its scores are written out, as on the CPU. One
    input more in float16, whose residuals are in float32. Of tokens that are ``reused`` later steps have the keys and
    values alone (see Reuse), which are counted here, beside the step that needs more.
    """
    if reused:
        steps = [transformer_bytes(params, tokens, dtype, batch, kept, cached)]
        steps.append(transformer_bytes(params, tokens - reused, dtype, batch, kept + reused, cached))
        held = batch * kept_bytes(params, reused, dtype)
        intermediates, attention = (max(parts) + held for parts in zip(*steps, strict=True))
        return intermediates, attention
    unit, scores = tokens * params.hidden_size, params.num_heads * tokens * (tokens + kept)
    units = 11 if dtype == mx.float16 else 10
    beside = (2 * (tokens + kept if kept else 0) + 3 * cached) * params.hidden_size
    return batch * (units * unit + beside) * dtype.size, (
        0 if on_gpu() else batch * ((units - 2) * unit + beside + scores) * dtype.size
    )


def training_bytes(
    params: FluxKleinParams, tokens: int, dtype: mx.Dtype, batch: int, *, recompute: bool, packed: bool
) -> int:
    """Intermediates of the loss of pictures with so many text and image tokens each, and of its gradients, as measured
    on the CPU backend, where attention's backward pass writes out its scores; a fused one needs less.

    Args:
        recompute: whether blocks are computed again in the backward pass; then their inputs are kept, and the
            insides of one, else of all.
        packed: whether matrices are; the backward pass takes them unpacked, of one block or of all.
    """
    unit, blocks = batch * tokens * params.hidden_size * dtype.size, params.depth + params.depth_single
    scores = tokens * params.num_heads / params.hidden_size  # in units
    single = (4 * params.hidden_size + 3 * params.mlp_hidden) * params.hidden_size * dtype.size if packed else 0
    half = 8 if dtype.size < 4 else 0  # what is computed in float32 all the same
    if recompute:
        return int(unit * (blocks + max(40, 30 + 3 * scores) + half) + single)
    doubles = 2 * params.depth + params.depth_single  # a double block has two streams' matrices
    return int(unit * (16 + blocks * (22 + 1.3 * scores) + half) + doubles * single)


def reused_tokens(reuse: str | None, text: int, references: int) -> int:
    """How many of so many tokens later steps leave out; see models.transformer.Reuse."""
    return {"text": text, "references": references}.get(reuse or "", 0)


def kept_bytes(params: FluxKleinParams, tokens: int, dtype: mx.Dtype) -> int:
    """Keys and values of so many tokens in every block."""
    return 2 * (params.depth + params.depth_single) * tokens * params.hidden_size * dtype.size


def preview_bytes(height: int, width: int, dtype: mx.Dtype) -> int:
    """Intermediates of TAEF2's decoder: four times its activations at the picture's size; on the CPU backend, which
    writes out what a convolution sees, thirteen times.
    """
    return (4 if on_gpu() else 13) * height * width * 64 * dtype.size


def decoder_bytes(config: AutoEncoderConfig, height: int, width: int, dtype: mx.Dtype) -> int:
    """Intermediates of decoding a picture, whose widest activation has its size and the second of the channels."""
    return _strips(height * width * config.decoder_channels[1], dtype, 46)


def encoder_bytes(config: AutoEncoderConfig, height: int, width: int, dtype: mx.Dtype) -> int:
    """Intermediates of encoding a picture, whose widest activation has its size and the first of the channels."""
    return _strips(height * width * config.block_out_channels[0], dtype, 52)


def _strips(widest: int, dtype: mx.Dtype, on_cpu: int) -> int:
    """An activation of so many elements, and what a strip of it needs besides: a norm's float32, on the CPU backend
    also the unfolded input of a 3x3 convolution (bytes an element), and where there are several, the next one in and
    out.
    """
    strip = min(widest, STRIP_BYTES // dtype.size)
    beside = 0 if strip == widest else 2 * dtype.size
    return widest * dtype.size + strip * ((12 if on_gpu() else on_cpu) + beside)
