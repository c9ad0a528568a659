"""LoRAs: small files that change the transformer, under every name and in every form that is met.

file -> open_lora -> Lora -> set_adapters: each layer adds a thin product to what its weight gives, packed ones too
                         -> with_fused: a WeightChange of the checkpoint, made as its weights are read

Forms: LoRA (two thin matrices), LoHa (the elementwise product of two of those), LoKr (a Kronecker product), each also
as DoRA (the sum's rows brought to given lengths); full differences, of norms too. A file is used whole or refused,
with the reason for each of its other keys.

References: Hu et al. 2021 (LoRA), Yeh et al. 2023 (LyCORIS: LoHa, LoKr), Liu et al. 2024 (DoRA), Kalajdzievski 2023
(rsLoRA). Keys of FLUX.2 LoRAs: diffusers' lora_conversion_utils and ComfyUI's lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import lora_file
from ..checkpoints.load import PendingWeights
from ..device import parts_of, weights_of
from ..errors import CheckpointError, InputError
from ..lazy import INTEGERS, LazyTensor, read, read_rows, sources_of
from ..models.flux2 import FluxKlein
from ..models.layers import Linear, random_state_kept
from ..quantization.packing import PACKED, dequantize
from ..quantization.recipes import packed_recipe
from .deltas import ADAPTED, Delta, DoRADelta, LoRADelta, weight_shape
from .keys import LoraLayer, rank_of, read_layers

MAX_SCALE = 100
Sources = tuple[mx.array, ...]  # arrays that are to be read first; see lazy


@dataclass(frozen=True)
class Lora:
    """A file that was found to fit a transformer. Its arrays are read again whenever they are wanted, so that they go
    with the transformer when that is unloaded.

    Attributes:
        source: the file as the caller named it.
        file: where it is.
        scale: the strength: 1 makes all of the change.
        merge: whether it is fused into the weights instead of standing beside them.
        partial: whether keys that fit nothing are passed over.
        summary: one line: layers, rank, alpha, form.
        shapes: (outputs, inputs) of the transformer's linear layers, (size,) of its norms.
        dora_ratios: DoRADelta.dora_ratio of a DoRA that is not fused, by the file's name of a layer and its path.
    """

    source: str
    file: Path
    scale: float = 1.0
    merge: bool = False
    partial: bool = False
    summary: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    dora_ratios: Mapping[tuple[str, str], mx.array] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.source if self.scale == 1 else f"{self.source}:{self.scale:g}"

    def deltas(self) -> dict[str, list[tuple[Delta, Sources]]]:
        """The deltas of each layer, by its path; their arrays are lazy, and beside them is what is to be read first."""
        deltas: dict[str, list[tuple[Delta, Sources]]] = {}
        for layer in read_layers(self.file, self.shapes).layers:
            for path, delta in layer.deltas(self.shapes, self.scale):
                if isinstance(delta, DoRADelta) and not self.merge:
                    delta.dora_ratio = self.dora_ratios[layer.name, path]
                deltas.setdefault(path, []).append((delta, layer.sources))
        return deltas

    @property
    def name(self) -> str:
        """The name in images' settings and in model cards."""
        return str(self)

    def apply(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """A transformer's weights with this fused into them, lazily; see WeightChange.

        Raises:
            CheckpointError: for packed weights, in which a small change would be lost.
        """
        merged = dict(weights)
        for path, deltas in self.deltas().items():
            weight = weights[f"{path}.weight"]
            if weight.dtype in INTEGERS:
                raise CheckpointError(
                    f"{self.source} cannot be merged into packed weights ({path}), where it would be lost to rounding; "
                    "load it beside them, or merge it into a checkpoint that is not packed"
                )
            merged[f"{path}.weight"] = _fuse_weight(weight, deltas)
        return merged


def parse_lora(text: str) -> tuple[str, float]:
    """(source, scale) of "source" or "source:scale", as commands take a LoRA.

    Raises:
        InputError: see check_scale.
    """
    source, _, number = text.rpartition(":")
    try:
        scale = float(number) if source and not Path(text).exists() else None
    except ValueError:
        scale = None
    if scale is None:
        return text, 1.0
    check_scale(scale)
    return source, scale


def check_scale(scale: float) -> None:
    """Refuse what is no scale of a LoRA.

    Raises:
        InputError: unless it is a number from -100 to 100.
    """
    if isinstance(scale, bool) or not (isinstance(scale, (int, float)) and abs(scale) <= MAX_SCALE):
        raise InputError(f"the scale of a LoRA must be a number from -{MAX_SCALE} to {MAX_SCALE}, got {scale!r}")


def open_lora(
    source: str,
    model: FluxKlein,
    weights: Callable[[], Mapping[str, Any]],
    *,
    scale: float = 1.0,
    merge: bool = False,
    partial: bool = False,
) -> Lora:
    """Find a LoRA's file and check it: every key, every shape, every number.

    Args:
        source: a safetensors file, a folder with one, a Hub id, or "owner/name/file".
        model: the transformer, whose weights are not read.
        weights: gives the transformer's weights, lazily, under the modules' names; called for a DoRA.
        partial: pass over what fits no layer.

    Raises:
        CheckpointError: naming all keys that are not used, with what they look like, unless ``partial``; for a file of
            which nothing fits, or with numbers that are not finite.
        InputError: for a scale that is none.
    """
    check_scale(scale)
    shapes = {path: weight_shape(layer) for path, layer in parts_of(model).items() if isinstance(layer, ADAPTED)}
    file = lora_file(source)
    lora = Lora(source, file, float(scale), merge, partial, shapes=shapes)
    layers, faults, note = read_layers(file, shapes)
    if faults and (not partial or not layers):
        way_out = "; partial (--lora-partial) loads the rest" if layers else ""
        raise CheckpointError(f"{file} does not fit: {'; '.join(faults)}{way_out}")
    if not layers:
        raise CheckpointError(f"{file} has no weights of a LoRA")
    for layer in layers:
        mx.eval(layer.sources)
        for kind, array in layer.arrays.items():
            if not mx.isfinite(array).all().item():
                raise CheckpointError(f"{layer.name}.{kind} has values that are not finite", source=file)
    dora_ratios = {}
    if not merge and any("magnitude" in layer.arrays for layer in layers):
        dora_ratios = _dora_ratios(layers, shapes, weights())
        mx.eval(dora_ratios)
    return replace(lora, summary=_summary(layers, shapes, faults, note), dora_ratios=dora_ratios)


def _dora_ratios(
    layers: Sequence[LoraLayer], shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Any]
) -> dict[tuple[str, str], mx.array]:
    """DoRADelta.dora_ratio by the file's name of a layer and its path; no scale of a LoRA is in it."""
    return {
        (layer.name, path): delta.find_ratio(_dense_rows(weights, path, shapes[path]))
        for layer in layers
        for path, delta in layer.deltas(shapes, 1.0)
        if isinstance(delta, DoRADelta)
    }


def _summary(layers: Sequence[LoraLayer], shapes: Mapping[str, Any], faults: Sequence[str], note: str) -> str:
    covered = {path for layer in layers for path, _, _ in layer.rows}
    forms = sorted({layer.form for layer in layers})
    ranks = sorted({rank for layer in layers if (rank := rank_of(layer.arrays)) is not None})
    alphas = sorted({layer.factor * rank for layer in layers if (rank := rank_of(layer.arrays)) is not None})
    linear = {path for path, shape in shapes.items() if len(shape) == 2}
    parts = [" and ".join(forms), f"{len(covered & linear)} of {len(linear)} layers"]
    parts += [f"{norms} norms"] if (norms := len(covered - linear)) else []
    for name, values in (("rank", ranks), ("alpha", alphas)):
        if values:
            parts.append(f"{name} {values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else ""))
    parts += [note] if note else []
    return ", ".join(parts) + (f"; passed over: {'; '.join(faults)}" if faults else "")


def set_adapters(model: FluxKlein, loras: Sequence[Lora]) -> None:
    """Put these LoRAs beside the weights of a transformer's layers, in the place of those that are there. Arrays stay
    lazy, until load_weights, in the dtype of the activations; thin products of one layer become one.
    """
    dtype = model.dtype
    pending = model.pending = PendingWeights.of(model)
    for name in filter(is_adapter, list(pending.sources)):
        del pending.sources[name]
    together: dict[str, list[tuple[Delta, Sources]]] = {}
    for lora in loras:
        for path, deltas in lora.deltas().items():
            together.setdefault(path, []).extend(deltas)
    for path, layer in parts_of(model).items():
        if not isinstance(layer, ADAPTED):
            continue
        layer.pop("deltas", None)
        if path in together:
            thin = [delta for delta, _ in together[path] if isinstance(delta, LoRADelta)]
            others: list[Delta] = [delta for delta, _ in together[path] if not isinstance(delta, LoRADelta)]
            layer.deltas = [*others, *_concat_ranks(thin)]
            sources = tuple(source for _, own in together[path] for source in own)
            for k, delta in enumerate(layer.deltas):
                delta.update(tree_map(lambda array: array.astype(dtype), delta.parameters()))
                delta.freeze()
                pending.sources |= {f"{path}.deltas.{k}.{name}": sources for name in weights_of(delta)}


def is_adapter(name: str) -> bool:
    """Whether a weight of that name is a LoRA's beside a layer."""
    return ".deltas." in name


def _concat_ranks(deltas: Sequence[LoRADelta]) -> list[LoRADelta]:
    """Products of thin matrices as one, its ranks those of all."""
    if len(deltas) < 2:
        return list(deltas)
    down, up, scales = ([delta[name] for delta in deltas] for name in ("down", "up", "scales"))
    return [LoRADelta(mx.concatenate(down), mx.concatenate(up, axis=1), mx.concatenate(scales))]


def _dense_rows(weights: Mapping[str, Any], path: str, shape: tuple[int, ...]) -> Callable[[int, int], mx.array]:
    """Rows of a layer's weight in float32, from one up to another."""
    weight = weights[f"{path}.weight"]
    mx.eval(sources_of(weight))
    with random_state_kept():
        layer = Linear(shape[1], shape[0])
    spec = packed_recipe(weights)(path, layer)
    if spec is None:
        return lambda start, stop: read_rows(weight, start, stop).astype(mx.float32)
    packed = {kind: read(weights[f"{path}.{kind}"]) for kind in PACKED if f"{path}.{kind}" in weights}

    def rows(start: int, stop: int) -> mx.array:
        part = {kind: array[start:stop] for kind, array in packed.items()}
        return dequantize(part["weight"], part["scales"], part.get("biases"), spec).astype(mx.float32)

    return rows


def with_fused(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """A checkpoint whose transformer has these LoRAs fused into its weights, and no others."""
    source = replace(checkpoint.sources["transformer"], changes=tuple(loras))
    return replace(checkpoint, sources={**checkpoint.sources, "transformer": source})


def fuse(checkpoint: Checkpoint, given: Sequence[tuple[str, float]], partial: bool) -> Checkpoint:
    """A checkpoint with LoRAs fused, each given as (source, scale).

    Raises:
        CheckpointError, InputError: see open_lora.
    """
    model, weights = FluxKlein(checkpoint.transformer), checkpoint.sources["transformer"].weights
    loras = [open_lora(source, model, weights, scale=scale, merge=True, partial=partial) for source, scale in given]
    return with_fused(checkpoint, loras)


def _fuse_weight(weight: Any, deltas: Sequence[tuple[Delta, Sources]]) -> LazyTensor:
    """A weight with deltas in it, summed in float32, some rows at a time."""

    def read(start: int, stop: int) -> mx.array:
        own = read_rows(weight, start, stop).astype(mx.float32)
        return sum((delta.weight_delta(own, start, stop) for delta, _ in deltas), own).astype(weight.dtype)

    sources = sources_of(weight) + tuple(source for _, own in deltas for source in own)
    return LazyTensor(weight.shape, weight.dtype, read, sources)
