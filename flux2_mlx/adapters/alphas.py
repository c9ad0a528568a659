"""Alpha over rank, as the program that wrote a file means it: from the file's arrays, its header, or PEFT's config.

References: PEFT's tuners (LoraConfig calls it lora_alpha, LoKrConfig and LoHaConfig alpha; get_pattern_key), LyCORIS (a
LoKr of two whole matrices has none), Kalajdzievski 2023 (rsLoRA), flux-2-swift-mlx (lora_rank, lora_alpha).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..checkpoints.hub import PEFT_CONFIG, PEFT_WEIGHTS, is_peft
from ..checkpoints.reading import read_json
from ..errors import CheckpointError

LARGEST = 1e38  # of float32, in which factors are multiplied
Patterns = tuple[tuple[re.Pattern[str], float | None], ...]


@dataclass(frozen=True)
class Alphas:
    """What stands in a header or a config about alphas; by default, nothing.

    Attributes:
        source: where it stands.
        values: lora_alpha of LoRA, alpha of LoKr and LoHa, and the rank r, each a number or None.
        patterns: those of alpha_pattern and of rank_pattern.
        by_r: whether alpha is divided by r, whatever the rank of a layer's matrices.
        note: what is to be told of a config that was left alone.
    """

    source: str = ""
    values: Mapping[str, float | None] = field(default_factory=dict)
    patterns: Mapping[str, Patterns] = field(default_factory=dict)
    use_rslora: bool = False
    by_r: bool = False
    note: str = ""

    def factor(self, names: Collection[str], form: str, rank: int | None, own: float | None) -> float:
        """Alpha over rank, or of rsLoRA over its root; 1 without alpha.

        Args:
            names: of a layer, that patterns may match.
            form: "LoRA", "LoHa" or "LoKr".
            rank: of its matrices; None for a LoKr of two whole ones.
            own: alpha as an array of the file; a LoKr of two whole matrices has one that means nothing.

        Raises:
            CheckpointError: for an alpha without the rank that it is to be divided by.
        """
        if own is not None:
            alpha: float | None = own
            if rank is None:
                return 1.0
        else:
            alpha = self._find("alpha_pattern", names, "lora_alpha" if form == "LoRA" else "alpha")
        divisor: float | None = rank
        if rank is None or (self.by_r and own is None):  # PEFT scales two whole matrices by its config's rank
            divisor = self._find("rank_pattern", names, "r")
        if alpha is None:
            alpha = rank
        if alpha is None:
            return 1.0
        if divisor is None:
            raise CheckpointError(f"{self.source} has an alpha without the rank (r) that it is to be divided by")
        return alpha / (math.sqrt(divisor) if self.use_rslora else divisor)

    def _find(self, kind: str, names: Collection[str], default: str) -> float | None:
        """The number of the first pattern that matches a layer's name, else the one of all layers."""
        for pattern, value in self.patterns.get(kind, ()):
            if any(pattern.match(name) for name in names):
                return value
        return self.values.get(default)


def read_alphas(file: Path, keys: Collection[str], ranks: Collection[int]) -> Alphas:
    """What is said about the alphas of a file outside of its arrays.

    A config beside it counts for PEFT's own file alone: in a folder of LoRAs it may be another's.

    Args:
        keys: the file's, and
        ranks: those of its layers.

    Raises:
        CheckpointError: for what cannot be read, an alpha that is no number, a pattern that is no expression.
    """
    with safe_open(file, framework="numpy") as opened:
        header = opened.metadata() or {}
    config = file.with_name(PEFT_CONFIG)
    if "lora_adapter_metadata" in header:  # diffusers'
        source = f"{file}: its header's lora_adapter_metadata"
    elif {"lora_rank", "lora_alpha"} <= header.keys():  # flux-2-swift-mlx's
        source = f"{file}: its header's lora_rank and lora_alpha"
    elif config.is_file() and is_peft(file.name, keys):
        source = str(config)
    else:
        note = f"{PEFT_CONFIG} beside it is not its own and not applied" if config.is_file() else ""
        return Alphas(note=note)
    try:
        if source == str(config):
            return _own_config(file, _parse(source, read_json(config)), ranks)
        if "lora_adapter_metadata" in header:
            values = json.loads(header["lora_adapter_metadata"])
            return _parse(source, {name.removeprefix("transformer."): value for name, value in values.items()})
        values = {"lora_alpha": float(header["lora_alpha"]), "r": float(header["lora_rank"])}
        return _parse(source, values | {"alpha": values["lora_alpha"]}, by_r=True)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise CheckpointError(f"{source} cannot be read ({error})") from None


def _own_config(file: Path, alphas: Alphas, ranks: Collection[int]) -> Alphas:
    """The config, unless it says of other ranks than the file has, under another name than PEFT's, that it is not
    the file's.
    """
    said = {alphas.values.get("r"), *(value for _, value in alphas.patterns["rank_pattern"])}
    if file.name == PEFT_WEIGHTS or said >= set(ranks):
        return alphas
    return Alphas(note=f"{PEFT_CONFIG} beside it is of other ranks and not applied")


def _parse(source: str, values: Mapping[str, Any], by_r: bool = False) -> Alphas:
    numbers = {name: _number(name, values.get(name)) for name in ("lora_alpha", "alpha", "r")}
    patterns = {}
    for kind in ("alpha_pattern", "rank_pattern"):
        try:
            patterns[kind] = tuple(
                (re.compile(rf"(.*\.)?({pattern})$"), _number(kind, value))  # as PEFT's get_pattern_key
                for pattern, value in (values.get(kind) or {}).items()
            )
        except re.error as error:
            raise ValueError(f"{kind} has what is no regular expression: {error}") from None
    return Alphas(source, numbers, patterns, bool(values.get("use_rslora")), by_r)


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    kind = "a rank" if name in ("r", "rank_pattern") else "an alpha"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError(f"{kind} that is no number")
    if kind == "a rank" and value <= 0:
        raise ValueError(f"a rank that is not above 0: {value}")
    return float(value)
