"""What the storage formats share: the layer that a format is asked about, marks that name one, scales in tiles.

A format is a Format: what it is called in marks, whether a layer is stored in it, and how that layer's weight is
decoded. To add one, write a file beside this one with its Format, and its name into decode.FORMATS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError
from ...lazy import INTEGERS, LazyTensor

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "weight_scale_2")
UNUSED = ("input_scale", "scale_input")  # scales of the activations, for hardware that multiplies in FP8

MARK = "comfy_quant"  # ComfyUI's array of JSON beside a weight that names the layer's storage format
MOST_MARK = 4096  # bytes of it
ROTATED = 256  # inputs that are rotated together where the mark does not say it


@dataclass(frozen=True)
class StoredLayer:
    """A layer as a file has it.

    Attributes:
        name: the layer's name in the file, without ".weight".
        weight: an mx.array or a LazyTensor, unread; FP8 is a float already.
        scales: those of SCALES that stand beside the weight, by that name; read, and finite.
        mark: the format that the file names for the layer; None where it names none.
        rotation: inputs that were rotated together before the weight was quantized (convrot); 0 where none were.
    """

    name: str
    weight: Any
    scales: Mapping[str, mx.array]
    mark: str | None
    rotation: int = 0

    def only_scale(self) -> mx.array:
        """Its one scale, or array of scales.

        Raises:
            CheckpointError: for a layer with none or with several.
        """
        if len(self.scales) != 1:
            found = f"more than one scale: {', '.join(self.scales)}" if self.scales else "no scale"
            raise CheckpointError(f"{self.name} has {found}")
        (scale,) = self.scales.values()
        return scale

    def unread(self) -> CheckpointError:
        rotated = " with convrot" if self.rotation else ""
        return CheckpointError(
            f"{self.name} is {self.weight.dtype}, marked {self.mark or 'with no format'}{rotated}, which is not read"
        )


@dataclass(frozen=True)
class Format:
    """A way to store a layer's weight.

    Attributes:
        marks: the names that marks have for it.
        matches: whether a layer with a mark or scales is stored so; of FORMATS the first that matches decodes.
        decode: the layer's weight in floats, lazy; raises CheckpointError where weight and scales do not fit.
        rotates: whether it knows of rotated weights.
    """

    marks: tuple[str, ...]
    matches: Callable[[StoredLayer], bool]
    decode: Callable[[StoredLayer], Any]
    rotates: bool = False


def mark(format: str, rotation: int = 0) -> mx.array:
    """The mark of a layer's format, for files that name the format elsewhere."""
    settings = {"format": format, **({"convrot": True, "convrot_groupsize": rotation} if rotation else {})}
    return mx.array(np.frombuffer(json.dumps(settings).encode(), np.uint8))


def format_of(settings: Any) -> tuple[str, int]:
    """(format, rotation) of a layer's settings, as ComfyUI writes them: how it is stored, and how many inputs were
    rotated together, 0 where none were.

    Raises:
        AttributeError, TypeError, ValueError, KeyError: where there is none.
    """
    settings = {**settings.get("params", {}), **settings}
    return str(settings["format"]), int(settings.get("convrot_groupsize", ROTATED)) if settings.get("convrot") else 0


def marked_format(layer: str, array: mx.array) -> tuple[str, int]:
    """(format, rotation) as a layer's mark says them.

    Raises:
        CheckpointError: where it says no format.
    """
    try:
        if isinstance(array, LazyTensor) or array.size > MOST_MARK:
            raise ValueError
        return format_of(json.loads(bytes(np.array(array))))
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError, OverflowError):
        raise CheckpointError(f"{layer}.{MARK} does not say a format") from None


def times_scales(layer: StoredLayer, scale: mx.array) -> Any:
    """A weight (out, in) in float32, multiplied by scales: one, (out, 1), or one for each block of equal size."""
    scale, shape = scale.astype(mx.float32), layer.weight.shape
    if scale.size == 0:
        raise CheckpointError(f"{layer.name} is {shape} and its scales {scale.shape}; they do not belong together")
    scale = scale.reshape(()) if scale.size == 1 else _spread_scales(layer.name, scale.reshape(len(scale), -1), shape)
    scale = mx.broadcast_to(scale, shape)
    return by_rows(layer.weight, scale, lambda rows, scale: rows.astype(mx.float32) * scale)


def _spread_scales(layer: str, scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Scales of rows (out, 1) or of equal blocks, repeated to where they apply; the last blocks may be cut off."""
    if scale.ndim != len(shape) or scale.size > shape[0] * shape[1]:
        raise CheckpointError(f"{layer} is {shape} and its scales {scale.shape}; they do not belong together")
    for axis, size in enumerate(shape):
        if scale.shape[axis] in (1, size):
            continue
        block = 1 << max(0, -(-size // scale.shape[axis]) - 1).bit_length()  # blocks are powers of two
        if -(-size // block) != scale.shape[axis]:
            raise CheckpointError(f"{layer} is {shape} and its scales {scale.shape}; they do not belong together")
        scale = mx.repeat(scale, block, axis=axis)
        scale = scale[:size] if axis == 0 else scale[:, :size]
    return scale


def by_rows(weight: Any, scale: mx.array, convert: Callable[[mx.array, mx.array], mx.array]) -> Any:
    """``convert`` of a weight and of a scale for each of its values; of a lazy weight, some rows as they are read."""
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


def is_integer(array: Any) -> bool:
    return array.dtype in INTEGERS
