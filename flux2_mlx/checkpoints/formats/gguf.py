"""GGUF files: the header, and each tensor as a weight that is read and converted when its turn comes.

Floats are read as they are. Q4_0, Q4_1 and Q8_0 matrices become MLX's packed layers of the same bits in groups of 32:
the codes are the file's own. All other types are converted to floats, some rows at a time: those of blocks.py here, the
rest (IQ1 to IQ3, TQ and others that are rare) by the ``gguf`` package (extra "gguf").

Reference: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError
from ...lazy import LazyTensor
from .blocks import BLOCKS

MAGIC = b"GGUF"
_MAX_TENSORS = 65536
_MAX_DIMENSIONS = 4
_MAX_SIDE = 2**31  # MLX counts in 32 bits
_MAX_STRINGS = 1 << 20  # in the header's arrays; a vocabulary and its merges are a third
_ALIGNMENT = "general.alignment"

# Bytes of the header's scalar values by type number; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_F32, _F16, _BF16 = 0, 1, 30
_FLOATS = {_F32: (np.float32, mx.float32), _F16: (np.float16, mx.float16), _BF16: (np.uint16, mx.bfloat16)}
# Types whose blocks of 32 MLX can hold: (bits, bytes of a block, whether it has an offset besides the scale).
_PACKED = {2: (4, 18, False), 3: (4, 20, True), 8: (8, 34, False)}
_GROUP = 32


class _Reader:
    """The header, front to back; nothing is read past the file's end, whatever lengths it claims."""

    def __init__(self, content: np.ndarray, path: Path):
        self.content, self.path, self.at, self.strings = content, path, 0, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.content) - self.at:
            raise CheckpointError(f"{self.path} is cut short or damaged: it ends within its header")
        self.at += count
        return self.content[self.at - count : self.at].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value, or None for an array, which is skipped: none is needed."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path} is damaged: its header has a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.bytes(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            self.strings += count
            if self.strings > _MAX_STRINGS:
                raise CheckpointError(f"{self.path} is damaged: its header claims {self.strings:,} strings")
            for _ in range(count):  # ends with the file at the latest
                self.bytes(self.number("Q"))
        else:
            raise CheckpointError(f"{self.path} is damaged: its header has an array of type {inner}")
        return None


def read_gguf(path: Path) -> dict[str, Any]:
    """The tensors of a GGUF file; see _read, which caches the last few headers: one may hold a whole vocabulary."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return dict(_read(path, status.st_mtime_ns, status.st_size)[0])


def gguf_values(path: Path) -> dict[str, Any]:
    """The numbers and strings of a GGUF file's header by name; read_gguf reports a missing file.

    Raises:
        CheckpointError: as read_gguf.
    """
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)[1]


@lru_cache(maxsize=4)
def _read(path: Path, _modified: int, _size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a GGUF file by name, packed ones as ``weight``, ``scales``, ``biases``, and the header's values;
    only the header is read.

    Raises:
        CheckpointError: for a file that is damaged, cut short, of another version, or of a type that needs the extra.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
    except ValueError:
        raise CheckpointError(f"{path} is empty") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    reader = _Reader(content, path)
    if reader.bytes(4) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file")
    version = reader.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF of version {version}; 2 and 3 are read")
    tensors, count = reader.number("Q"), reader.number("Q")
    if tensors > _MAX_TENSORS or count > _MAX_TENSORS:
        raise CheckpointError(f"{path} is damaged: its header claims {tensors:,} tensors and {count:,} values")
    values: dict[str, Any] = {}
    for _ in range(count):
        name = reader.string()
        values[name] = reader.value(reader.number("I"))
    alignment = values.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise CheckpointError(f"{path} is damaged: its alignment is {alignment!r}")
    entries = _read_entries(reader, tensors)
    start = -(-reader.at // alignment) * alignment
    weights: dict[str, Any] = {}
    for name, (shape, kind, offset) in entries.items():
        block, size, to_floats = _block_of(path, name, shape, kind)
        if shape[-1] % block or math.prod(shape) == 0:
            raise CheckpointError(f"{path} is damaged: {name} is {shape} in blocks of {block}")
        length = math.prod(shape) // block * size
        if start + offset + length > len(content):
            raise CheckpointError(f"{path} is cut short or damaged: {name} ends beyond its {len(content):,} bytes")
        if max(shape) >= _MAX_SIDE:
            raise CheckpointError(f"{path} is damaged: {name} is {shape}")
        raw = content[start + offset : start + offset + length].reshape(-1, shape[-1] // block * size)  # (rows, bytes)
        decoded = _decode_tensor(name, shape, kind, raw, to_floats)
        if decoded.keys() & weights.keys():
            raise CheckpointError(f"{path} is damaged: {min(decoded.keys() & weights.keys())} is there twice")
        weights |= decoded
    return weights, values


def _read_entries(reader: _Reader, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """(shape, type, offset in bytes) of each tensor, by its name."""
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, dimensions = reader.string(), reader.number("I")
        if name in entries:
            raise CheckpointError(f"{reader.path} is damaged: {name} is there twice")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{reader.path} is damaged: {name} has {dimensions} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        entries[name] = (shape, reader.number("I"), reader.number("Q"))
    return entries


Converter = Callable[[np.ndarray], np.ndarray]


def _block_of(path: Path, name: str, shape: tuple[int, ...], kind: int) -> tuple[int, int, Converter | None]:
    """(values, bytes) of a type's blocks, and what makes floats of rows of them, where they do not stay as they are."""
    if kind in _FLOATS:
        return 1, np.dtype(_FLOATS[kind][0]).itemsize, None
    if kind in _PACKED and len(shape) == 2 and name.endswith(".weight"):
        return _GROUP, _PACKED[kind][1], None
    if kind in BLOCKS:
        block, size, convert = BLOCKS[kind]
        return block, size, lambda rows: convert(rows.reshape(-1, size)).reshape(len(rows), -1)
    return _package_block(path, name, kind)


def _package_block(path: Path, name: str, kind: int) -> tuple[int, int, Converter]:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{path}: {name} is of GGUF type {kind}, which needs the gguf package: pip install 'flux2-mlx[gguf]'; "
            "Q2_K to Q8_0, IQ4_NL and IQ4_XS need none"
        ) from None
    try:
        package_type = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[package_type]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), package_type)  # raises for a type that it cannot read
    except (ValueError, KeyError, NotImplementedError):
        raise CheckpointError(f"{path}: {name} is of GGUF type {kind}, which the gguf package does not read") from None
    return block, size, lambda rows: gguf.quants.dequantize(rows, package_type)


def _decode_tensor(
    name: str, shape: tuple[int, ...], kind: int, raw: np.ndarray, to_floats: Converter | None
) -> dict[str, Any]:
    if kind in _FLOATS:
        numpy_dtype, dtype = _FLOATS[kind]
        return {name: _lazy_tensor(shape, dtype, raw, lambda rows: mx.array(rows.view(numpy_dtype)).view(dtype))}
    if to_floats is None:
        bits, size, has_offset = _PACKED[kind]
        layer, (rows, columns) = name.removesuffix(".weight"), shape

        def scales(blocks: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(blocks[..., :2]).view(np.float16)

        def biases(blocks: np.ndarray) -> np.ndarray:
            if has_offset:
                return np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)
            return scales(blocks) * np.float16(-(2 ** (bits - 1)))

        def codes(blocks: np.ndarray) -> np.ndarray:
            values = np.ascontiguousarray(blocks[..., 4 if has_offset else 2 :])
            if bits == 8:
                return (values ^ 128).view(np.uint32)  # signed to offset
            values = np.concatenate([values & 15, values >> 4], axis=-1)  # now in the order of the weights
            return np.ascontiguousarray(values[..., ::2] | values[..., 1::2] << 4).view(np.uint32)

        def part(function: Callable[[np.ndarray], np.ndarray], dtype: mx.Dtype, width: int) -> LazyTensor:
            return _lazy_tensor(
                (rows, width), dtype, raw, lambda some: mx.array(function(some.reshape(-1, columns // _GROUP, size)))
            )

        return {
            name: part(codes, mx.uint32, columns * bits // 32),
            f"{layer}.scales": part(scales, mx.float16, columns // _GROUP),
            f"{layer}.biases": part(biases, mx.float16, columns // _GROUP),
        }

    return {name: _lazy_tensor(shape, mx.float32, raw, lambda rows: mx.array(to_floats(rows)))}


def _lazy_tensor(
    shape: tuple[int, ...], dtype: mx.Dtype, raw: np.ndarray, function: Callable[[np.ndarray], mx.array]
) -> LazyTensor:
    """A tensor of that shape from its raw rows along the last axis, read in parts of the first axis."""
    each = math.prod(shape[1:-1]) if len(shape) > 1 else 1

    def read(start: int, stop: int) -> mx.array:
        with np.errstate(all="ignore"):  # of a damaged file; what is not finite is told where it is met
            if len(shape) == 1:
                return function(raw).reshape(shape)[start:stop]
            return function(raw[start * each : stop * each]).reshape(stop - start, *shape[1:])

    return LazyTensor(shape, dtype, read)
