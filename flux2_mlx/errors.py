"""Errors: exceptions whose message names the fault, the value and the way out."""

from __future__ import annotations

from collections.abc import Sequence


def summarize(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(error: BaseException) -> str:
    """An error's message on one line; the name of its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


def printable(text: str, most: int = 2000) -> str:
    """A text for a terminal: what does not print, escape sequences and line breaks too, as Python writes it within
    quotes, and of a long one the beginning and the end.
    """
    shown = abridge(text, most)
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)


def abridge(text: str, most: int) -> str:
    """A text, or of one with more letters the beginning and the end."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]} ... {text[-most // 4 :]}"


MOST_LETTERS = 10_000  # of a message: files may hold names and values of any length


class InputError(ValueError):
    """A value that cannot be used: the message names it and the way out.

    Attributes:
        message: the fault, without the source.
        source: the file that it is about, if any; str() gives "source: message".
    """

    def __init__(self, message: str, *, source: object = None):
        self.message, self.source = abridge(message, MOST_LETTERS), source
        super().__init__(self.message if source is None else f"{source}: {self.message}")


class CheckpointError(InputError):
    """A checkpoint that cannot be used: the message names the file and the way out."""


class DeviceError(RuntimeError):
    """The GPU was stopped, or memory was too little: the message says which, and the way out. MLX's error is its
    ``__cause__``.
    """


class OtherModelError(CheckpointError):
    """Another model than FLUX.2 [klein]; config_faults adds the released models' names to the message."""
