"""What the names of all parts share: prefixes, block counts, widths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def select(weights: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The component's own weights of a file that may hold more, without the prefix; of one that does not, all."""
    for prefix in prefixes:
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        if own:
            return own
    return dict(weights)


def block_count(weights: Mapping[str, Any], prefix: str) -> int:
    numbers = [int(match[1]) for name in weights if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def dense_columns(weights: Mapping[str, Any], layer: str, group: int) -> int:
    """Columns of a layer's dense weight; packed, it has groups of that size."""
    scales = weights.get(f"{layer}.scales")
    return int(weights[f"{layer}.weight"].shape[1] if scales is None else scales.shape[1] * group)
