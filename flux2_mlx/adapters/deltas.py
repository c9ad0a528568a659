"""The deltas that adapters add to a layer: LoRA, LoKr, full differences, DoRA as modules.

References: Hu et al. 2021 (LoRA), Yeh et al. 2023 (LyCORIS: LoHa, LoKr), Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..models.layers import Linear, RMSNorm
from ..models.names.flux2 import Rows
from ..quantization.layers import QuantizedLinear

ROWS_AT_ONCE = 4096  # rows of a weight whose lengths are computed at one time


class LoRADelta(nn.Module):
    """LoRA, and LoHa as one of more ranks: x (..., inputs) times down (R, inputs), scales (R,) and up (outputs, R)."""

    def __init__(self, down: mx.array, up: mx.array, scales: mx.array):
        super().__init__()
        self.down, self.up, self.scales = down, up, scales

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        """``out`` with this delta's output added, for the layer's outputs start to stop; see models.layers."""
        thin = (x @ self.down.T) * self.scales
        return mx.addmm(out, thin, self.up[start:stop].T)

    def weight_delta(self, weight: mx.array, start: int, stop: int) -> mx.array:
        """The delta of rows start to stop of a layer's weight; ``weight`` has these rows, in float32."""
        return (self.up[start:stop].astype(mx.float32) * self.scales) @ self.down.astype(mx.float32)


class LoKrDelta(nn.Module):
    """LoKr: x (..., b * d) times the Kronecker product of left (a, b) and right (c, d), which is never formed; its
    a * c outputs stand where spans put them among the layer's.
    """

    def __init__(self, left: mx.array, right: mx.array, spans: Sequence[Span], outputs: int):
        super().__init__()
        self.left, self.right = left, right
        self._spans, self._outputs = tuple(spans), outputs

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        inner = x.reshape(-1, self.left.shape[1], self.right.shape[1]) @ self.right.T
        full = (self.left @ inner).reshape(inner.shape[0], -1)
        placed = place_rows(full.T, self._spans, self._outputs)[start:stop].T
        return out + placed.reshape(*x.shape[:-1], -1)

    def weight_delta(self, weight: mx.array, start: int, stop: int) -> mx.array:
        full = mx.kron(self.left.astype(mx.float32), self.right.astype(mx.float32))
        return place_rows(full, self._spans, self._outputs)[start:stop]


class FullDelta(nn.Module):
    """A full difference: of a layer's weight (outputs, inputs), or of a norm's (size,)."""

    def __init__(self, change: mx.array, scale: float):
        super().__init__()
        self.change, self.scale = change, mx.array(scale)

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        return out + self.scale * (x @ self.change[start:stop].T)

    def weight_delta(self, weight: mx.array, start: int, stop: int) -> mx.array:
        return self.scale * self.change[start:stop].astype(mx.float32)


class DoRADelta(nn.Module):
    """DoRA: the rows of the weight with another delta are brought to given lengths; a share of that change is added.

    Attributes:
        dora_ratio: (outputs,) the given lengths over those of the rows with the delta; ones until it is set, which it
            needs not be for what is merged.
    """

    def __init__(self, delta: LoRADelta | LoKrDelta, lengths: mx.array, scale: float):
        super().__init__()
        self.delta, self.scale = delta, mx.array(scale)
        self._lengths = lengths  # (outputs,), NaN for rows that keep their own
        self.dora_ratio = mx.ones(lengths.shape)

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        dora_ratio = self.dora_ratio[start:stop]
        delta = self.delta(x, base, mx.zeros_like(base), start, stop)
        return out + self.scale * ((dora_ratio - 1) * base + dora_ratio * delta)

    def weight_delta(self, weight: mx.array, start: int, stop: int) -> mx.array:
        whole = weight + self.delta.weight_delta(weight, start, stop)
        return self.scale * (self._ratio(whole, start, stop)[:, None] * whole - weight)

    def find_ratio(self, rows: Callable[[int, int], mx.array]) -> mx.array:
        """dora_ratio (outputs,) of a layer; ``rows`` gives rows start to stop of its weight in float32."""
        parts, size = [], self._lengths.size
        for start in range(0, size, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, size)
            weight = rows(start, stop)
            parts.append(self._ratio(weight + self.delta.weight_delta(weight, start, stop), start, stop))
            mx.eval(parts)
        return mx.concatenate(parts)

    def _ratio(self, whole: mx.array, start: int, stop: int) -> mx.array:
        lengths = self._lengths[start:stop].astype(mx.float32)
        own = mx.maximum(mx.linalg.norm(whole, axis=1), 1e-12)
        return mx.where(mx.isnan(lengths), 1.0, lengths / own)


Delta = LoRADelta | LoKrDelta | FullDelta | DoRADelta
Span = tuple[int, int, int]  # (start, stop in the layer's outputs, offset in the file's)


def spans_of(rows: Sequence[Rows]) -> dict[str, list[Span]]:
    """By layer, where its outputs are in a layer of a file, in the order of the layer's outputs."""
    spans: dict[str, list[Span]] = {}
    at = 0
    for path, start, stop in rows:
        spans.setdefault(path, []).append((start, stop, at))
        at += stop - start
    return {path: sorted(own) for path, own in spans.items()}


def place_rows(array: mx.array, spans: Sequence[Span], size: int, filling: float = 0.0) -> mx.array:
    """Rows of a layer of a file where spans put them among ``size`` rows, with ``filling`` between them."""
    parts, at = [], 0
    for start, stop, first in [*spans, (size, size, 0)]:
        if start > at:
            parts.append(mx.full((start - at, *array.shape[1:]), filling, array.dtype))
        if stop > start:
            parts.append(array[first : first + stop - start])
        at = stop
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


LINEAR = (Linear, QuantizedLinear)
ADAPTED = (*LINEAR, RMSNorm)  # layers that adapters change


def linear_shape(layer: Linear | QuantizedLinear) -> tuple[int, int]:
    """(outputs, inputs), of a packed layer too."""
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.spec.bits if isinstance(layer, QuantizedLinear) else columns


def weight_shape(layer: Linear | QuantizedLinear | RMSNorm) -> tuple[int, ...]:
    """(outputs, inputs), or (size,) of a norm."""
    return tuple(layer.weight.shape) if isinstance(layer, RMSNorm) else linear_shape(layer)
