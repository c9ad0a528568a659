"""The LoRA that is trained, in the layers that it changes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.deltas import LINEAR, linear_shape
from ..errors import InputError, summarize
from ..models.flux2 import FluxKlein
from .options import TrainingOptions

BLOCKS = re.compile(r"(single_)?transformer_blocks\.")


class Adapter(nn.Module):
    """A LoRA that is trained: down (R, inputs) and up (outputs, R), in float32, computed with in the dtype of x.

    down is drawn as torch draws a linear layer's weight, uniform within 1 / sqrt(inputs); up is zero, so that nothing
    is changed to begin with.
    """

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__()
        bound = inputs**-0.5
        self.down = mx.random.uniform(-bound, bound, (rank, inputs), key=key)
        self.up = mx.zeros((outputs, rank))
        self._scale, self._dropout, self._key = scale, dropout, key
        self._is_off = False

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        """As adapters.deltas.LoRADelta."""
        if self._is_off:
            return out
        if self.training and self._dropout:
            # By a key of its own: blocks that are computed again must leave out the same.
            kept = mx.random.bernoulli(1 - self._dropout, x.shape, key=self._key)
            x = mx.where(kept, x / (1 - self._dropout), mx.zeros_like(x))
        thin = (x @ self.down.astype(x.dtype).T) * self._scale
        return mx.addmm(out, thin, self.up[start:stop].astype(x.dtype).T)


def targeted(model: FluxKlein, targets: Sequence[str]) -> dict[str, Any]:
    """The linear layers whose path has one of the targets as a part, as "to_q", "attn" or "transformer_blocks.0" are;
    without targets all of the blocks'.

    Raises:
        InputError: for a target that no layer has, with one that is near.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LINEAR)}
    found: dict[str, Any] = {}
    for target in targets:
        own = {path: layer for path, layer in layers.items() if f".{target}." in f".{path}."}
        if not own:
            parts = {part for path in layers for part in path.split(".") if not part.isdecimal()}
            near = difflib.get_close_matches(target, sorted(parts), n=1) or sorted(parts)
            raise InputError(f"no layer has {target!r} in its path; there are {summarize(near, 8)}")
        found |= own
    wanted = found if targets else {path: layer for path, layer in layers.items() if BLOCKS.match(path)}
    return {path: layer for path, layer in layers.items() if path in wanted}


def adapter_size(model: FluxKlein, options: TrainingOptions) -> int:
    """Numbers in the LoRA that add_adapters makes."""
    return options.rank * sum(sum(linear_shape(layer)) for layer in targeted(model, options.targets).values())


def add_adapters(model: FluxKlein, options: TrainingOptions) -> dict[str, Adapter]:
    """Let the targeted layers of a model learn a LoRA, and nothing else of it; by their paths."""
    model.freeze()
    layers = targeted(model, options.targets)
    keys = mx.random.split(mx.random.key(options.seed), len(layers))
    alpha = options.rank if options.alpha is None else options.alpha
    adapters = {}
    for key, (path, layer) in zip(keys, layers.items(), strict=True):
        adapters[path] = Adapter(*linear_shape(layer), options.rank, alpha / options.rank, options.dropout, key)
        layer.deltas = [adapters[path]]
    return adapters
