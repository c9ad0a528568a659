"""Which layers are packed into how many bits, and what unpacking them takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import on_gpu, parts_of, weights_of
from ..errors import CheckpointError, InputError
from ..lazy import derive
from ..models.config import FluxKleinParams
from ..models.flux2 import FluxKlein
from .layers import QuantizedEmbedding, QuantizedLinear, Recipe, dense_layers, quantize, set_packed
from .packing import bits_and_group, has_one_bit, quantize_rtn, quantize_weight, widen_one_bit
from .spec import AFFINE_BITS, FLOAT_MODES, Quantization

FINE_BITS = 8  # bits of the layers that read and write the latents
SPARE_BITS = 0.33  # bits a weight, on average over all, that the sensitive layers may cost together

# The transformer's layers that a small error harms most, per weight: what reads and writes the latents, what attention
# adds to the image stream of double blocks, then the single blocks, the later the more. And the text encoder's, the
# earlier the more. Measured on nano, see benchmarks/packing.py.
ENDS, SINGLE = re.compile(r"(proj_out|x_embedder)$"), re.compile(r"single_transformer_blocks\.")
ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn\.to_out")
TEXT = re.compile(r"model\.layers\.")


def mixed_precision(module: nn.Module, spec: Quantization) -> Recipe:
    """The recipe that packs a component's dense layers as ``spec`` says, and the most sensitive ones finer, as long as
    that costs SPARE_BITS a weight or less: a transformer's ends in FINE_BITS, then what attention adds in double
    blocks, and single blocks, which are large, one step above the rest, since the first bit more takes three quarters
    of the squared error; a text encoder's first layers, whose errors go through all others, two steps.
    """
    if spec.mode != "affine" or spec.bits >= FINE_BITS:
        return lambda *_: spec
    above, far_above = ([*AFFINE_BITS, FINE_BITS][AFFINE_BITS.index(spec.bits) + step] for step in (1, 2))
    sizes = {path: layer.weight.size for path, layer in dense_layers(module)}
    spare = SPARE_BITS * sum(sizes.values())
    finer = {}
    for pattern, bits in ((ENDS, FINE_BITS), (ATTENTION, above), (SINGLE, above), (TEXT, far_above)):
        # Order: the last single block first, and in it to_out before to_qkv_mlp_proj.
        for path in sorted(filter(pattern.match, sizes), key=_block_number if pattern is TEXT else _last_block_first):
            cost = sizes[path] * (bits - spec.bits)
            if cost <= spare:
                spare -= cost
                finer[path] = Quantization(bits, spec.group_size)
    return lambda path, _: finer.get(path, spec)


def _block_number(path: str) -> int:
    """The number of a layer's block; 0 for a layer outside of the blocks."""
    number = re.search(r"\.(\d+)\.", path)
    return int(number[1]) if number else 0


def _last_block_first(path: str) -> tuple[int, str]:
    return -_block_number(path), path


def packed_recipe(weights: Mapping[str, Any]) -> Recipe:
    """The recipe that the weights themselves follow: a layer with ``scales`` is packed as their shapes say; see also
    readable.

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
            return readable(Quantization(bits, group_size, mode))
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from None

    return recipe


def readable(spec: Quantization) -> Quantization:
    """How weights that are packed so are held: as they are, but one bit in two where MLX has no kernels for it."""
    return replace(spec, bits=2) if spec.bits == 1 and not has_one_bit() else spec


def hold_packed(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the layers that the weights hold packed, in place.

    Returns:
        the words of layers that are held in more bits than the weights have, with the same values.

    Raises:
        CheckpointError: for a packing that MLX does not have.
    """
    quantize(module, packed_recipe(weights), quantize_rtn)
    return {
        f"{path}.weight": derive(widen_one_bit, weights[f"{path}.weight"])
        for path, layer in parts_of(module).items()
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding))
        and layer.spec.bits == 2
        and 2 * weights[f"{path}.weight"].shape[-1] == layer.weight.shape[-1]
    }


IN_PARTS = {"to_qkv_mlp_proj": 1 / 3, "linear_in": 1 / 2}  # layers multiplied in parts, and the largest part's share
# Layers whose input has one row, so that they are never unpacked.
ONE_ROW = re.compile(r"(\w+_modulation(_\w+)?|norm_out|time_guidance_embed)\.|lm_head$")


def dense_bytes(module: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes of all packed matrices once they are unpacked, but for those that never are; 0 without any."""
    return sum(
        layer.weight.size * 32 // layer.spec.bits * dtype.size
        for path, layer in parts_of(module).items()
        if isinstance(layer, QuantizedLinear) and not ONE_ROW.match(path)
    )


def largest_dense_bytes(module: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes of the largest packed matrix, or part of one, that is unpacked to be multiplied with; 0 without any. The
    CPU backend unpacks bits for which there is no word by way of lanes, and other formats by way of 32-bit codes.
    """

    def each(spec: Quantization) -> int:
        beside = 0 if on_gpu() else 4 if spec.mode != "affine" else 1 if 32 % spec.bits else 0
        return dtype.size + beside

    sizes = [
        int(layer.weight.size * 32 // layer.spec.bits * each(layer.spec) * IN_PARTS.get(path.rpartition(".")[2], 1))
        for path, layer in parts_of(module).items()
        if isinstance(layer, QuantizedLinear) and not ONE_ROW.match(path)
    ]
    return max(sizes, default=0)


class QuantizedFluxKlein(FluxKlein):
    """The transformer with packed linear layers; called as FluxKlein is.

    Args:
        recipe: how each layer is packed; unless given, every one at 4 bits in groups of 64.
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
        spec = Quantization(bits, group_size, mode)
        packed = cls(model.params, lambda *_: spec)
        weights = weights_of(model)
        for path, layer in parts_of(packed).items():
            if isinstance(layer, QuantizedLinear):
                set_packed(layer, quantize_weight(weights.pop(f"{path}.weight"), spec))
        packed.load_weights(list(weights.items()), strict=False)
        return packed
