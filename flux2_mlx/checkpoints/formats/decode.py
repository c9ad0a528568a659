"""Stored weights to those that the modules hold: every layer that has scales or a mark is decoded by its format.

A format is one file here, with a Format (see marks.py), and one word in FORMATS. GGUF is a kind of file rather than of
tensor and is decoded as its tensors are read (gguf.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from ...lazy import Derived, LazyTensor, array_of, derive, read, sources_of
from ...quantization.packing import PACKED, bits_and_group
from .fp8 import FP8
from .int8 import INT8
from .marks import MARK, SCALES, UNUSED, StoredLayer, marked_format
from .mxfp8 import MXFP8
from .nvfp4 import NVFP4

FORMATS = (MXFP8, NVFP4, INT8, FP8)


def decode(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights that are stored with scales or a mark as floats, without these; everything else as it is.

    Raises:
        CheckpointError: for a storage format that is not read, or scales that are not finite.
    """
    marks = {
        name.removesuffix(f".{MARK}"): marked_format(name.removesuffix(f".{MARK}"), array)
        for name, array in weights.items()
        if name.endswith(f".{MARK}")
    }
    known = sorted(mark for format in FORMATS for mark in format.marks)
    unread = sorted({format for format, _ in marks.values()}.difference(known))
    if unread:
        raise CheckpointError(f"weights are stored as {', '.join(unread)}, which is not read, only {', '.join(known)}")
    result: dict[str, Any] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if name == "scaled_fp8" or (kind in (*SCALES, *UNUSED, MARK) and f"{layer}.weight" in weights):
            continue
        if kind == "weight":
            scales = {kind: weights[f"{layer}.{kind}"] for kind in SCALES if f"{layer}.{kind}" in weights}
            if scales or layer in marks:
                weight = _decode_layer(layer, weight, scales, *marks.get(layer, (None, 0)))
        result[name] = weight
    return result


def _decode_layer(name: str, weight: Any, scales: Mapping[str, Any], mark: str | None, rotation: int) -> Any:
    for kind, scale in scales.items():
        if isinstance(scale, LazyTensor):
            raise CheckpointError(f"{name}.{kind} is in GGUF, where no scales belong")
        if not mx.isfinite(read(scale)).all().item():
            raise CheckpointError(f"{name}.{kind} is not a finite number")
    arrays = {kind: array_of(scale) for kind, scale in scales.items()}
    layer = StoredLayer(name, array_of(weight), arrays, mark, rotation)
    format = next((format for format in FORMATS if format.matches(layer)), None)
    if format is None or (rotation and not format.rotates):
        raise layer.unread()
    decoded = format.decode(layer)
    return decoded if isinstance(decoded, LazyTensor) else Derived(decoded, sources_of(weight))


def dequantize_square(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The dense weights of a part whose modules are never packed. Packed layers are square matrices there, as the
    attention's that mflux packs; their bits follow from that.

    Raises:
        CheckpointError: for weights of another packing, and for those that are not read as arrays.
    """
    if any(isinstance(weight, LazyTensor) for weight in weights.values()):
        raise CheckpointError("autoencoders in GGUF or F8_E5M2 are not read; it is small, so get another file")
    dense = dict(weights)
    for layer in [name.removesuffix(".weight") for name in weights]:
        if f"{layer}.scales" in weights and f"{layer}.weight" in weights:
            weight = weights[f"{layer}.weight"]
            bits, group = bits_and_group(weights, layer, weight.shape[0])
            arrays = [dense.pop(f"{layer}.{kind}") for kind in PACKED if f"{layer}.{kind}" in dense]
            dense[f"{layer}.weight"] = derive(partial(mx.dequantize, group_size=group, bits=bits), *arrays)
    return dense
