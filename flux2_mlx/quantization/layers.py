"""Quantization: which layers are packed into how few bits, the packed layers, and the packed transformer.

A packed layer keeps ``weight`` (integers in uint32 words), ``scales`` and, in the affine mode, ``biases``, one of each
for a group of inputs, as mlx.core.quantize makes them. It multiplies few rows with MLX's fused kernel, and many by
unpacking its weight first: with thousands of rows the fused product costs more than the unpacking. From how many on,
depends on the machine and the weight's shape, so it is measured.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..disk_cache import read_table, write_table
from ..models.config import CheckpointError, FluxKleinParams, InputError
from ..models.flux2 import FluxKlein
from ..models.layers import Linear, added
from ..models.names.autoencoder import bits_and_group
from ..runtime.activations import machine_name, on_gpu, weights_of

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# Formats of 4 and 8 bits with floating point codes: (bits, group size), both fixed.
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}

# Up to so many bits are fitted to the weight, in so many rounds from a part of each group's range, so many weights at a
# time. With more, what is gained is less than what a bias loses as a 16-bit number.
FITTED_BITS = 5
FITTED_ROUNDS, FITTED_RANGE = 4, 0.95
PACKED_AT_ONCE = 2**21
# What reads and writes the latents is packed into so many bits, and how many bits a weight, on average, the sensitive
# layers together may cost.
FINE_BITS, SPARE_BITS = 8, 0.33

# Rows of an input from which a packed layer unpacks its weight and multiplies densely, where nothing was measured.
DENSE_ROWS = 128
# What is measured to find out, and the answer where the fused product wins everywhere; what was found in this process.
MEASURED_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
NEVER = 1 << 62
_measured: dict[str, int] = {}


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


Packing = Callable[[mx.array, Quantization], tuple[mx.array, ...]]


def pack(
    weight: mx.array, how: Quantization, dtype: mx.Dtype | None = None, *, now: bool = False
) -> tuple[mx.array, ...]:
    """A weight (out, in) as (weight, scales, biases) or, without offsets, (weight, scales), as if it were in another
    dtype, to which it is brought in parts.

    Formats, and more than FITTED_BITS, are mlx.core.quantize's; fewer bits are fitted to the weight.

    Args:
        now: compute each part before the next, or MLX, which computes ahead, holds what several are made of.
    """
    packing = _fitted if how.mode == "affine" and how.bits <= FITTED_BITS else pack_plainly
    rows = max(1, PACKED_AT_ONCE // weight.shape[1])
    dtype = weight.dtype if dtype is None else dtype
    parts = []
    for top in range(0, weight.shape[0], rows):
        parts.append(packing(weight[top : top + rows].astype(dtype), how))
        if now:
            mx.eval(parts[-1])
    return tuple(mx.concatenate(list(part)) for part in zip(*parts, strict=True))


def pack_plainly(weight: mx.array, how: Quantization) -> tuple[mx.array, ...]:
    """The same arrays as pack's, by mlx.core.quantize: one lazy operation."""
    return tuple(mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode))


def _fitted(weight: mx.array, how: Quantization) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of the least squared error, by turns: the nearest codes for a scale and a bias, then
    the scale and bias of the regression of the weights on those codes.

    The codes of a group's least and greatest weight waste the range on two weights; a search for better ends without
    data is that of Half-Quadratic Quantization (Badri and Shaji, 2023), here with the squared error.
    """
    top = 2**how.bits - 1
    groups = weight.astype(mx.float32).reshape(weight.shape[0], -1, how.group_size)
    mean = groups.mean(-1, keepdims=True)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = mx.maximum((high - low) * (FITTED_RANGE / top), 1e-12)
    bias = (high + low) / 2 - scale * (top / 2)
    for _ in range(FITTED_ROUNDS):
        codes = mx.clip(mx.round((groups - bias) / scale), 0, top)
        centre = codes.mean(-1, keepdims=True)
        spread = mx.square(codes - centre).sum(-1, keepdims=True)
        slope = ((codes - centre) * (groups - mean)).sum(-1, keepdims=True) / mx.maximum(spread, 1e-12)
        scale = mx.where(spread > 0, mx.maximum(slope, 1e-12), scale)
        bias = mean - scale * centre
    scale, bias = scale.astype(weight.dtype), bias.astype(weight.dtype)
    codes = mx.clip(mx.round((groups - bias.astype(mx.float32)) / scale.astype(mx.float32)), 0, top)
    return _words(codes.reshape(weight.shape).astype(mx.uint32), how.bits), scale[..., 0], bias[..., 0]


def _words(codes: mx.array, bits: int) -> mx.array:
    """Codes (out, in) as the words that MLX reads: the codes' bits one after another, lowest first, 32 to a word."""
    codes = codes.reshape(codes.shape[0], -1, 32)
    words = [mx.zeros(codes.shape[:2], mx.uint32)] * bits
    for k in range(32):
        word, start = divmod(k * bits, 32)
        words[word] = words[word] | (codes[..., k] << start)
        if start + bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., k] >> (32 - start))
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)


def unpack(weight: mx.array, scales: mx.array, biases: mx.array | None, how: Quantization) -> mx.array:
    """A packed weight (..., words) as (..., inputs), in the dtype of its scales."""
    if biases is None or on_gpu():
        return mx.dequantize(weight, scales, biases, group_size=how.group_size, bits=how.bits, mode=how.mode)
    if 32 % how.bits:  # eight codes in so many bytes, for which there is no word
        lead, octets = weight.shape[:-1], weight.view(mx.uint8)
        weight = _lanes(octets.reshape(*lead, -1, how.bits))
    return _unpacked(weight, scales, biases, how.bits, how.group_size)


@mx.compile  # one kernel: mx.dequantize writes out what lies between on the CPU, of odd bits every single one
def _lanes(octets: mx.array) -> mx.array:
    """Bytes (..., n) as one number (...), the first byte lowest."""
    parts = [octets[..., k].astype(mx.uint64) << (8 * k) for k in range(octets.shape[-1])]
    return sum(parts[1:], parts[0])


@mx.compile
def _unpacked(lanes: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """Numbers (..., n) of several codes, the first one lowest, times their scales, and their biases: (..., inputs)."""
    inputs = scales.shape[-1] * group_size
    shifts = bits * mx.arange(inputs // lanes.shape[-1], dtype=lanes.dtype)
    grouped = lanes.reshape(*scales.shape, -1, 1)
    codes = ((grouped >> shifts) & (2**bits - 1)).astype(scales.dtype)
    return (codes * scales[..., None, None] + biases[..., None, None]).reshape(*scales.shape[:-1], inputs)


class QuantizedLinear(nn.Module):
    """x (..., in) to (..., out) with a packed weight and no bias.

    Args:
        dense: the layer that this one stands for; its weight is packed lazily.
        packing: pack, or pack_plainly where only shapes matter, since the values come later.

    Attributes:
        dense_rows: of x, from which the weight is unpacked; see tune.
    """

    def __init__(self, dense: Linear, how: Quantization, packing: Packing = pack):
        super().__init__()
        self.how = how
        self.dense_rows = DENSE_ROWS
        _keep(self, packing(dense.weight, how))

    def __call__(self, x: mx.array) -> mx.array:
        return self.outputs(x)

    def outputs(self, x: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
        """Those from start to stop: (..., stop - start)."""
        multiply = self.dense if x.size // x.shape[-1] >= self.dense_rows else self.fused
        return added(self, x, multiply(x, start, stop), start, stop)

    def dense(self, x: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
        weight, scales, biases = self._rows(start, stop)
        weight = mx.stop_gradient(mx.depends(weight, x))  # or the wait would pass gradients to codes, which have none
        return x @ unpack(weight, scales, biases, self.how).astype(x.dtype).T

    def fused(self, x: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
        how = self.how
        return mx.quantized_matmul(
            x, *self._rows(start, stop), transpose=True, group_size=how.group_size, bits=how.bits, mode=how.mode
        )

    def _rows(self, start: int, stop: int | None) -> tuple[mx.array, mx.array, mx.array | None]:
        biases = self.get("biases")
        return self.weight[start:stop], self.scales[start:stop], None if biases is None else biases[start:stop]


class QuantizedEmbedding(nn.Module):
    """Token ids (...) to rows (..., dims) of a packed table, in the scales' dtype."""

    def __init__(self, dense: nn.Embedding, how: Quantization, packing: Packing = pack):
        super().__init__()
        self.how = how
        _keep(self, packing(dense.weight, how))

    def __call__(self, ids: mx.array) -> mx.array:
        biases = self.get("biases")
        return unpack(self.weight[ids], self.scales[ids], None if biases is None else biases[ids], self.how)


PACKED_LAYERS = {Linear: QuantizedLinear, nn.Embedding: QuantizedEmbedding}


def _keep(layer: nn.Module, packed: tuple[mx.array, ...]) -> None:
    for name, array in zip(("weight", "scales", "biases"), packed, strict=False):
        layer[name] = array
    layer.freeze()


# Which layers of a module are packed, and how: (path, layer) to Quantization, or None for a layer that stays as it is.
Recipe = Callable[[str, nn.Module], "Quantization | None"]


def dense_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every layer that can be packed and is not yet."""
    for path, layer in module.named_modules():
        if type(layer) in PACKED_LAYERS:
            yield path, layer


# The transformer's layers that a small error harms most, per weight: what reads and writes the latents, what attention
# adds to the image stream of double blocks, then the single blocks, the later the more. And the text encoder's, the
# earlier the more. Measured on nano, see benchmarks/packing.py.
ENDS, SINGLE = re.compile(r"(proj_out|x_embedder)$"), re.compile(r"single_transformer_blocks\.")
ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn\.to_out")
TEXT = re.compile(r"model\.layers\.")


def mixed(module: nn.Module, how: Quantization) -> Recipe:
    """The recipe that packs a component's dense layers as ``how`` says, and the most sensitive ones finer, as long as
    that costs SPARE_BITS a weight or less: a transformer's ends in FINE_BITS, then what attention adds in double
    blocks, and single blocks, which are large, one step above the rest, since the first bit more takes three quarters
    of the squared error; a text encoder's first layers, whose errors go through all others, two steps.
    """
    if how.mode != "affine" or how.bits >= FINE_BITS:
        return lambda *_: how
    above, far_above = ([*AFFINE_BITS, FINE_BITS][AFFINE_BITS.index(how.bits) + step] for step in (1, 2))
    sizes = {path: layer.weight.size for path, layer in dense_layers(module)}
    spare = SPARE_BITS * sum(sizes.values())
    finer = {}
    for pattern, bits in ((ENDS, FINE_BITS), (ATTENTION, above), (SINGLE, above), (TEXT, far_above)):
        # Of the single blocks the last first, and in a block to_out before to_qkv_mlp_proj.
        for path in sorted(filter(pattern.match, sizes), key=_number if pattern is TEXT else _last_block_first):
            cost = sizes[path] * (bits - how.bits)
            if cost <= spare:
                spare -= cost
                finer[path] = Quantization(bits, how.group_size)
    return lambda path, _: finer.get(path, how)


def _number(path: str) -> int:
    """Of its block or layer, 0 where it has none."""
    number = re.search(r"\.(\d+)\.", path)
    return int(number[1]) if number else 0


def _last_block_first(path: str) -> tuple[int, str]:
    return -_number(path), path


def quantize(module: nn.Module, recipe: Recipe, packing: Packing = pack) -> None:
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
        packed[path] = PACKED_LAYERS[type(layer)](layer, how, packing)
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


def tune(module: nn.Module, dtype: mx.Dtype, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Let each packed linear layer of a loaded module know from how many rows it is faster unpacked.

    The environment variable FLUX2_MLX_DENSE_ROWS says it for all of them. Otherwise it is measured, once on a machine
    for each shape, packing and dtype, and kept in dense_rows.json in the cache folder; after a change of the BLAS that
    the CPU backend uses, delete that file.

    Args:
        dtype: of the inputs.
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
        rows, how = layer.weight.shape[0], layer.how
        columns = layer.weight.shape[1] * 32 // how.bits
        key = f"{machine_name()}: {rows} x {columns} {dtype}, {how}"
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
    return NEVER


def shortest_seconds(function: Callable[..., mx.array], *arrays: mx.array) -> float:
    """Of the shorter of two calls, after a first one that may compile a kernel."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(function(*arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


# Of the transformer's layers, those that are multiplied in parts (models.blocks.outputs) with the share of the largest
# part, and those that only ever see one row, and so are not unpacked.
IN_PARTS = {"to_qkv_mlp_proj": 1 / 3, "linear_in": 1 / 2}
ONE_ROW = re.compile(r"(\w+_modulation(_\w+)?|norm_out|time_guidance_embed)\.")


def dense_bytes(module: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes of all packed matrices once they are unpacked, but for those that never are; 0 without any."""
    return sum(
        layer.weight.size * 32 // layer.how.bits * dtype.size
        for path, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear) and not ONE_ROW.match(path)
    )


def largest_dense_bytes(module: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes of the largest packed matrix, or part of one, that is unpacked to be multiplied with; 0 without any. The
    CPU backend unpacks bits for which there is no word by way of lanes, and other formats by way of 32-bit codes.
    """

    def each(how: Quantization) -> int:
        beside = 0 if on_gpu() else 4 if how.mode != "affine" else 1 if 32 % how.bits else 0
        return dtype.size + beside

    sizes = [
        int(layer.weight.size * 32 // layer.how.bits * each(layer.how) * IN_PARTS.get(path.rpartition(".")[2], 1))
        for path, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear) and not ONE_ROW.match(path)
    ]
    return max(sizes, default=0)


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
