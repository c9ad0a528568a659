"""Quantization: which layers are packed into how few bits, the packed layers, and the packed transformer.

A packed layer keeps ``weight`` (integers in uint32 words), ``scales`` and, in the affine mode, ``biases``, one of each
for a group of inputs, as mlx.core.quantize makes them. It multiplies few rows with MLX's fused kernel, and many by
unpacking its weight first: with thousands of rows the fused product costs more than the unpacking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .checkpoints import bits_and_group
from .config import CheckpointError, FluxKleinParams, InputError
from .memory import weights_of
from .models.transformer import FluxKlein

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# Formats of 4 and 8 bits with floating point codes: (bits, group size), both fixed.
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}

# Rows of an input from which a packed layer unpacks its weight and multiplies densely.
DENSE_ROWS = 128


@dataclass(frozen=True)
class Quantization:
    """How a layer's weight is packed.

    Attributes:
        bits: a weight, without scales.
        group_size: inputs that share a scale.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".

    Raises:
        InputError: for a combination that MLX does not have.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode in FLOAT_MODES:
            if (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
                bits, group_size = FLOAT_MODES[self.mode]
                raise InputError(
                    f"{self.mode} has {bits} bits in groups of {group_size}, got {self.bits} in {self.group_size}"
                )
        elif self.mode != "affine":
            raise InputError(f"the mode must be affine, {', '.join(FLOAT_MODES)}, got {self.mode!r}")
        elif self.bits not in AFFINE_BITS or self.group_size not in AFFINE_GROUPS:
            raise InputError(
                f"affine quantization has {', '.join(map(str, AFFINE_BITS))} bits in groups of "
                f"{', '.join(map(str, AFFINE_GROUPS))}, got {self.bits!r} in {self.group_size!r}"
            )

    def check(self, layer: str, columns: int) -> None:
        """Refuse a layer that does not divide into groups.

        Raises:
            InputError: naming it.
        """
        if columns % self.group_size:
            raise InputError(f"{layer} has {columns} inputs, which are no multiple of the group size {self.group_size}")

    @classmethod
    def parse(cls, value: int | str | None, group_size: int | None = None) -> Quantization | None:
        """From what an option says: bits (4 or "4"), a mode ("mxfp4"), or None or "none".

        Args:
            group_size: of bits, 64 unless given; a mode has its own.

        Raises:
            InputError: naming what is possible.
        """
        if value in (None, "none"):
            return None
        if value in FLOAT_MODES:
            return cls(*FLOAT_MODES[str(value)], str(value))
        if not str(value).isdecimal():
            raise InputError(
                f"quantize must be {', '.join(map(str, AFFINE_BITS))} bits or one of {', '.join(FLOAT_MODES)}, "
                f"got {value!r}"
            )
        return cls(int(str(value)), 64 if group_size is None else group_size)


def parse_options(
    quantize: int | str | None, quantize_text_encoder: int | str | None, group_size: int | None
) -> dict[str, Quantization]:
    """The options of that name, as pipeline and commands have them, to how each component is packed.

    Raises:
        InputError: for what cannot be, a group size of nothing among it.
    """
    text = quantize if quantize_text_encoder is None else quantize_text_encoder
    how = {
        "transformer": Quantization.parse(quantize, group_size),
        "text_encoder": Quantization.parse(text, group_size),
    }
    packed = {part: quantization for part, quantization in how.items() if quantization is not None}
    if group_size is not None and not any(quantization.mode == "affine" for quantization in packed.values()):
        raise InputError(f"group_size {group_size} belongs to quantize in bits, and none is given")
    return packed


def options_of(packed: Mapping[str, Quantization]) -> dict[str, Any]:
    """The options that parse_options makes this of."""
    named: dict[str, int | str] = {part: how.bits if how.mode == "affine" else how.mode for part, how in packed.items()}
    transformer, text = named.get("transformer"), named.get("text_encoder", "none")
    groups = [how.group_size for how in packed.values() if how.mode == "affine"]
    return {
        "quantize": transformer,
        "quantize_text_encoder": None if text == (transformer or "none") else text,
        "group_size": groups[0] if groups else None,
    }


class QuantizedLinear(nn.Module):
    """x (..., in) to (..., out) with a packed weight and no bias.

    Args:
        dense: the layer that this one stands for; its weight is packed lazily.
    """

    def __init__(self, dense: nn.Linear, how: Quantization):
        super().__init__()
        self.how = how
        _keep(self, pack(dense.weight, how))

    def __call__(self, x: mx.array) -> mx.array:
        weight, scales, biases, how = self.weight, self.scales, self.get("biases"), self.how
        if x.size // x.shape[-1] >= DENSE_ROWS:
            return x @ unpack(weight, scales, biases, how).astype(x.dtype).T
        return mx.quantized_matmul(
            x, weight, scales, biases, transpose=True, group_size=how.group_size, bits=how.bits, mode=how.mode
        )


class QuantizedEmbedding(nn.Module):
    """Token ids (...) to rows (..., dims) of a packed table, in the scales' dtype."""

    def __init__(self, dense: nn.Embedding, how: Quantization):
        super().__init__()
        self.how = how
        _keep(self, pack(dense.weight, how))

    def __call__(self, ids: mx.array) -> mx.array:
        biases = self.get("biases")
        return unpack(self.weight[ids], self.scales[ids], None if biases is None else biases[ids], self.how)


PACKED_LAYERS = {nn.Linear: QuantizedLinear, nn.Embedding: QuantizedEmbedding}


def _keep(layer: nn.Module, packed: tuple[mx.array, ...]) -> None:
    for name, array in zip(("weight", "scales", "biases"), packed, strict=False):
        layer[name] = array
    layer.freeze()


def pack(weight: mx.array, how: Quantization) -> tuple[mx.array, ...]:
    """(weight, scales, biases) or, without offsets, (weight, scales): mlx.core.quantize."""
    return tuple(mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode))


def unpack(weight: mx.array, scales: mx.array, biases: mx.array | None, how: Quantization) -> mx.array:
    return mx.dequantize(weight, scales, biases, group_size=how.group_size, bits=how.bits, mode=how.mode)


# Which layers of a module are packed, and how: (path, layer) to Quantization, or None for a layer that stays as it is.
Recipe = Callable[[str, nn.Module], "Quantization | None"]


def dense_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every layer that can be packed and is not yet."""
    for path, layer in module.named_modules():
        if type(layer) in PACKED_LAYERS and "bias" not in layer:
            yield path, layer


def quantize(module: nn.Module, recipe: Recipe) -> None:
    """Replace layers by packed ones, in place. Lazy weights stay lazy: each is packed when it is first needed.

    Raises:
        InputError: for a layer whose inputs are no multiple of the group size.
    """
    packed = {}
    for path, layer in dense_layers(module):
        how = recipe(path, layer)
        if how is None:
            continue
        how.check(path, layer.weight.shape[1])
        packed[path] = PACKED_LAYERS[type(layer)](layer, how)
    _replace(module, packed)


def packing_in(weights: Mapping[str, Any]) -> Recipe:
    """The recipe that the weights themselves follow: a layer with ``scales`` is packed as their shapes say.

    Raises (the recipe):
        CheckpointError: for a packing that MLX does not have.
    """

    def recipe(path: str, layer: nn.Module) -> Quantization | None:
        if f"{path}.scales" not in weights or f"{path}.weight" not in weights:
            return None
        bits, group_size = bits_and_group(weights, path, layer.weight.shape[1])
        mode = "affine"
        if f"{path}.biases" not in weights:
            mode = next((mode for mode, fixed in FLOAT_MODES.items() if fixed == (bits, group_size)), "")
            if not mode or weights[f"{path}.scales"].dtype != mx.uint8:
                raise CheckpointError(
                    f"{path} has {bits} bits in groups of {group_size} without biases, which is not read"
                )
        try:
            return Quantization(bits, group_size, mode)
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from None

    return recipe


def largest_dense_bytes(module: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes that the largest packed matrix has when it is unpacked to be multiplied with; 0 without any."""
    packed = [layer for _, layer in module.named_modules() if isinstance(layer, QuantizedLinear)]
    return max((layer.weight.size * 32 // layer.how.bits * dtype.size for layer in packed), default=0)


def _replace(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for path, layer in layers.items():
        parent: Any = module
        *names, last = path.split(".")
        for name in names:
            parent = parent[int(name)] if isinstance(parent, list) else parent[name]
        parent[int(last) if isinstance(parent, list) else last] = layer


class QuantizedFluxKlein(FluxKlein):
    """The transformer with packed linear layers; called as FluxKlein is.

    Args:
        recipe: which layers, and how; unless given, every one at 4 bits in groups of 64.
    """

    def __init__(self, params: FluxKleinParams, recipe: Recipe | None = None):
        super().__init__(params)
        quantize(self, recipe or (lambda *_: Quantization()))

    @classmethod
    def from_unquantized(
        cls, model: FluxKlein, group_size: int = 64, bits: int = 4, mode: str = "affine"
    ) -> QuantizedFluxKlein:
        """Every linear layer of a model packed; the model itself stays as it is.

        Raises:
            InputError: for a combination that MLX does not have.
        """
        how = Quantization(bits, group_size, mode)
        packed = cls(model.params, lambda *_: how)
        weights = weights_of(model)
        for path, layer in packed.named_modules():
            if isinstance(layer, QuantizedLinear):
                _keep(layer, pack(weights.pop(f"{path}.weight"), how))
        packed.load_weights(list(weights.items()), strict=False)
        return packed
