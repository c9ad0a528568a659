"""GGUF's quantized types as floats, each from its blocks' bytes: Q4_0 to Q8_0, the K-types and the IQ4 types.

A block has a scale (and a minimum) in float16; of the K-types 256 values, whose groups of 16 or 32 have scales of
their own in 4 to 8 bits. Reference: the structures in ggml-common.h and dequantize_row_* in ggml-quants.c of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray

_IQ4_VALUES = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)  # kvalues_iq4nl


def _halves(blocks: Array, at: int) -> Array:
    """A float16 of each block, from two bytes: (N, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _unpack(packed: Array, bits: int, run: int) -> Array:
    """Codes (N, count) from bytes that hold several each: runs of bytes have first their lowest bits, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1)


def q4_0(blocks: Array) -> Array:
    return _halves(blocks, 0) * (_unpack(blocks[:, 2:], 4, 16).astype(np.float32) - 8)


def q4_1(blocks: Array) -> Array:
    return _halves(blocks, 0) * _unpack(blocks[:, 4:], 4, 16) + _halves(blocks, 2)


def q8_0(blocks: Array) -> Array:
    return _halves(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def _q5(blocks: Array, at: int) -> Array:
    """The codes of Q5_0 and Q5_1: a fifth bit for each value, then four bits."""
    high = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
    return (_unpack(blocks[:, at + 4 :], 4, 16) | high << 4).astype(np.float32)


def q5_0(blocks: Array) -> Array:
    return _halves(blocks, 0) * (_q5(blocks, 2) - 16)


def q5_1(blocks: Array) -> Array:
    return _halves(blocks, 0) * _q5(blocks, 4) + _halves(blocks, 2)


def _by_groups(scales: Array, codes: Array) -> Array:
    """Scales (N, groups) times codes (N, groups, size)."""
    return scales[:, :, None] * codes.reshape(*scales.shape, -1).astype(np.float32)


def q2_k(blocks: Array) -> Array:
    scales, codes = blocks[:, :16], _unpack(blocks[:, 16:80], 2, 32)
    minima = _halves(blocks, 82) * (scales >> 4)
    return (_by_groups(_halves(blocks, 80) * (scales & 15), codes) - minima[:, :, None]).reshape(len(blocks), -1)


def q3_k(blocks: Array) -> Array:
    low, high = _unpack(blocks[:, 96:104], 4, 8), _unpack(blocks[:, 104:108], 2, 4)
    scales = (low | high << 4).astype(np.float32) - 32  # (N, 16)
    codes = _unpack(blocks[:, 32:96], 2, 32) | _unpack(blocks[:, :32], 1, 32) << 2
    return _by_groups(_halves(blocks, 108) * scales, codes.astype(np.float32) - 4).reshape(len(blocks), -1)


def _scales_and_minima(packed: Array) -> tuple[Array, Array]:
    """Of Q4_K and Q5_K (N, 8) each, 6 bits, from 12 bytes: the first four are whole; of the others four bits are in the
    last bytes, and two are above those of the first.
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _q4_or_5_k(blocks: Array, codes: Array) -> Array:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    offsets = (_halves(blocks, 2) * minima)[:, :, None]
    return (_by_groups(_halves(blocks, 0) * scales, codes) - offsets).reshape(len(blocks), -1)


def q4_k(blocks: Array) -> Array:
    return _q4_or_5_k(blocks, _unpack(blocks[:, 16:], 4, 32))


def q5_k(blocks: Array) -> Array:
    return _q4_or_5_k(blocks, _unpack(blocks[:, 48:], 4, 32) | _unpack(blocks[:, 16:48], 1, 32) << 4)


def q6_k(blocks: Array) -> Array:
    codes = _unpack(blocks[:, :128], 4, 64) | _unpack(blocks[:, 128:192], 2, 32) << 4
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return _by_groups(_halves(blocks, 208) * scales, codes.astype(np.float32) - 32).reshape(len(blocks), -1)


def iq4_nl(blocks: Array) -> Array:
    return _halves(blocks, 0) * _IQ4_VALUES[_unpack(blocks[:, 2:], 4, 16)]


def iq4_xs(blocks: Array) -> Array:
    high = _unpack(blocks[:, 2:4], 2, 1)
    scales = (_unpack(blocks[:, 4:8], 4, 1) | high << 4).astype(np.float32) - 32  # (N, 8)
    values = _IQ4_VALUES[_unpack(blocks[:, 8:], 4, 16)]
    return _by_groups(_halves(blocks, 0) * scales, values).reshape(len(blocks), -1)


# By the type's number: values and bytes of a block, and its blocks (N, bytes) as floats (N, values).
BLOCKS: dict[int, tuple[int, int, Callable[[Array], Array]]] = {
    2: (32, 18, q4_0),
    3: (32, 20, q4_1),
    6: (32, 22, q5_0),
    7: (32, 24, q5_1),
    8: (32, 34, q8_0),
    10: (256, 84, q2_k),
    11: (256, 110, q3_k),
    12: (256, 144, q4_k),
    13: (256, 176, q5_k),
    14: (256, 210, q6_k),
    20: (32, 18, iq4_nl),
    23: (256, 136, iq4_xs),
}
