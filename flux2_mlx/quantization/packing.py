"""Packing a weight into integers and back, as mlx.core.quantize lays them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
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


@cache
def has_one_bit() -> bool:
    """Whether MLX multiplies with weights of one bit; it does from 0.32.4 on."""
    try:
        mx.quantize(mx.zeros((1, 32)), group_size=32, bits=1)
    except ValueError:
        return False
    return True


def widen_one_bit(words: mx.array) -> mx.array:
    """Codes of one bit in words (..., n) as the same codes of two bits (..., 2 n): a word's halves, lower first, and in
    each a zero above every bit, which spreads by halves of halves.
    """
    spread = mx.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(*words.shape[:-1], -1)
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        spread = (spread | spread << shift) & mask
    return spread


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
    is_fitted = spec.mode == "affine" and spec.bits <= FITTED_BITS
    packing = _quantize_fitted if is_fitted else quantize_rtn
    rows = max(1, PACKED_AT_ONCE // weight.shape[1])
    dtype = weight.dtype if dtype is None else dtype
    parts = []
    for top in range(0, weight.shape[0], rows):
        parts.append(packing(weight[top : top + rows].astype(dtype), spec))
        if now:
            mx.eval(parts[-1])
    words, *scales = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
    return words, *(array.astype(dtype) if is_fitted else array for array in scales)


def quantize_rtn(weight: mx.array, spec: Quantization) -> tuple[mx.array, ...]:
    """The same arrays as quantize_weight's, by mlx.core.quantize: one lazy operation."""
    return tuple(mx.quantize(weight, group_size=spec.group_size, bits=spec.bits, mode=spec.mode))


def _quantize_fitted(weight: mx.array, spec: Quantization) -> tuple[mx.array, ...]:
    """fit_groups, compiled on a GPU."""
    fit = _fit_compiled if on_gpu() else fit_groups  # a compiler takes longer for these kernels than a CPU to pack
    return tuple(fit(weight, spec.bits, spec.group_size))


def fit_groups(weight: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Words, scales and biases of the least squared error, these rounded to the weight's dtype but in float32. Found by
    turns: the nearest codes for a scale and a bias, then the scale and bias of the regression of the weights on those
    codes.

    The codes of a group's least and greatest weight waste the range on two weights; a search for better ends without
    data is that of Half-Quadratic Quantization (Badri and Shaji, 2023), here with the squared error.

    It is written for mx.compile, which makes one kernel of what lies between two sums. So two arrays that are summed
    alike are one with an axis more, a group hands on nothing but its sums, and means are written anew for each kernel
    that has them, by other factors of the same product, which is exact for groups of a power of two: of two kernels'
    common term mx.compile would make a third kernel.
    """
    top, shape = 2**bits - 1, weight.shape
    weight = weight.reshape(1, shape[0], -1, group_size)
    low, high = (end(weight, axis=-1, keepdims=True).astype(mx.float32) for end in (mx.min, mx.max))
    scale = mx.maximum((high - low) * (FITTED_RANGE / top), 1e-12)
    bias = (high + low) / 2 - scale * (top / 2)
    second = mx.array([False, True]).reshape(2, 1, 1, 1)

    def nearest(groups: mx.array) -> mx.array:
        return mx.clip(mx.round((groups - bias) / scale), 0, top)

    groups = weight.astype(mx.float32)
    both = mx.where(second, groups, nearest(groups))
    codes, groups = mx.split(both, 2)
    total, sums = mx.split(both.sum(-1, keepdims=True), 2)
    from_mean = groups - sums / group_size
    for k in range(FITTED_ROUNDS):
        if k > 0:
            codes = nearest(groups)
            total = codes.sum(-1, keepdims=True)
        distance = codes - total / group_size
        if k == 0:  # the first kernel keeps the weights' distances for the others
            first, third = (mx.array([k == place for k in range(3)]).reshape(3, 1, 1, 1) for place in (0, 2))
            factors = mx.where(first, distance, from_mean)
            products, from_mean = mx.split(mx.where(third, from_mean, distance * factors), [2])
        else:
            products = distance * mx.where(second, from_mean, distance)
        spread, slope = mx.split(products.sum(-1, keepdims=True), 2)
        scale = mx.maximum(slope / mx.maximum(spread, 1e-12), 1e-12)  # of equal weights both sums are 0
        mean = sums * 0.5**k * (2**k / group_size)
        bias = mean - scale * (total * (1 / group_size))
    rounded = mx.where(second, bias, scale).astype(weight.dtype).astype(mx.float32)
    scale, bias = mx.split(rounded, 2)
    count = 8 // math.gcd(8, bits)
    words = pack_lanes([nearest(groups[..., k::count]) for k in range(count)], bits)
    return words.reshape(shape[0], -1), scale.reshape(shape[0], -1), bias.reshape(shape[0], -1)


_fit_compiled = mx.compile(fit_groups)


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., inputs) as the words (..., words) that MLX reads: their bits one after another, lowest first."""
    count = 8 // math.gcd(8, bits)
    return pack_lanes([codes[..., k::count] for k in range(count)], bits)


def pack_lanes(lanes: Sequence[mx.array], bits: int) -> mx.array:
    """pack_codes of codes that are given as the first of each few that take whole bytes, the second of each, and so
    on (..., inputs / few).
    """
    size = len(lanes) * bits // 8  # bytes of one code of each lane
    dtype = mx.uint8 if size == 1 else mx.uint32 if size <= 4 else mx.uint64
    parts = [lane.astype(dtype) << (bits * k) for k, lane in enumerate(lanes)]
    while len(parts) > 1:  # as a tree, since mx.compile fuses no long chains
        parts = [a | b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    octets = parts[0][..., None].view(mx.uint8)[..., :size]
    return octets.reshape(*lanes[0].shape[:-1], -1).view(mx.uint32)


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
