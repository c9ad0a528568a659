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
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import machine_name, on_gpu, parts_of, system_name
from ..disk_cache import read_table, write_table
from ..errors import InputError
from ..models.layers import Linear, apply_adapters
from .packing import Packing, dequantize, quantize_weight
from .spec import Quantization

DENSE_ROWS, GPU_DENSE_ROWS = 128, 256  # rows of an input from which weights are unpacked where nothing was measured
# Rows that autotune tries. On a GPU fewer are always fused: there launching a kernel would be measured, and little won.
CPU_ROWS, GPU_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048), (256, 512, 1024, 2048, 4096)
ALWAYS_FUSED = 1 << 62  # rows that no input has: the fused product was the faster one with all that were tried
TOLERANCE = 1.1  # how much longer than the other way the chosen one may take before an entry is measured again
FINE = 10  # rows are found to a share of one in so many
EVALUATION = 0.005  # seconds that an evaluation of several products is to take at least, so that starting it is little
_measured: dict[str, int] = {}  # what autotune found or checked in this process, by machine, shape, packing and dtype


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
        self.dense_rows = GPU_DENSE_ROWS if on_gpu() else DENSE_ROWS
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

    def as_linear(self, x: mx.array) -> mx.array:
        """The table as the weight of a head: x (..., dims) to (..., ids)."""
        spec, packed = self.spec, (self.weight, self.scales, self.get("biases"))
        return mx.quantized_matmul(
            x, *packed, transpose=True, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
        )


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
    for path, layer in parts_of(module).items():
        if isinstance(layer, nn.Module) and type(layer) in PACKED_LAYERS:
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

    The environment variable FLUX2_MLX_DENSE_ROWS sets it for all of them. Otherwise it is measured, once for each chip,
    version of MLX and of the system, shape, packing and dtype, and kept in dense_rows.json in the cache folder; after a
    change of the BLAS that the CPU backend uses, delete that file.

    On a GPU an entry of that file is checked where a process first uses it, and costs no more than a tenth: the fused
    product takes time for each row, the other one also for unpacking, so the more rows, the better the latter. Where
    both take the same at an entry's rows, up to TOLERANCE, neither way is worse by more at rows on its own side.

    Args:
        dtype: the dtype of the inputs.
        wanted: whether a layer is among them, by its path.

    Raises:
        InputError: for a FLUX2_MLX_DENSE_ROWS that is no number of rows.
    """
    layers = [layer for path, layer in parts_of(module).items() if isinstance(layer, QuantizedLinear) and wanted(path)]
    given = os.environ.get("FLUX2_MLX_DENSE_ROWS")
    if given is not None:
        if not given.isdecimal() or len(given) > 19:
            raise InputError(f"FLUX2_MLX_DENSE_ROWS must be a number of rows, got {given!r}")
        for layer in layers:
            layer.dense_rows = int(given)
        return
    if not layers:
        return
    kept = read_table("dense_rows")
    table = dict(kept)
    for layer in layers:
        rows, spec = layer.weight.shape[0], layer.spec
        columns = layer.weight.shape[1] * 32 // spec.bits
        key = f"{machine_name()}, {system_name()}: {rows} x {columns} {dtype}, {spec}"
        if key not in _measured:
            ways = partial(_ratio, layer, columns, dtype)
            _measured[key] = kept[key] if _is_right(kept.get(key), ways) else _fewest_rows(ways)
        layer.dense_rows = table[key] = _measured[key]
    if table != kept:
        write_table("dense_rows", table)


def _tried_rows() -> tuple[int, ...]:
    return GPU_ROWS if on_gpu() else CPU_ROWS


def _is_right(entry: Any, ratio: Callable[[int], float]) -> bool:
    """Whether an entry of the table can be one and, on a GPU, its rows are where both ways take the same."""
    least, most = _tried_rows()[0], _tried_rows()[-1]
    if isinstance(entry, bool) or not isinstance(entry, int) or not (least <= entry <= most or entry == ALWAYS_FUSED):
        return False
    if not on_gpu():
        return True
    found = ratio(min(entry, most))
    return (entry == ALWAYS_FUSED or found >= 1 / TOLERANCE) and (entry == least or found <= TOLERANCE)


def _fewest_rows(ratio: Callable[[int], float]) -> int:
    """The fewest rows with which the unpacked product takes no longer than the fused one, up to one in FINE too many.

    Args:
        ratio: the time of the fused product over that of the other, by the number of rows.
    """
    fused = 0
    for dense in _tried_rows():
        if ratio(dense) >= 1:
            break
        fused = dense
    else:
        return ALWAYS_FUSED
    while fused and dense - fused > max(1, dense // FINE):
        middle = (fused + dense) // 2
        fused, dense = (fused, middle) if ratio(middle) >= 1 else (middle, dense)
    return dense


def _ratio(layer: QuantizedLinear, columns: int, dtype: mx.Dtype, rows: int) -> float:
    """The time of a layer's fused product over that of the other way: the median of several evaluations in turn, each
    beside the next of the other way, so that a clock that still rises changes little. A first one is not counted.
    """
    x = mx.ones((rows, columns), dtype)
    longest = max(evaluation_seconds(way, x) for way in (layer.fused, layer.dense) for _ in range(2))
    calls = min(8, max(1, round(EVALUATION / max(longest, 1e-9))))
    pairs = 5 if longest < 0.1 else 3
    return median(
        evaluation_seconds(layer.fused, x, calls) / evaluation_seconds(layer.dense, x, calls) for _ in range(pairs)
    )


def evaluation_seconds(function: Callable[..., mx.array], x: mx.array, calls: int = 1) -> float:
    """Seconds of one evaluation of several calls."""
    start = time.perf_counter()
    mx.eval([function(x) for _ in range(calls)])
    return time.perf_counter() - start


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
