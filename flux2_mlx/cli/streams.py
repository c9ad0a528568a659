"""Standard streams that are closed, full or broken: what would go there is lost, and no work with it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Stream:
    """A stream to write to that never raises.

    Attributes:
        fault: the first error; None while there was none.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.fault: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        with self._kept():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self.stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.fault = self.fault or error
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())  # so that Python can flush what is left when it ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def shows_bars(quiet: bool) -> bool:
    """Whether progress bars are wanted: never in a pipe or a file, which would keep their cursor codes."""
    return not quiet and sys.stderr.isatty()


@contextlib.contextmanager
def guarded_streams() -> Iterator[Stream]:
    """Put guarded streams in the place of Python's while the body runs; yields that of standard output.

    The numbers 0 to 2 are kept busy where they are closed: a file that is opened would get one of them, and MLX takes a
    file with the number 0 for one that did not open.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull, encoding="utf-8") as empty, open(os.devnull, "w", encoding="utf-8") as nothing:
        for stream in before[1:]:
            if isinstance(stream, io.TextIOWrapper):
                with contextlib.suppress(OSError, ValueError):
                    stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter must not end the run
        output, errors = (Stream(nothing if stream is None else stream) for stream in before[1:])
        sys.stdin, sys.stdout, sys.stderr = before[0] or empty, output, errors
        try:
            yield output
        finally:
            errors.flush()
            sys.stdin, sys.stdout, sys.stderr = before
