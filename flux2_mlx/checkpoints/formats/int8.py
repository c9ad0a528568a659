"""Integers of 8 bits with float scales, as ComfyUI writes them, rotated ("convrot") or not. Only marked ones are read.

A rotated weight is the layer's own times R, in groups of a power of four of inputs; the scales belong to the product.
R is a Kronecker power of H4, half of ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1)), which is symmetric
and its own inverse, and so is R. Reference: docs/int8_convrot.md of https://github.com/leejet/stable-diffusion.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from ...lazy import LazyTensor
from .marks import Format, StoredLayer, times_scales

INT8_MARK = "int8_tensorwise"


def matches(layer: StoredLayer) -> bool:
    return layer.mark == INT8_MARK or layer.weight.dtype == mx.int8


def decode(layer: StoredLayer) -> Any:
    scale = layer.only_scale()
    if layer.mark != INT8_MARK or layer.weight.dtype != mx.int8:
        raise layer.unread()
    weight = times_scales(layer, scale)
    if not layer.rotation:
        return weight
    is_power = layer.rotation > 1 and layer.rotation == 1 << layer.rotation.bit_length() - 1
    if not is_power or layer.rotation.bit_length() % 2 == 0 or weight.ndim != 2 or weight.shape[1] % layer.rotation:
        raise CheckpointError(
            f"{layer.name} is {weight.shape}, and rotated (convrot) in groups of {layer.rotation}; these are powers of "
            "four that divide the inputs"
        )
    if isinstance(weight, LazyTensor):
        return replace(weight, read=lambda start, stop: rotate(weight.read(start, stop), layer.rotation))
    return rotate(weight, layer.rotation)


def rotate(weight: mx.array, size: int) -> mx.array:
    """A weight (out, in) times R, in groups of ``size`` inputs: H4 along each of its fours."""
    shape, inner = weight.shape, size // 4
    while inner:
        parts = mx.split(weight.reshape(-1, 4, inner), 4, axis=1)
        half = (parts[0] + parts[1] + parts[2] + parts[3]) * 0.5
        weight = mx.concatenate([half - part for part in reversed(parts)], axis=1)  # each row has one -1/2
        inner //= 4
    return weight.reshape(shape)


INT8 = Format((INT8_MARK,), matches, decode, rotates=True)
