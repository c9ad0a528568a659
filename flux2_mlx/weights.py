"""Weights: find a checkpoint (folder, Hub id or released name), check its files, and put them into the modules.

Arrays stay lazy: loading reads configs and file headers, and a weight's bytes are read from disk when it is first
computed with. Only safetensors are ever opened; pickles are refused.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open

from .checkpoints import (
    is_read_by_klein,
    sanitize_flux2_klein_weights,
    sanitize_qwen3_weights,
    sanitize_vae_weights,
)
from .config import (
    RELEASED,
    AutoEncoderConfig,
    CheckpointError,
    FluxKleinParams,
    InputError,
    Qwen3Config,
    check_scheduler_config,
)
from .memory import weights_of
from .models.autoencoder import AutoEncoder
from .models.text_encoder import Qwen3TextEncoder
from .models.transformer import FluxKlein

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"F32", "F16", "BF16"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.safetensors")

# Stem of each component's weight files in the diffusers layout.
_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
_SCHEDULER = "scheduler/scheduler_config.json"
_CONFIG_FILES = (
    "model_index.json",
    _SCHEDULER,
    *(f"{component}/config.json" for component in _STEMS),
    "tokenizer/tokenizer.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configs fit together and whose weight files are there; none of them was opened yet.

    Attributes:
        name: what the caller asked for: a released name, a Hub id, or the path of a folder.
        revision: of the Hub repository, where the caller asked for one.
        folder: where the files are.
        is_distilled: whether it draws in few steps without guidance.
        has_kv_cache: whether it was trained to cache its references (klein-9b-kv).
        files: each component's weight files.
    """

    name: str
    revision: str | None
    folder: Path
    is_distilled: bool
    has_kv_cache: bool
    transformer: FluxKleinParams
    text_encoder: Qwen3Config
    autoencoder: AutoEncoderConfig
    files: Mapping[str, tuple[Path, ...]]


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
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which can run code and is never loaded; get the .safetensors file")
    try:
        with path.open("rb") as raw:  # tells a file that may not be read from one that is not there
            size = raw.seek(0, os.SEEK_END)
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


def component_files(folder: Path, component: str) -> tuple[Path, ...]:
    """Weight files of one component in the diffusers layout: the index's shards, the single file, or shards alone.

    Raises:
        CheckpointError: where there are none, or shards are missing; the message says what was looked for.
    """
    here, stem = folder / component, _STEMS[component]
    index, single = here / f"{stem}.safetensors.index.json", here / f"{stem}.safetensors"
    if index.is_file():
        files = tuple(_needed_shards(index, component))
    elif single.is_file():
        return (single,)
    else:
        files = tuple(sorted(here.glob(f"{stem}-*-of-*.safetensors")))
        if not files:
            others = sorted(path.name for path in here.glob("*") if path.suffix in (*PICKLES, ".safetensors"))
            found = f"found only {', '.join(others)}" if others else "found no weights"
            pickles = "; pickles are never loaded" if any(name.endswith(PICKLES) for name in others) else ""
            raise CheckpointError(
                f"{here}: looked for {index.name}, {single.name} or {stem}-00001-of-0000N.safetensors, {found}{pickles}"
            )
        counts = {match[2] for file in files if (match := _SHARD.fullmatch(file.name))}
        expected = [here / f"{stem}-{i + 1:05}-of-{count}.safetensors" for count in counts for i in range(int(count))]
        files = tuple(sorted({*files, *expected}))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{here}: {len(missing)} of {len(files)} shards missing: {', '.join(missing)}")
    return files


def load_safetensors(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, mx.array]:
    """Lazy arrays of a safetensors file, of a list of shards, or of the shards that an index names.

    Every file's header, length, dtypes and offsets are checked first; no tensor data is read.

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
    if not files:
        raise CheckpointError(f"no files to load weights from, got {path!r}")
    weights: dict[str, mx.array] = {}
    for file in files:
        header = read_header(file)
        odd = sorted(
            f"{name} ({dtype})"
            for name, (dtype, _) in header.items()
            if dtype not in _FLOATS and not name.endswith("num_batches_tracked")
        )
        if odd:
            raise CheckpointError(
                f"{file} has weights in formats that are not read, only {', '.join(sorted(_FLOATS))}: {', '.join(odd)}"
            )
        twice = sorted(header.keys() & weights.keys())
        if twice:
            raise CheckpointError(f"{file} repeats weights of another shard: {', '.join(twice)}; {_refetch(file)}")
        loaded = mx.load(str(file), format="safetensors")
        assert isinstance(loaded, dict)
        weights.update(loaded)
    absent = sorted(names - weights.keys())
    if absent:
        raise CheckpointError(f"{path} names weights that its shards do not have: {', '.join(absent)}")
    return weights


# ---------------------------------------------------------------------------------------------------- modules

M = TypeVar("M", bound=nn.Module)


def assign(module: M, weights: Mapping[str, mx.array], dtype: mx.Dtype, where: str) -> M:
    """Put weights into a module, strictly: all names and shapes must match. They stay lazy, cast to dtype.

    Latent statistics ("bn.") stay in float32 whatever the dtype.

    Raises:
        CheckpointError: naming every missing, unknown and mis-shaped weight at once.
    """
    expected = weights_of(module)
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    misshaped = [
        f"{name} is {weights[name].shape}, not {expected[name].shape}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    faults = [
        f"{len(names)} {fault}: {', '.join(names)}"
        for fault, names in (("missing", missing), ("unknown", unknown), ("mis-shaped", misshaped))
        if names
    ]
    if faults:
        raise CheckpointError(f"{where}: the weights do not fit the config: {'; '.join(faults)}")
    module.load_weights(
        [(name, weights[name].astype(mx.float32 if name.startswith("bn.") else dtype)) for name in expected]
    )
    return module


def load_transformer(checkpoint: Checkpoint, dtype: mx.Dtype) -> FluxKlein:
    """The checkpoint's transformer with lazy weights.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    weights = sanitize_flux2_klein_weights(load_safetensors(checkpoint.files["transformer"]))
    return assign(FluxKlein(checkpoint.transformer), weights, dtype, f"{checkpoint.folder}/transformer")


def load_text_encoder(checkpoint: Checkpoint, dtype: mx.Dtype) -> Qwen3TextEncoder:
    """The checkpoint's text encoder with lazy weights, up to the last tapped layer.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    weights = sanitize_qwen3_weights(load_safetensors(checkpoint.files["text_encoder"]))
    return assign(Qwen3TextEncoder(checkpoint.text_encoder), weights, dtype, f"{checkpoint.folder}/text_encoder")


def load_autoencoder(checkpoint: Checkpoint, dtype: mx.Dtype) -> AutoEncoder:
    """The checkpoint's autoencoder with lazy weights.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    weights = sanitize_vae_weights(load_safetensors(checkpoint.files["vae"]))
    return assign(AutoEncoder(checkpoint.autoencoder), weights, dtype, f"{checkpoint.folder}/vae")


# ---------------------------------------------------------------------------------------------------- checkpoints


def open_checkpoint(model: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and check it: configs, pairing of the parts, presence of the files.

    Args:
        model: a folder in the diffusers layout, a Hub id, or a released name such as "klein-4b". What is not here is
            downloaded, the needed files only; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: for whatever is wrong, with the way out.
    """
    name = os.fspath(model)
    try:
        folder = Path(name).expanduser()
        if name and folder.is_dir():
            if revision is not None:
                raise InputError(f"revision {revision!r} has no meaning for the local folder {name}")
            return _checkpoint(folder, name, None)
        if name and folder.exists():
            raise CheckpointError(f"{name} is a file; give the checkpoint's folder in the diffusers layout")
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    except RuntimeError as error:  # a home folder that does not exist
        raise CheckpointError(f"no model {name!r}: {error}") from None
    if name not in RELEASED and not _HUB_ID.fullmatch(name):
        near = difflib.get_close_matches(name.lower(), RELEASED, n=3, cutoff=0.4) or list(RELEASED)
        raise CheckpointError(
            f"no model {name!r}: there is no such folder, and no released model of that name; "
            f"did you mean {' or '.join(near)}?"
        )
    folder = _download(name, RELEASED.get(name, name), revision)
    try:
        return _checkpoint(folder, name, revision)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or the download is incomplete: run it again with a connection") from None


def _checkpoint(folder: Path, name: str, revision: str | None) -> Checkpoint:
    configs = _read_configs(folder)
    files = {part: component_files(folder, part) for part in _STEMS}
    return Checkpoint(name, revision, folder, *configs, files=files)


class _Configs(NamedTuple):
    is_distilled: bool
    has_kv_cache: bool
    transformer: FluxKleinParams
    text_encoder: Qwen3Config
    autoencoder: AutoEncoderConfig


def _read_configs(folder: Path) -> _Configs:
    """Configs of a checkpoint, each on its own and against the others; no weights are needed for it."""
    absent = [file for file in _CONFIG_FILES if not (folder / file).is_file()]
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
    configs = {part: _read_json(folder / part / "config.json") for part in _STEMS}
    configs["scheduler"] = _read_json(folder / _SCHEDULER)
    try:
        transformer = FluxKleinParams.from_config(configs["transformer"])
        text_encoder = Qwen3Config.from_config(configs["text_encoder"])
        autoencoder = AutoEncoderConfig.from_config(configs["vae"])
        check_scheduler_config(configs["scheduler"])
    except InputError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: a config has a value that cannot be ({error})") from None
    if transformer.txt_embed_dim != text_encoder.output_size:
        sizes = {2560: "4B", 4096: "8B"}
        raise CheckpointError(
            f"{folder}: the transformer takes prompt embeddings of {transformer.txt_embed_dim} (3 x "
            f"{transformer.txt_embed_dim // 3}), but the text encoder gives {text_encoder.output_size} (3 x "
            f"{text_encoder.hidden_size}, Qwen3-{sizes.get(text_encoder.hidden_size, '?')}); klein-4b goes with "
            "Qwen3-4B and klein-9b with Qwen3-8B"
        )
    if transformer.in_channels != autoencoder.packed_channels:
        raise CheckpointError(
            f"{folder}: the transformer takes {transformer.in_channels} latent channels, but the autoencoder packs "
            f"{autoencoder.packed_channels}"
        )
    has_kv_cache = kind == "Flux2KleinKVPipeline"
    is_distilled = has_kv_cache or index.get("is_distilled") is True
    return _Configs(is_distilled, has_kv_cache, transformer, text_encoder, autoencoder)


def _download(name: str, repo: str, revision: str | None) -> Path:
    """Fetch what the diffusers layout needs of a Hub repository into the Hub's cache; the snapshot's folder.

    Configs come first, so that another model is refused before its weights are fetched.
    """

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))

    try:
        indices = {part: f"{part}/{stem}.safetensors.index.json" for part, stem in _STEMS.items()}
        folder = fetch(revision, [*_CONFIG_FILES, "tokenizer/tokenizer_config.json", *indices.values()])
        _read_configs(folder)
        patterns = []
        for part, stem in _STEMS.items():
            if (folder / indices[part]).is_file():
                patterns += [f"{part}/{shard.name}" for shard in _needed_shards(folder / indices[part], part)]
            else:
                patterns += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*-of-*.safetensors"]
        return fetch(folder.name, patterns)  # the same commit
    except CheckpointError:
        raise
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
