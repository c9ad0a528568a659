"""What the models' blocks share: how they are called, and a product of a part of a layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def run_block(block: nn.Module, *arguments: Any, method: str = "__call__") -> Any:
    """What the block's method gives for its arguments. Streaming puts its own way in the place of this one."""
    return getattr(block, method)(*arguments)


def outputs(layer: nn.Module, x: mx.array, start: int, stop: int) -> mx.array:
    """Outputs start to stop of a linear layer without bias: (..., in) to (..., stop - start).

    The wide layers are multiplied in parts, so that neither all of their outputs nor, of a packed one, all of its
    unpacked weight is in memory at one time. A layer of another kind, which a caller may have put there, computes all.
    """
    if isinstance(layer, nn.Linear):
        return x @ layer.weight[start:stop].T
    part = getattr(layer, "outputs", None)  # of quantize.QuantizedLinear
    return layer(x)[..., start:stop] if part is None else part(x, start, stop)
