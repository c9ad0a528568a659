"""What is worth keeping between runs: small tables, and prompt embeddings.

Nothing in the folder is needed. What cannot be read or written, for whatever reason, is computed again.
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

PROMPTS = "prompts"  # folder of the embeddings
PROMPT_BYTES = 1_000_000_000  # that they may take together


def cache_folder() -> Path:
    """FLUX2_MLX_CACHE, or flux2_mlx in the platform's folder for caches."""
    given = os.environ.get("FLUX2_MLX_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flux2_mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux2_mlx"


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear whole, or not at all."""
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
    """A table that was kept under this name, else an empty one."""
    try:
        table = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # no home folder
        return {}
    return table if isinstance(table, dict) else {}


def write_table(name: str, table: dict[str, Any]) -> None:
    text = json.dumps(table, indent=1)
    with contextlib.suppress(OSError, RuntimeError):
        _write(cache_folder() / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))


def digest_of(files: Iterable[Path], key: object) -> str:
    """A name for what is made from files: another key, other files, or the same files changed, and it is another."""
    stats = [(path.resolve(), path.stat()) for path in files]
    identity = [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return hashlib.sha256(repr((identity, key)).encode()).hexdigest()[:40]


def _prompt_file(files: Iterable[Path], key: object) -> Path:
    return cache_folder() / PROMPTS / f"{digest_of(files, key)}.safetensors"


def read_prompt(files: Iterable[Path], key: object) -> mx.array | None:
    """The embeddings (1, L, D) that were kept for these files of weights and this key, or None."""
    try:
        path = _prompt_file(files, key)
        with safe_open(path, framework="numpy"):  # refuses a file that was cut short, which MLX would read past its end
            embeds = cast("dict[str, mx.array]", mx.load(str(path)))["prompt_embeds"]
        mx.eval(embeds)
        with contextlib.suppress(OSError):
            os.utime(path)  # those that were not needed for long go first
    except (OSError, RuntimeError, SafetensorError, KeyError):
        return None
    return embeds


def write_prompt(files: Iterable[Path], key: object, embeds: mx.array) -> None:
    """Keep embeddings (1, L, D), and of all that are kept the latest, up to PROMPT_BYTES."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _prompt_file(files, key)
        _write(path, lambda file: mx.save_safetensors(str(file), {"prompt_embeds": embeds}))
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        total = 0
        for file in kept:
            total += file.stat().st_size
            if total > PROMPT_BYTES and file != path:
                file.unlink()
