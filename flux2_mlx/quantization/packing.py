"""Packing a weight into integers and back, as mlx.core.quantize lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from ..device import on_gpu
from ..errors import CheckpointError
from .spec import Quantization

PACKED = ("weight", "scales", "biases")  # the arrays of a quantized layer in MLX


def bits_and_group(weights: Mapping[str, Any], layer: str, columns: int) -> tuple[int, int]:
    """(bits, group size) of a packed layer whose dense weight has that many columns.

    Raises:
        CheckpointError: where the shapes fit no such packing.
    """
    packed, scales = weights[f"{layer}.weight"], weights[f"{layer}.scales"]
    if packed.ndim == scales.ndim == 2 and packed.dtype == mx.uint32 and scales.shape[1]:
        bits, rest = divmod(32 * packed.shape[1], columns)
        group, uneven = divmod(columns, scales.shape[1])
        if not rest and not uneven and packed.shape[0] == scales.shape[0]:
            return bits, group
    raise CheckpointError(
        f"{layer}: weight {packed.shape} and scales {scales.shape} are no packing of {columns} columns"
    )


FITTED_BITS = 5  # bits up to which scales are fitted; with more, a bias in 16 bits loses more than that gains
FITTED_ROUNDS, FITTED_RANGE = 4, 0.95  # rounds of fitting, and the share of a group's range that they begin with
PACKED_AT_ONCE = 2**21  # weights that are packed at one time
Packing = Callable[[mx.array, Quantization], tuple[mx.array, ...]]


def quantize_weight(
    weight: mx.array, spec: Quantization, dtype: mx.Dtype | None = None, *, now: bool = False
) -> tuple[mx.array, ...]:
    """Pack a weight (out, in): (weight, scales, biases) or, of formats without offsets, (weight, scales).

    Formats, and more than FITTED_BITS, are mlx.core.quantize's; scales and biases of fewer bits are fitted.

    Args:
        dtype: the dtype that the weight is cast to first, part by part; its own unless given.
        now: compute each part before the next. Left lazy, the sources of several parts would be in memory together.
    """
    packing = _quantize_fitted if spec.mode == "affine" and spec.bits <= FITTED_BITS else quantize_rtn
    rows = max(1, PACKED_AT_ONCE // weight.shape[1])
    dtype = weight.dtype if dtype is None else dtype
    parts = []
    for top in range(0, weight.shape[0], rows):
        parts.append(packing(weight[top : top + rows].astype(dtype), spec))
        if now:
            mx.eval(parts[-1])
    return tuple(mx.concatenate(list(part)) for part in zip(*parts, strict=True))


def quantize_rtn(weight: mx.array, spec: Quantization) -> tuple[mx.array, ...]:
    """The same arrays as quantize_weight's, by mlx.core.quantize: one lazy operation."""
    return tuple(mx.quantize(weight, group_size=spec.group_size, bits=spec.bits, mode=spec.mode))


def _quantize_fitted(weight: mx.array, spec: Quantization) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of the least squared error, by turns: the nearest codes for a scale and a bias, then
    the scale and bias of the regression of the weights on those codes.

    The codes of a group's least and greatest weight waste the range on two weights; a search for better ends without
    data is that of Half-Quadratic Quantization (Badri and Shaji, 2023), here with the squared error.
    """
    top = 2**spec.bits - 1
    groups = weight.astype(mx.float32).reshape(weight.shape[0], -1, spec.group_size)
    mean = groups.mean(-1, keepdims=True)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = mx.maximum((high - low) * (FITTED_RANGE / top), 1e-12)
    bias = (high + low) / 2 - scale * (top / 2)
    for _ in range(FITTED_ROUNDS):
        codes = mx.clip(mx.round((groups - bias) / scale), 0, top)
        centre = codes.mean(-1, keepdims=True)
        spread = mx.square(codes - centre).sum(-1, keepdims=True)
        slope = ((codes - centre) * (groups - mean)).sum(-1, keepdims=True) / mx.maximum(spread, 1e-12)
        scale = mx.where(spread > 0, mx.maximum(slope, 1e-12), scale)
        bias = mean - scale * centre
    scale, bias = scale.astype(weight.dtype), bias.astype(weight.dtype)
    codes = mx.clip(mx.round((groups - bias.astype(mx.float32)) / scale.astype(mx.float32)), 0, top)
    return pack_codes(codes.reshape(weight.shape).astype(mx.uint32), spec.bits), scale[..., 0], bias[..., 0]


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes (out, in) as the words that MLX reads: the codes' bits one after another, lowest first, 32 to a word."""
    codes = codes.reshape(codes.shape[0], -1, 32)
    words = [mx.zeros(codes.shape[:2], mx.uint32)] * bits
    for k in range(32):
        word, start = divmod(k * bits, 32)
        words[word] = words[word] | (codes[..., k] << start)
        if start + bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., k] >> (32 - start))
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array | None, spec: Quantization) -> mx.array:
    """A packed weight (..., words) as (..., inputs), in the dtype of its scales."""
    if biases is None or on_gpu():
        return mx.dequantize(weight, scales, biases, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    if 32 % spec.bits:  # bits that do not divide a word: eight codes take ``bits`` bytes
        lead, octets = weight.shape[:-1], weight.view(mx.uint8)
        weight = byte_lanes(octets.reshape(*lead, -1, spec.bits))
    return _dequantize_lanes(weight, scales, biases, spec.bits, spec.group_size)


@mx.compile  # one kernel: mx.dequantize writes out what lies between on the CPU, of odd bits every single one
def byte_lanes(octets: mx.array) -> mx.array:
    """Bytes (..., n) as one number (...), the first byte lowest."""
    parts = [octets[..., k].astype(mx.uint64) << (8 * k) for k in range(octets.shape[-1])]
    return sum(parts[1:], parts[0])


@mx.compile
def _dequantize_lanes(lanes: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """Numbers (..., n) of several codes, the first one lowest, times their scales, and their biases: (..., inputs)."""
    inputs = scales.shape[-1] * group_size
    shifts = bits * mx.arange(inputs // lanes.shape[-1], dtype=lanes.dtype)
    grouped = lanes.reshape(*scales.shape, -1, 1)
    codes = ((grouped >> shifts) & (2**bits - 1)).astype(scales.dtype)
    return (codes * scales[..., None, None] + biases[..., None, None]).reshape(*scales.shape[:-1], inputs)
