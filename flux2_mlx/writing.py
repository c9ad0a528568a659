"""Writing files and folders that appear whole or not at all, whatever stops the program, the disk or the machine.

Each is written under a hidden name beside its place, ``.NAME.partial-XXXX``, whose writer holds a lock on it. So what a
killed program left is told from what another one is writing: see remove_partials.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

PARTIAL = ".partial-"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@contextlib.contextmanager
def atomic_write(path: Path, *, lasting: bool = False) -> Iterator[Path]:
    """Let a file appear whole or not at all: yields a temporary path beside it, which replaces ``path`` at the end.

    A body that moves the temporary file elsewhere decides itself where it goes; after an exception it is deleted.

    Args:
        lasting: have the file on the disk before it gets its name, so that a power cut does not empty it.

    Raises:
        InputError: for a full disk or another failure to write.
    """
    with _write_errors(path), _partial(path, is_folder=False) as temporary:
        yield temporary
        if temporary.exists():
            if lasting:
                sync(temporary)
            temporary.replace(path)
        if lasting:
            sync(path.parent)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Let a folder appear whole or not at all: yields a temporary one beside it, which is on the disk, all of it,
    before it is named ``target`` at the end. After an exception it is deleted.

    Raises:
        InputError: for a full disk or another failure to write.
    """
    with _write_errors(target), _partial(target, is_folder=True) as unfinished:
        yield unfinished
        for file in (*unfinished.rglob("*"), unfinished):
            sync(file)
        unfinished.rename(target)
        sync(target.absolute().parent)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Give the system's errors, and those of MLX where it could not write, as InputErrors about ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and PARTIAL not in str(error.filename) and Path(error.filename) != path.parent:
            raise  # of another file, which the body reads
        fault = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise InputError(f"cannot write {path}: {fault}; choose another file") from None
    except RuntimeError as error:
        if "[write]" not in str(error) and "[save_safetensors]" not in str(error):
            raise
        raise InputError(f"cannot write {path}: the disk is full, or refuses; choose another file") from None


@contextlib.contextmanager
def _partial(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """A temporary file or folder beside a path, locked; whatever of it is still there at the end is removed.

    Its name is chosen before it is there, so that a signal that comes as it is created leaves nothing.
    """
    name = path.parent / f".{path.stem[:40]}{PARTIAL}{secrets.token_hex(8)}{path.suffix}"
    handles: list[int] = []
    try:
        while not os.path.lexists(name):  # another program's remove_partials may come before the lock
            if is_folder:
                name.mkdir(0o755)
            handles.append(os.open(name, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            with contextlib.suppress(OSError):  # a file system without locks, whose partial files nobody removes
                fcntl.flock(handles[-1], fcntl.LOCK_EX)
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(name, ignore_errors=True) if is_folder else name.unlink()
        for handle in handles:
            os.close(handle)


def remove_partials(folder: Path) -> None:
    """Remove what programs that were killed left unfinished in a folder, and nothing that is being written."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{PARTIAL}*"):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def tell_unlocked_partials(target: Path) -> None:
    """Warn of what earlier versions left unfinished beside a folder's place: without a lock, so that nothing tells
    whether one of them is still at work there.
    """
    left = [path for path in target.absolute().parent.glob(f".{glob.escape(target.name)}.????????") if path.is_dir()]
    if left:
        names = ", ".join(map(str, sorted(left)))
        warnings.warn(f"unfinished folders of an earlier version are left: {names}; delete them", stacklevel=2)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: on macOS with F_FULLFSYNC, as fsync leaves it in the disk's
    own cache. A file system that cannot is left to itself.

    Raises:
        OSError: where the disk failed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is not None:
            with contextlib.suppress(OSError):
                fcntl.fcntl(handle, full)
                return
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def move_to_free_name(temporary: Path, path: Path) -> Path:
    """Give a finished file the name ``path``, or the first free numbered one, and never another's file.

    A link fails where the name is taken. Where the file system has no links an empty file claims the name, which may be
    left, empty, by a program that is killed.
    """
    for number in itertools.count(1):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            os.link(temporary, target)
            temporary.unlink()
            return target
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        if _claim(temporary, target):
            return target
    raise AssertionError("numbers do not end")


def _claim(temporary: Path, target: Path) -> bool:
    """Rename a file to a name that was free; returns whether it was."""
    is_claimed = False
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        is_claimed = True
        temporary.replace(target)
    except FileExistsError:
        return False
    except BaseException:
        if is_claimed and temporary.exists():
            target.unlink()
        raise
    return True
