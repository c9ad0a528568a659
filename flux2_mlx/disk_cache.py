"""A cache on disk between runs: small tables, and prompt embeddings.

The folder can be deleted at any time: an entry that cannot be read or written, for whatever reason, is computed again.
Each has the SHA-256 of its name and content, so one that a power cut or a failing disk changed counts as unreadable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import InputError
from .paths import expand
from .writing import atomic_write, remove_partials

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


def read_table(name: str) -> dict[str, Any]:
    """The cached table of this name, or an empty one."""
    try:
        entry = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
        table, digest = entry["table"], entry["sha256"]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):  # RuntimeError: no home folder, or deep nesting
        return {}
    return table if isinstance(table, dict) and digest == _table_digest(name, table) else {}


def write_table(name: str, table: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, RuntimeError, InputError):
        path = cache_folder() / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"sha256": _table_digest(name, table), "table": table}, indent=1)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _table_digest(name: str, table: dict[str, Any]) -> str:
    return hashlib.sha256(f"{name} {json.dumps(table, sort_keys=True)}".encode()).hexdigest()


def digest_of(files: Iterable[Path], key: object) -> str:
    """A cache entry's name: a hash of ``key`` and of the files' paths, sizes and times."""
    stats = [(path.resolve(), path.stat()) for path in files]
    identity = [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return hashlib.sha256(repr((identity, key)).encode()).hexdigest()[:40]


def _prompt_file(files: Iterable[Path], key: object) -> Path:
    return cache_folder() / PROMPTS / f"{digest_of(files, key)}.safetensors"


def array_digest(name: str, array: mx.array) -> str:
    """Hexadecimal SHA-256 of an array's name, dtype, shape and values."""
    digest = hashlib.sha256(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()


def write_array(path: Path, array: mx.array) -> None:
    """Write an array to a file of its own, with its digest.

    Raises:
        InputError: for a full disk or another failure to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        mx.save_safetensors(str(temporary), {"array": array}, {"sha256": array_digest(path.stem, array)})


def read_array(path: Path) -> mx.array | None:
    """The array that write_array wrote to this file; None where it is not there, or is not what was written."""
    try:
        with safe_open(
            path, framework="numpy"
        ) as file:  # checks the length: MLX would read past a truncated file's end
            expected = (file.metadata() or {}).get("sha256")
        array = cast("dict[str, mx.array]", mx.load(str(path)))["array"]
        mx.eval(array)  # on its own: see lazy
        return array if array_digest(path.stem, array) == expected else None
    except (OSError, RuntimeError, SafetensorError, KeyError, ValueError):
        return None


def read_prompt(files: Iterable[Path], key: object) -> mx.array | None:
    """The cached prompt embeddings (1, L, D) of these weight files and this key, or None."""
    try:
        path = _prompt_file(files, key)
    except (OSError, RuntimeError):
        return None
    embeds = read_array(path)
    if embeds is not None:
        with contextlib.suppress(OSError):
            os.utime(path)  # marks it as used: write_prompt deletes the least recently used first
    return embeds


def write_prompt(files: Iterable[Path], key: object, embeds: mx.array) -> None:
    """Cache prompt embeddings (1, L, D) that are finite, and delete the least recently used beyond PROMPT_BYTES."""
    if not mx.isfinite(embeds).all().item():
        return
    with contextlib.suppress(OSError, RuntimeError, InputError):
        path = _prompt_file(files, key)
        write_array(path, embeds)
        remove_partials(path.parent)
        newest_first = sorted(path.parent.glob("[!.]*.safetensors"), key=lambda file: -file.stat().st_mtime_ns)
        total = 0
        for file in newest_first:
            total += file.stat().st_size
            if total > PROMPT_BYTES and file != path:
                file.unlink()
