"""A cache on disk between runs: small tables, and prompt embeddings.

The folder can be deleted at any time: an entry that cannot be read or written, for whatever reason, is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .paths import expand

PROMPTS = "prompts"  # subfolder of the prompt embeddings
PROMPT_BYTES = 1_000_000_000  # most bytes of all cached prompt embeddings; the least recently used go first


def cache_folder() -> Path:
    """The folder in FLUX2_MLX_CACHE, else flux2_mlx in the platform's folder for caches."""
    configured = os.environ.get("FLUX2_MLX_CACHE")
    if configured:
        return Path(expand(configured))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flux2_mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux2_mlx"


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear whole or not at all: ``write`` gets a temporary path, which then replaces ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_table(name: str) -> dict[str, Any]:
    """The cached table of this name, or an empty one."""
    try:
        table = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    return table if isinstance(table, dict) else {}


def write_table(name: str, table: dict[str, Any]) -> None:
    text = json.dumps(table, indent=1)
    with contextlib.suppress(OSError, RuntimeError):
        _write_atomically(cache_folder() / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))


def digest_of(files: Iterable[Path], key: object) -> str:
    """A cache entry's name: a hash of ``key`` and of the files' paths, sizes and times."""
    stats = [(path.resolve(), path.stat()) for path in files]
    identity = [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return hashlib.sha256(repr((identity, key)).encode()).hexdigest()[:40]


def _prompt_file(files: Iterable[Path], key: object) -> Path:
    return cache_folder() / PROMPTS / f"{digest_of(files, key)}.safetensors"


def read_prompt(files: Iterable[Path], key: object) -> mx.array | None:
    """The cached prompt embeddings (1, L, D) of these weight files and this key, or None."""
    try:
        path = _prompt_file(files, key)
        with safe_open(path, framework="numpy"):  # checks the length: MLX would read past the end of a truncated file
            embeds = cast("dict[str, mx.array]", mx.load(str(path)))["prompt_embeds"]
        mx.eval(embeds)
        with contextlib.suppress(OSError):
            os.utime(path)  # marks it as used: write_prompt deletes the least recently used first
    except (OSError, RuntimeError, SafetensorError, KeyError):
        return None
    return embeds


def write_prompt(files: Iterable[Path], key: object, embeds: mx.array) -> None:
    """Cache prompt embeddings (1, L, D), and delete the least recently used beyond PROMPT_BYTES."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _prompt_file(files, key)
        _write_atomically(path, lambda file: mx.save_safetensors(str(file), {"prompt_embeds": embeds}))
        newest_first = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        total = 0
        for file in newest_first:
            total += file.stat().st_size
            if total > PROMPT_BYTES and file != path:
                file.unlink()
