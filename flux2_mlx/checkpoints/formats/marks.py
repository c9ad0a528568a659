"""Marks of a layer's storage format, and what the formats share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError
from ...lazy import LazyTensor

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "weight_scale_2")
UNUSED = ("input_scale", "scale_input")  # of the activations, for hardware that multiplies in FP8

# A mark of a layer's storage, as ComfyUI writes it beside the weight, and the formats that may stand in it: those of
# ComfyUI (QUANT_ALGOS in its quant_ops.py) that are read, and one for ModelOpt's NVFP4.
MARK = "comfy_quant"
MODELOPT_NVFP4 = "modelopt_nvfp4"
INT8, MXFP8, NVFP4 = "int8_tensorwise", "mxfp8", "nvfp4"
FORMATS = ("float8_e4m3fn", "float8_e5m2", INT8, MXFP8, MODELOPT_NVFP4, NVFP4)


def mark(format: str) -> mx.array:
    """The mark of a layer's storage, for a file that says it elsewhere."""
    return mx.array(np.frombuffer(json.dumps({"format": format}).encode(), np.uint8))


def format_of(settings: Any) -> str:
    """The format that is said of a layer, with "convrot" where its weight is rotated, which ComfyUI says beside it.

    Raises:
        AttributeError, TypeError, KeyError: where none is said.
    """
    rotated = settings.get("convrot") or settings.get("params", {}).get("convrot")
    return f"{settings['format']} with convrot" if rotated else str(settings["format"])


def marked_format(layer: str, array: mx.array) -> str:
    try:
        return format_of(json.loads(bytes(np.array(array))))
    except (ValueError, AttributeError, TypeError, KeyError):
        raise CheckpointError(f"{layer}.{MARK} does not say a format") from None


def by_rows(weight: Any, scale: mx.array, convert: Callable[[mx.array, mx.array], mx.array]) -> Any:
    """What a weight and the scales of all its values stand for; of a deferred one, rows as they are read."""
    if isinstance(weight, LazyTensor):
        return LazyTensor(
            scale.shape, mx.float32, lambda start, stop: convert(weight.read(start, stop), scale[start:stop])
        )
    return convert(weight, scale)


def untile(layer: str, scale: mx.array, rows: int, blocks: int) -> mx.array:
    """Scales (rows, blocks) out of the tiles of 128 x 4 that NVIDIA's matrix units read (cuBLAS, "1D block scaling
    factors layout"), as ComfyUI's files have them.
    """
    tiles = (-(-rows // 128), -(-blocks // 4))
    if scale.size != 512 * tiles[0] * tiles[1]:
        raise CheckpointError(f"{layer}: {scale.size} scales in tiles for {rows} x {blocks} blocks")
    scale = scale.reshape(*tiles, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(128 * tiles[0], 4 * tiles[1])
    return scale[:rows, :blocks]
