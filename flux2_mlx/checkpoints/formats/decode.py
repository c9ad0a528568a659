"""Stored weights to floats: every layer that has scales or a mark is decoded by its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from ...lazy import INTEGERS
from .fp8 import spread_scales
from .marks import FORMATS, INT8, MARK, MODELOPT_NVFP4, MXFP8, NVFP4, SCALES, UNUSED, by_rows, marked_format
from .mxfp8 import mxfp8_scale
from .nvfp4 import decode_nvfp4


def decode(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights that have scales times these, as floats; everything else as it is.

    Raises:
        CheckpointError: for a storage format that is not read, or scales that are not finite.
    """
    formats = {
        name.removesuffix(f".{MARK}"): marked_format(name.removesuffix(f".{MARK}"), array)
        for name, array in weights.items()
        if name.endswith(f".{MARK}")
    }
    unread = sorted({format for format in formats.values() if format not in FORMATS})
    if unread:
        raise CheckpointError(
            f"weights are stored as {', '.join(unread)}, which is not read, only {', '.join(FORMATS)}"
        )
    result: dict[str, Any] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if name == "scaled_fp8":
            continue
        if kind in (*SCALES, *UNUSED, MARK) and f"{layer}.weight" in weights:
            continue
        if kind == "weight":
            found = {kind: weights[f"{layer}.{kind}"] for kind in SCALES if f"{layer}.{kind}" in weights}
            if found or formats.get(layer) == MXFP8:  # which means nothing without scales
                weight = _scaled(layer, weight, found, formats.get(layer))
        result[name] = weight
    return result


def _scaled(layer: str, weight: Any, scales: dict[str, mx.array], format: str | None) -> Any:
    for name, scale in scales.items():
        if not isinstance(scale, mx.array):
            raise CheckpointError(f"{layer}.{name} is in GGUF, where no scales belong")
        if not mx.isfinite(scale).all().item():
            raise CheckpointError(f"{layer}.{name} is not a finite number")
    if format == MXFP8:
        scales = {"weight_scale": mxfp8_scale(layer, weight, scales)}
    if "weight_scale_2" in scales:
        if weight.dtype != mx.uint8 or weight.ndim != 2 or "weight_scale" not in scales:
            raise CheckpointError(f"{layer}: weight_scale_2 belongs to NVFP4, but the weight is {weight.dtype}")
        if format not in (NVFP4, MODELOPT_NVFP4):
            raise CheckpointError(
                f"{layer} is NVFP4, but the file does not say in which of two layouts its scales are: neither a "
                f"{MARK} mark (ComfyUI) nor a quantization_config (ModelOpt) is there"
            )
        return decode_nvfp4(layer, weight, scales["weight_scale"], scales["weight_scale_2"], format == NVFP4)
    if len(scales) > 1:
        raise CheckpointError(f"{layer} has more than one scale: {', '.join(scales)}")
    (scale,) = scales.values()
    if scale.dtype in INTEGERS:
        raise CheckpointError(f"{layer} has scales in bytes (MXFP8), but no {MARK} mark that says their layout")
    if weight.dtype == mx.uint8:
        raise CheckpointError(f"{layer} is packed in bytes with one scale, a format that is not read")
    if (weight.dtype == mx.int8) != (format == INT8):  # int8 without a mark may be rotated
        raise CheckpointError(f"{layer} is {weight.dtype}, marked {format or 'with no format'}, which is not read")
    scale = scale.astype(mx.float32)
    scale = spread_scales(layer, scale.reshape(len(scale), -1), weight.shape) if scale.size > 1 else scale.reshape(())
    scale = mx.broadcast_to(scale, weight.shape)
    return by_rows(weight, scale, lambda rows, scale: rows.astype(mx.float32) * scale)
