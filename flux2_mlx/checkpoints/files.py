"""Weight files: headers, indices, shards; safetensors and GGUF, never pickles."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, one_line, summarize
from ..lazy import Derived, LazyTensor, array_of
from .formats.gguf import MAGIC, read_gguf
from .formats.marks import MARK, format_of, mark
from .reading import read_json, read_start, refetch_hint

READ_BLOCK = 1 << 23  # bytes
MAX_TENSORS = 65536
_MAX_HEADER = 1 << 24  # bytes, with a trainer's notes or a whole workflow in it
_MAX_DIMENSION = 2**31  # MLX counts in 32 bits
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's archives, bare pickles


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check one safetensors file (header, length, dtypes, offsets) and list its tensors.

    Returns:
        name to (dtype as written in the file, shape).

    Raises:
        CheckpointError: for a file that is missing, cut short, corrupt, or no safetensors file at all.
    """
    start, size = read_start(path, 9)
    length = int.from_bytes(start[:8], "little")
    # A length of 640, 896, 1,152 or 1,408 begins as a pickle does; what follows tells.
    is_safetensors = start[8:] == b"{" and 8 + length <= size
    if path.suffix in PICKLES or (start.startswith(_PICKLE_STARTS) and not is_safetensors):
        raise CheckpointError(f"{path} is a pickle, which can run code and is never loaded; get the .safetensors file")
    if is_safetensors and length > _MAX_HEADER:
        raise CheckpointError(f"{path} is damaged: its header has {length:,} bytes, more than {_MAX_HEADER:,}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_slice(name)
                header[name] = (str(tensor.get_dtype()), tuple(tensor.get_shape()))
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        fault = f"is cut short or damaged: {reason} ({size:,} bytes)" if size else "is empty"
        raise CheckpointError(f"{path} {fault}; {refetch_hint(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} is damaged: its header claims {len(header):,} tensors")
    beyond = [name for name, (_, shape) in header.items() if any(side >= _MAX_DIMENSION for side in shape)]
    if beyond:
        raise CheckpointError(f"{path} is damaged: it has shapes that cannot be: {summarize(beyond)}")
    return header


def read_index(index: Path) -> dict[str, Path]:
    """Each weight that an index names and the shard that it is in, inside the index's own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files; {refetch_hint(index)}")
    for file in weight_map.values():
        if not file or Path(file).name != file or file.startswith(".") or not file.isprintable() or "\\" in file:
            raise CheckpointError(f"{index} names the shard {file!r}, which is outside its folder or hidden; refused")
    return {name: index.parent / file for name, file in weight_map.items()}


# Dtypes of safetensors that are read, and how MLX has them: the floats of 8 bits as bytes.
_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F8_E4M3": mx.uint8,
    "F8_E5M2": mx.uint8,
    "F8_E8M0": mx.uint8,  # scales, which stay bytes
    "I8": mx.int8,
    "U8": mx.uint8,  # packed layers and marks
    "U32": mx.uint32,
}
_COUNTS = ("num_batches_tracked", ".alpha", ".split_positions")  # names of what is integers in some files


def load_safetensors(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, mx.array]:
    """Lazy arrays of a safetensors file, of a list of shards, or of the shards that an index names.

    Every file's header, length, dtypes and offsets are checked first; no tensor data is read. FP8 becomes bfloat16,
    which holds all its values; scales are not applied: the sanitize functions do that. Where the header says
    how layers are stored, each gets its mark (``comfy_quant``).

    Raises:
        CheckpointError: for a bad file, a weight that is in two shards, or an index whose weights are not there.
    """
    return {name: array_of(weight) for name, weight in open_safetensors(path).items()}


def header_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header, once read_header has checked the file."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def open_safetensors(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """The same, arrays as MLX reads them and Derived ones."""
    names: set[str] = set()
    if isinstance(path, (str, os.PathLike)):
        path = Path(path)
        if path.name.endswith(".index.json"):
            shards = read_index(path)
            files, names = sorted(set(shards.values())), set(shards)
        else:
            files = [path]
    else:
        files = [Path(file) for file in path]
    weights = load_files(files)
    if any(isinstance(weight, LazyTensor) for weight in weights.values()):
        raise CheckpointError(f"{path} is GGUF or has F8_E5M2, which open_checkpoint and Flux2Pipeline read")
    absent = sorted(names - weights.keys())
    if absent:
        raise CheckpointError(f"{path} names weights that its shards do not have: {summarize(absent)}")
    return weights


def load_files(files: Sequence[Path]) -> dict[str, Any]:
    """The weights of some files together; a file's first bytes decide between safetensors and GGUF."""
    if not files:
        raise CheckpointError("no files to load weights from")
    weights: dict[str, Any] = {}
    for file in files:
        loaded = read_gguf(file) if is_gguf(file) else _load_file(file)
        twice = sorted(loaded.keys() & weights.keys())
        if twice:
            raise CheckpointError(f"{file} repeats weights of another shard: {summarize(twice)}; {refetch_hint(file)}")
        weights |= loaded
    return weights


def is_gguf(file: Path) -> bool:
    return read_start(file, len(MAGIC))[0] == MAGIC


def _load_file(file: Path) -> dict[str, Any]:
    header = read_header(file)
    odd = sorted(
        f"{name} ({dtype})"
        for name, (dtype, _) in header.items()
        if dtype not in _DTYPES and not name.endswith(_COUNTS)
    )
    if odd:
        raise CheckpointError(
            f"{file} has weights in formats that are not read, only {', '.join(_DTYPES)}: {summarize(odd)}"
        )
    try:
        loaded = mx.load(str(file), format="safetensors")
    except RuntimeError as error:  # a dtype that MLX does not know, and then none of the file: F8_E5M2, once F8_E8M0
        if {dtype for dtype, _ in header.values()} <= _DTYPES.keys() - {"F8_E5M2", "F8_E8M0"}:
            raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from None
        weights = _load_mapped(file, header)
    else:
        assert isinstance(loaded, dict)
        weights = {name: _lazy_array(array, header[name][0]) for name, array in loaded.items()}
    for layer, format in _layer_formats(file).items():
        weights.setdefault(f"{layer}.{MARK}", mark(*format))
    return weights


def _lazy_array(array: mx.array, dtype: str) -> mx.array | Derived:
    decoded = _decoded(array, dtype)
    return array if decoded is array else Derived(decoded, (array,))


def _decoded(array: mx.array, dtype: str) -> mx.array:
    """FP8, which MLX loads as bytes, in a dtype that has all its values; anything else as it is."""
    if dtype == "F8_E4M3":
        return mx.from_fp8(array, mx.bfloat16)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (array.astype(mx.uint16) << 8).view(mx.float16)
    return array


def _load_mapped(file: Path, header: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The tensors of a file that MLX does not read: a weight when its turn comes, the rest, which is small, now."""
    content = np.memmap(file, np.uint8, "r")
    start = 8 + int(content[:8].view("<u8")[0])
    entries = json.loads(content[8:start].tobytes())
    weights: dict[str, Any] = {}
    for name, (dtype, shape) in header.items():
        if dtype in _DTYPES:
            first, last = entries[name]["data_offsets"]
            to_tensor = _lazy_tensor if name.endswith(".weight") else _array
            weights[name] = to_tensor(content[start + first : start + last], dtype, shape)
    return weights


def _array(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> mx.array:
    return _decoded(mx.array(raw).view(_DTYPES[dtype]), dtype).reshape(shape)


def _lazy_tensor(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    size = math.prod(shape[1:]) * _DTYPES[dtype].size  # bytes of a row

    def read(start: int, stop: int) -> mx.array:
        return _array(raw[start * size : stop * size], dtype, (stop - start, *shape[1:]))

    return LazyTensor(shape, _array(raw[:0], dtype, (0,)).dtype, read)


def _layer_formats(file: Path) -> dict[str, tuple[str, int]]:
    """How layers are stored, where ComfyUI wrote it into the header: layer to (format, rotation)."""
    written = header_metadata(file).get("_quantization_metadata")
    if written is None:
        return {}
    try:
        layers = json.loads(written)["layers"]
        return {layer: format_of(entry) for layer, entry in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise CheckpointError(f"{file}: its header's _quantization_metadata does not say the layers' formats") from None


def read_through(files: Sequence[Path], room: int, stop: Event) -> int:
    """Read files to their end, or until ``stop`` is set, so that the system has them cached when weights are read.
    Files of more bytes than there is room for are left alone: reading on would drive out what was read.

    Returns:
        How many bytes were read.
    """
    count = 0
    with contextlib.suppress(OSError):  # whoever wants the weights will tell
        if sum(path.stat().st_size for path in files) <= room:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while not stop.is_set() and (block := file.read(READ_BLOCK)):
                        count += len(block)
    return count
