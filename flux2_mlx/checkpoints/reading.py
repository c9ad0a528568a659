"""Files that are read whole: configs, indexes, tokenizers, checksums; and what any file is asked before it is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MOST_BYTES = 1 << 22  # of a file of text; the longest index has a twentieth
WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_weight_file(name: str) -> bool:
    """Whether a file of a folder counts as weights, by its path there. Names that begin with a dot never do: these are
    what macOS leaves beside files on other systems' disks (._NAME), and files that are still being written.
    """
    return name.endswith(WEIGHT_SUFFIXES) and not any(part.startswith(".") for part in Path(name).parts)


def weight_names(folder: Path, pattern: str = "*") -> list[str]:
    """The weight files of a folder, or with "**/*" those below it, by their paths there."""
    found = (file.relative_to(folder).as_posix() for file in folder.glob(pattern))
    return sorted(name for name in found if is_weight_file(name))


def refetch_hint(path: Path) -> str:
    """How to get a file again: the command for one in the Hub's cache, else a hint."""
    cached = re.search(r"models--([^/]+)/snapshots/[^/]+/(.+)$", path.as_posix())
    if cached:
        return f"fetch it again: hf download {cached[1].replace('--', '/', 1)} {cached[2]} --force-download"
    return "fetch or copy it again"


def read_start(path: Path, count: int) -> tuple[bytes, int]:
    """(first bytes, size) of a file.

    Raises:
        CheckpointError: for one that is missing, cannot be read, is no regular file, which could hang or never end, or
            is a pointer of git-lfs in place of the file.
    """
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a pipe or device"
            raise CheckpointError(f"{path} cannot be read: it is {what}, not a file")
        with path.open("rb") as raw:  # a file without permission raises another error than a missing one
            start, size = raw.read(max(count, len(_LFS_POINTER))), path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {refetch_hint(path)}") from None
    except (OSError, ValueError) as error:  # a name with a null character
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in its repository, or fetch it with "
            "`hf download`"
        )
    return start[:count], size


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A file of text in UTF-8, with or without a byte order mark.

    Raises:
        CheckpointError: as read_start; and for more than ``most`` bytes, or other than UTF-8.
    """
    _, size = read_start(path, 0)
    if size > most:
        raise CheckpointError(f"{path} has {size:,} bytes, and at most {most:,} are read; {refetch_hint(path)}")
    try:
        with path.open("rb") as file:
            return file.read(most).decode("utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}); {refetch_hint(path)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: as read_text; and for what is no JSON object.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {refetch_hint(path)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; {refetch_hint(path)}")
    return content
