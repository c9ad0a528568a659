"""Paths as people write them, by one rule on every surface, and paths as they may stand in an image that is shared."""

from __future__ import annotations

import os
from pathlib import PurePath

HIDDEN = "~/.../"  # stands for folders of a home folder whose names an image does not carry


def expand(path: str | os.PathLike[str]) -> str:
    """A path with environment variables ($NAME, ${NAME}) and a leading ~ filled in; what is not set stays as it is.

    A relative path is one of the working folder, wherever it was written.
    """
    text = os.fspath(path)
    return text if text.startswith(HIDDEN) else os.path.expanduser(os.path.expandvars(text))


def without_home(path: str) -> str:
    """A path as an image carries it: of one in the home folder the last part, behind "~/" or HIDDEN; others as they
    are.
    """
    if not os.path.isabs(path) and ".." not in PurePath(path).parts:
        return path
    home = os.path.expanduser("~")
    homes = {os.path.abspath(home), os.path.realpath(home)} - {os.path.abspath(os.sep)}
    parents = {os.path.abspath(path), os.path.realpath(path)}
    if not any(full == place or full.startswith(place + os.sep) for full in parents for place in homes):
        return path
    is_deep = os.path.dirname(os.path.abspath(path)) not in homes
    return (HIDDEN if is_deep else "~/") + os.path.basename(os.path.abspath(path))
