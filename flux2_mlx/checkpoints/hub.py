"""Checkpoints, parts and LoRAs on the Hub, each fault in one line with the way out.

The client's errors are imported where they are needed: an HTTP library comes with them, a seventh of the time that a
command takes to start.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import huggingface_hub

from ..errors import CheckpointError, one_line, summarize
from ..families import NANO, RELEASED, RELEASED_NAMES, SMALL_ADAPTER, TEXT_ENCODER, TRANSFORMER, Part
from ..paths import expand
from .files import read_header
from .folder import (
    SCHEDULER,
    TOKENIZER,
    config_faults,
    is_bonsai,
    needed_shards,
    only_variant,
    part_folder,
    read_model_index,
    stems_of,
)
from .formats.unread import refuse_unread
from .reading import is_weight_file, read_json, weight_names

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*/[\w.-]+/[\w./-]+\.(safetensors|gguf)")


# What PEFT calls the file of an adapter, its config, and the layers in it.
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def is_peft(name: str, keys: Iterable[str]) -> bool:
    """Whether PEFT wrote a file of that name and with these keys, so that a config belongs to it."""
    return name == PEFT_WEIGHTS or all(key.startswith(PEFT_PREFIX) for key in keys)


def lora_file(source: str) -> Path:
    """The safetensors file of a LoRA: of a folder, or a repository of the Hub, the only one, or the one that PEFT or
    diffusers would write. PEFT's own has its config beside it.

    Raises:
        CheckpointError: where there is none, or several that it could be.
    """
    path = local_path(source)
    if path is None and HUB_FILE.fullmatch(source):
        file = download_file(source, None, "LoRA")
        return _with_config(file, source) if is_peft(file.name, read_header(file)) else file
    if path is None and HUB_ID.fullmatch(source):
        return fetching(source, source, None, lambda: _download_lora(source), "LoRA")
    if path is None:
        raise CheckpointError(f"no LoRA {source!r}: there is no such file or folder")
    if path.is_dir():
        return path / _only_lora(source, weight_names(path, "*.safetensors"))
    return path


def _with_config(file: Path, source: str) -> Path:
    """A file of PEFT's on the Hub, its config fetched, if it has one; the cache knows of those that have none."""
    from huggingface_hub import errors

    owner, name, inside = source.split("/", 2)
    repo, config = f"{owner}/{name}", str(Path(inside).with_name(PEFT_CONFIG))

    def fetch() -> Path:
        if huggingface_hub.try_to_load_from_cache(repo, config) is None:
            try:
                huggingface_hub.hf_hub_download(repo, config)
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:
                pass
        return file

    return fetching(f"{repo}/{config}", repo, None, fetch, "LoRA")


def _download_lora(repo: str) -> Path:
    from huggingface_hub import errors

    try:
        found = huggingface_hub.model_info(repo).siblings  # list_repo_files would try again for half a minute
        files = [file.rfilename for file in found or ()]
    except errors.HfHubHTTPError:
        raise
    except Exception:  # of the HTTP library: nobody answers, and snapshot_download knows what is cached
        files = _cached_files(repo)
    name = _only_lora(repo, [file for file in files if is_weight_file(file) and file.endswith(".safetensors")])
    beside = str(Path(name).with_name(PEFT_CONFIG))
    return _snapshot(repo, None, [name, beside]) / name


def _cached_files(repo: str) -> list[str]:
    from huggingface_hub import errors

    folder = _snapshot(repo, None, [PEFT_CONFIG])
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")]
    if not files:
        raise errors.LocalEntryNotFoundError(f"no file of {repo} is cached")
    return files


def _only_lora(source: str, files: Sequence[str]) -> str:
    files = [file for file in files if not any(part.startswith(".") for part in file.split("/"))]
    standard = [file for file in files if file in (PEFT_WEIGHTS, "pytorch_lora_weights.safetensors")]
    for found in (standard, files):
        if len(found) == 1:
            return found[0]
    if not files:
        raise CheckpointError(f"{source} has no safetensors file")
    raise CheckpointError(f"{source} has several files; name one: {summarize([f'{source}/{file}' for file in files])}")


def local_path(name: str) -> Path | None:
    """The folder or file of that name here, or None; nano is in the package, unless a folder here has its name."""
    try:
        path = Path(expand(name))
        if name == NANO and not path.exists():
            path = Path(__file__).parents[1] / NANO
        return path if name and path.exists() else None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None


def is_cached(source: str, revision: str | None = None) -> bool:
    """Whether the Hub's cache has weights of a repository, or a file of it, at this revision; the Hub is not asked."""
    from huggingface_hub import errors

    try:
        if HUB_FILE.fullmatch(source):
            owner, repo, file = source.split("/", 2)
            found = huggingface_hub.try_to_load_from_cache(f"{owner}/{repo}", file, revision=revision)
            return isinstance(found, str)
        repo = RELEASED.get(source, source)
        if not HUB_ID.fullmatch(repo):
            return False
        folder = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        return any(Path(folder).rglob("*.safetensors"))
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, OSError):
        return False


def _weights_on_hub(repo: str, revision: str | None = None) -> list[str]:
    return [file for file in huggingface_hub.list_repo_files(repo, revision=revision) if is_weight_file(file)]


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))


def download(name: str, repo: str, revision: str | None, parts: Sequence[Part], with_tokenizer: bool) -> Path:
    """Fetch some parts of a Hub repository into the Hub's cache; the snapshot's folder.

    Configs come first, so that another model is refused before its weights are fetched.
    """

    def fetch() -> Path:
        folders = [folder for part in parts for folder in part.folders]
        configs = ["model_index.json", SCHEDULER, f"{TRANSFORMER.bonsai_key}/config.json"]
        configs += [f"{folder}/{file}" for folder in folders for file in ("config.json", "*.safetensors.index.json")]
        configs += [TOKENIZER, "tokenizer/tokenizer_config.json"] if with_tokenizer else []
        folder = _snapshot(repo, revision, configs)
        bonsai = is_bonsai(folder)
        if not bonsai and name not in RELEASED and not (folder / "model_index.json").is_file():  # mflux saves no index
            if not any((folder / part.key).is_dir() for part in parts):
                raise CheckpointError(
                    f"{repo} has neither model_index.json nor a folder transformer{_files_hint(repo)}"
                )
            return _snapshot(repo, folder.name, [f"{part.key}/*.safetensors" for part in parts])
        if not bonsai:
            read_model_index(folder, parts, with_tokenizer)
        patterns = [pattern for part in parts for pattern in _weight_patterns(repo, folder, part)]
        folder = _snapshot(repo, folder.name, patterns)  # the same commit
        return _with_variants(repo, folder, {f"{part_folder(folder, part)}/": part for part in parts})

    return fetching(name, repo, revision, fetch)


def _weight_patterns(repo: str, folder: Path, part: Part) -> list[str]:
    """The weight files to fetch of a part whose config is in a folder.

    Raises:
        CheckpointError: for another model's config.
    """
    own = part_folder(folder, part)
    config = read_json(folder / own / "config.json")
    refuse_unread((), config, f"{repo}/{own}")
    with config_faults(f"{repo}/{own}"):
        part.config.from_config(config)
    index = folder / own / f"{part.stem}.safetensors.index.json"
    files = [f"{part.stem}.safetensors", f"{part.stem}-*-of-*.safetensors"]
    if index.is_file():
        files = [shard.name for shard in needed_shards(index, part)]
    adapter = [Path(SMALL_ADAPTER).name] if part is TEXT_ENCODER else []
    return [f"{own}/{file}" for file in (*files, *adapter)]


def download_part(repo: str, part: Part) -> Path:
    """Fetch one part that is a repository of its own: config and weights at its top."""
    stems = stems_of(part)
    folder = _snapshot(repo, None, ["config.json", *(f"{stem}.safetensors.index.json" for stem in stems)])
    indices = [index for stem in stems if (index := folder / f"{stem}.safetensors.index.json").is_file()]
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repo} has no config.json at its top{_files_hint(repo)}")
    files = [shard.name for shard in needed_shards(indices[0], part)] if indices else []
    folder = _snapshot(repo, folder.name, files or [f"{stem}.safetensors" for stem in stems])
    return _with_variants(repo, folder, {"": part})


def complete_part(folder: Path, part: Part) -> None:
    """Fetch the weight files that a part needs in a folder of the Hub's cache, of which another part left some out; a
    folder elsewhere is left as it is.
    """
    cached = re.search(r"/models--([^/]+)/snapshots/([^/]+)(/.+)?$", folder.as_posix())
    indices = [index for stem in stems_of(part) if (index := folder / f"{stem}.safetensors.index.json").is_file()]
    if not cached or not indices or all(shard.is_file() for shard in needed_shards(indices[0], part)):
        return
    repo, start = cached[1].replace("--", "/", 1), f"{cached[3]}/".lstrip("/") if cached[3] else ""
    files = [f"{start}{shard.name}" for shard in needed_shards(indices[0], part)]
    fetching(repo, repo, cached[2], lambda: _snapshot(repo, cached[2], files))


def _with_variants(repo: str, folder: Path, parts: Mapping[str, Part]) -> Path:
    """The snapshot's folder, of parts without a weight file in it the repository's only variant fetched too.

    Args:
        parts: by the beginning of their files' names.
    """
    lacking = {start: part for start, part in parts.items() if not weight_names(folder / start, "*.safetensors")}
    names = _weights_on_hub(repo, folder.name) if lacking else []
    wanted = []
    for start, part in lacking.items():
        own = [name.removeprefix(start) for name in names if name.startswith(start) and name.endswith(".safetensors")]
        wanted += [start + name for name in only_variant(own, part, f"{repo}/{start}")]
    return _snapshot(repo, folder.name, wanted) if wanted else folder


def _files_hint(repo: str) -> str:
    """The files of a repository that can be named one by one."""
    files = _weights_on_hub(repo)
    return f"; to use a file of it, name the file: {summarize([f'{repo}/{file}' for file in files])}" if files else ""


def download_file(name: str, revision: str | None, kind: str = "model") -> Path:
    """Fetch one file, "owner/name/path", of the Hub; ``kind`` is what messages call it."""
    owner, repo, file = name.split("/", 2)
    repo = f"{owner}/{repo}"
    download = partial(huggingface_hub.hf_hub_download, repo, file, revision=revision)
    return fetching(name, repo, revision, lambda: Path(download()), kind)


def fetching(name: str, repo: str, revision: str | None, fetch: Callable[[], Path], kind: str = "model") -> Path:
    """The result of ``fetch``; each of the Hub's errors becomes a CheckpointError of one line with the way out."""
    from huggingface_hub import errors

    is_model = kind == "model"
    try:
        return fetch()
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}; leave it out for the newest") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"no {kind} {name!r}: no such folder here, and the Hub shows no such repository (if it is private or "
            "gated, log in with `hf auth login` or set HF_TOKEN)"
            + (f"; released models: {RELEASED_NAMES}" if is_model else "")
        ) from None
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        fault = answer_of(error) or (
            "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        )
        cached = f" (cached: {', '.join(cached_releases()) or 'no klein model'})" if is_model else ""
        way_out = f"give --model a folder, or try --model {NANO}, which comes with this package"
        raise CheckpointError(
            f"cannot fetch {repo}: {fault} and the cache has not all of it{cached}; connect, or "
            + (way_out if is_model else f"give the {kind} as a file")
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{repo} has no file {name.removeprefix(repo).strip('/')}") from None
    except Exception as error:  # the Hub's client, its transfer library and its HTTP library each raise their own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            fault = "the disk is full; HF_HOME moves the Hub's cache"
        else:
            fault = f"{answer_of(error) or one_line(error)}; run it again, which keeps the files that are whole"
        raise CheckpointError(f"cannot fetch {repo}: {fault}") from None


ANSWERS = {401: "log in with `hf auth login`", 403: "the token may not", 429: "too many requests; wait a while"}


def answer_of(error: BaseException | None) -> str:
    """What the Hub answered where that was an error, by its status; nothing where it did not answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int) and status >= 400:
            meaning = ANSWERS.get(status, "its fault; try again later" if status >= 500 else "refused")
            return f"the Hub answered {status} ({meaning})"
        error = error.__cause__ or error.__context__
    return ""


def cached_releases() -> list[str]:
    """The released models of which anything is in the Hub's cache."""
    from huggingface_hub import errors

    try:
        present = {repo.repo_id for repo in huggingface_hub.scan_cache_dir().repos}
    except errors.CacheNotFound:
        return []
    return [name for name, repo in RELEASED.items() if repo in present]
