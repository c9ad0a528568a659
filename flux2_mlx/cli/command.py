"""How a command ends: every fault in one line, signals as Ctrl-C, streams that cannot be written to in peace."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import DeviceError, InputError, one_line, printable
from .streams import guarded_streams

INTERRUPTED = 128 + signal.SIGINT  # as shells report it
EXPECTED = (InputError, DeviceError, FloatingPointError, OSError)  # whose message is for the user
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler or `kill`, a terminal that was closed


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a session too, where Ctrl-C ends a prompt."""


def run_command(run: Callable[[], int | None], *, interrupted: str = "", about: Callable[[], str] = lambda: "") -> int:
    """Run a command.

    Args:
        run: does it; returns the exit code where that is not 0.
        interrupted: what an interrupt leaves, where the KeyboardInterrupt does not say it itself.
        about: added to the message of a fault.

    Returns:
        The exit code: that of ``run``; 2 for a fault, or for results that standard output did not take, one line on
        standard error; 128 and the signal's number after Ctrl-C (130), SIGTERM (143) and SIGHUP (129).
    """
    with guarded_streams() as output, ending_signals() as received, warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show_warning  # type: ignore[assignment]  # takes whatever comes after the message
        try:
            code = run() or 0
        except KeyboardInterrupt as interrupt:
            left = str(interrupt) or interrupted
            tell(f"interrupted{about()}{f'; {left}' if left else ''}")
            code = 128 + (received[-1] if received else signal.SIGINT)
        except BaseException as error:
            tell_fault(error, about=about())
            code = 2
        output.flush()
        if output.fault is not None:
            tell(f"error: standard output: {one_line(output.fault)}; the work was done all the same")
            code = code or 2
    return code


@contextlib.contextmanager
def ending_signals() -> Iterator[list[int]]:
    """Have the signals that end a program raise KeyboardInterrupt, as Ctrl-C does, while the body runs; yields the
    numbers of those that came. One that is ignored, as by nohup, stays so.
    """
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield received
        return
    kept = {number: signal.getsignal(number) for number in ENDINGS}
    before = {number: handler for number, handler in kept.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(line: str) -> None:
    print(printable(line), file=sys.stderr)


def tell_fault(error: BaseException, where: str = "", about: str = "") -> None:
    """Print a fault in one line, with its traceback under FLUX2_MLX_DEBUG=1. What is to end the process goes on doing
    so; Rust's panics, which are no Exceptions, do not.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error
    if os.environ.get("FLUX2_MLX_DEBUG") == "1":
        traceback.print_exception(error)
    message = one_line(error)
    if not isinstance(error, EXPECTED):
        message = f"{type(error).__name__}: {message}; a damaged file, or a fault of flux2_mlx"
        message += "" if os.environ.get("FLUX2_MLX_DEBUG") == "1" else ": FLUX2_MLX_DEBUG=1 shows where"
    tell(f"error: {where}{message}{about}")


def show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as one line, without the place in the code."""
    tell(f"warning: {message}")
