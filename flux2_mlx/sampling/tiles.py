"""Tiles: an image that is larger than a pass is denoised in overlapping tiles, which follow a smaller image.

The velocity of an image is the weighted mean of its tiles' velocities. What a tile cannot know, the composition, is the
smaller image's: a tile's tokens have the positions of their places in it, so that the transformer knows which part of
an image they are, and what the denoised image has of low frequencies follows it.

Reference: Bar-Tal et al., MultiDiffusion, arXiv 2302.08113, equation 5, with weights that fall towards a tile's edge as
in Barbero Jiménez, Mixture of Diffusers, arXiv 2302.02412; positions between those of training as in Chen et al.,
Position Interpolation, arXiv 2306.15595; low frequencies after Choi et al., ILVR, arXiv 2108.02938, of the denoised
image as in Wang et al., DDNM, arXiv 2212.00490.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .latents import PIXELS_PER_TOKEN, resizing
from .samplers import GuidedVelocity
from .schedules import StepPlan

OVERLAP = 4  # tiles overlap by this part of the largest tile's side


@dataclass(frozen=True)
class Axis:
    """Tiles of one length along rows or columns, in tokens.

    Attributes:
        tokens: of the image.
        length: of each tile.
        starts: where each begins; the last ends with the image.
    """

    tokens: int
    length: int
    starts: tuple[int, ...]

    @classmethod
    def divided(cls, tokens: int, most: int) -> Axis:
        """As few tiles as cover the tokens, each of at most ``most``, overlapping by a quarter of that or more; then as
        short and as evenly spread as they can be.
        """
        if tokens <= most:
            return cls(tokens, tokens, (0,))
        overlap = max(1, most // OVERLAP)
        count = -(-(tokens - overlap) // (most - overlap))
        length = -(-(tokens + (count - 1) * overlap) // count)
        return cls(tokens, length, tuple(round(k * (tokens - length) / (count - 1)) for k in range(count)))

    def weights(self) -> np.ndarray:
        """(tiles, length) in float64: how much each tile counts at each of its tokens. At a token they sum to 1; where
        two tiles overlap, one falls as the other rises, by sin^2.
        """
        raw = np.ones((len(self.starts), self.length))
        for k, (start, after) in enumerate(pairwise(self.starts)):
            overlap = start + self.length - after
            rising = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / overlap) ** 2
            raw[k, self.length - overlap :] *= np.flip(rising)
            raw[k + 1, :overlap] *= rising
        total = np.zeros(self.tokens)
        for start, own in zip(self.starts, raw, strict=True):
            total[start : start + self.length] += own
        return np.stack([own / total[start : start + self.length] for start, own in zip(self.starts, raw, strict=True)])


@dataclass(frozen=True)
class Tiling:
    """Tiles of one shape that cover an image, from the left to the right, then down."""

    rows: Axis
    columns: Axis

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels."""
        return self.rows.length * PIXELS_PER_TOKEN, self.columns.length * PIXELS_PER_TOKEN

    @property
    def tokens(self) -> int:
        """Tokens of the image."""
        return self.rows.tokens * self.columns.tokens

    @property
    def places(self) -> list[tuple[slice, slice]]:
        """Rows and columns of each tile."""
        tops, lefts = ([slice(k, k + axis.length) for k in axis.starts] for axis in (self.rows, self.columns))
        return [(top, left) for top in tops for left in lefts]

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def weights(self) -> list[np.ndarray]:
        """Of each tile (rows, columns) in float64: how much it counts at each of its tokens; see Axis."""
        return [np.outer(down, across) for down in self.rows.weights() for across in self.columns.weights()]

    def position_ids(self, small: tuple[int, int]) -> list[mx.array]:
        """Positions (1, S, 4) of each tile's tokens, as of an image of the size (height, width) ``small`` that is
        enlarged: token k of n has the position (k + 1/2) m / n - 1/2, where that image has m tokens.
        """
        axes = zip((self.rows, self.columns), small, strict=True)
        down, across = (
            (np.arange(axis.tokens) + 0.5) * (side // PIXELS_PER_TOKEN) / axis.tokens - 0.5 for axis, side in axes
        )
        ids = np.zeros((self.rows.tokens, self.columns.tokens, 4), np.float32)
        ids[..., 1], ids[..., 2] = down[:, None], across
        return [mx.array(ids[place].reshape(1, -1, 4)) for place in self.places]


def divide(size: tuple[int, int], most: int) -> Tiling | None:
    """Tiles of at most ``most`` pixels a side for an image of a size (height, width); None where it is one tile."""
    rows, columns = (Axis.divided(side // PIXELS_PER_TOKEN, most // PIXELS_PER_TOKEN) for side in size)
    tiling = Tiling(rows, columns)
    return tiling if len(tiling) > 1 else None


def low_pass(size: tuple[int, int], small: tuple[int, int]) -> tuple[mx.array, mx.array]:
    """What an image of the size (height, width) ``small`` can hold of one of ``size``: matrices that scale the rows,
    and the columns, of a latent down and up again (bicubic): (H/8, H/8) and (W/8, W/8).
    """
    rows, columns = (
        mx.array(resizing(few, many, few / many) @ resizing(many, few, many / few))
        for many, few in zip([side // 8 for side in size], [side // 8 for side in small], strict=True)
    )
    return rows, columns


@dataclass
class Following:
    """Low frequencies follow a smaller image. Of the denoised latent z = x - sigma v

        z + sqrt(sigma) L (target - z)

    takes the place, L a low pass, and v becomes the velocity that leads there. The weight falls with the noise level,
    since the first steps decide on the composition and the last ones on details, but slowly: of nano's images a weight
    of sigma let tiles draw what belongs elsewhere (docs/generate.md).

    Attributes:
        target: the smaller image's latent, enlarged (B or 1, H/8, W/8, 32).
        rows, columns: low_pass.
        unpack, pack: tokens (B, S, C) to latents (B, H/8, W/8, 32) and back; latents, since the statistics of tokens
            differ among the places of a patch.
    """

    target: mx.array
    rows: mx.array
    columns: mx.array
    unpack: Callable[[mx.array], mx.array]
    pack: Callable[[mx.array], mx.array]

    def __call__(self, x: mx.array, v: mx.array, sigma: float) -> mx.array:
        """The velocity (B, S, C) of tokens x (B, S, C) at a noise level."""
        z = self.unpack(x - sigma * v)
        off = self.target - z
        batch, height, width, channels = off.shape
        off = (self.rows @ off.reshape(batch, height, -1)).reshape(-1, width, channels)
        off = (self.columns @ off).reshape(batch, height, width, channels)
        return (x - self.pack(z + math.sqrt(sigma) * off)) / sigma


class TiledVelocity:
    """The velocity of an image in tiles, one after another, so that memory is that of one.

    Args:
        velocities: of each tile's tokens (B, S, C).
        follow: what the velocity of the whole image follows.
    """

    def __init__(self, tiling: Tiling, velocities: Sequence[GuidedVelocity], follow: Following):
        self.tiling, self.velocities, self.follow = tiling, velocities, follow
        self._weights = tiling.weights()

    def __call__(self, x: mx.array, step: StepPlan) -> mx.array:
        return self.follow(x, self.mean(x, step), step.sigma)

    def mean(self, x: mx.array, step: StepPlan) -> mx.array:
        """The weighted mean (B, S, C) of the tiles' velocities."""
        grid = x.reshape(len(x), self.tiling.rows.tokens, self.tiling.columns.tokens, -1)
        total = mx.zeros_like(grid)
        for (rows, columns), weights, velocity in zip(self.tiling.places, self._weights, self.velocities, strict=True):
            part = grid[:, rows, columns]
            v = velocity(part.reshape(len(x), -1, part.shape[-1]), step).reshape(part.shape)
            total[:, rows, columns] += mx.array(weights.astype(np.float32))[..., None] * v
            mx.eval(total)
        return total.reshape(x.shape)
