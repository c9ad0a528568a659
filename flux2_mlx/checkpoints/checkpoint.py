"""Weights: find a checkpoint (folder, file, Hub id or name), check its files, and put them into the modules.

Arrays stay lazy: opening reads configs and file headers, and a weight's bytes are read from disk when it is first
computed with. Only safetensors and GGUF are ever opened; pickles are refused.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open

from ..models.autoencoder import AutoEncoder
from ..models.config import (
    KV,
    NANO,
    RELEASED,
    AutoEncoderConfig,
    CheckpointError,
    FluxKleinParams,
    InputError,
    OtherModelError,
    Qwen3Config,
    check_scheduler_config,
)
from ..models.flux2 import FluxKlein
from ..models.names.autoencoder import (
    INTEGERS,
    MARK,
    MODELOPT_NVFP4,
    PACKED,
    TEXT_ENCODER_PREFIXES,
    TRANSFORMER_PREFIXES,
    VAE_PREFIXES,
    Deferred,
    autoencoder_config,
    cast,
    format_of,
    is_read_by_klein,
    klein_params,
    mark,
    qwen3_config,
    sanitize_flux2_klein_weights,
    sanitize_qwen3_weights,
    sanitize_taef2_weights,
    sanitize_vae_weights,
)
from ..models.qwen3 import Qwen3TextEncoder
from ..models.taef2 import TinyDecoder
from ..quantization.layers import (
    Quantization,
    QuantizedEmbedding,
    QuantizedFluxKlein,
    QuantizedLinear,
    dense_layers,
    mixed,
    pack,
    pack_plainly,
    packing_in,
    quantize,
)
from ..runtime.activations import weights_of
from .formats.gguf import MAGIC, gguf_values, read_gguf

READ_BLOCK = 1 << 23  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")  # torch's archives, and bare pickles
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*/[\w.-]+/[\w./-]+\.(safetensors|gguf)")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

# Stem of each component's weight files in the diffusers layout.
_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
_SCHEDULER = "scheduler/scheduler_config.json"
_TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class Source:
    """Where a component's weights come from.

    Attributes:
        part: "transformer", "text_encoder" or "vae".
        where: what messages call it.
        files: one, or the shards.
        config: its config.json, where there is one.
        decoder: of the vae, a file with another decoder for it.
        changes: of its weights, made one after another; each has its name as a string.
    """

    part: str
    where: str
    files: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    decoder: Path | None = None
    changes: tuple[Callable[[Mapping[str, Any]], dict[str, Any]], ...] = ()

    def weights(self) -> dict[str, Any]:
        """The component's weights under the modules' names, lazy.

        Raises:
            CheckpointError: for a bad file or a storage format that is not read.
        """
        sanitize = _SANITIZE[self.part]
        loaded = _load(self.files)
        quantization = (self.config or {}).get("quantization_config")
        if isinstance(quantization, Mapping) and quantization.get("quant_method") == "modelopt":
            layers = [name.removesuffix(".weight_scale_2") for name in loaded if name.endswith(".weight_scale_2")]
            loaded |= {f"{layer}.{MARK}": mark(MODELOPT_NVFP4) for layer in layers}
        try:
            weights = sanitize(loaded)
            if self.decoder is not None:
                other = {
                    name: weight
                    for name, weight in sanitize(_load([self.decoder])).items()
                    if name.startswith("decoder.")
                }
                weights = {name: weight for name, weight in weights.items() if not name.startswith("decoder.")} | other
            for change in self.changes:
                weights = change(weights)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        return weights

    def shape(self) -> Any:
        """The component's config, from its config.json or told from its weights.

        Raises:
            CheckpointError: for another architecture.
        """
        try:
            if self.config is not None and self.decoder is None:
                return _FROM_CONFIG[self.part](self.config)
            shape = _FROM_WEIGHTS[self.part](self.weights())
            return self._as_header_says(shape) if self.part == "text_encoder" else shape
        except InputError as error:
            message = str(error)
            if isinstance(error, OtherModelError):
                message += f"; released klein models: {', '.join(RELEASED)}"
            raise CheckpointError(message if message.startswith(self.where) else f"{self.where}: {message}") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{self.where}: a config has a value that cannot be ({error})") from None

    def _as_header_says(self, shape: Qwen3Config) -> Qwen3Config:
        """Of a GGUF file, the numbers that no shape tells: a Qwen3 for longer texts has another base of its RoPE."""
        values = gguf_values(self.files[0]) if _starts_with(self.files[0], MAGIC) else {}
        written = {
            "rope_theta": values.get("qwen3.rope.freq_base"),
            "rms_norm_eps": values.get("qwen3.attention.layer_norm_rms_epsilon"),
        }
        return replace(shape, **{name: value for name, value in written.items() if value is not None})


_SANITIZE: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "transformer": sanitize_flux2_klein_weights,
    "text_encoder": sanitize_qwen3_weights,
    "vae": sanitize_vae_weights,
}
_FROM_CONFIG: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "transformer": FluxKleinParams.from_config,
    "text_encoder": Qwen3Config.from_config,
    "vae": AutoEncoderConfig.from_config,
}
_FROM_WEIGHTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "transformer": klein_params,
    "text_encoder": qwen3_config,
    "vae": autoencoder_config,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configs fit together and whose weight files are there.

    Attributes:
        name: what the caller asked for: a released name, a Hub id, or a path.
        revision: of the Hub repository, where the caller asked for one.
        folder: where the files are, of a single file the folder of the rest.
        is_distilled: whether it draws in few steps without guidance.
        has_kv_cache: whether it was trained to cache its references (klein-9b-kv).
        sources: of each component's weights.
        tokenizer: folder of tokenizer.json.
        options: what the caller asked for besides, as open_checkpoint takes it; None where nothing.
    """

    name: str
    revision: str | None
    folder: Path
    is_distilled: bool
    has_kv_cache: bool
    transformer: FluxKleinParams
    text_encoder: Qwen3Config
    autoencoder: AutoEncoderConfig
    sources: Mapping[str, Source]
    tokenizer: Path
    options: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------- files


def _refetch(path: Path) -> str:
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
        with path.open("rb") as raw:  # tells a file that may not be read from one that is not there
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
        raise CheckpointError(f"{path} does not exist; {_refetch(path)}") from None
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        fault = f"is cut short or damaged: {reason} ({size:,} bytes)" if size else "is empty"
        raise CheckpointError(f"{path} {fault}; {_refetch(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return header


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {_refetch(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {_refetch(path)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; {_refetch(path)}")
    return content


def _read_index(index: Path) -> dict[str, Path]:
    """Each weight that an index names and the shard that it is in, inside the index's own folder."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files; {_refetch(index)}")
    for file in weight_map.values():
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(f"{index} names the shard {file!r}, which is outside its folder; refused")
    return {name: index.parent / file for name, file in weight_map.items()}


def _needed_shards(index: Path, component: str) -> list[Path]:
    """The shards of an index with weights that are used: of the text encoder, its later layers are not."""
    return sorted(
        {shard for name, shard in _read_index(index).items() if component != "text_encoder" or is_read_by_klein(name)}
    )


def _weight_files(here: Path, part: str) -> tuple[Path, ...]:
    """Weight files in a component's folder: an index's shards, the single file, or shards alone, under the names that
    diffusers, transformers, mlx-lm ("model") and mflux ("0") give them.

    Raises:
        CheckpointError: where there are none, or shards are missing; the message says what was looked for.
    """
    stems = dict.fromkeys((_STEMS[part], "model"))
    indices = [index for stem in stems if (index := here / f"{stem}.safetensors.index.json").is_file()]
    singles = [single for stem in stems if (single := here / f"{stem}.safetensors").is_file()]
    if indices:
        files = tuple(_needed_shards(indices[0], part))
    elif singles:
        return (singles[0],)
    else:
        numbered = sorted(here.glob("*.safetensors"))
        files = tuple(file for file in numbered if _SHARD.fullmatch(file.name) or file.stem.isdecimal())
        if not files:
            others = sorted(path.name for path in here.glob("*") if path.suffix in (*PICKLES, ".safetensors"))
            found = f"found only {', '.join(others)}" if others else "found no weights"
            pickles = "; pickles are never loaded" if any(name.endswith(PICKLES) for name in others) else ""
            stem = _STEMS[part]
            raise CheckpointError(
                f"{here}: looked for {stem}.safetensors.index.json, {stem}.safetensors or "
                f"{stem}-00001-of-0000N.safetensors, {found}{pickles}"
            )
        shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
        expected = [
            here / f"{stem}-{i + 1:05}-of-{count}.safetensors"
            for stem, count in {(match[1], match[3]) for match in shards}
            for i in range(int(count))
        ]
        files = tuple(sorted({*files, *expected}))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{here}: {len(missing)} of {len(files)} shards missing: {', '.join(missing)}")
    return files


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
_COUNTS = ("num_batches_tracked", ".alpha")  # which are integers in some files


def load_safetensors(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, mx.array]:
    """Lazy arrays of a safetensors file, of a list of shards, or of the shards that an index names.

    Every file's header, length, dtypes and offsets are checked first; no tensor data is read. FP8 becomes bfloat16,
    which holds all its values; scales are not applied, as the functions that sanitize do that. Where the header says
    how layers are stored, each gets its mark (``comfy_quant``).

    Raises:
        CheckpointError: for a bad file, a weight that is in two shards, or an index whose weights are not there.
    """
    names: set[str] = set()
    if isinstance(path, (str, os.PathLike)):
        path = Path(path)
        if path.name.endswith(".index.json"):
            shards = _read_index(path)
            files, names = sorted(set(shards.values())), set(shards)
        else:
            files = [path]
    else:
        files = [Path(file) for file in path]
    weights = _load(files)
    if any(isinstance(weight, Deferred) for weight in weights.values()):
        raise CheckpointError(f"{path} is GGUF or has F8_E5M2, which open_checkpoint and Flux2Pipeline read")
    absent = sorted(names - weights.keys())
    if absent:
        raise CheckpointError(f"{path} names weights that its shards do not have: {', '.join(absent)}")
    return weights


def _load(files: Sequence[Path]) -> dict[str, Any]:
    """The weights of some files together, told apart by their first bytes: safetensors or GGUF."""
    if not files:
        raise CheckpointError("no files to load weights from")
    weights: dict[str, Any] = {}
    for file in files:
        loaded = read_gguf(file) if _starts_with(file, MAGIC) else _load_file(file)
        twice = sorted(loaded.keys() & weights.keys())
        if twice:
            raise CheckpointError(f"{file} repeats weights of another shard: {', '.join(twice)}; {_refetch(file)}")
        weights |= loaded
    return weights


def _starts_with(file: Path, magic: bytes) -> bool:
    try:
        with file.open("rb") as raw:
            return raw.read(len(magic)) == magic
    except OSError:
        return False  # which reading its header tells in full


def _load_file(file: Path) -> dict[str, Any]:
    header = read_header(file)
    odd = sorted(
        f"{name} ({dtype})"
        for name, (dtype, _) in header.items()
        if dtype not in _DTYPES and not name.endswith(_COUNTS)
    )
    if odd:
        raise CheckpointError(f"{file} has weights in formats that are not read, only {', '.join(_DTYPES)}: {few(odd)}")
    try:
        loaded = mx.load(str(file), format="safetensors")
    except RuntimeError:  # a dtype that MLX does not know, and then none of the file: F8_E5M2, before 0.32 F8_E8M0 too
        weights = _load_mapped(file, header)
    else:
        assert isinstance(loaded, dict)
        weights = {name: _decoded(array, header[name][0]) for name, array in loaded.items()}
    for layer, format in _layer_formats(file).items():
        weights.setdefault(f"{layer}.{MARK}", mark(format))
    return weights


def _decoded(array: mx.array, dtype: str) -> mx.array:
    """FP8, which is there as bytes, in a dtype that has all its values; anything else as it is."""
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
            make = _deferred if name.endswith(".weight") else _array
            weights[name] = make(content[start + first : start + last], dtype, shape)
    return weights


def _array(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> mx.array:
    return _decoded(mx.array(raw).view(_DTYPES[dtype]), dtype).reshape(shape)


def _deferred(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Deferred:
    size = math.prod(shape[1:]) * _DTYPES[dtype].size  # of a row

    def read(start: int, stop: int) -> mx.array:
        return _array(raw[start * size : stop * size], dtype, (stop - start, *shape[1:]))

    return Deferred(shape, _array(raw[:0], dtype, (0,)).dtype, read)


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


def few(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------------------------------------------- modules

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Pending:
    """Of a module, the weights that are still to be converted: each function gives one or a layer's by name."""

    make: dict[str, Callable[[], dict[str, mx.array]]] = field(default_factory=dict)


def assign(module: M, weights: Mapping[str, Any], dtype: mx.Dtype, where: str, how: Quantization | None = None) -> M:
    """Put weights into a module, strictly: all names and shapes must match. They stay lazy, cast to dtype.

    Layers that the weights hold packed stay packed; with ``how`` the others are packed, see quantize.mixed. Latent
    statistics ("bn.") stay in float32 whatever the dtype.

    Raises:
        CheckpointError: naming every missing, unknown, mis-shaped and unreadable weight at once.
    """
    try:
        quantize(module, packing_in(weights), pack_plainly)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    expected = weights_of(module)
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    both = sorted(expected.keys() & weights.keys())
    misshaped = [
        f"{name} is {weights[name].shape}, not {expected[name].shape}"
        for name in both
        if weights[name].shape != expected[name].shape
    ]
    unreadable = [
        f"{name} is {weights[name].dtype}"
        for name in both
        if (weights[name].dtype in INTEGERS) != (expected[name].dtype in INTEGERS)
    ]
    faults = [
        f"{len(names)} {fault}: {few(names)}"
        for fault, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("mis-shaped", misshaped),
            ("in formats that are not read", unreadable),
        )
        if names
    ]
    if faults:
        raise CheckpointError(f"{where}: the weights do not fit the config: {'; '.join(faults)}")

    pending = _Pending()
    values = {}
    for name in expected:
        weight = cast(weights[name], mx.float32 if name.startswith("bn.") else dtype)
        if isinstance(weight, Deferred):
            pending.make[name] = partial(_made, name, weight)
            weight = mx.full(weight.shape, 0 if weight.dtype in INTEGERS else math.nan, weight.dtype)  # stands for it
        values[name] = weight
    module.load_weights(list(values.items()))
    if how is not None:
        dense = set(dict(dense_layers(module)))
        quantize(module, mixed(module, how), pack_plainly)
        for path, layer in module.named_modules():
            if path in dense and isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
                name = f"{path}.weight"
                make = pending.make.get(name, partial(dict, [(name, weights[name])]))
                pending.make[name] = partial(_made_packed, path, layer.how, dtype, make)
    module._pending = pending
    return module


def _made(name: str, weight: Deferred) -> dict[str, mx.array]:
    return {name: weight.make()}


def _made_packed(
    path: str, how: Quantization, dtype: mx.Dtype, make: Callable[[], dict[str, mx.array]]
) -> dict[str, mx.array]:
    (dense,) = make().values()
    return {f"{path}.{name}": array for name, array in zip(PACKED, pack(dense, how, dtype, now=True), strict=False)}


def read_through(files: Sequence[Path], room: int, stop: Event) -> int:
    """Read files to their end, or until told to stop, so that the system has them at hand when weights are wanted.
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


def to_be_converted(module: nn.Module, prefix: str = "") -> bool:
    """Whether weights of that prefix come from another format, or are packed, as they are brought into memory."""
    return any(name.startswith(prefix) for name in vars(module).get("_pending", _Pending()).make)


def materialize(module: nn.Module, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[int]:
    """Bring a module's weights into memory, one after another, since a conversion holds its source until it is done.

    Args:
        wanted: whether a weight is among them, by its name; a packed layer's arrays all or none.

    Yields:
        the bytes of each.

    Raises:
        CheckpointError: for scales that are not finite.
    """
    make = vars(module).get("_pending", _Pending()).make
    made: dict[str, mx.array] = {}
    own = weights_of(module)
    for name in filter(wanted, list(own)):
        array = own.pop(name)
        if name in make:
            made |= make.pop(name)()
        if name in made:
            array = made.pop(name)
            module.load_weights([(name, array)], strict=False)
        mx.eval(array)
        if name.endswith((".scales", ".biases")) and array.dtype != mx.uint8 and not mx.isfinite(array).all().item():
            raise CheckpointError(f"{name} has values that are not finite; fetch the file again")
        yield array.nbytes


def load_transformer(checkpoint: Checkpoint, dtype: mx.Dtype, how: Quantization | None = None) -> FluxKlein:
    """The checkpoint's transformer with lazy weights; those that it holds dense are packed by the recipe.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    source = checkpoint.sources["transformer"]
    return assign(FluxKlein(checkpoint.transformer), source.weights(), dtype, source.where, how)


def load_text_encoder(checkpoint: Checkpoint, dtype: mx.Dtype, how: Quantization | None = None) -> Qwen3TextEncoder:
    """The checkpoint's text encoder with lazy weights, up to the last tapped layer; as load_transformer.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    source = checkpoint.sources["text_encoder"]
    return assign(Qwen3TextEncoder(checkpoint.text_encoder), source.weights(), dtype, source.where, how)


def load_autoencoder(checkpoint: Checkpoint, dtype: mx.Dtype) -> AutoEncoder:
    """The checkpoint's autoencoder with lazy weights. It is small and is never packed.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    source = checkpoint.sources["vae"]
    return assign(AutoEncoder(checkpoint.autoencoder), source.weights(), dtype, source.where)


def load_preview_decoder(where: str | os.PathLike[str], dtype: mx.Dtype) -> TinyDecoder:
    """TAEF2's decoder with lazy weights, from a safetensors file here, or "owner/name/file" on the Hub.

    Raises:
        CheckpointError: for a file that is not there, or holds something else.
    """
    name = os.fspath(where)
    path = _local(name)
    if path is None and _HUB_FILE.fullmatch(name):
        path = _download_file(name, None)
    if path is None or not path.is_file():
        raise CheckpointError(f"no preview decoder {name!r}: there is no such file")
    return assign(TinyDecoder(), sanitize_taef2_weights(load_safetensors(path)), dtype, f"{path}, as TAEF2's decoder")


def lora_file(where: str) -> Path:
    """The safetensors file of a LoRA: of a folder, or a repository of the Hub, the only one, or the one that PEFT or
    diffusers would write.

    Raises:
        CheckpointError: where there is none, or several that it could be.
    """
    path = _local(where)
    if path is None and _HUB_FILE.fullmatch(where):
        return _download_file(where, None)
    if path is None and HUB_ID.fullmatch(where):
        return _fetching(where, where, None, lambda: _download_lora(where))
    if path is None:
        raise CheckpointError(f"no LoRA {where!r}: there is no such file or folder")
    if path.is_dir():
        return path / _only_lora(where, sorted(file.name for file in path.glob("*.safetensors")))
    return path


def _download_lora(repo: str) -> Path:
    found = [file for file in huggingface_hub.list_repo_files(repo) if file.endswith(".safetensors")]
    name = _only_lora(repo, found)
    beside = str(Path(name).with_name("adapter_config.json"))
    return _snapshot(repo, None, [name, beside]) / name


def _only_lora(where: str, files: Sequence[str]) -> str:
    usual = [file for file in files if file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    for found in (usual, files):
        if len(found) == 1:
            return found[0]
    if not files:
        raise CheckpointError(f"{where} has no safetensors file")
    raise CheckpointError(f"{where} has several files; name one: {few([f'{where}/{file}' for file in files])}")


def load_quantized_flux_klein(weights: Mapping[str, mx.array], params: FluxKleinParams) -> QuantizedFluxKlein:
    """A transformer from packed weights; layers that are not packed stay dense.

    Args:
        weights: under any names that sanitize_flux2_klein_weights knows, with ``scales`` (and ``biases``) of the packed
            layers. Their bits are told from the shapes.

    Raises:
        CheckpointError: naming every missing, unknown and mis-shaped weight.
    """
    weights = sanitize_flux2_klein_weights(weights)
    dtype = next((weight.dtype for name, weight in weights.items() if ".norm_" in name), mx.bfloat16)
    return assign(QuantizedFluxKlein(params, packing_in(weights)), weights, dtype, "the weights")


# ---------------------------------------------------------------------------------------------------- checkpoints


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    distilled: bool | None = None,
    kv_cache: bool | None = None,
) -> Checkpoint:
    """Find a checkpoint and check it: configs, pairing of the parts, presence of the files.

    What a file is, is told from its content, never from its name.

    Args:
        model: a folder in the diffusers layout, or as mflux saves one; a safetensors or GGUF file with a transformer,
            whose other parts are taken from the released model of its size; a Hub id, or "owner/name/file"
            there; a released name such as "klein-4b"; or "nano", the miniature in this package. What is not here is
            downloaded, the needed files only; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured.
        revision: branch, tag or commit on the Hub, of the model.
        transformer, text_encoder, vae: instead of the model's own: a file, a folder with config.json and weights, a Hub
            id of such a folder, or "owner/name/file". A vae may be a decoder alone.
        tokenizer: a folder with tokenizer.json.
        distilled: whether the transformer draws in few steps without guidance, where the model does not say it.
        kv_cache: whether the transformer was trained to keep its references, where the model does not say it.

    Raises:
        CheckpointError: for whatever is wrong, with the way out.
    """
    name = os.fspath(model)
    paths = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    given = {part: None if where is None else os.fspath(where) for part, where in paths.items()}
    parts = {part: _find_part(part, where) for part in _STEMS if (where := given[part]) is not None}
    if transformer is not None and distilled is None:
        raise _unsaid(given["transformer"])
    if kv_cache and transformer is None:
        check_keeps(name)
    needed = [part for part in _STEMS if part not in parts or (part == "vae" and not _is_whole(parts[part]))]
    found = _find_model(name, revision, needed, tokenizer is None, distilled)
    sources = dict(found.sources)
    for part, source in parts.items():
        decoder_only = part == "vae" and not _is_whole(source)
        sources[part] = replace(sources[part], decoder=source.files[0]) if decoder_only else source
    is_distilled = found.is_distilled if distilled is None else distilled
    if is_distilled is None:
        raise _unsaid(name)
    keeps = found.has_kv_cache if transformer is None else None
    if kv_cache and keeps is False:
        raise _keeps_nothing(name)
    folder = found.folder / "tokenizer" if tokenizer is None else Path(tokenizer).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json")
    shapes = {part: sources[part].shape() for part in _STEMS}
    _check_pairing(sources, **shapes)
    return Checkpoint(
        name,
        revision,
        found.folder,
        is_distilled,
        bool(keeps) if kv_cache is None else kv_cache,
        shapes["transformer"],
        shapes["text_encoder"],
        shapes["vae"],
        sources,
        folder,
        {**given, "distilled": distilled, "kv_cache": kv_cache},
    )


def check_keeps(name: str) -> None:
    """Refuse a released model that was not trained to keep its references.

    Raises:
        CheckpointError: with the one that was.
    """
    released = RELEASED.get(name, name)
    if released in RELEASED.values() and released != RELEASED[KV]:
        raise _keeps_nothing(name)


def _keeps_nothing(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} was not trained to keep its references, which then see neither the prompt nor the picture: its edits "
        f"would come out wrong; {KV} was (or leave out kv_cache, --kv-cache)"
    )


def _unsaid(name: str | None) -> CheckpointError:
    return CheckpointError(
        f"{name} does not say whether its transformer is distilled (4 steps, no guidance) or a base model (50 steps, "
        "guidance 4); say distilled=True or False (--distilled, --no-distilled)"
    )


@dataclass(frozen=True)
class _Found:
    """A model's parts, and what it says of itself; ``is_distilled`` and ``has_kv_cache`` are None where it says
    nothing.
    """

    folder: Path
    is_distilled: bool | None
    has_kv_cache: bool | None
    sources: Mapping[str, Source]


def _find_model(
    name: str, revision: str | None, parts: Sequence[str], with_tokenizer: bool, distilled: bool | None
) -> _Found:
    """The parts of a model: of a folder, a file, or what the Hub has under the name."""
    path = _local(name)
    if path is not None and revision is not None:
        raise InputError(
            f"revision {revision!r} has no meaning for the local {'folder' if path.is_dir() else 'file'} {name}"
        )
    if path is None and _HUB_FILE.fullmatch(name):
        path = _download_file(name, revision)
    if path is not None:
        try:
            if path.is_dir():
                return _open_folder(path, parts, with_tokenizer)
            return _open_file(path, parts, with_tokenizer, distilled)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    if name not in RELEASED and not HUB_ID.fullmatch(name):
        known = (*RELEASED, NANO)
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4) or known
        raise CheckpointError(
            f"no model {name!r}: there is no such folder or file, and no released model of that name; "
            f"did you mean {' or '.join(near)}?"
        )
    folder = _download(name, RELEASED.get(name, name), revision, parts, with_tokenizer)
    try:
        return _open_folder(folder, parts, with_tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or the download is incomplete: run it again with a connection") from None


def _local(name: str) -> Path | None:
    """The folder or file of that name here, or None; nano is in the package, unless a folder here has its name."""
    try:
        path = Path(name).expanduser()
        if name == NANO and not path.exists():
            path = Path(__file__).parents[1] / NANO
        return path if name and path.exists() else None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    except RuntimeError as error:  # a home folder that does not exist
        raise CheckpointError(f"no model {name!r}: {error}") from None


def _open_folder(folder: Path, parts: Sequence[str], with_tokenizer: bool) -> _Found:
    """A folder with a folder for each part: in the diffusers layout, or without configs, as mflux saves one."""
    index = folder / "model_index.json"
    if not index.is_file() and not any((folder / part).is_dir() for part in _STEMS):
        files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
        hint = f"; to use a file of it, name the file: {', '.join(files)}" if files else ""
        raise CheckpointError(
            f"{folder} is no FLUX.2 [klein] checkpoint in the diffusers layout: no model_index.json, and no folder "
            f"transformer, text_encoder or vae{hint}"
        )
    is_distilled = has_kv_cache = None
    if index.is_file():
        is_distilled, has_kv_cache = _read_model_index(folder, parts, with_tokenizer)
    sources = {}
    for part in parts:
        config = folder / part / "config.json"
        content = _read_json(config) if config.is_file() else None
        sources[part] = Source(part, f"{folder}/{part}", _weight_files(folder / part, part), content)
    return _Found(folder, is_distilled, has_kv_cache, sources)


def _read_model_index(folder: Path, parts: Sequence[str], with_tokenizer: bool) -> tuple[bool, bool]:
    """(is_distilled, has_kv_cache) of a folder in the diffusers layout, whose configs must all be there."""
    files = ["model_index.json", _SCHEDULER, *(f"{part}/config.json" for part in parts)]
    files += [_TOKENIZER] if with_tokenizer else []
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} is no FLUX.2 [klein] checkpoint in the diffusers layout: no {', '.join(absent)}"
        )
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"):
        other = {"Flux2Pipeline": " (FLUX.2-dev)", "FluxPipeline": " (FLUX.1)", "FluxKontextPipeline": " (FLUX.1)"}
        raise CheckpointError(
            f"{folder} holds a {kind}{other.get(str(kind), '')}, not a Flux2KleinPipeline; "
            f"released klein models: {', '.join(RELEASED)}"
        )
    try:
        check_scheduler_config(_read_json(folder / _SCHEDULER))
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(folder)) else f"{folder}: {message}") from None
    has_kv_cache = kind == "Flux2KleinKVPipeline"
    return has_kv_cache or index.get("is_distilled") is True, has_kv_cache


def _open_file(path: Path, parts: Sequence[str], with_tokenizer: bool, distilled: bool | None) -> _Found:
    """A file with a transformer, and perhaps more; the other parts are those of the released model of its size."""
    inside = _parts_in(path)
    if "transformer" in parts and "transformer" not in inside:
        flags = " and ".join("--" + part.replace("_", "-") for part in inside)
        raise CheckpointError(f"{path} holds no transformer; give a model, and this file as {flags}")
    sources = {part: Source(part, str(path), (path,)) for part in parts if part in inside}
    rest = [part for part in parts if part not in sources]
    if not rest and not with_tokenizer:
        return _Found(path.parent, None, None, sources)
    params = Source("transformer", str(path), (path,)).shape()
    base = next((name for name, size in _TEXT_SIZES.items() if size == params.txt_embed_dim), None)
    if base is not None and distilled is None:
        raise _unsaid(str(path))  # before the rest is downloaded
    if base is None:
        raise CheckpointError(
            f"{path} holds the transformer of no released model (it takes prompt embeddings of "
            f"{params.txt_embed_dim}); give its {', '.join([*(_CALLED[part] for part in rest), 'tokenizer'])} as well"
        )
    folder = _download(base, RELEASED[base], None, rest, with_tokenizer)
    found = _open_folder(folder, rest, with_tokenizer)
    return _Found(folder, None, None, {**found.sources, **sources})


_CALLED = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "autoencoder"}
_TEXT_SIZES = {"klein-4b": Qwen3Config().output_size, "klein-9b": Qwen3Config.qwen3_8b().output_size}
_MARKS_OF_PARTS = {
    "transformer": (TRANSFORMER_PREFIXES, ("img_in.weight", "x_embedder.weight")),
    "text_encoder": (
        TEXT_ENCODER_PREFIXES,
        ("model.embed_tokens.weight", "embed_tokens.weight", "token_embd.weight"),
    ),
    "vae": (VAE_PREFIXES, ("decoder.conv_in.weight",)),
}


def _parts_in(path: Path) -> list[str]:
    """Which components a file holds, by the names of its weights.

    Raises:
        CheckpointError: for a file that holds none, saying what it looks like.
    """
    names = _load([path]).keys()
    parts = [
        part
        for part, (prefixes, marks) in _MARKS_OF_PARTS.items()
        if any(prefix + mark in names for prefix in ("", *prefixes) for mark in marks)
    ]
    if parts:
        return parts
    looks = ""
    if any(re.search(r"lora_|\.lokr_|\.hada_", name) for name in names):
        looks = "; it looks like a LoRA"
    elif any(name.startswith(("model.diffusion_model.input_blocks.", "down_blocks.")) for name in names):
        looks = "; it looks like Stable Diffusion"
    shown = ", ".join(sorted(names)[:3])
    raise CheckpointError(f"{path} holds no part of a FLUX.2 [klein] model{looks} (its first weights: {shown})")


def _find_part(part: str, where: str) -> Source:
    """A component that is given on its own: a file, a folder, or either on the Hub."""
    path = _local(where)
    if path is None and _HUB_FILE.fullmatch(where):
        path = _download_file(where, None)
    elif path is None and HUB_ID.fullmatch(where):
        path = _fetching(where, where, None, lambda: _download_part(where, part))
    if path is None:
        raise CheckpointError(f"no {_CALLED[part]} {where!r}: there is no such file or folder")
    if path.is_dir():
        config = _read_json(path / "config.json") if (path / "config.json").is_file() else None
        return Source(part, str(path), _weight_files(path, part), config)
    inside = _parts_in(path)
    if part not in inside:
        raise CheckpointError(f"{path} holds no {_CALLED[part]}, but {' and '.join(_CALLED[p] for p in inside)}")
    return Source(part, str(path), (path,))


def _is_whole(source: Source) -> bool:
    """Whether an autoencoder is more than a decoder."""
    return "bn.running_mean" in source.weights()


def _check_pairing(
    sources: Mapping[str, Source], transformer: FluxKleinParams, text_encoder: Qwen3Config, vae: AutoEncoderConfig
) -> None:
    if transformer.txt_embed_dim != text_encoder.output_size:
        sizes = {2560: "4B", 4096: "8B"}
        raise CheckpointError(
            f"{sources['transformer'].where} takes prompt embeddings of {transformer.txt_embed_dim} (3 x "
            f"{transformer.txt_embed_dim // 3}), but the text encoder {sources['text_encoder'].where} gives "
            f"{text_encoder.output_size} (3 x {text_encoder.hidden_size}, "
            f"Qwen3-{sizes.get(text_encoder.hidden_size, '?')}); klein-4b goes with Qwen3-4B and klein-9b with Qwen3-8B"
        )
    if transformer.in_channels != vae.packed_channels:
        raise CheckpointError(
            f"{sources['transformer'].where} takes {transformer.in_channels} latent channels, but the autoencoder "
            f"packs {vae.packed_channels}"
        )


# ---------------------------------------------------------------------------------------------------- the Hub


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _download(name: str, repo: str, revision: str | None, parts: Sequence[str], with_tokenizer: bool) -> Path:
    """Fetch some parts of a Hub repository into the Hub's cache; the snapshot's folder.

    Configs come first, so that another model is refused before its weights are fetched.
    """

    def fetch() -> Path:
        configs = ["model_index.json", _SCHEDULER, *(f"{part}/config.json" for part in parts)]
        configs += [f"{part}/*.safetensors.index.json" for part in parts]
        configs += [_TOKENIZER, "tokenizer/tokenizer_config.json"] if with_tokenizer else []
        folder = _snapshot(repo, revision, configs)
        if name not in RELEASED and not (folder / "model_index.json").is_file():  # as mflux saves it
            if not any((folder / part).is_dir() for part in parts):
                raise CheckpointError(
                    f"{repo} has neither model_index.json nor a folder transformer{_files_hint(repo)}"
                )
            return _snapshot(repo, folder.name, [f"{part}/*.safetensors" for part in parts])
        _read_model_index(folder, parts, with_tokenizer)
        patterns = []
        for part in parts:
            stem = _STEMS[part]
            _FROM_CONFIG[part](_read_json(folder / part / "config.json"))
            index = folder / part / f"{stem}.safetensors.index.json"
            if index.is_file():
                patterns += [f"{part}/{shard.name}" for shard in _needed_shards(index, part)]
            else:
                patterns += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*-of-*.safetensors"]
        return _snapshot(repo, folder.name, patterns)  # the same commit

    return _fetching(name, repo, revision, fetch)


def _download_part(repo: str, part: str) -> Path:
    """Fetch one component that is a repository of its own: config and weights at its top."""
    stems = dict.fromkeys((_STEMS[part], "model"))
    folder = _snapshot(repo, None, ["config.json", *(f"{stem}.safetensors.index.json" for stem in stems)])
    indices = [index for stem in stems if (index := folder / f"{stem}.safetensors.index.json").is_file()]
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repo} has no config.json at its top{_files_hint(repo)}")
    files = [shard.name for shard in _needed_shards(indices[0], part)] if indices else []
    return _snapshot(repo, folder.name, files or [f"{stem}.safetensors" for stem in stems])


def _files_hint(repo: str) -> str:
    """The files of a repository that can be named one by one."""
    found = [file for file in huggingface_hub.list_repo_files(repo) if file.endswith((".safetensors", ".gguf"))]
    return f"; to use a file of it, name the file: {few([f'{repo}/{file}' for file in found])}" if found else ""


def _download_file(name: str, revision: str | None) -> Path:
    """Fetch one file, "owner/name/path", of the Hub."""
    owner, repo, file = name.split("/", 2)
    repo = f"{owner}/{repo}"
    return _fetching(name, repo, revision, lambda: Path(huggingface_hub.hf_hub_download(repo, file, revision=revision)))


def _fetching(name: str, repo: str, revision: str | None, fetch: Callable[[], Path]) -> Path:
    """What ``fetch`` gets of a Hub repository, each of its faults told in one line with the way out."""
    try:
        return fetch()
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{repo}: {error}") from None
    except hub_errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}; leave it out for the newest") from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"no model {name!r}: no such folder here, and the Hub shows no such repository (if it is private or "
            f"gated, log in with `hf auth login` or set HF_TOKEN); released models: {', '.join(RELEASED)}"
        ) from None
    except (hub_errors.LocalEntryNotFoundError, ConnectionError):
        raise CheckpointError(
            f"cannot fetch {repo}: the Hub cannot be reached and the cache has not all of it (cached: "
            f"{', '.join(_cached()) or 'no klein model'}); connect, or give --model a folder"
        ) from None
    except hub_errors.EntryNotFoundError:
        raise CheckpointError(f"{repo} has no file {name.removeprefix(repo).strip('/')}") from None
    except Exception as error:  # the Hub's client, its transfer library and its HTTP library each raise their own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            fault = "the disk is full; HF_HOME moves the Hub's cache"
        else:
            fault = f"{' '.join(str(error).split()) or type(error).__name__}; run it again to resume"
        raise CheckpointError(f"cannot fetch {repo}: {fault}") from None


def _cached() -> list[str]:
    try:
        present = {repo.repo_id for repo in huggingface_hub.scan_cache_dir().repos}
    except hub_errors.CacheNotFound:
        return []
    return [name for name, repo in RELEASED.items() if repo in present]
