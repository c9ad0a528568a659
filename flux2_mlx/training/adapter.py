"""A trainable LoRA, attached to the layers that it targets."""

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
    """A trainable LoRA of one layer: down (rank, inputs) and up (outputs, rank) in float32, cast to x's dtype in use.

    down is initialized as torch initializes a linear layer's weight, uniform within 1 / sqrt(inputs); up is zero, so
    that an untrained LoRA changes nothing.

    Attributes:
        enabled: False leaves the layer as it is without the LoRA.
    """

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__()
        bound = inputs**-0.5
        self.down = mx.random.uniform(-bound, bound, (rank, inputs), key=key)
        self.up = mx.zeros((outputs, rank))
        self._scale, self._dropout, self._dropout_key = scale, dropout, key
        self.enabled = True

    def set_dropout_key(self, key: mx.array) -> None:
        """Choose which inputs dropout leaves out, until the next key."""
        self._dropout_key = key

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        """Add the LoRA's output to ``out``; see adapters.deltas.LoRADelta."""
        if not self.enabled:
            return out
        if self.training and self._dropout:
            # MLX's global random state would give a block that is recomputed another mask.
            mask = mx.random.bernoulli(1 - self._dropout, x.shape, key=self._dropout_key)
            x = mx.where(mask, x / (1 - self._dropout), mx.zeros_like(x))
        low_rank = (x @ self.down.astype(x.dtype).T) * self._scale
        return mx.addmm(out, low_rank, self.up[start:stop].astype(x.dtype).T)


def target_layers(model: FluxKlein, targets: Sequence[str]) -> dict[str, Any]:
    """The linear layers, by path, whose path has a target as one of its parts, as "to_q", "attn" or
    "transformer_blocks.0"; without targets all linear layers of the blocks.

    Raises:
        InputError: for a target that is in no path, with the nearest part.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LINEAR)}
    matched: dict[str, Any] = {}
    for target in targets:
        own = {path: layer for path, layer in layers.items() if f".{target}." in f".{path}."}
        if not own:
            parts = {part for path in layers for part in path.split(".") if not part.isdecimal()}
            near = difflib.get_close_matches(target, sorted(parts), n=1) or sorted(parts)
            raise InputError(f"no layer has {target!r} in its path; there are {summarize(near, 8)}")
        matched |= own
    chosen = matched if targets else {path: layer for path, layer in layers.items() if BLOCKS.match(path)}
    return {path: layer for path, layer in layers.items() if path in chosen}


def adapter_size(model: FluxKlein, options: TrainingOptions) -> int:
    """Parameters of the LoRA that add_adapters makes."""
    return options.rank * sum(sum(linear_shape(layer)) for layer in target_layers(model, options.targets).values())


def add_adapters(model: FluxKlein, options: TrainingOptions) -> dict[str, Adapter]:
    """Freeze a model and attach a trainable LoRA to each target layer; the adapters by the layers' paths."""
    model.freeze()
    layers = target_layers(model, options.targets)
    keys = mx.random.split(mx.random.key(options.seed), len(layers))
    alpha = options.rank if options.alpha is None else options.alpha
    adapters = {}
    for key, (path, layer) in zip(keys, layers.items(), strict=True):
        adapters[path] = Adapter(*linear_shape(layer), options.rank, alpha / options.rank, options.dropout, key)
        layer.deltas = [adapters[path]]
    return adapters
