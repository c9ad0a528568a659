"""What the models' blocks share: how they are called, and their linear layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def run_block(block: nn.Module, *arguments: Any, method: str = "__call__", may_end: bool = False) -> Any:
    """What the block's method gives for its arguments. Streaming puts its own way in the place of this one: it reads
    the next block meanwhile, unless the pass may end with this one.
    """
    return getattr(block, method)(*arguments)


class Linear(nn.Linear):
    """x (..., inputs) to (..., outputs), without bias.

    Attributes:
        deltas: where LoRAs are loaded, what they add; see added.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return added(self, x, x @ self.weight.T)

    def outputs(self, x: mx.array, start: int, stop: int) -> mx.array:
        """Those from start to stop: (..., stop - start)."""
        return added(self, x, x @ self.weight[start:stop].T, start, stop)


def added(layer: nn.Module, x: mx.array, out: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
    """What a layer with ``deltas`` gives for x, where its weight alone gives ``out``: outputs from start to stop."""
    base = out
    for delta in layer.get("deltas", ()):
        out = delta(x, base, out, start, stop)
    return out


def outputs(layer: nn.Module, x: mx.array, start: int, stop: int) -> mx.array:
    """Outputs start to stop of a linear layer without bias: (..., in) to (..., stop - start).

    The wide layers are multiplied in parts, so that neither all of their outputs nor, of a packed one, all of its
    unpacked weight is in memory at one time. A layer of another kind, which a caller may have put there, computes all.
    """
    part = getattr(layer, "outputs", None)
    return layer(x)[..., start:stop] if part is None else part(x, start, stop)
