"""Gradient checkpointing: the backward pass recomputes each block."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten


def checkpoint_block(block: nn.Module, *arguments: Any, may_end: bool = False) -> Any:
    """A block runner (see models.layers) whose backward pass computes the block again, so that its intermediates are
    not kept. Training passes no KV.

    One block is recomputed after another: it waits for the gradient of its outputs, and the block before it for the
    gradients of its weights. MLX's own checkpointing leaves the order open, and then holds intermediates of several.

    The last block is not: its backward pass is what comes next.
    """
    if may_end:
        return block(*arguments)
    weights, inputs = named_arrays(block.trainable_parameters()), named_arrays(arguments)
    count = len(weights)

    def forward(*arrays: mx.array) -> list[mx.array]:
        block.update(tree_unflatten(list(zip(weights, arrays[:count], strict=True))) if weights else {})
        given = dict(zip(inputs, arrays[count:], strict=True))
        out = block(*tree_map_with_path(given.get, arguments))
        return list(out) if isinstance(out, tuple) else [out]

    checkpointed = mx.custom_function(forward)

    @checkpointed.vjp
    def backward(arrays: Any, cotangents: Any, _: Any) -> list[mx.array]:
        _, gradients = mx.vjp(forward, mx.depends(list(arrays), list(cotangents)), list(cotangents))
        own, passed_on = gradients[:count], gradients[count:]
        # Each on its own: those that nobody asks for, of rotation tables and modulations, are then not computed.
        return [*own, *(mx.depends(gradient, own) for gradient in passed_on)] if own else gradients

    out: Any = checkpointed(*weights.values(), *inputs.values())
    return tuple(out) if len(out) > 1 else out[0]


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their names in it."""
    leaves = cast("list[tuple[str, Any]]", tree_flatten(tree))
    return {name: leaf for name, leaf in leaves if isinstance(leaf, mx.array)}
