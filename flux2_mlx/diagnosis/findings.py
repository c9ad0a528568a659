"""What a check finds, and a report of it that names nobody."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from .._version import __version__
from ..device import device_errors
from ..errors import one_line

OK, SLOW, WRONG, SKIPPED = "ok", "slow", "WRONG", "skipped"
REPORT_IT = "please open an issue with what --report writes"

# An absolute path, and a token of the Hub, wherever an error's message has one.
PATH = re.compile(r"(?<![\w/:.])~?(?:/[^\s/:'\"]+){2,}/?")
TOKEN = re.compile(r"\bhf_\w+")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        verdict: OK, SLOW, WRONG or SKIPPED.
        measured: what was measured, in words.
        advice: what to do where it is not ok.
    """

    verdict: str
    measured: str
    advice: str = ""

    def __str__(self) -> str:
        return self.measured + (f"; {self.advice}" if self.advice else "")


CUT_OFF = Finding(SKIPPED, "the run was cut off here")


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[], Finding]


def examine(check: Check) -> Finding:
    """What a check finds, in words that name nobody; an exception within it is something wrong."""
    try:
        with device_errors():
            found = check.run()
    except Exception as error:  # whatever a backend raises is what was to be found out
        found = Finding(WRONG, f"{type(error).__name__}: {one_line(error)}", REPORT_IT)
    return Finding(found.verdict, anonymous(found.measured), anonymous(found.advice))


def anonymous(text: str) -> str:
    """The text without the user's paths, tokens and names."""
    token = huggingface_hub.get_token()
    for secret, word in ((token, "<token>"), (_home(), "<home>")):
        text = text.replace(secret, word) if secret else text
    text = PATH.sub("<path>", TOKEN.sub("<token>", text))
    for name in _names():
        text = re.sub(rf"\b{re.escape(name)}\b", "<name>", text)
    return text


def _home() -> str:
    try:
        return str(Path.home())
    except RuntimeError:  # there is none
        return ""


def _names() -> set[str]:
    """The names of the user and of the machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user whom the system does not know
        user = ""
    return {user, Path(_home()).name, platform.node()} - {""}


def markdown(found: Iterable[tuple[str, Finding]]) -> str:
    """A table to paste into an issue."""
    rows = [f"| {name} | {finding.verdict} | {str(finding).replace('|', '/')} |" for name, finding in found]
    return "\n".join([f"flux2-doctor {__version__}", "", "| check | verdict | measured |", "|---|---|---|", *rows, ""])
