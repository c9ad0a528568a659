"""DFloat11: bfloat16 whose exponents are Huffman codes, decoded bit for bit as rows are read.

Some matrices are a group, one after another, of which files have six arrays: ``sign_mantissa``, a byte a weight;
``encoded_exponent``, the codes, first bit highest; ``luts``, tables of a code's next byte, and last the codes' lengths;
``gaps``, in 5 bits the first code's place in each 8 bytes; ``output_positions``, the first weight of each 4096 bytes,
and the number of all; ``split_positions``, where the matrices part. The config names them. Reference: "70% Size, 100%
Accuracy" (Zhang et al., 2025), and https://github.com/LeanModels/DFloat11.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError
from ...lazy import LazyTensor, array_of

CONFIG = "dfloat11_config"
_ARRAYS = ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions", "split_positions")
_BLOCK, _CHUNK = 4096, 8  # bytes of a block, and of a chunk, whose first code a gap tells
_RUN = 64  # blocks that are decoded at one time
_POINTER = 240  # values of a table from here on stand for another table
# Patterns of a config: names and numbers, with two repetitions at most, so that none takes long to match.
_PATTERN = re.compile(r"(?!.*\+.*\+.*\+)(?!.*\)\+)(?:[\w.|()\[\]-]|\\[.dw]|\+){1,256}")


def decode_groups(
    weights: Mapping[str, Any],
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    is_read: Callable[[str], bool],
) -> dict[str, Any]:
    """Weights with the matrices of each group in the place of its arrays; nothing is decoded yet.

    Args:
        config: the config's ``dfloat11_config``.
        shapes: of the part's weights, by name.
        is_read: whether the part has a weight of that name; others are left out.

    Raises:
        CheckpointError: for a config that does not name a group's matrices, and for arrays that are none of these.
    """
    result = {name: weight for name, weight in weights.items() if name.rpartition(".")[2] not in _ARRAYS}
    for group in sorted(name.removesuffix(".luts") for name in weights if name.endswith(".luts")):
        arrays = {kind: array_of(weights.get(f"{group}.{kind}")) for kind in _ARRAYS}
        names = [f"{group}.{inner}.weight" for inner in _matrices(group, config)] or [f"{group}.weight"]
        codes = _checked(group, arrays, len(names))
        for name, (first, last) in zip(names, pairwise(codes.splits), strict=True):
            if not is_read(name):
                continue
            shape = shapes.get(name)
            if shape is None or math.prod(shape) != last - first:
                raise CheckpointError(f"{name} has {last - first} weights in DFloat11, not {shape or 'any'}")
            result[name] = _lazy_matrix(codes, first, shape)
    return result


def _matrices(group: str, config: Any) -> list[str]:
    """What a config says that a group holds; nothing for a group that is a matrix itself."""
    patterns = config.get("pattern_dict") if isinstance(config, Mapping) else None
    for pattern, names in (patterns if isinstance(patterns, Mapping) else {}).items():
        try:
            is_named = _PATTERN.fullmatch(pattern) and re.fullmatch(pattern, group[:256])
        except re.error:
            is_named = None
        if is_named and isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    raise CheckpointError(f"{group} is in DFloat11, and pattern_dict of {CONFIG} does not say which matrices it holds")


@dataclass(frozen=True)
class _Codes:
    """A group's arrays, unread.

    Attributes:
        splits: where its matrices begin, and where the last one ends.
        positions: the first weight of each block, and the number of all.
    """

    name: str
    exponents: mx.array
    others: mx.array
    luts: mx.array
    gaps: mx.array
    splits: list[int]
    positions: np.ndarray

    def bits(self, first: int, last: int) -> np.ndarray:
        """Weights first to last of the group as bfloat16's bits (uint16)."""
        start = int(np.searchsorted(self.positions, first, side="right")) - 1
        stop = int(np.searchsorted(self.positions, last, side="left"))
        runs = [self._exponents(block, min(block + _RUN, stop)) for block in range(start, stop, _RUN)]
        skipped = first - int(self.positions[start])
        exponents = np.concatenate(runs)[skipped : skipped + last - first].astype(np.uint16)
        others = np.asarray(self.others)[first:last].astype(np.uint16)
        return (others & 0x80) << 8 | exponents << 7 | others & 0x7F

    def _exponents(self, start: int, stop: int) -> np.ndarray:
        """All exponents whose codes begin in blocks start to stop (uint8)."""
        raw = np.asarray(self.exponents)[start * _BLOCK : stop * _BLOCK + _CHUNK]
        padded = np.zeros((stop - start) * _BLOCK + _CHUNK, np.uint8)
        padded[: raw.size] = raw
        words = padded.view(">u8").astype(np.uint64)
        own, following = words[:-1], words[1:]
        gaps = np.asarray(self.gaps)[start * _BLOCK // _CHUNK * 5 // 8 : stop * _BLOCK // _CHUNK * 5 // 8]
        fives = np.unpackbits(gaps).reshape(-1, 5)
        at = (fives << np.arange(4, -1, -1, dtype=np.uint8)).sum(axis=1).astype(np.uint64)  # bits to the next code
        table, lengths = self._table()
        found, begins = [], []
        while (is_inside := at < 64).any():
            place = np.minimum(at, np.uint64(63))
            window = (own << place | following >> np.uint64(1) >> (np.uint64(63) - place)) >> np.uint64(32)
            symbols = table[window >> np.uint64(16)]
            for shift in (8, 0):
                longer = symbols >= _POINTER
                if longer.any():
                    symbols[longer] = self._next(symbols[longer], window[longer] >> np.uint64(shift) & np.uint64(255))
            found.append(symbols)
            begins.append(is_inside)
            at += lengths[symbols]
        exponents = np.stack(found, axis=1)[np.stack(begins, axis=1)]
        count = int(self.positions[stop] - self.positions[start])
        is_last = stop + 1 == len(self.positions)  # the rest of its last byte is filled up
        if exponents.size < count or (exponents.size > count and not is_last):
            raise self.damaged(f"{exponents.size} codes in blocks {start} to {stop}, and {count} are said")
        return exponents[:count]

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Exponents by a code's first 16 bits, or where these are not all of it the value of the next table; and the
        lengths of the exponents' codes.
        """
        luts = np.asarray(self.luts)
        table = np.repeat(luts[0], 256)
        longer = table >= _POINTER
        table[longer] = self._next(table[longer], np.tile(np.arange(256), 256)[longer])
        lengths = luts[-1].astype(np.uint64)
        return table, np.where(lengths == 0, np.uint64(64), lengths)  # none of these is met but behind the end

    def _next(self, values: np.ndarray, octets: np.ndarray) -> np.ndarray:
        luts = np.asarray(self.luts)
        rows = 256 - values.astype(np.int64)
        rows = np.where(rows > len(luts) - 2, 0, rows)  # of a damaged file, whose count of codes tells
        return luts[rows, octets.astype(np.int64)]

    def damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.name} is damaged: {fault}; fetch the file again")


def _checked(group: str, arrays: Mapping[str, Any], count: int) -> _Codes:
    """
    Raises:
        CheckpointError: for arrays that are not those of a group of so many matrices.
    """
    missing = [kind for kind, array in arrays.items() if not isinstance(array, mx.array)]
    if missing:
        raise CheckpointError(f"{group} is in DFloat11, but has no {', '.join(missing)}")
    kinds = {kind: (mx.uint8, 2 if kind == "luts" else 1) for kind in _ARRAYS} | {"split_positions": (mx.int64, 1)}
    is_fit = all((arrays[kind].dtype, arrays[kind].ndim) == expected for kind, expected in kinds.items())
    exponents, others, luts, gaps, positions, splits = (arrays[kind] for kind in _ARRAYS)
    weights, blocks = others.size, -(-exponents.size // _BLOCK)
    if not is_fit or luts.shape[1] != 256 or len(luts) < 2 or positions.size % 4 or weights == 0:
        raise CheckpointError(f"{group} is in DFloat11, but its arrays are of other shapes or dtypes")
    ends = np.array(positions).view("<u4").astype(np.int64)
    cuts = [0, *np.array(splits).tolist(), weights]
    codes = _Codes(group, exponents, others, luts, gaps, cuts, ends)
    if len(cuts) != count + 1:
        raise CheckpointError(f"{group} holds {len(cuts) - 1} matrices, and {CONFIG} names {count}")
    is_ordered = (np.diff(ends) >= 0).all() and all(a < b for a, b in pairwise(cuts))
    if not 2 <= len(ends) <= blocks + 1 or ends[0] or ends[-1] != weights or not is_ordered:
        raise codes.damaged("output_positions or split_positions are no positions")
    if gaps.size < blocks * _BLOCK // _CHUNK * 5 // 8:
        raise codes.damaged("it has too few gaps")
    return codes


def _lazy_matrix(codes: _Codes, first: int, shape: tuple[int, ...]) -> LazyTensor:
    columns = math.prod(shape[1:])

    def read(start: int, stop: int) -> mx.array:
        bits = codes.bits(first + start * columns, first + stop * columns)
        return mx.array(bits).view(mx.bfloat16).reshape(stop - start, *shape[1:])

    return LazyTensor(shape, mx.bfloat16, read, (codes.exponents, codes.others, codes.luts, codes.gaps))
