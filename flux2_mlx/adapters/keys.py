"""Keys and forms of adapter files: which layer, which matrix, which alpha; and writing them.

Keys of FLUX.2 LoRAs: diffusers' lora_conversion_utils and ComfyUI's lora.py. Kalajdzievski 2023 (rsLoRA).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoints.files import is_gguf, load_files
from ..checkpoints.hub import PEFT_PREFIX
from ..errors import CheckpointError, printable, summarize
from ..lazy import INTEGERS, LazyTensor, array_of, derive, read, sources_of
from ..models.names.flux2 import Rows, bfl_lora, lora_layers
from .alphas import Alphas, read_alphas
from .deltas import Delta, DoRADelta, FullDelta, LoKrDelta, LoRADelta, place_rows, spans_of
from .unread import TEXT_ENCODER, checkpoint_part, explain

MOST_OF_KEY = 200  # characters of a key in a message
_KINDS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "w_norm": "diff",
    "diff_b": "bias",
    "b_norm": "bias",
}


# The layer's name, what of it this is, perhaps the adapter's name (PEFT), perhaps "weight", or "bias".
_KEY = re.compile(
    r"(.+?)\.(lora[._](?:A|B|down|up)|lora_magnitude_vector|dora_scale|alpha|"
    r"lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]|diff|diff_b|w_norm|b_norm)"
    r"(?:\.(?!weight$|bias$)\w+)?(\.weight|\.bias)?"
)
_PREFIX = re.compile(r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer|unet|module)\.)+")
_UNDERSCORED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_")
_WIDTHS = {3072: "klein-4b", 4096: "klein-9b", 6144: "FLUX.2-dev"}


@dataclass(frozen=True)
class LoraLayer:
    """A layer of a file: its arrays by kind, all of its outputs' places, and alpha over rank.

    Attributes:
        name: the layer's name in the file.
        sources: the arrays that are to be read before anything is computed from ``arrays``; see lazy.
    """

    name: str
    arrays: Mapping[str, mx.array]
    rows: tuple[Rows, ...]
    factor: float
    sources: tuple[mx.array, ...]

    @property
    def form(self) -> str:
        if "diff" in self.arrays:
            return "full difference"
        form = "LoRA" if "down" in self.arrays else "LoHa" if "hada_w1_a" in self.arrays else "LoKr"
        return f"{form} with DoRA" if "magnitude" in self.arrays else form

    def deltas(self, shapes: Mapping[str, tuple[int, ...]], scale: float) -> Iterator[tuple[str, Delta]]:
        """(path, delta) of each layer that this is a part of."""
        magnitude = self.arrays.get("magnitude")
        factor = self.factor * (scale if magnitude is None else 1)
        for path, spans in spans_of(self.rows).items():
            size = shapes[path][0]
            if "diff" in self.arrays:
                yield path, FullDelta(place_rows(self.arrays["diff"], spans, size), scale)
                continue
            delta: LoRADelta | LoKrDelta
            if self.form.startswith("LoKr"):
                left, right = _kronecker_parts(self.arrays)
                delta = LoKrDelta(left * factor, right, spans, size)
            else:
                down, up = _thin_parts(self.arrays)
                delta = LoRADelta(down, place_rows(up, spans, size), mx.full((down.shape[0],), factor))
            if magnitude is None:
                yield path, delta
            else:
                yield path, DoRADelta(delta, place_rows(magnitude.reshape(-1), spans, size, math.nan), scale)


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


def rank_of(arrays: Mapping[str, Any]) -> int | None:
    """The rank, by which alpha is divided; None for a LoKr of two whole matrices and a full difference,
    whose alpha means nothing.
    """
    for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in arrays:
            return int(arrays[name].shape[0])
    return None


_FORMS = (
    {"diff"},
    {"down", "up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)
_OPTIONAL = {"alpha", "magnitude", "hada_t1", "hada_t2", "lokr_t2"}


def _fault(arrays: Mapping[str, mx.array], rows: Sequence[Rows], weight: tuple[int, ...]) -> str:
    """Why a layer of a file cannot be used, or nothing."""
    if len(weight) == 1 and "diff" not in arrays:
        return f"is a norm and has {', '.join(sorted(arrays))}, where only a full difference is read"
    if arrays.keys() - _OPTIONAL not in _FORMS or ("hada_t1" in arrays) != ("hada_t2" in arrays):
        return f"has {', '.join(sorted(arrays))} alone"
    numbers = [name for name, array in arrays.items() if name != "alpha" and array.dtype in INTEGERS]
    if numbers:
        return f"has whole numbers in {', '.join(numbers)}"
    if "alpha" in arrays and arrays["alpha"].size != 1:
        return f"has {arrays['alpha'].size} alphas"
    outputs = sum(stop - start for _, start, stop in rows)
    shape = _changed_shape(arrays)
    if shape is None or rank_of(arrays) == 0:
        return "has matrices that do not go together"
    expected = (outputs, *weight[1:])
    if shape != expected:
        last, own = shape[-1], expected[-1]
        wide = f", as {_WIDTHS[last]}'s" if last in _WIDTHS and own in _WIDTHS else ""
        return f"changes {' x '.join(map(str, shape))}, not {' x '.join(map(str, expected))}{wide}"
    magnitude = arrays.get("magnitude")
    if magnitude is not None and not magnitude.shape[:1] == (magnitude.size,) == (outputs,):
        return f"has DoRA lengths {magnitude.shape}, not one of each of its {outputs} outputs, which is not read"
    return ""


def _changed_shape(arrays: Mapping[str, mx.array]) -> tuple[int, ...] | None:
    """(outputs, inputs) of what a layer's matrices make together; None where they do not go together."""
    if "diff" in arrays:
        return tuple(arrays["diff"].shape)
    if any(array.ndim != 2 for kind, array in arrays.items() if kind not in ("alpha", "magnitude")):
        return None
    try:
        if "down" in arrays or "hada_w1_a" in arrays:
            down, up = _thin_parts(arrays)
            return (up.shape[0], down.shape[1]) if up.shape[1] == down.shape[0] else None
        left, right = _kronecker_parts(arrays)
        return left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    except (ValueError, IndexError):  # what MLX raises for shapes that do not go together
        return None


class Read(NamedTuple):
    """The layers of a file that fit, their arrays lazy; what is wrong with the others, a line for each fault; and what
    is to be told beside.
    """

    layers: list[LoraLayer]
    faults: list[str]
    note: str


def read_layers(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Read:
    """Find the layers of a file that is no checkpoint.

    Raises:
        CheckpointError: for a checkpoint, and for what read_alphas refuses.
    """
    if is_gguf(file):
        raise CheckpointError(f"{file} is GGUF, and no LoRA is read from that; get a safetensors file")
    layers = lora_layers({path: shape[0] for path, shape in shapes.items()}, shapes["x_embedder"][0])
    underscored = {name.replace(".", "_"): name for name in layers}

    def find(name: str) -> str | None:
        stripped = _PREFIX.sub("", name, count=1)
        return stripped if stripped in layers else underscored.get(_UNDERSCORED.sub("", stripped, count=1).rstrip("_"))

    weights: dict[str, dict[str, Any]] = {}
    raw: dict[str, str] = {}
    strange: dict[str, bool] = {}
    faults: list[str] = []
    opened = load_files([file])
    found_part = checkpoint_part(opened)
    if found_part and not any(_KEY.fullmatch(key) for key in opened):
        label, option = found_part
        raise CheckpointError(f"{file} has the weights of a whole {label} and is no LoRA; give it as {option}")
    for key, weight in opened.items():
        if isinstance(weight, LazyTensor):
            weight = weight.load()
        match = _KEY.fullmatch(key)
        name = find(match[1]) if match else None
        if match is None or name is None:
            strange[key] = match is not None
            continue
        kind = "bias" if match[3] == ".bias" else _KINDS.get(match[2], match[2])
        if kind in weights.setdefault(name, {}):
            faults.append(f"{printable(key, MOST_OF_KEY)} is there twice, under two names")
        if weight.ndim == 4 and weight.shape[2:] == (1, 1):
            weight = derive(lambda array: array.reshape(array.shape[:2]), weight)
        weights[name][kind], raw[name] = weight, match[1]
    if all(TEXT_ENCODER.fullmatch(key) and not _changes(opened[key]) for key in strange):
        strange = {}  # what is zero changes nothing
    for reason, keys in explain(strange, layers, find):
        verb = "key is not used" if len(keys) == 1 else "keys are not used"
        faults.append(f"{len(keys)} {verb}, {reason}: {summarize([printable(key, MOST_OF_KEY) for key in keys], 3)}")
    fitting = []
    own_alphas: dict[str, float] = {}
    misfits = []
    for name, stored in weights.items():
        bias = stored.pop("bias", None)
        if bias is not None and _changes(bias):
            misfits.append(f"{name} has a bias, and no layer of FLUX.2 [klein] has one")
            continue
        if not stored:
            continue
        rows, own = layers[name], {kind: array_of(weight) for kind, weight in stored.items()}
        fault = _fault(own, rows, shapes[rows[0][0]])
        if fault:
            misfits.append(f"{name} {fault}")
        else:
            if rank_of(own) is None:
                own.pop("alpha", None)  # it means nothing, and is often too large for float16
            sources = tuple(source for weight in stored.values() for source in sources_of(weight))
            fitting.append(LoraLayer(name, own, rows, 1.0, sources))
            if "alpha" in own:
                own_alphas[name] = float(np.array(read(stored["alpha"]).astype(mx.float32)).reshape(-1)[0])
    ranks = {rank for layer in fitting if (rank := rank_of(layer.arrays)) is not None}
    alphas = read_alphas(file, opened, ranks) if fitting else Alphas()  # another form's config may say of ranks of 0
    found = []
    for layer in fitting:
        if "diff" in layer.arrays:
            found.append(layer)
            continue
        names = layer.name, raw[layer.name].removeprefix(PEFT_PREFIX)
        form = layer.form.removesuffix(" with DoRA")
        factor = alphas.factor(names, form, rank_of(layer.arrays), own_alphas.get(layer.name))
        found.append(replace(layer, factor=factor))
    if misfits:
        faults.append(
            f"{len(misfits)} {'layer does' if len(misfits) == 1 else 'layers do'} not fit: {summarize(misfits, 2)}"
        )
    return Read(found, faults, alphas.note)


def _changes(weight: Any) -> bool:
    return bool(mx.any(read(weight) != 0).item())


NAMES = ("diffusers", "comfyui")


def lora_arrays(
    layers: Mapping[str, tuple[mx.array, mx.array]], alpha: float, names: str = "diffusers"
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A LoRA as a file has it: its arrays, and its header's metadata.

    With diffusers' names the header holds alpha, as diffusers reads it. ComfyUI reads no header, and diffusers no alpha
    under BFL's names: there up is multiplied by alpha over rank, which every reader understands.

    Args:
        layers: down (R, inputs) and up (outputs, R) of each layer, by its path.
        names: whose names the layers get, one of NAMES.
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
