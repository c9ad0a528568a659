"""Edits that leave the rest alone: where nothing changed, the reference's colours, or its very pixels.

    result, reference --fit_colours--> result in the reference's colours --find_mask, with latents--> mask --> image

Models redraw all of an image that they edit, its colours off by a little and its details others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..sampling.latents import unpack_latents
from .preprocess import crop_reference, to_pil

THRESHOLD = 0.1  # share of a channel's range by which an edit differs
LATENT_CHANGE = 0.7  # RMS of normalized latents from which on pixels count in full; unrelated images differ by 1.4
FIT_SIDE = 128  # pixels of the longer side at which colours are fitted
FIT_SCALES = (64, 48, 32, 24, 16, 12, 8, 8, 8)  # levels of 255 from which on a pixel counts little, pass by pass
LARGEST_SHIFT = 0.25  # share of a channel's range; what is off by more is the edit's
RIDGE = 1e-4
CELLS = 8  # of the shorter side: what is coarser than a cell is corrected place by place
FEATHER = 128  # the shorter side over the width of the mask's soft edge


@dataclass(frozen=True)
class Edit:
    """A reference image, and how the result of its edit is brought back to it.

    Attributes:
        reference: RGB, laid over the result, of its size.
        match: whether colours follow the reference's where nothing changed.
        threshold: share of a channel's range from which on a difference is the edit's, where the rest is to be the
            reference's own pixels; None leaves the result's.
        mask: 8-bit grey of the same size, white where the edit is; None finds it.
        tokens: (1, S, C) the reference's clean latents, once they are encoded.
    """

    reference: Image.Image
    match: bool
    threshold: float | None
    mask: Image.Image | None = None
    tokens: mx.array | None = None

    def finish(self, image: Image.Image, latents: mx.array) -> tuple[Image.Image, Image.Image]:
        """The result brought back to the reference, and the mask of what the edit changed, 8-bit grey.

        Args:
            image: the decoded result, RGB.
            latents: (1, S, C) its latents.
        """
        edited, reference = _unit(image), _unit(self.reference)
        matched = fit_colours(edited, reference, self.mask) if self.match else edited
        mask = self.mask
        if mask is None:
            change = 1.0 if self.tokens is None else latent_change(latents, self.tokens, image.size)
            mask = find_mask(matched, reference, change, self.threshold or THRESHOLD)
        if self.match:
            image = to_pil(match_colours(edited, matched, reference, mask))
        if self.threshold is not None:
            image = Image.composite(image, self.reference, mask)
        return image, mask


def lay_over(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A reference image laid over a result of a size (height, width): RGB, of this size.

    It is scaled and cropped as the transformer sees it, and from that to the result's size: scaled to cover it and
    cropped around the centre, never stretched.
    """
    height, width = size
    seen = crop_reference(image)
    return seen if seen.size == (width, height) else ImageOps.fit(seen, (width, height), Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------------ colours


def fit_colours(edited: np.ndarray, reference: np.ndarray, mask: Image.Image | None = None) -> np.ndarray:
    """The colours of an image (H, W, 3) in 0..1, mapped so that they are the reference's where both agree.

    The map is affine, with a square of each channel, which holds a shift of gain, offset, gamma and saturation. It is
    fitted by least squares with weights that fall with a pixel's error over a scale, which falls pass by pass (the
    weights of Geman and McClure, graduated non-convexity as of Blake and Zisserman), and stays near the identity in
    what the colours leave open.

    Args:
        mask: white is left out of the fit.
    """
    ratio = max(1, max(edited.shape[:2]) // FIT_SIDE)
    x, y = (np.reshape(_reduced(array, ratio), (-1, 3)) for array in (edited, reference))
    terms, wanted = _terms(x), y - x
    counts = (np.abs(wanted).max(-1) < LARGEST_SHIFT).astype(np.float64)
    if mask is not None:
        counts *= 1 - _reduced(_unit(mask), ratio).ravel()
    penalty = RIDGE * len(x) * np.eye(terms.shape[1])
    change = np.zeros((terms.shape[1], 3))
    for scale in FIT_SCALES:
        off = np.linalg.norm(wanted - terms @ change, axis=-1) * 255 / scale
        weighted = terms * (counts / (1 + off**2) ** 2)[:, None]
        change = np.linalg.solve(weighted.T @ terms + penalty, weighted.T @ wanted)
    mapped: np.ndarray = edited + _terms(edited) @ change.astype(np.float32)
    return mapped.clip(0, 1)


def match_colours(edited: np.ndarray, fitted: np.ndarray, reference: np.ndarray, mask: Image.Image) -> np.ndarray:
    """An image (H, W, 3) in 0..1 with its fitted colours where the mask is black, corrected place by place besides.

    Within the mask the correction goes on from its edge, without the edit's own differences, and fades out.
    """
    shift = fitted + low_frequencies(reference - fitted, mask) - edited
    inside, soft = _unit(mask)[..., None], 4 * feather(mask.size)
    edge = np.clip(2 - 2 * _unit(mask.filter(ImageFilter.GaussianBlur(soft))), 0, 1)[..., None]
    shift += inside * (edge * low_frequencies(shift, mask) - shift)
    matched: np.ndarray = edited + shift
    return matched.clip(0, 1)


def low_frequencies(off: np.ndarray, mask: Image.Image) -> np.ndarray:
    """What of differences (H, W, 3) is coarser than a cell, from where the mask is black; it goes to 0 where all around
    is white.
    """
    height, width = off.shape[:2]
    cell = max(1, min(height, width) // CELLS)
    grid = -(-width // cell), -(-height // cell)
    kept = 1 - _unit(mask)
    share = np.maximum(_resized(kept, grid), 0.05)
    return np.stack([_resized(_resized(kept * off[..., k], grid) / share, (width, height)) for k in range(3)], -1)


def _terms(colours: np.ndarray) -> np.ndarray:
    """(..., 3) colours in 0..1 to (..., 7): centred, their squares, and 1."""
    centred = colours - 0.5
    return np.concatenate([centred, centred**2, np.ones_like(centred[..., :1])], -1)


# ------------------------------------------------------------------------------------------------ what changed


def find_mask(edited: np.ndarray, reference: np.ndarray, change: np.ndarray | float, threshold: float) -> Image.Image:
    """Where an edit changed its reference: 8-bit grey, white there, with a soft edge outside of it.

    Args:
        edited, reference: (H, W, 3) in 0..1.
        change: (H, W) in 0..1, how much the latents differ.
        threshold: share of a channel's range.
    """
    soft = feather((edited.shape[1], edited.shape[0]))
    core = (pixel_change(edited, reference, max(1, soft // 4)) * change > threshold).astype(np.uint8) * 255
    crowd = np.asarray(Image.fromarray(core).filter(ImageFilter.BoxBlur(1)))
    core[crowd < 4 * 255 // 9] = 0  # of the nine around a pixel, four at least are changed
    return Image.fromarray(_extremes(core, 2 * soft, np.maximum)).filter(ImageFilter.GaussianBlur(soft))


def pixel_change(a: np.ndarray, b: np.ndarray, reach: int) -> np.ndarray:
    """(H, W) by how much either image leaves the range of the other's pixels within so many pixels, the largest of the
    channels: an edge that is off by less counts nothing, a line that is gone does.
    """
    return np.maximum(_beyond(a, b, reach), _beyond(b, a, reach))


def latent_change(a: mx.array, b: mx.array, size: tuple[int, int]) -> np.ndarray:
    """(H, W) how much latents (1, S, C) of images of a size (width, height) differ: 0 where they are equal, 1 from half
    of what unrelated images differ by. What the autoencoder alone changes in pixels is no difference of latents.
    """
    width, height = size
    off = unpack_latents(a.astype(mx.float32) - b.astype(mx.float32), height, width)[0]
    rms = np.array(mx.sqrt(mx.square(off).mean(-1)))
    return _resized(np.minimum(rms / LATENT_CHANGE, 1), size)


def feather(size: tuple[int, int]) -> int:
    """The width in pixels of the soft edge of a mask of a size."""
    return max(1, min(size) // FEATHER)


def _beyond(a: np.ndarray, b: np.ndarray, reach: int) -> np.ndarray:
    low, high = (_extremes(b, reach, pick) for pick in (np.minimum, np.maximum))
    beyond = np.maximum(a - high, low - a)
    return reduce(np.maximum, (beyond[..., k] for k in range(3))).clip(0, None)


def _extremes(array: np.ndarray, reach: int, pick: np.ufunc) -> np.ndarray:
    """Of each pixel of (H, W, ...) the least or the largest value of the square of pixels within reach."""
    found = array.copy()
    for k in range(1, reach + 1):
        pick(found[k:], array[:-k], out=found[k:])
        pick(found[:-k], array[k:], out=found[:-k])
    both = found.copy()
    for k in range(1, reach + 1):
        pick(both[:, k:], found[:, :-k], out=both[:, k:])
        pick(both[:, :-k], found[:, k:], out=both[:, :-k])
    return both


def _unit(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def _reduced(array: np.ndarray, ratio: int) -> np.ndarray:
    """An array (H, W, ...) by means of squares of so many pixels a side; what is over is left out."""
    height, width = array.shape[0] // ratio, array.shape[1] // ratio
    cut = array[: height * ratio, : width * ratio]
    return cut.reshape(height, ratio, width, ratio, *array.shape[2:]).mean((1, 3))


def _resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An array (H, W) at a size (width, height), smoothly."""
    return np.asarray(Image.fromarray(array.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
