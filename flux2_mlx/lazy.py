"""Weights that are still to be read: what MLX computes from arrays of files, and tensors that are read row by row.

A weight is an array, as MLX reads it from a file or as a caller made it; a Derived one, which is computed from such
arrays; or a LazyTensor, for formats that MLX does not read lazily. On a GPU too it is the CPU that reads a file. A
graph with both has a GPU's commands wait for the disk, and macOS ends those that wait for about five seconds. So what
a weight is made of is read before anything is computed from it (``read``, ``sources_of``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import mlx.core as mx

# Rows of a LazyTensor that are converted at one time.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Derived:
    """A weight that is computed from others.

    Attributes:
        array: the weight, lazy.
        sources: the arrays that it is computed from, which are to be read first.
    """

    array: mx.array
    sources: tuple[mx.array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.array.dtype

    @property
    def ndim(self) -> int:
        return self.array.ndim


@dataclass(frozen=True)
class LazyTensor:
    """A weight in a format that MLX cannot read lazily: read and converted when its turn comes.

    Attributes:
        read: gives rows start to stop, converted.
        sources: the arrays that ``read`` computes from, which are to be read first.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[int, int], mx.array]
    sources: tuple[mx.array, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def load(self) -> mx.array:
        """The whole tensor, converted some rows at a time."""
        mx.eval(self.sources)
        parts = []
        for start in range(0, self.shape[0], ROWS_AT_ONCE):
            parts.append(self.read(start, min(start + ROWS_AT_ONCE, self.shape[0])))
            mx.eval(parts)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def array_of(weight: Any) -> Any:
    """The lazy array of a weight; a LazyTensor has none and stays."""
    return weight.array if isinstance(weight, Derived) else weight


def sources_of(weight: Any) -> tuple[mx.array, ...]:
    """The arrays that are to be read before a weight is computed; an array is its own."""
    return weight.sources if isinstance(weight, (Derived, LazyTensor)) else (weight,)


def derive(function: Callable[..., mx.array], *weights: Any) -> Derived:
    """The weight that a function of others' arrays gives; of no LazyTensors."""
    sources = tuple(source for weight in weights for source in sources_of(weight))
    return Derived(function(*map(array_of, weights)), sources)


def read(weight: Any) -> mx.array:
    """A weight whose sources are in memory; a LazyTensor is converted, a Derived one is still to be computed."""
    mx.eval(sources_of(weight))
    return weight.load() if isinstance(weight, LazyTensor) else array_of(weight)


def cast(weight: Any, dtype: mx.Dtype) -> Any:
    """A weight in another dtype; integers, which are packed, stay."""
    if weight.dtype in INTEGERS or weight.dtype == dtype:
        return weight
    if isinstance(weight, LazyTensor):
        return replace(weight, dtype=dtype, read=lambda start, stop: weight.read(start, stop).astype(dtype))
    return derive(lambda array: array.astype(dtype), weight)


INTEGERS = (mx.uint8, mx.int8, mx.uint32, mx.int64)


def read_rows(weight: Any, start: int, stop: int) -> mx.array:
    """Rows start to stop of a weight whose sources were read; those of a LazyTensor are converted."""
    return weight.read(start, stop) if isinstance(weight, LazyTensor) else array_of(weight)[start:stop]


def slice_rows(weight: Any, start: int, stop: int) -> Any:
    if isinstance(weight, LazyTensor):
        shape = (stop - start, *weight.shape[1:])
        return replace(weight, shape=shape, read=lambda a, b: weight.read(start + a, start + b))
    return derive(lambda array: array[start:stop], weight)


def concat_rows(parts: list[Any]) -> Any:
    """The rows of some weights as one."""
    if not any(isinstance(part, LazyTensor) for part in parts):
        return derive(lambda *arrays: mx.concatenate(list(arrays)), *parts)
    ends = list(accumulate(part.shape[0] for part in parts))

    def read(start: int, stop: int) -> mx.array:
        rows = []
        for part, end in zip(parts, ends, strict=True):
            first = end - part.shape[0]
            if start < end and stop > first:
                rows.append(read_rows(part, max(start - first, 0), min(stop, end) - first))
        return mx.concatenate(rows)

    sources = tuple(source for part in parts for source in sources_of(part))
    return LazyTensor((ends[-1], *parts[0].shape[1:]), parts[0].dtype, read, sources)
