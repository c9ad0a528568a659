"""Shared by the models: how they call their blocks, and their linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave MLX's random state as it was: ``nn.Linear`` and others draw initial weights that nobody evaluates, so each
    building would change the caller's random numbers, and make the state grow by the splits it is to be made of.
    """
    high, low = map(int, np.array(cast("list[mx.array]", mx.random.state)[0]))
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # the seed whose key is that state


class BlockRunner(Protocol):
    """How a model calls its blocks; another one is assigned to ``model.block_runner`` to stream or recompute them."""

    def __call__(self, block: nn.Module, *arguments: Any, may_end: bool = False) -> Any:
        """Give what the block gives for the arguments.

        Args:
            arguments: arrays, lists of them, a BlockKV or None.
            may_end: whether the model may call no block after this one, so that reading ahead, or computing it again in
                the backward pass, could be in vain.
        """
        ...


def run_block(block: nn.Module, *arguments: Any, may_end: bool = False) -> Any:
    return block(*arguments)


class LinearAdapter(Protocol):
    """A change of a linear layer that stands beside its weight: LoRA, LoKr, DoRA; see adapters.deltas."""

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        """Give ``out`` with this adapter's change added.

        Args:
            x: (..., inputs) the layer's input.
            base: (..., stop - start) what the weight's rows start to stop give for x, without any adapter.
            out: base with the changes of the adapters before this one.
            start, stop: rows of the weight; a stop of None means all from start on.
        """
        ...


class Linear(nn.Linear):
    """x (..., inputs) to (..., outputs), without bias.

    Attributes:
        deltas: the adapters beside the weight, each a LinearAdapter. Absent where there are none: an nn.Module is a
            dict of its parameters, and a checkpoint must have all of them.
    """

    deltas: list[nn.Module]

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return apply_adapters(self, x, x @ self.weight.T)

    def outputs(self, x: mx.array, start: int, stop: int) -> mx.array:
        """Rows start to stop of the weight applied to x: (..., inputs) to (..., stop - start)."""
        return apply_adapters(self, x, x @ self.weight[start:stop].T, start, stop)


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight may have differences beside it, ``deltas``: adapters.deltas.FullDelta of one dimension."""

    deltas: list[nn.Module]

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight
        for delta in self.get("deltas", ()):
            weight = weight + delta.scale * delta.change
        return mx.fast.rms_norm(x, weight, self.eps)


def apply_adapters(layer: nn.Module, x: mx.array, base: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
    """The outputs start to stop of a layer for x, with its adapters; ``base`` are those without adapters."""
    out = base
    adapters: Sequence[LinearAdapter] = layer.get("deltas", ())
    for adapter in adapters:
        out = adapter(x, base, out, start, stop)
    return out


def outputs(layer: nn.Module, x: mx.array, start: int, stop: int) -> mx.array:
    """Outputs start to stop of a linear layer without bias: (..., inputs) to (..., stop - start).

    The wide layers are multiplied in parts, so that neither all of their outputs nor, of a packed one, all of its
    unpacked weight is in memory at one time. A layer of another kind, which a caller may have put there, computes all.
    """
    part = getattr(layer, "outputs", None)
    return layer(x)[..., start:stop] if part is None else part(x, start, stop)
