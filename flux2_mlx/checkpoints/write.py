"""Writing checkpoints: a folder in the diffusers layout, packed or not, or BFL's files; and checking what was written.

Tensors are read, converted and written one at a time. The folder appears under its name only when it is whole. Of the
text encoder it has the layers that FLUX.2 [klein] reads and no others, and its adapter's file as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._version import __version__
from ..bars import progress_bar
from ..device import device_errors
from ..errors import CheckpointError, InputError
from ..families import PARTS
from ..lazy import cast, read
from ..quantization.layers import QuantizedEmbedding, QuantizedLinear, dense_layers
from ..quantization.packing import PACKED, quantize_rtn, quantize_weight
from ..quantization.recipes import hold_packed, mixed_precision
from ..quantization.spec import Quantization
from ..writing import atomic_folder, remove_partials, tell_unlocked_partials
from .checkpoint import Checkpoint
from .files import read_header
from .load import load_autoencoder, load_text_encoder, load_transformer
from .publish import CHECKSUMS, model_card, sha256

LAYOUTS = ("diffusers", "bfl")
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
NUMBER_TYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int64: "I64",
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the result, loaded when it is written; ``load`` is called once and keeps nothing afterwards."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    load: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def dense_entry(name: str, weight: Any) -> Entry:
    """A weight in bfloat16; integers, latent statistics and what is packed stay as they are."""
    scale = name.endswith((".scales", ".biases"))
    value = weight if name.startswith("bn.") or scale else cast(weight, mx.bfloat16)
    pending = [value]

    def load() -> mx.array:
        return read(pending.pop())

    return Entry(tuple(value.shape), value.dtype, load)


def packed_entries(layer: str, weight: Any, spec: Quantization) -> dict[str, Entry]:
    """A dense weight as the packed layer's arrays; it is packed when the first of them is written."""
    pending, parts = [weight], dict[str, mx.array]()

    def load(kind: str) -> mx.array:
        if pending:
            packed = quantize_weight(read(pending.pop()), spec, mx.bfloat16, now=True)
            parts.update(zip(PACKED, packed, strict=False))
        return parts.pop(kind)

    shapes = quantize_rtn(mx.zeros(weight.shape, mx.bfloat16), spec)
    return {
        f"{layer}.{kind}": Entry(tuple(array.shape), array.dtype, partial(load, kind))
        for kind, array in zip(PACKED, shapes, strict=False)
    }


def entries_of(
    module: nn.Module, weights: dict[str, Any], spec: Quantization | None
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """A component's tensors, taken out of ``weights``, with ``spec`` the dense matrices packed; and what its config is
    to say of the packing.

    Raises:
        InputError: for a layer whose inputs are no multiple of the group size.
    """
    weights |= hold_packed(module, weights)
    recipe = mixed_precision(module, spec) if spec is not None else lambda *_: None
    ways = {path: recipe(path, layer) for path, layer in dense_layers(module)}
    result: dict[str, Entry] = {}
    while weights:
        name = next(iter(weights))
        weight = weights.pop(name)
        layer = name.removesuffix(".weight")
        way = ways.get(layer) if name.endswith(".weight") else None
        if way is None:
            result[name] = dense_entry(name, weight)
        else:
            way.check(layer, weight.shape[1])
            result |= packed_entries(layer, weight, way)
    return result, packing_config(module, ways)


def packing_config(module: nn.Module, dense: Mapping[str, Quantization | None]) -> dict[str, Any]:
    """The quantization entry of a component's config: the commonest spec, and the layers with another one or none."""
    layers: dict[str, Any] = {path: way and asdict(way) for path, way in dense.items()}
    for path, layer in module.named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
            layers[path] = asdict(layer.spec)
    ways = [way for way in layers.values() if way is not None]
    if not ways:
        return {}
    commonest = max(ways, key=ways.count)
    others = {path: way or False for path, way in layers.items() if way != commonest}
    return {"quantization": {**commonest, **others}}


# ---------------------------------------------------------------------------------------------------- files


def shards_of(entries: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    """The tensors in order, in as few files of at most ``limit`` bytes as that order allows."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        filled = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append({})
        shards[-1][name] = entry
    return shards


def write_safetensors(path: Path, entries: Mapping[str, Entry], written: Callable[[int], object]) -> str:
    """One file, tensor by tensor; the hexadecimal SHA-256 of it.

    Raises:
        CheckpointError: for a tensor that is not finite.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", "flux2_mlx": __version__}}
    at = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": NUMBER_TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (struct.pack("<Q", len(text)), text):
            file.write(part)
            digest.update(part)
        for name, entry in entries.items():
            array = entry.load()
            if array.dtype in (mx.float32, mx.float16, mx.bfloat16) and not mx.isfinite(array).all().item():
                raise CheckpointError(f"{name} has values that are not finite; fetch the file again")
            raw = np.array(array.reshape(-1).view(mx.uint8))
            del array
            file.write(raw.data)
            digest.update(raw.data)
            written(entry.nbytes)
    return digest.hexdigest()


@device_errors()
def convert(
    checkpoint: Checkpoint,
    target: Path,
    *,
    layout: str = "diffusers",
    quantization: Mapping[str, Quantization] | None = None,
    progress: bool = False,
) -> None:
    """Write a checkpoint as a folder that this library opens.

    Args:
        target: the folder, which must not exist; it appears when it is whole.
        layout: "diffusers", or "bfl" for BFL's single files.
        quantization: for "transformer" and "text_encoder", how their dense weights are quantized; without it they are
            written in bfloat16.

    Raises:
        InputError: for a target that exists, too small a disk, or packed weights or an adapter in BFL's layout.
        CheckpointError: for weights that do not fit or are not finite.
        DeviceError: where the GPU was stopped, or memory was too little.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "bfl" and checkpoint.text_encoder.adapter is not None:
        raise InputError(
            "BFL's files hold no adapter, which the small text encoder needs; leave --layout out, or --text-encoder"
        )
    if target.exists():
        raise InputError(f"{target} exists; give another name, or delete it")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} is no folder")
    remove_partials(parent)
    tell_unlocked_partials(target)
    # The modules check names and shapes; none of their lazy weights is computed.
    load_transformer(checkpoint, mx.bfloat16)
    load_text_encoder(checkpoint, mx.bfloat16)
    load_autoencoder(checkpoint, mx.bfloat16)
    weights = {key: replace(source, adapter=None).weights() for key, source in checkpoint.sources.items()}
    specs = dict(quantization or {})
    recipes: dict[str, dict[str, Any]] = {}
    if layout == "bfl":
        files = _bfl_files(weights, is_packed=bool(specs))
    else:
        files, recipes = _diffusers_files(checkpoint, weights, specs)
    total = sum(entry.nbytes for entries in files.values() for entry in entries.values())
    adapter = checkpoint.sources["text_encoder"].adapter
    total += 0 if adapter is None else adapter.stat().st_size
    free = shutil.disk_usage(parent).free
    if free < total + 2**20:
        raise InputError(f"{target} needs {total / 1e9:.2f} GB and {free / 1e9:.2f} GB are free in {parent}")
    with progress_bar("writing", total, shown=progress, unit="B", unit_scale=True) as bar:
        _write_folder(target, files, checkpoint, partial(_texts, checkpoint, layout, recipes), bar.update)


Files = dict[str, dict[str, Entry]]  # the tensors of each file, by its path in the folder


def _bfl_files(weights: dict[str, dict[str, Any]], *, is_packed: bool) -> Files:
    """BFL's single files, one a part; the weights are taken out of ``weights``.

    Raises:
        InputError: for packed weights, asked for or there.
    """
    if is_packed or any(name.endswith(".scales") for part in weights.values() for name in part):
        raise InputError("BFL's files hold no packed weights; take a checkpoint with dense ones, and no --quantize")
    files: Files = {}
    for key, part in PARTS.items():
        tensors = part.names.to_bfl(weights.pop(key))
        files[f"{part.bfl_stem}.safetensors"] = {name: dense_entry(name, tensors.pop(name)) for name in list(tensors)}
    return files


def _diffusers_files(
    checkpoint: Checkpoint, weights: dict[str, dict[str, Any]], specs: Mapping[str, Quantization]
) -> tuple[Files, dict[str, dict[str, Any]]]:
    """The shards of each part in the diffusers layout, and what each part's config says of its packing; the weights
    are taken out of ``weights``.

    Raises:
        InputError: for a layer whose inputs are no multiple of the group size.
    """
    files: Files = {}
    recipes: dict[str, dict[str, Any]] = {}
    for key, part in PARTS.items():
        tensors = part.names.to_diffusers(weights.pop(key))
        if part.can_be_packed:
            entries, recipes[key] = entries_of(part.module(checkpoint.configs[key]), tensors, specs.get(key))
        else:
            entries = {name: dense_entry(name, tensors.pop(name)) for name in list(tensors)}
        shards = shards_of(entries, SHARD_BYTES)
        for k, shard in enumerate(shards):
            suffix = f"-{k + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            files[f"{key}/{part.stem}{suffix}.safetensors"] = shard
    return files, recipes


def _write_folder(
    target: Path,
    files: Files,
    checkpoint: Checkpoint,
    texts: Callable[[Sequence[str], Path], Mapping[str, str]],
    written: Callable[[int], object],
) -> None:
    """Write the folder beside its place, and give it its name when it is whole; nothing is left of half a one.

    Args:
        files: taken out one by one.
        texts: gives the text files by name, from the names of the weight files and the folder.
        written: called with the bytes of each tensor that was written, and of a text encoder's adapter.
    """
    with atomic_folder(target) as unfinished:
        sums = {}
        for name in list(files):
            (unfinished / name).parent.mkdir(exist_ok=True)
            sums[name] = write_safetensors(unfinished / name, files.pop(name), written)
        for name, content in texts(list(sums), unfinished).items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_text(content, encoding="utf-8")
        adapter = checkpoint.sources["text_encoder"].adapter
        if adapter is not None:  # as it is: its metadata says how it is read
            copy = unfinished / "text_encoder" / adapter.name
            shutil.copyfile(adapter, copy)
            sums[copy.relative_to(unfinished).as_posix()] = sha256(copy)
            written(copy.stat().st_size)
        tokenizer = unfinished / "tokenizer"
        tokenizer.mkdir()
        for file in tokenizer_files(checkpoint.tokenizer):
            shutil.copyfile(file, tokenizer / file.name)
        (unfinished / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder that belong to a tokenizer.

    Raises:
        CheckpointError: for a link to anything but a file of the same name, or a blob of the folder's own repository
            in the Hub's cache: a folder from a stranger could have a private file copied, and published.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    here = folder.resolve()
    for file in files:
        target = file.resolve()
        is_blob = target.parent.name == "blobs" and target.parent.parent in here.parents
        if target.name != file.name and not is_blob:
            raise CheckpointError(f"{file} is a link to {target}; put the file itself there")
    return files


def _texts(
    checkpoint: Checkpoint,
    layout: str,
    recipes: Mapping[str, Mapping[str, Any]],
    written: Sequence[str],
    folder: Path,
) -> dict[str, str]:
    """The files of text beside the weights, by name."""
    configs: dict[str, Any] = {}
    if layout == "diffusers":
        kind = "Flux2KleinKVPipeline" if checkpoint.has_kv_cache else "Flux2KleinPipeline"
        configs["model_index.json"] = {
            "_class_name": kind,
            "is_distilled": checkpoint.is_distilled,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        }
        configs["scheduler/scheduler_config.json"] = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
        }
        for part, config in checkpoint.configs.items():
            configs[f"{part}/config.json"] = config.to_config() | recipes.get(part, {})
            shards = [name for name in written if name.startswith(f"{part}/")]
            if len(shards) > 1:
                stem = Path(shards[0]).name.split("-00001-of-")[0]
                names = {key: Path(shard).name for shard in shards for key in read_header(folder / shard)}
                size = sum((folder / shard).stat().st_size for shard in shards)
                configs[f"{part}/{stem}.safetensors.index.json"] = {
                    "metadata": {"total_size": size},
                    "weight_map": names,
                }
    texts = {name: json.dumps(config, indent=2) + "\n" for name, config in configs.items()}
    return texts | {"README.md": model_card(checkpoint, layout, recipes)}
