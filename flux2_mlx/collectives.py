"""What processes tell each other: each collective is evaluated on its own, by the CPU.

In a graph with a computation, a GPU's commands would wait for the other process, and macOS ends those that wait for
about five seconds. So what is to be sent is computed before, and what comes is there before anything uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


def all_gather(array: mx.array, group: mx.distributed.Group) -> mx.array:
    """The arrays (N, ...) of all processes, one after another along the first axis."""
    return _evaluated(mx.distributed.all_gather, array, group)


def all_sum(array: mx.array, group: mx.distributed.Group) -> mx.array:
    """The sum of all processes' arrays."""
    return _evaluated(mx.distributed.all_sum, array, group)


def sum_tree(tree: Any, group: mx.distributed.Group) -> Any:
    """The sums of all processes' arrays in a tree, of one dtype, in one message."""
    leaves = cast("list[tuple[str, mx.array]]", tree_flatten(tree))
    total = all_sum(mx.concatenate([array.reshape(-1) for _, array in leaves]), group)
    parts = mx.split(total, list(accumulate(array.size for _, array in leaves))[:-1])
    return tree_unflatten([(name, part.reshape(own.shape)) for (name, own), part in zip(leaves, parts, strict=True)])


def _evaluated(collective: Callable[..., mx.array], array: mx.array, group: mx.distributed.Group) -> mx.array:
    mx.eval(array)
    result = collective(array, group=group, stream=mx.cpu)
    mx.eval(result)
    return result
