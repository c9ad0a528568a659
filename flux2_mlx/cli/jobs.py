"""Job files: one JSON object a line, which is a command line of its own.

    {"prompt": "a red fox", "seed": 1, "width": 512, "output": "fox.png"}
    {"prompt": "make it blue", "image": ["fox.png"], "steps": 8}

Keys are the command's options without their dashes, values what would stand behind them: lists for several, an object
for pairs, true or false for switches.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.config import InputError

# Options that are given once for each file, and those that concern the whole run.
SEVERAL = ("image", "lora")
COMMAND_ALONE = ("help", "version", "prompt-file", "jobs", "resume", "interactive", "plan", "measure", "stats", "quiet")


@dataclass(frozen=True)
class Job:
    """One line of a job file.

    Attributes:
        number: of the line, from 1.
        text: of the line.
    """

    number: int
    text: str

    @property
    def seed(self) -> int:
        """The seed of a line that gives none, 0 to 2^32 - 1: always the same for this text in this line."""
        return int.from_bytes(hashlib.sha256(f"{self.number} {self.text}".encode()).digest()[:4], "big")

    def arguments(self, parser: argparse.ArgumentParser, given: argparse.Namespace) -> argparse.Namespace:
        """The command line that this is, on top of the one that was given for all lines.

        Raises:
            InputError: for what is no JSON object, or no option.
        """
        try:
            values = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"no JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"a job must be a JSON object, got {self.text[:40]}")
        arguments = copy.copy(given)
        prompt = values.pop("prompt", given.prompt)
        if not isinstance(prompt, (str, type(None))):
            raise InputError(f"a prompt must be a string, got {prompt!r}")
        words: list[str] = []
        for name, value in values.items():
            option = name.replace("_", "-")
            if option in COMMAND_ALONE:
                raise InputError(f"--{option} is for the command line, not for a job")
            if value is not None and option in ("steps", "num-steps", "schedule"):
                arguments.sigmas = None  # as they would go before these
            if value is not None and option in SEVERAL:
                setattr(arguments, option, None)  # else those of the command line would stay
            words += _words(option, value)
        arguments = parser.parse_args(words, arguments)
        arguments.prompt = prompt
        return arguments


def _words(option: str, value: Any) -> list[str]:
    """An option and its value as a command line has them; null says nothing."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if option in SEVERAL:
        return [f"--{option}={path}" for path in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    elif isinstance(value, dict):
        value = ",".join(f"{key}={part}" for key, part in value.items())
    return [f"--{option}={value}"]


def read_jobs(path: Path) -> list[Job]:
    """The lines of a job file that are not empty.

    Raises:
        InputError: for a file that cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line breaks
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    jobs = [Job(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise InputError(f"{path} has no jobs: one JSON object a line")
    return jobs


def missing_runs(outputs: Sequence[Path]) -> list[range]:
    """Indices of the files that do not exist, as runs."""
    runs: list[range] = []
    for index, output in enumerate(outputs):
        if os.path.lexists(output):
            continue
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
