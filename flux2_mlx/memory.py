"""Memory: what this machine gives MLX, and what each stage needs, so that the pipeline knows what can stay loaded."""

from __future__ import annotations

import os
import re
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import AutoEncoderConfig, FluxKleinParams, Qwen3Config
from .models.autoencoder import STRIP_BYTES


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


def machine_memory() -> int:
    """Bytes that the stages may hold together: Metal's recommended working set, or three quarters of the memory."""
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size") or 0
    if recommended:
        return int(recommended)
    total = info.get("total_memory", 0) if on_gpu() else 0
    return int(int(total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) * 0.75)


def default_dtype() -> mx.Dtype:
    """bfloat16 on a GPU that has it, float16 on M1 and M2, which emulate bfloat16, float32 on the CPU backend."""
    if not on_gpu():
        return mx.float32
    # Apple's GPU generations: g13 is M1, g14 is M2.
    apple = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return mx.float16 if apple and int(apple[1]) <= 14 else mx.bfloat16


def stage_dtype(stage: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a stage where the transformer has ``dtype``: in float16 the text encoder and the autoencoder stay
    in bfloat16, whose range their activations need.
    """
    return mx.bfloat16 if dtype == mx.float16 and stage != "transformer" else dtype


def weights_of(module: nn.Module) -> dict[str, mx.array]:
    """A module's weights by name, as they are: loaded or still lazy."""
    return cast("dict[str, mx.array]", tree_flatten(module.parameters(), destination={}))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights once they are loaded."""
    return sum(array.nbytes for array in weights_of(module).values())


def _scores(heads: int, tokens: int) -> int:
    """Attention scores: one fused kernel on a GPU, written out (with their softmax) on the CPU."""
    return 0 if on_gpu() else 2 * 4 * heads * tokens * tokens


def text_encoder_bytes(config: Qwen3Config, length: int, dtype: mx.Dtype) -> int:
    """Estimated intermediates of encoding one prompt of ``length`` tokens."""
    return length * (3 * config.intermediate_size + 4 * config.output_size) * dtype.size + _scores(
        config.num_attention_heads, length
    )


def transformer_bytes(params: FluxKleinParams, tokens: int, dtype: mx.Dtype) -> int:
    """Estimated intermediates of one step over ``tokens`` text and image tokens: about 30 residual streams in the
    weights' dtype, and 6 in float32 for the rotation.
    """
    return tokens * params.hidden_size * (30 * dtype.size + 6 * 4) + _scores(params.num_heads, tokens)


def decoder_bytes(config: AutoEncoderConfig, height: int, width: int, dtype: mx.Dtype) -> int:
    """Estimated intermediates of decoding a picture: the widest activation, and what a strip of it needs besides; the
    CPU backend also unfolds the inputs of its 3x3 convolutions.
    """
    widest = height * width * config.decoder_channels[1] * dtype.size
    return widest + min(widest, STRIP_BYTES) * (6 if on_gpu() else 28)
