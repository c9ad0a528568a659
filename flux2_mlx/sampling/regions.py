"""Regions: parts of an image that have prompts of their own, as a mask of attention.

The sequence is every text in turn, the prompt's first, then the image, then references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .latents import PIXELS_PER_TOKEN

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the image's sides
WHOLE = slice(None), slice(None)  # rows and columns of tokens


@dataclass(frozen=True)
class Regions:
    """Which tokens attend to which: the different rows of the mask, and the one of each token.

    Attributes:
        rows: (1, 1, rows, keys), true where there is attention.
        row_of: (N,), of each token of a pass.
    """

    rows: mx.array
    row_of: mx.array

    def mask(self, bias: mx.array | None) -> mx.array:
        """(1, 1, N, keys): true where there is attention, or what is added to the scores.

        Args:
            bias: (1, 1, 1, keys) that is added besides.
        """
        rows = self.rows if bias is None else mx.where(self.rows, bias, mx.array(-float("inf"), bias.dtype))
        return mx.take(rows, self.row_of, axis=2)


def region_tokens(box: Box, height: int, width: int) -> np.ndarray:
    """(rows, columns) whether an image's token has its centre in the box; of a box with none, the token that its own
    centre is in.

    Args:
        height, width: the image's size in pixels.
    """
    left, top, right, bottom = box
    inside = []
    for start, end, side in ((top, bottom, height), (left, right, width)):
        count = side // PIXELS_PER_TOKEN
        centres = (np.arange(count) + 0.5) / count
        own = (start <= centres) & (centres < end)
        inside.append(own if own.any() else np.arange(count) == int((start + end) / 2 * count))
    return inside[0][:, None] & inside[1]


def make_regions(
    boxes: Sequence[Box],
    size: tuple[int, int],
    text: int,
    references: int,
    kv: int = 0,
    place: tuple[slice, slice] = WHOLE,
) -> Regions:
    """Who attends to whom. A token of the image reads the texts of the regions that it is in, outside of them the first
    text; a text reads itself alone, references the first. All attend to the whole image and to references.

    So each token sees what it sees in training. By nano fewer images are right where the first text is read everywhere,
    or where texts see their own region alone, or one another; docs/development/log.md has the numbers.

    Args:
        boxes: of each text but the first, which is for what is in none of them.
        size: (height, width) of the image in pixels.
        text: tokens of each text.
        references: tokens of references that follow the image's.
        kv: tokens of references that are attended to by cached keys and values alone.
        place: rows and columns of the image's tokens that a pass has, where it is one of a tile.
    """
    regions = np.stack([region_tokens(box, *size)[place].reshape(-1) for box in boxes])  # (regions, S)
    reads = np.concatenate([~regions.any(axis=0, keepdims=True), regions])  # (texts, S)
    kinds, kind_of = np.unique(reads.T, axis=0, return_inverse=True)
    texts, image = reads.shape
    of_texts = np.repeat(np.concatenate([np.eye(texts, dtype=bool), kinds]), text, axis=1)
    rows = np.pad(of_texts, ((0, 0), (0, image + references + kv)), constant_values=True)
    row_of = [np.repeat(np.arange(texts), text), texts + kind_of.reshape(-1), np.zeros(references, int)]
    return Regions(mx.array(rows)[None, None], mx.array(np.concatenate(row_of).astype(np.int32)))
