"""Tensors that are read and converted row by row when they are wanted, for formats that MLX does not read lazily."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx

# Rows of a LazyTensor that are converted at one time.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class LazyTensor:
    """A weight in a format that MLX cannot read lazily: read and converted when its turn comes.

    Attributes:
        read: gives rows start to stop, converted.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[int, int], mx.array]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def load(self) -> mx.array:
        """The whole tensor, converted some rows at a time."""
        parts = []
        for start in range(0, self.shape[0], ROWS_AT_ONCE):
            parts.append(self.read(start, min(start + ROWS_AT_ONCE, self.shape[0])))
            mx.eval(parts)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def cast(weight: Any, dtype: mx.Dtype) -> Any:
    """A weight in another dtype; integers, which are packed, stay."""
    if weight.dtype in INTEGERS:
        return weight
    if isinstance(weight, LazyTensor):
        return LazyTensor(weight.shape, dtype, lambda start, stop: weight.read(start, stop).astype(dtype))
    return weight.astype(dtype)


INTEGERS = (mx.uint8, mx.int8, mx.uint32, mx.int64)


def read_rows(weight: Any, start: int, stop: int) -> mx.array:
    """Rows start to stop of a weight; those of a LazyTensor are converted."""
    return weight.read(start, stop) if isinstance(weight, LazyTensor) else weight[start:stop]


def slice_rows(weight: Any, start: int, stop: int) -> Any:
    if isinstance(weight, LazyTensor):
        shape = (stop - start, *weight.shape[1:])
        return LazyTensor(shape, weight.dtype, lambda a, b: weight.read(start + a, start + b))
    return weight[start:stop]


def concat_rows(parts: list[Any]) -> Any:
    """The rows of some weights as one."""
    if not any(isinstance(part, LazyTensor) for part in parts):
        return mx.concatenate(parts)
    ends = list(accumulate(part.shape[0] for part in parts))

    def read(start: int, stop: int) -> mx.array:
        rows = []
        for part, end in zip(parts, ends, strict=True):
            first = end - part.shape[0]
            if start < end and stop > first:
                rows.append(read_rows(part, max(start - first, 0), min(stop, end) - first))
        return mx.concatenate(rows)

    return LazyTensor((ends[-1], *parts[0].shape[1:]), parts[0].dtype, read)
