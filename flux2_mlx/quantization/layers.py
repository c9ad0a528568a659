"""Packed layers, and how a module gets them in the place of its dense ones.

A packed layer keeps ``weight`` (integers in uint32 words), ``scales`` and, in the affine mode, ``biases``, one of each
for a group of inputs, as mlx.core.quantize makes them. It multiplies few rows with MLX's fused kernel, and many by
unpacking its weight first: with thousands of rows the fused product costs more than the unpacking. From how many on,
depends on the machine and the weight's shape, so it is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import machine_name
from ..disk_cache import read_table, write_table
from ..errors import InputError
from ..models.layers import Linear, apply_adapters
from .packing import Packing, dequantize, quantize_weight
from .spec import Quantization

DENSE_ROWS = 128  # rows of an input from which a packed layer unpacks its weight, where nothing was measured
MEASURED_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # rows of an input that autotune tries
ALWAYS_FUSED = 1 << 62  # rows that no input has: the fused product was the faster one with all of MEASURED_ROWS
_measured: dict[str, int] = {}  # what autotune found in this process, by machine, shape, packing and dtype


class QuantizedLinear(nn.Module):
    """x (..., in) to (..., out) with a packed weight and no bias.

    Args:
        dense: the layer that this one replaces; its weight is packed lazily.
        packing: quantize_weight, or quantize_rtn where only shapes matter, since the values come later.

    Attributes:
        spec: how the weight is packed.
        dense_rows: rows of x from which the weight is unpacked; see autotune.
        deltas: the adapters beside the weight, as a Linear's; absent where there are none.
    """

    deltas: list[nn.Module]

    def __init__(self, dense: Linear, spec: Quantization, packing: Packing = quantize_weight):
        super().__init__()
        self.spec = spec
        self.dense_rows = DENSE_ROWS
        set_packed(self, packing(dense.weight, spec))

    def __call__(self, x: mx.array) -> mx.array:
        return self.outputs(x)

    def outputs(self, x: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows start to stop of the weight applied to x: (..., in) to (..., stop - start)."""
        multiply = self.dense if x.size // x.shape[-1] >= self.dense_rows else self.fused
        return apply_adapters(self, x, multiply(x, start, stop), start, stop)

    def dense(self, x: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
        """The product with the unpacked weight, which is unpacked only once x is computed."""
        weight, scales, biases = self._rows(start, stop)
        weight = mx.stop_gradient(
            mx.depends(weight, x)
        )  # mx.depends would pass gradients to the codes, which have none
        return x @ dequantize(weight, scales, biases, self.spec).astype(x.dtype).T

    def fused(self, x: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
        """The product by MLX's kernel, which unpacks as it multiplies."""
        spec = self.spec
        return mx.quantized_matmul(
            x, *self._rows(start, stop), transpose=True, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
        )

    def _rows(self, start: int, stop: int | None) -> tuple[mx.array, mx.array, mx.array | None]:
        biases = self.get("biases")
        return self.weight[start:stop], self.scales[start:stop], None if biases is None else biases[start:stop]


class QuantizedEmbedding(nn.Module):
    """Token ids (...) to rows (..., dims) of a packed table, in the scales' dtype."""

    def __init__(self, dense: nn.Embedding, spec: Quantization, packing: Packing = quantize_weight):
        super().__init__()
        self.spec = spec
        set_packed(self, packing(dense.weight, spec))

    def __call__(self, ids: mx.array) -> mx.array:
        biases = self.get("biases")
        return dequantize(self.weight[ids], self.scales[ids], None if biases is None else biases[ids], self.spec)


PACKED_LAYERS = {Linear: QuantizedLinear, nn.Embedding: QuantizedEmbedding}


def set_packed(layer: nn.Module, packed: tuple[mx.array, ...]) -> None:
    """Give a packed layer its arrays, which are not trained."""
    for name, array in zip(("weight", "scales", "biases"), packed, strict=False):
        layer[name] = array
    layer.freeze()


# (path, layer) to how that layer is packed, or None for one that stays as it is.
Recipe = Callable[[str, nn.Module], "Quantization | None"]


def dense_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every layer that can be packed and is not yet."""
    for path, layer in module.named_modules():
        if type(layer) in PACKED_LAYERS:
            yield path, layer


def quantize(module: nn.Module, recipe: Recipe, packing: Packing = quantize_weight) -> None:
    """Replace layers by packed ones, in place. Lazy weights stay lazy: each is packed when it is first needed.

    Raises:
        InputError: for a layer whose inputs are no multiple of the group size.
    """
    packed = {}
    for path, layer in dense_layers(module):
        spec = recipe(path, layer)
        if spec is None:
            continue
        spec.check(path, layer.weight.shape[1])
        packed[path] = PACKED_LAYERS[type(layer)](layer, spec, packing)
    _replace(module, packed)


def autotune(module: nn.Module, dtype: mx.Dtype, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Set each packed linear layer's ``dense_rows``: from how many rows of an input it is faster unpacked.

    The environment variable FLUX2_MLX_DENSE_ROWS sets it for all of them. Otherwise it is measured, once on a machine
    for each shape, packing and dtype, and kept in dense_rows.json in the cache folder; after a change of the BLAS that
    the CPU backend uses, delete that file.

    Args:
        dtype: the dtype of the inputs.
        wanted: whether a layer is among them, by its path.

    Raises:
        InputError: for a FLUX2_MLX_DENSE_ROWS that is no number of rows.
    """
    layers = [layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear) and wanted(path)]
    given = os.environ.get("FLUX2_MLX_DENSE_ROWS")
    if given is not None:
        if not given.isdecimal():
            raise InputError(f"FLUX2_MLX_DENSE_ROWS must be a number of rows, got {given!r}")
        for layer in layers:
            layer.dense_rows = int(given)
        return
    if not layers:
        return
    table = read_table("dense_rows") | _measured
    new = False
    for layer in layers:
        rows, spec = layer.weight.shape[0], layer.spec
        columns = layer.weight.shape[1] * 32 // spec.bits
        key = f"{machine_name()}: {rows} x {columns} {dtype}, {spec}"
        if not isinstance(table.get(key), int):
            table[key] = _measured[key] = _measured_rows(layer, columns, dtype)
            new = True
        layer.dense_rows = table[key]
    if new:
        write_table("dense_rows", table)


def _measured_rows(layer: QuantizedLinear, columns: int, dtype: mx.Dtype) -> int:
    """The fewest of MEASURED_ROWS with which the unpacked product takes no longer than the fused one."""
    for rows in MEASURED_ROWS:
        x = mx.ones((rows, columns), dtype)
        if shortest_seconds(layer.dense, x) <= shortest_seconds(layer.fused, x):
            return rows
    return ALWAYS_FUSED


def shortest_seconds(function: Callable[..., mx.array], *arrays: mx.array) -> float:
    """Seconds of the shorter of two calls, after a first one that may compile a kernel."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(function(*arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _replace(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for path, layer in layers.items():
        parent: Any = module
        *names, last = path.split(".")
        for name in names:
            parent = parent[int(name)] if isinstance(parent, list) else parent[name]
        parent[int(last) if isinstance(parent, list) else last] = layer
