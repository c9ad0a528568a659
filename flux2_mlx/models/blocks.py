"""What the models' blocks share: how they are called, and their linear layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def run_block(block: nn.Module, *arguments: Any, method: str = "__call__") -> Any:
    """What the block's method gives for its arguments. Streaming puts its own way in the place of this one."""
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

    def joint(self, first: mx.array, second: mx.array) -> mx.array:
        """Of inputs that are in two parts, (..., inputs of each)."""
        if self.get("deltas"):
            return self(mx.concatenate([first, second], axis=-1))
        return joint_product(first, second, self.weight)


def joint_product(first: mx.array, second: mx.array, weight: mx.array) -> mx.array:
    """The inputs (..., a) and (..., b) times a weight (outputs, a + b), without putting them side by side in memory."""
    cut = first.shape[-1]
    return mx.addmm(first @ weight[:, :cut].T, second, weight[:, cut:].T)


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


def joint(layer: nn.Module, first: mx.array, second: mx.array) -> mx.array:
    """A linear layer without bias of inputs that are in two parts: (..., a) and (..., b) to (..., outputs)."""
    own = getattr(layer, "joint", None)
    if own is None or first.dtype == mx.float16:  # which a part of the sum may overflow
        return layer(mx.concatenate([first, second], axis=-1))
    return own(first, second)
