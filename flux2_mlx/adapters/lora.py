"""LoRAs: small files that change the transformer, under every name and in every form that is met.

file -> open_lora -> Lora -> attach: each layer adds a thin product to what its weight gives, also where it is packed
                         -> a change of the checkpoint's weights, as Source.changes takes it: merged

Forms: LoRA (two thin matrices), LoHa (the elementwise product of two of those), LoKr (a Kronecker product), each also
as DoRA (the sum's rows brought to given lengths). A file is used whole or refused, with what its other keys look like.

References: Hu et al. 2021 (LoRA), Yeh et al. 2023 (LyCORIS: LoHa, LoKr), Liu et al. 2024 (DoRA), Kalajdzievski 2023
(rsLoRA). Keys of FLUX.2 LoRAs: diffusers' lora_conversion_utils and ComfyUI's lora.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from safetensors import safe_open

from ..checkpoints.checkpoint import Checkpoint, few, load_safetensors, lora_file
from ..models.config import CheckpointError, InputError
from ..models.flux2 import FluxKlein
from ..models.layers import Linear
from ..models.names.autoencoder import INTEGERS, Deferred, Rows, bfl_lora, lora_layers, read_rows
from ..quantization.layers import QuantizedLinear, packing_in, unpack
from ..runtime.activations import weights_of

MAX_SCALE = 100
ROWS_AT_ONCE = 4096  # of a weight whose rows' lengths are measured

# ---------------------------------------------------------------------------------------------------- arithmetic


class LowRank(nn.Module):
    """x (..., inputs) times down (R, inputs), scales (R,) and up (outputs, R)."""

    def __init__(self, down: mx.array, up: mx.array, scales: mx.array):
        super().__init__()
        self.down, self.up, self.scales = down, up, scales

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        """``out`` and what this adds to a layer's outputs from start to stop, which without LoRAs are ``base``."""
        thin = (x @ self.down.T) * self.scales
        return mx.addmm(out, thin, self.up[start:stop].T)

    def change(self, weight: mx.array, start: int, stop: int) -> mx.array:
        """What this adds to those rows of a layer's weight, given in float32."""
        return (self.up[start:stop].astype(mx.float32) * self.scales) @ self.down.astype(mx.float32)


class Kronecker(nn.Module):
    """x (..., b * d) times the Kronecker product of left (a, b) and right (c, d), which is never formed; its a * c
    outputs where they belong in the layer's.
    """

    def __init__(self, left: mx.array, right: mx.array, spans: Sequence[_Span], outputs: int):
        super().__init__()
        self.left, self.right = left, right
        self._spans, self._outputs = tuple(spans), outputs

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        inner = x.reshape(-1, self.left.shape[1], self.right.shape[1]) @ self.right.T
        full = (self.left @ inner).reshape(inner.shape[0], -1)
        placed = _placed(full.T, self._spans, self._outputs)[start:stop].T
        return out + placed.reshape(*x.shape[:-1], -1)

    def change(self, weight: mx.array, start: int, stop: int) -> mx.array:
        full = mx.kron(self.left.astype(mx.float32), self.right.astype(mx.float32))
        return _placed(full, self._spans, self._outputs)[start:stop]


class Decomposed(nn.Module):
    """DoRA: the rows of the weight with another delta are brought to given lengths; a share of that change is added.

    Attributes:
        gain: (outputs,) the lengths over those that the rows have with the delta; for what is merged, not known yet.
    """

    def __init__(self, delta: LowRank | Kronecker, lengths: mx.array, scale: float):
        super().__init__()
        self.delta, self.scale = delta, mx.array(scale)
        self._lengths = lengths  # (outputs,), NaN for rows that keep their own
        self.gain = mx.ones(lengths.shape)

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        gain = self.gain[start:stop]
        delta = self.delta(x, base, mx.zeros_like(base), start, stop)
        return out + self.scale * ((gain - 1) * base + gain * delta)

    def change(self, weight: mx.array, start: int, stop: int) -> mx.array:
        whole = weight + self.delta.change(weight, start, stop)
        return self.scale * (self._gain(whole, start, stop)[:, None] * whole - weight)

    def find_gain(self, rows: Callable[[int, int], mx.array]) -> mx.array:
        """The gain, for a weight whose rows from one up to another are given in float32."""
        parts, size = [], self._lengths.size
        for start in range(0, size, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, size)
            weight = rows(start, stop)
            parts.append(self._gain(weight + self.delta.change(weight, start, stop), start, stop))
            mx.eval(parts)
        return mx.concatenate(parts)

    def _gain(self, whole: mx.array, start: int, stop: int) -> mx.array:
        lengths = self._lengths[start:stop].astype(mx.float32)
        own = mx.maximum(mx.linalg.norm(whole, axis=1), 1e-12)
        return mx.where(mx.isnan(lengths), 1.0, lengths / own)


Delta = LowRank | Kronecker | Decomposed
_Span = tuple[int, int, int]  # of a layer's outputs from one up to another, and the first of the file's that they are


def _spans(rows: Sequence[Rows]) -> dict[str, list[_Span]]:
    """Of each layer, where its outputs are in a file's layer, in the layer's order."""
    spans: dict[str, list[_Span]] = {}
    at = 0
    for path, start, stop in rows:
        spans.setdefault(path, []).append((start, stop, at))
        at += stop - start
    return {path: sorted(own) for path, own in spans.items()}


def _placed(array: mx.array, spans: Sequence[_Span], size: int, filling: float = 0.0) -> mx.array:
    """The rows of a file's layer where they belong among a layer's, with ``filling`` between them."""
    parts, at = [], 0
    for start, stop, first in [*spans, (size, size, 0)]:
        if start > at:
            parts.append(mx.full((start - at, *array.shape[1:]), filling, array.dtype))
        if stop > start:
            parts.append(array[first : first + stop - start])
        at = stop
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


# ---------------------------------------------------------------------------------------------------- files

_KINDS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
}
# The layer's name, what of it this is, perhaps the adapter's name (PEFT), perhaps "weight".
_KEY = re.compile(
    r"(.+?)\.(lora[._](?:A|B|down|up)|lora_magnitude_vector|dora_scale|alpha|"
    r"lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12])(?:\.(?!weight$)\w+)?(?:\.weight)?"
)
_PREFIX = re.compile(r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer)\.)+")
_UNDERSCORED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_")

# What keys look like that are no layer of klein's.
_LOOKS = (
    (r"(text_encoders?|te\d?|lora_te\d?)[._]", "a text encoder's, which FLUX.2 [klein] takes as it is"),
    (
        r".*(img_mod|txt_mod|single_blocks[._]\d+[._]modulation|norm1|vector_in|[._]ff[._]net|[._]proj_mlp|"
        r"ff_context[._]net|single_transformer_blocks[._]\d+[._](norm[._]linear|proj_out))",
        "FLUX.1's",
    ),
    (r".*guidance_(in|embedder)", "FLUX.2-dev's"),
    (r".*(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)", "Stable Diffusion's"),
    (r".*(double_blocks|single_blocks|transformer_blocks)[._]\d+[._]", "blocks that this model does not have"),
)
_WIDTHS = {3072: "klein-4b", 4096: "klein-9b", 6144: "FLUX.2-dev"}


@dataclass(frozen=True)
class Lora:
    """A file that was found to fit a transformer. Its arrays are read again whenever they are wanted, so that they go
    with the transformer when that is unloaded.

    Attributes:
        where: as the caller named it.
        file: where it is.
        scale: how much of the change is made, 1 for all of it.
        merge: whether it is to be merged into the weights.
        partial: whether keys that fit nothing are passed over.
        summary: one line: layers, rank, alpha, form.
        shapes: (outputs, inputs) of the transformer's linear layers.
        gains: of a DoRA that is not merged, by the file's name of a layer and the layer's path; see Decomposed.
    """

    where: str
    file: Path
    scale: float = 1.0
    merge: bool = False
    partial: bool = False
    summary: str = ""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    gains: Mapping[tuple[str, str], mx.array] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.where if self.scale == 1 else f"{self.where}:{self.scale:g}"

    def deltas(self) -> dict[str, list[Delta]]:
        """What this changes in each layer, by its path, lazily."""
        layers, _ = _read(self.file, self.shapes)
        deltas: dict[str, list[Delta]] = {}
        for layer in layers:
            for path, delta in layer.deltas(self.shapes, self.scale):
                if isinstance(delta, Decomposed) and not self.merge:
                    delta.gain = self.gains[layer.name, path]
                deltas.setdefault(path, []).append(delta)
        return deltas

    def __call__(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """A transformer's weights with this merged, when their turn comes.

        Raises:
            CheckpointError: for packed weights, in which a small change would be lost.
        """
        merged = dict(weights)
        for path, deltas in self.deltas().items():
            weight = weights[f"{path}.weight"]
            if weight.dtype in INTEGERS:
                raise CheckpointError(
                    f"{self.where} cannot be merged into packed weights ({path}), where it would be lost to rounding; "
                    "load it beside them, or merge it into a checkpoint that is not packed"
                )
            merged[f"{path}.weight"] = _merged(weight, deltas)
        return merged


@dataclass(frozen=True)
class _Layer:
    """A layer of a file: its arrays by kind, all of its outputs' places, and alpha over rank.

    Attributes:
        name: as the file has it.
    """

    name: str
    arrays: Mapping[str, mx.array]
    rows: tuple[Rows, ...]
    factor: float

    @property
    def form(self) -> str:
        form = "LoRA" if "down" in self.arrays else "LoHa" if "hada_w1_a" in self.arrays else "LoKr"
        return f"{form} with DoRA" if "magnitude" in self.arrays else form

    def deltas(self, shapes: Mapping[str, tuple[int, int]], scale: float) -> Iterator[tuple[str, Delta]]:
        """(path, delta) of each layer that this is a part of."""
        magnitude = self.arrays.get("magnitude")
        factor = self.factor * (scale if magnitude is None else 1)
        for path, spans in _spans(self.rows).items():
            size = shapes[path][0]
            delta: LowRank | Kronecker
            if self.form.startswith("LoKr"):
                left, right = _kronecker_parts(self.arrays)
                delta = Kronecker(left * factor, right, spans, size)
            else:
                down, up = _thin_parts(self.arrays)
                delta = LowRank(down, _placed(up, spans, size), mx.full((down.shape[0],), factor))
            if magnitude is None:
                yield path, delta
            else:
                yield path, Decomposed(delta, _placed(magnitude.reshape(-1), spans, size, math.nan), scale)


def _thin_parts(arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
    """down (R, inputs) and up (outputs, R). LoHa's two pairs give one of all products of their ranks: the elementwise
    product of two sums is the sum over all pairs.
    """
    if "down" in arrays:
        return arrays["down"], arrays["up"]
    pairs = []
    for k in (1, 2):
        a, b, core = arrays[f"hada_w{k}_a"], arrays[f"hada_w{k}_b"], arrays.get(f"hada_t{k}")
        pairs.append((a, b) if core is None else (a.T, core @ b))
    (up1, down1), (up2, down2) = pairs
    down = (down1[:, None] * down2[None]).reshape(-1, down1.shape[1])
    return down, (up1[:, :, None] * up2[:, None]).reshape(up1.shape[0], -1)


def _kronecker_parts(arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
    """left (a, b) and right (c, d), of which each may be a product of two, the right one with a core between them."""
    left, right, core = (arrays.get(name) for name in ("lokr_w1", "lokr_w2", "lokr_t2"))
    if left is None:
        left = arrays["lokr_w1_a"] @ arrays["lokr_w1_b"]
    if right is None:
        a, b = arrays["lokr_w2_a"], arrays["lokr_w2_b"]
        right = a @ b if core is None else a.T @ core @ b
    return left, right


def _rank(arrays: Mapping[str, mx.array]) -> int | None:
    """What alpha is divided by; None for a LoKr of two whole matrices, which knows no alpha."""
    for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in arrays:
            return int(arrays[name].shape[0])
    return None


_FORMS = (
    {"down", "up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)
_OPTIONAL = {"alpha", "magnitude", "hada_t1", "hada_t2", "lokr_t2"}


def _fault(arrays: Mapping[str, mx.array], rows: Sequence[Rows], inputs: int) -> str:
    """Why a layer of a file cannot be used, or nothing."""
    if arrays.keys() - _OPTIONAL not in _FORMS or ("hada_t1" in arrays) != ("hada_t2" in arrays):
        return f"has {', '.join(sorted(arrays))} alone"
    numbers = [name for name, array in arrays.items() if name != "alpha" and array.dtype in INTEGERS]
    if numbers:
        return f"has whole numbers in {', '.join(numbers)}"
    if "alpha" in arrays and arrays["alpha"].size != 1:
        return f"has {arrays['alpha'].size} alphas"
    outputs = sum(stop - start for _, start, stop in rows)
    try:
        if "down" in arrays or "hada_w1_a" in arrays:
            down, up = _thin_parts(arrays)
            found = (up.shape[0], down.shape[1]) if up.shape[1] == down.shape[0] else None
        else:
            left, right = _kronecker_parts(arrays)
            found = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])
    except (ValueError, IndexError):  # what MLX raises for shapes that do not go together
        found = None
    if found is None or _rank(arrays) == 0:
        return "has matrices that do not go together"
    if found != (outputs, inputs):
        wide = f", as {_WIDTHS[found[1]]}'s" if found[1] in _WIDTHS and inputs in _WIDTHS else ""
        return f"changes {found[0]} x {found[1]}, not {outputs} x {inputs}{wide}"
    magnitude = arrays.get("magnitude")
    if magnitude is not None and not magnitude.shape[:1] == (magnitude.size,) == (outputs,):
        return f"has DoRA lengths {magnitude.shape}, not one of each of its {outputs} outputs, which is not read"
    return ""


def _read(file: Path, shapes: Mapping[str, tuple[int, int]]) -> tuple[list[_Layer], list[str]]:
    """The layers of a file that fit, its arrays lazy, and what is wrong with the others, a line for each fault."""
    layers = lora_layers({path: shape[0] for path, shape in shapes.items()}, shapes["x_embedder"][0])
    underscored = {name.replace(".", "_"): name for name in layers}
    arrays: dict[str, dict[str, mx.array]] = {}
    strange: list[str] = []
    faults: list[str] = []
    for key, array in load_safetensors(file).items():
        match = _KEY.fullmatch(key)
        stripped = _PREFIX.sub("", match[1], count=1) if match else ""
        name = stripped if stripped in layers else underscored.get(_UNDERSCORED.sub("", stripped, count=1))
        if match is None or name is None:
            strange.append(key)
            continue
        kind = _KINDS.get(match[2], match[2])
        if kind in arrays.setdefault(name, {}):
            faults.append(f"{key} is there twice, under two names")
        arrays[name][kind] = array.reshape(array.shape[:2]) if array.ndim == 4 and array.shape[2:] == (1, 1) else array
    for look, keys in groupby(sorted(strange, key=_look), key=_look):
        named = list(keys)
        faults.append(f"{len(named)} {'key' if len(named) == 1 else 'keys'} of no layer here, {look}: {few(named, 3)}")
    settings = _settings(file)
    found = []
    misfits = []
    for name, own in arrays.items():
        rows = layers[name]
        fault = _fault(own, rows, shapes[rows[0][0]][1])
        if fault:
            misfits.append(f"{name} {fault}")
        else:
            found.append(_Layer(name, own, rows, _factor(name, own, settings)))
    if misfits:
        faults.append(f"{len(misfits)} {'layer' if len(misfits) == 1 else 'layers'} of other shapes: {few(misfits, 2)}")
    return found, faults


def _look(key: str) -> str:
    stripped = _PREFIX.sub("", key, count=1)
    for pattern, look in _LOOKS:
        if re.match(pattern, stripped):
            return f"by their names {look}"
    return "unknown"


def _settings(file: Path) -> Mapping[str, Any]:
    """What the file's header says of ranks and alphas, as diffusers writes it, or an adapter_config.json beside it, as
    PEFT does.
    """
    with safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    beside = file.with_name("adapter_config.json")
    try:
        if text is not None:
            values = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
        else:
            values = dict(json.loads(beside.read_bytes())) if beside.is_file() else {}
        alphas = [values.get("lora_alpha"), *(values.get("alpha_pattern") or {}).values()]
        if not all(alpha is None or isinstance(alpha, (int, float)) for alpha in alphas):
            raise ValueError("an alpha that is no number")
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        where = f"{file}: its header's lora_adapter_metadata" if text is not None else str(beside)
        raise CheckpointError(f"{where} cannot be read ({error})") from None
    return values


def _factor(name: str, arrays: Mapping[str, mx.array], settings: Mapping[str, Any]) -> float:
    """Alpha over rank, or of rsLoRA over its root: of an array, else of the header; 1 where nothing is said."""
    rank = _rank(arrays)
    if rank is None:
        return 1.0
    alpha: float = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if f".{name}".endswith(f".{pattern.lstrip('^')}"):
            alpha = value
    if "alpha" in arrays:
        alpha = float(np.array(arrays["alpha"].astype(mx.float32)).reshape(-1)[0])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def parse_lora(text: str) -> tuple[str, float]:
    """(where, scale) of "where" or "where:scale", as commands take a LoRA.

    Raises:
        InputError: see check_scale.
    """
    where, _, number = text.rpartition(":")
    try:
        scale = float(number) if where and not Path(text).exists() else None
    except ValueError:
        scale = None
    if scale is None:
        return text, 1.0
    check_scale(scale)
    return where, scale


def check_scale(scale: float) -> None:
    """Refuse what is no scale of a LoRA.

    Raises:
        InputError: unless it is a number from -100 to 100.
    """
    if isinstance(scale, bool) or not (isinstance(scale, (int, float)) and abs(scale) <= MAX_SCALE):
        raise InputError(f"the scale of a LoRA must be a number from -{MAX_SCALE} to {MAX_SCALE}, got {scale!r}")


def open_lora(
    where: str,
    model: FluxKlein,
    weights: Callable[[], Mapping[str, Any]],
    *,
    scale: float = 1.0,
    merge: bool = False,
    partial: bool = False,
) -> Lora:
    """Find a LoRA's file and check it: every key, every shape, every number.

    Args:
        where: a safetensors file, a folder with one, a Hub id, or "owner/name/file".
        model: the transformer, whose weights are not read.
        weights: gives them, lazily, under the modules' names, for a DoRA.
        partial: pass over what fits no layer.

    Raises:
        CheckpointError: naming all keys that are not used, with what they look like, unless ``partial``; for a file of
            which nothing fits, or with numbers that are not finite.
        InputError: for a scale that is none.
    """
    check_scale(scale)
    shapes = {path: linear_shape(layer) for path, layer in model.named_modules() if isinstance(layer, LINEAR)}
    file = lora_file(where)
    lora = Lora(where, file, float(scale), merge, partial, shapes=shapes)
    layers, faults = _read(file, shapes)
    if faults and (not partial or not layers):
        way_out = "; partial (--lora-partial) loads the rest" if layers else ""
        raise CheckpointError(f"{file} does not fit: {'; '.join(faults)}{way_out}")
    if not layers:
        raise CheckpointError(f"{file} has no weights of a LoRA")
    for layer in layers:
        for kind, array in layer.arrays.items():
            if not mx.isfinite(array).all().item():
                raise CheckpointError(f"{file}: {layer.name}.{kind} has values that are not finite")
    gains = {}
    if not merge and any("magnitude" in layer.arrays for layer in layers):
        source = weights()
        for layer in layers:
            for path, delta in layer.deltas(shapes, scale):
                if isinstance(delta, Decomposed):
                    gains[layer.name, path] = delta.find_gain(_dense_rows(source, path, shapes[path]))
    return replace(lora, summary=_summary(layers, shapes, faults), gains=gains)


def _summary(layers: Sequence[_Layer], shapes: Mapping[str, Any], faults: Sequence[str]) -> str:
    covered = {path for layer in layers for path, _, _ in layer.rows}
    forms = sorted({layer.form for layer in layers})
    ranks = sorted({rank for layer in layers if (rank := _rank(layer.arrays)) is not None})
    alphas = sorted({layer.factor * rank for layer in layers if (rank := _rank(layer.arrays)) is not None})
    parts = [" and ".join(forms), f"{len(covered)} of {len(shapes)} layers"]
    for name, values in (("rank", ranks), ("alpha", alphas)):
        if values:
            parts.append(f"{name} {values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else ""))
    return ", ".join(parts) + (f"; passed over: {'; '.join(faults)}" if faults else "")


# ---------------------------------------------------------------------------------------------------- writing

NAMES = ("diffusers", "comfyui")


def lora_arrays(
    layers: Mapping[str, tuple[mx.array, mx.array]], alpha: float, names: str = "diffusers"
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A LoRA as a file has it: its arrays, and its header's metadata.

    With diffusers' names the header says alpha, as diffusers reads it. ComfyUI reads no header, and diffusers no alpha
    under BFL's names: there up is multiplied by alpha over rank, which every reader understands.

    Args:
        layers: of each layer, by its path, down (R, inputs) and up (outputs, R).
        names: of NAMES.
    """
    if names == "comfyui":
        scaled = {path: (down, up * (alpha / down.shape[0])) for path, (down, up) in layers.items()}
        prefix, layers, metadata = "diffusion_model", bfl_lora(scaled), {}
    else:
        rank = next(iter(layers.values()))[0].shape[0]
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
        values = {f"transformer.{name}": value for name, value in config.items()}
        prefix, metadata = "transformer", {"lora_adapter_metadata": json.dumps(values, sort_keys=True)}
    arrays = {}
    for name, (down, up) in layers.items():
        arrays[f"{prefix}.{name}.lora_A.weight"] = down
        arrays[f"{prefix}.{name}.lora_B.weight"] = up
    return arrays, {"format": "pt", **metadata}


# ---------------------------------------------------------------------------------------------------- layers

LINEAR = (Linear, QuantizedLinear)


def linear_shape(layer: Linear | QuantizedLinear) -> tuple[int, int]:
    """(outputs, inputs), of a packed layer too."""
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.how.bits if isinstance(layer, QuantizedLinear) else columns


def attach(model: FluxKlein, loras: Sequence[Lora]) -> None:
    """Let a transformer's layers add what these LoRAs say, and nothing else. Arrays stay lazy, in the dtype of the
    activations; thin products of one layer become one.
    """
    dtype = model._dtype
    together: dict[str, list[Delta]] = {}
    for lora in loras:
        for path, deltas in lora.deltas().items():
            together.setdefault(path, []).extend(deltas)
    for path, layer in model.named_modules():
        if not isinstance(layer, LINEAR):
            continue
        layer.pop("deltas", None)
        if path in together:
            thin = [delta for delta in together[path] if isinstance(delta, LowRank)]
            others: list[Delta] = [delta for delta in together[path] if not isinstance(delta, LowRank)]
            layer.deltas = [*others, *_joined(thin)]
            for delta in layer.deltas:
                delta.update(tree_map(lambda array: array.astype(dtype), delta.parameters()))
                delta.freeze()


def attached(model: FluxKlein) -> list[mx.array]:
    """The arrays of the LoRAs that a transformer has."""
    deltas = [
        delta for _, layer in model.named_modules() if isinstance(layer, LINEAR) for delta in layer.get("deltas", ())
    ]
    return [array for delta in deltas for array in weights_of(delta).values()]


def _joined(deltas: Sequence[LowRank]) -> list[LowRank]:
    """Thin products as one, of all their ranks."""
    if len(deltas) < 2:
        return list(deltas)
    down, up, scales = ([delta[name] for delta in deltas] for name in ("down", "up", "scales"))
    return [LowRank(mx.concatenate(down), mx.concatenate(up, axis=1), mx.concatenate(scales))]


def _dense_rows(weights: Mapping[str, Any], path: str, shape: tuple[int, int]) -> Callable[[int, int], mx.array]:
    """Rows of a layer's weight in float32, from one up to another."""
    weight = weights[f"{path}.weight"]
    how = packing_in(weights)(path, Linear(shape[1], shape[0]))
    if how is None:
        return lambda start, stop: read_rows(weight, start, stop).astype(mx.float32)
    scales, biases = weights[f"{path}.scales"], weights.get(f"{path}.biases")

    def rows(start: int, stop: int) -> mx.array:
        part = slice(start, stop)
        return unpack(weight[part], scales[part], None if biases is None else biases[part], how).astype(mx.float32)

    return rows


def merging(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """A checkpoint whose transformer has these merged into its weights, and no others."""
    source = replace(checkpoint.sources["transformer"], changes=tuple(loras))
    return replace(checkpoint, sources={**checkpoint.sources, "transformer": source})


def fused(checkpoint: Checkpoint, given: Sequence[tuple[str, float]], partial: bool) -> Checkpoint:
    """A checkpoint with LoRAs merged, each given as (where, scale).

    Raises:
        CheckpointError, InputError: see open_lora.
    """
    model, weights = FluxKlein(checkpoint.transformer), checkpoint.sources["transformer"].weights
    loras = [open_lora(where, model, weights, scale=scale, merge=True, partial=partial) for where, scale in given]
    return merging(checkpoint, loras)


def _merged(weight: Any, deltas: Sequence[Delta]) -> Deferred:
    """A weight with deltas in it, summed in float32, some rows at a time."""

    def read(start: int, stop: int) -> mx.array:
        own = read_rows(weight, start, stop).astype(mx.float32)
        return sum((delta.change(own, start, stop) for delta in deltas), own).astype(weight.dtype)

    return Deferred(weight.shape, weight.dtype, read)
