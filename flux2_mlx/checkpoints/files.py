"""Weight files: headers, indices, shards; safetensors and GGUF, never pickles."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, summarize
from ..lazy import Derived, LazyTensor, array_of
from .formats.gguf import MAGIC, read_gguf
from .formats.marks import MARK, format_of, mark

READ_BLOCK = 1 << 23  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")  # torch's archives, and bare pickles


def refetch_hint(path: Path) -> str:
    """How to get a file again: the command for one in the Hub's cache, else a hint."""
    cached = re.search(r"models--([^/]+)/snapshots/[^/]+/(.+)$", path.as_posix())
    if cached:
        return f"fetch it again: hf download {cached[1].replace('--', '/', 1)} {cached[2]} --force-download"
    return "fetch or copy it again"


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check one safetensors file (header, length, dtypes, offsets) and list its tensors.

    Returns:
        name to (dtype as written in the file, shape).

    Raises:
        CheckpointError: for a file that is missing, cut short, corrupt, or no safetensors file at all.
    """
    try:
        with path.open("rb") as raw:  # a file without permission raises another error than a missing one
            start, size = raw.read(4), raw.seek(0, os.SEEK_END)
        if path.suffix in PICKLES or start.startswith(_PICKLE_STARTS):
            raise CheckpointError(
                f"{path} is a pickle, which can run code and is never loaded; get the .safetensors file"
            )
        with safe_open(path, framework="numpy") as file:
            header = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_slice(name)
                header[name] = (str(tensor.get_dtype()), tuple(tensor.get_shape()))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {refetch_hint(path)}") from None
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        fault = f"is cut short or damaged: {reason} ({size:,} bytes)" if size else "is empty"
        raise CheckpointError(f"{path} {fault}; {refetch_hint(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return header


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {refetch_hint(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {refetch_hint(path)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; {refetch_hint(path)}")
    return content


def read_index(index: Path) -> dict[str, Path]:
    """Each weight that an index names and the shard that it is in, inside the index's own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files; {refetch_hint(index)}")
    for file in weight_map.values():
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(f"{index} names the shard {file!r}, which is outside its folder; refused")
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
_COUNTS = ("num_batches_tracked", ".alpha")  # names of weights that are integers in some files


def load_safetensors(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, mx.array]:
    """Lazy arrays of a safetensors file, of a list of shards, or of the shards that an index names.

    Every file's header, length, dtypes and offsets are checked first; no tensor data is read. FP8 becomes bfloat16,
    which holds all its values; scales are not applied: the sanitize functions do that. Where the header says
    how layers are stored, each gets its mark (``comfy_quant``).

    Raises:
        CheckpointError: for a bad file, a weight that is in two shards, or an index whose weights are not there.
    """
    return {name: array_of(weight) for name, weight in open_safetensors(path).items()}


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
        raise CheckpointError(f"{path} names weights that its shards do not have: {', '.join(absent)}")
    return weights


def load_files(files: Sequence[Path]) -> dict[str, Any]:
    """The weights of some files together; a file's first bytes decide between safetensors and GGUF."""
    if not files:
        raise CheckpointError("no files to load weights from")
    weights: dict[str, Any] = {}
    for file in files:
        loaded = read_gguf(file) if starts_with(file, MAGIC) else _load_file(file)
        twice = sorted(loaded.keys() & weights.keys())
        if twice:
            raise CheckpointError(f"{file} repeats weights of another shard: {', '.join(twice)}; {refetch_hint(file)}")
        weights |= loaded
    return weights


def starts_with(file: Path, magic: bytes) -> bool:
    try:
        with file.open("rb") as raw:
            return raw.read(len(magic)) == magic
    except OSError:
        return False  # read_header raises the error that explains it


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
    except RuntimeError:  # a dtype that MLX does not know, and then none of the file: F8_E5M2, before 0.32 F8_E8M0 too
        weights = _load_mapped(file, header)
    else:
        assert isinstance(loaded, dict)
        weights = {name: _lazy_array(array, header[name][0]) for name, array in loaded.items()}
    for layer, format in _layer_formats(file).items():
        weights.setdefault(f"{layer}.{MARK}", mark(format))
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


def _layer_formats(file: Path) -> dict[str, str]:
    """How layers are stored, where ComfyUI wrote it into the header: layer to format."""
    with safe_open(file, framework="numpy") as opened:
        written = (opened.metadata() or {}).get("_quantization_metadata")
    if written is None:
        return {}
    try:
        layers = json.loads(written)["layers"]
        return {layer: format_of(entry) for layer, entry in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
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
