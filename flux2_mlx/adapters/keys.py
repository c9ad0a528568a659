"""Keys and forms of adapter files: which layer, which matrix, which alpha; and writing them.

Keys of FLUX.2 LoRAs: diffusers' lora_conversion_utils and ComfyUI's lora.py. Kalajdzievski 2023 (rsLoRA).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoints.files import open_safetensors
from ..checkpoints.hub import PEFT_PREFIX
from ..errors import summarize
from ..lazy import INTEGERS, array_of, derive, read, sources_of
from ..models.names.flux2 import Rows, bfl_lora, lora_layers
from .alphas import read_alphas
from .deltas import Delta, DoRADelta, LoKrDelta, LoRADelta, place_rows, spans_of

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
        form = "LoRA" if "down" in self.arrays else "LoHa" if "hada_w1_a" in self.arrays else "LoKr"
        return f"{form} with DoRA" if "magnitude" in self.arrays else form

    def deltas(self, shapes: Mapping[str, tuple[int, int]], scale: float) -> Iterator[tuple[str, Delta]]:
        """(path, delta) of each layer that this is a part of."""
        magnitude = self.arrays.get("magnitude")
        factor = self.factor * (scale if magnitude is None else 1)
        for path, spans in spans_of(self.rows).items():
            size = shapes[path][0]
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
    """The rank, by which alpha is divided; None for a LoKr of two whole matrices, which has no alpha."""
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
    shape = _changed_shape(arrays)
    if shape is None or rank_of(arrays) == 0:
        return "has matrices that do not go together"
    if shape != (outputs, inputs):
        wide = f", as {_WIDTHS[shape[1]]}'s" if shape[1] in _WIDTHS and inputs in _WIDTHS else ""
        return f"changes {shape[0]} x {shape[1]}, not {outputs} x {inputs}{wide}"
    magnitude = arrays.get("magnitude")
    if magnitude is not None and not magnitude.shape[:1] == (magnitude.size,) == (outputs,):
        return f"has DoRA lengths {magnitude.shape}, not one of each of its {outputs} outputs, which is not read"
    return ""


def _changed_shape(arrays: Mapping[str, mx.array]) -> tuple[int, int] | None:
    """(outputs, inputs) of what a layer's matrices make together; None where they do not go together."""
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


def read_layers(file: Path, shapes: Mapping[str, tuple[int, int]]) -> Read:
    layers = lora_layers({path: shape[0] for path, shape in shapes.items()}, shapes["x_embedder"][0])
    underscored = {name.replace(".", "_"): name for name in layers}
    weights: dict[str, dict[str, Any]] = {}
    raw: dict[str, str] = {}
    strange: list[str] = []
    faults: list[str] = []
    opened = open_safetensors(file)
    for key, weight in opened.items():
        match = _KEY.fullmatch(key)
        stripped = _PREFIX.sub("", match[1], count=1) if match else ""
        name = stripped if stripped in layers else underscored.get(_UNDERSCORED.sub("", stripped, count=1))
        if match is None or name is None:
            strange.append(key)
            continue
        kind = _KINDS.get(match[2], match[2])
        if kind in weights.setdefault(name, {}):
            faults.append(f"{key} is there twice, under two names")
        if weight.ndim == 4 and weight.shape[2:] == (1, 1):
            weight = derive(lambda array: array.reshape(array.shape[:2]), weight)
        weights[name][kind], raw[name] = weight, match[1]
    for look, keys in groupby(sorted(strange, key=_look), key=_look):
        named = list(keys)
        faults.append(
            f"{len(named)} {'key' if len(named) == 1 else 'keys'} of no layer here, {look}: {summarize(named, 3)}"
        )
    fitting = []
    own_alphas: dict[str, float] = {}
    misfits = []
    for name, stored in weights.items():
        rows, own = layers[name], {kind: array_of(weight) for kind, weight in stored.items()}
        fault = _fault(own, rows, shapes[rows[0][0]][1])
        if fault:
            misfits.append(f"{name} {fault}")
        else:
            if rank_of(own) is None:
                own.pop("alpha", None)  # it means nothing, and is often too large for float16
            sources = tuple(source for weight in stored.values() for source in sources_of(weight))
            fitting.append(LoraLayer(name, own, rows, 1.0, sources))
            if "alpha" in own:
                own_alphas[name] = float(np.array(read(stored["alpha"]).astype(mx.float32)).reshape(-1)[0])
    alphas = read_alphas(file, opened, {rank for layer in fitting if (rank := rank_of(layer.arrays)) is not None})
    found = []
    for layer in fitting:
        names = layer.name, raw[layer.name].removeprefix(PEFT_PREFIX)
        form = layer.form.removesuffix(" with DoRA")
        factor = alphas.factor(names, form, rank_of(layer.arrays), own_alphas.get(layer.name))
        found.append(replace(layer, factor=factor))
    if misfits:
        faults.append(
            f"{len(misfits)} {'layer' if len(misfits) == 1 else 'layers'} of other shapes: {summarize(misfits, 2)}"
        )
    return Read(found, faults, alphas.note)


def _look(key: str) -> str:
    stripped = _PREFIX.sub("", key, count=1)
    for pattern, look in _LOOKS:
        if re.match(pattern, stripped):
            return f"by their names {look}"
    return "unknown"


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
