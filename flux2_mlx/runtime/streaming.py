"""Streaming: run a model that does not fit into memory, its blocks read from disk as the computation comes to them.

model -> stream -> the same model, called as before: in memory are its weights outside of the blocks, the block at
work, and the next one, which is read meanwhile
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import attrgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.load import load_all, load_weights, needs_conversion, start_reading
from ..device import parts_of, weights_of
from ..errors import InputError
from ..families import PARTS
from ..quantization.layers import autotune

BLOCK = re.compile(r"\D+\.\d+\.")  # the start of a name with a number in it


def block_paths(model: nn.Module) -> list[str]:
    """A model's blocks in the order in which they run, as prefixes of their weights' names; empty for a model that has
    none.
    """
    lists = next((part.blocks for part in PARTS.values() if isinstance(model, part.module)), ())
    return [f"{name}.{k}." for name in lists for k in range(len(attrgetter(name)(model)))]


def streamed_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights that are in memory together when it is streamed."""
    blocks = dict.fromkeys(block_paths(model), 0)
    rest = 0
    for name, array in weights_of(model).items():
        path = BLOCK.match(name)
        if path is not None and path[0] in blocks:
            blocks[path[0]] += array.nbytes
        else:
            rest += array.nbytes
    return rest + max(map(sum, pairwise([*blocks.values(), 0])), default=0)


def stream(model: nn.Module, load: Callable[[], nn.Module], dtype: mx.Dtype) -> Iterator[int]:
    """Bring into memory what a model has outside of its blocks, and let these be read from disk at every call.

    Args:
        model: a FluxKlein or Qwen3TextEncoder with lazy weights.
        load: opens the same model anew, its weights lazy; called once a pass over the blocks, since an array that was
            read stays in memory as long as it exists.
        dtype: the dtype of the model's activations.

    Yields:
        the bytes of each weight that is brought into memory.

    Raises:
        InputError: for a model that was changed since it was opened, whose blocks are not those of its files.
        CheckpointError: see load_weights.
    """
    paths = tuple(block_paths(model))
    if _shapes(model) != _shapes(load()):
        raise InputError(
            f"the {type(model).__name__} was changed after it was opened, and its blocks would be read from the files; "
            'use memory="staged" or "resident"'
        )
    yield from load_weights(model, lambda name: not name.startswith(paths))
    autotune(model, dtype, lambda path: not path.startswith(paths))
    model.block_runner = _Blocks(model, load, dtype)


def is_streamed(model: nn.Module) -> bool:
    return isinstance(getattr(model, "block_runner", None), _Blocks)


def _shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    return {name: (array.shape, array.dtype) for name, array in weights_of(model).items()}


class _Blocks:
    """The block runner of a streamed model: it reads each block from disk, while the one before it is computed."""

    def __init__(self, model: nn.Module, load: Callable[[], nn.Module], dtype: mx.Dtype):
        self.load, self.dtype = load, dtype
        self.paths = block_paths(model)
        parts = parts_of(model)
        self.numbers = {id(parts[path[:-1]]): k for k, path in enumerate(self.paths)}
        # The model as it was opened for this pass, with the blocks that are still to be read.
        self.unread: nn.Module = nn.Module()

    def __call__(self, block: nn.Module, *arguments: Any, may_end: bool = False) -> Any:
        number = self.numbers[id(block)]
        if number == 0:
            self.unread = self.load()
        loaded = self._take(self.paths[number])
        out = loaded(*arguments)
        mx.async_eval(out)
        for path in () if may_end else self.paths[number + 1 : number + 2]:
            if not needs_conversion(self.unread, path):
                start_reading(self.unread, path)
        mx.eval(out)
        return out

    def _take(self, path: str) -> nn.Module:
        """Load a block and take it out of ``unread``, so that it is freed once its caller is done with it."""
        load_all(self.unread, lambda name: name.startswith(path))
        *parents, last = path[:-1].split(".")
        blocks: Any = self.unread
        for name in parents:
            blocks = blocks[name]
        block: nn.Module = blocks[int(last)]
        blocks[int(last)] = nn.Module()
        autotune(block, self.dtype)
        return block
