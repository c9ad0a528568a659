"""Shared by the names of all parts: the table of a part's names, block counts, widths."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError

NUMBER = r"\d{1,6}"  # of a block in a weight's name

Renaming = Callable[[Mapping[str, Any]], dict[str, Any]]


def is_always_read(_name: str) -> bool:
    return True


@dataclass(frozen=True)
class Names:
    """The names that files give the weights of a part, both ways. None of these functions reads a weight.

    Attributes:
        prefixes: what files that hold more than this part put before its names.
        marks: names, before and after renaming, of which every file with this part has one.
        rename: brings any file's names to the modules'; weights under the modules' names stay as they are.
        infer: the part's config, from the shapes of renamed weights; raises CheckpointError for another model's.
        is_read: whether the modules have a weight of that name, without prefix; the rest of a file is passed over.
        to_diffusers, to_bfl: bring the modules' names to those of diffusers' and of BFL's files.
    """

    prefixes: tuple[str, ...]
    marks: tuple[str, ...]
    rename: Renaming
    infer: Callable[[Mapping[str, Any]], Any]
    is_read: Callable[[str], bool] = is_always_read
    to_diffusers: Renaming = dict
    to_bfl: Renaming = dict

    def select(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The part's own weights, without the prefix of a file that holds more parts."""
        prefix = next((p for p in self.prefixes if any(name.startswith(p) for name in weights)), "")
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        return {name: weight for name, weight in own.items() if self.is_read(name)}

    def are_in(self, names: Container[str]) -> bool:
        """Whether a file with weights of these names holds the part."""
        return any(prefix + mark in names for prefix in ("", *self.prefixes) for mark in self.marks)


def gather(renamed: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Renamed weights by their names.

    Raises:
        CheckpointError: where two weights of a file are the same one, under names of two programs.
    """
    weights: dict[str, Any] = {}
    for name, weight in renamed:
        if name in weights:
            raise CheckpointError(f"{name} is there twice, under two names")
        weights[name] = weight
    return weights


def block_count(weights: Mapping[str, Any], prefix: str) -> int:
    """How many blocks have weights whose names begin with the prefix and the block's number."""
    numbers = [int(match[1]) for name in weights if (match := re.match(rf"{re.escape(prefix)}\.({NUMBER})\.", name))]
    return max(numbers, default=-1) + 1


def dense_columns(weights: Mapping[str, Any], layer: str, group: int) -> int:
    """Columns of a layer's dense weight; packed, it has groups of that size."""
    scales = weights.get(f"{layer}.scales")
    return int(weights[f"{layer}.weight"].shape[1] if scales is None else scales.shape[1] * group)
