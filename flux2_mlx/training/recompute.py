"""Gradient checkpointing: blocks are computed again in the backward pass."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten


def checkpoint_block(block: nn.Module, *arguments: Any, method: str = "__call__", may_end: bool = False) -> Any:
    """As models.blocks.run_block, but the backward pass computes the block again, instead of keeping what is inside.

    One block after another: its computing again waits for the gradient of its outputs, and the block before it for the
    gradients of its weights. MLX's own checkpointing leaves the order open, and then holds the insides of several.
    """
    weights, inputs = named_arrays(block.trainable_parameters()), named_arrays(arguments)
    count = len(weights)

    def forward(*arrays: mx.array) -> list[mx.array]:
        block.update(tree_unflatten(list(zip(weights, arrays[:count], strict=True))) if weights else {})
        given = dict(zip(inputs, arrays[count:], strict=True))
        out = getattr(block, method)(*tree_map_with_path(lambda name, _: given.get(name), arguments))
        return list(out) if isinstance(out, tuple) else [out]

    checkpointed = mx.custom_function(forward)

    @checkpointed.vjp
    def backward(arrays: Any, cotangents: Any, _: Any) -> list[mx.array]:
        _, gradients = mx.vjp(forward, mx.depends(list(arrays), list(cotangents)), list(cotangents))
        own, passed_on = gradients[:count], gradients[count:]
        return [*own, *mx.depends(passed_on, own)] if own else gradients

    out: Any = checkpointed(*weights.values(), *inputs.values())
    return tuple(out) if len(out) > 1 else out[0]


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their names in it."""
    return {name: array for name, array in cast("list[tuple[str, Any]]", tree_flatten(tree)) if array is not None}
