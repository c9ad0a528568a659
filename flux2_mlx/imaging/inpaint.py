"""Repainting a part of a picture (inpainting), and painting on beyond its edges (outpainting).

    picture, mask --expand--> larger picture, mask --box--> the region that is drawn --paste--> the picture, repainted

The region is drawn at a size of its own, scaled back and pasted through the mask, so pixels that the mask leaves black
come back as they were. Reference: diffusers' Flux2KleinInpaintPipeline and its VaeImageProcessor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..errors import InputError
from ..sampling.latents import PIXELS_PER_TOKEN
from .preprocess import flatten, init_array, picture_array, reference_size

ALPHA = "alpha"  # in place of a mask: what is transparent in the picture
SIDES = ("left", "top", "right", "bottom")
MAX_MARGIN = 10_000  # pixels
MAX_PIXELS = 2**28  # of a picture that was expanded


@dataclass(frozen=True)
class Repainting:
    """A picture and what of it is repainted.

    Attributes:
        picture: RGB, expanded.
        mask: of the same size, 8-bit: white is repainted, black kept, grey is blended.
        box: (left, top, right, bottom) of the region that is drawn, of about the picture's aspect.
    """

    picture: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    @classmethod
    def of(
        cls,
        picture: Image.Image,
        mask: Image.Image | str | None,
        *,
        blur: float = 0,
        padding: int | None = None,
        expand: Mapping[str, int] | None = None,
    ) -> Repainting:
        """
        Args:
            picture: what is repainted.
            mask: of the picture's size, or of its aspect; "alpha" for what is transparent in the picture; None with
                expand, for what is added alone.
            blur: radius in the picture's pixels of a Gaussian blur of the mask.
            padding: pixels to draw around what the mask shows; None draws the whole picture.
            expand: pixels to add on each of SIDES.

        Raises:
            InputError: for a mask that does not belong to the picture, or shows nothing.
        """
        reference_size(picture)  # refuses what is no picture, or cannot be one
        if mask is None:
            shown = Image.new("L", picture.size)
        elif isinstance(mask, str):
            shown = _transparency(picture, mask)
        else:
            shown = _levels_of(mask, picture.size)
        picture = flatten(picture) if mask == ALPHA else picture.convert("RGB")
        if expand is not None:
            edges = [int(expand.get(side, 0)) for side in SIDES]
            borders = ((edges[1], edges[3]), (edges[0], edges[2]))
            width, height = picture.width + edges[0] + edges[2], picture.height + edges[1] + edges[3]
            if width * height > MAX_PIXELS:
                raise InputError(f"{width} x {height} is more than can be painted on; expand by less")
            picture = Image.fromarray(np.pad(np.asarray(picture), (*borders, (0, 0)), mode="edge"))
            shown = Image.fromarray(np.pad(np.asarray(shown), borders, constant_values=255))
        if blur:
            shown = shown.filter(ImageFilter.GaussianBlur(blur))
        found = shown.getbbox()
        if found is None:
            raise InputError("the mask is black everywhere: nothing would be repainted (white repaints)")
        box = (0, 0, *picture.size) if padding is None else _padded(found, padding, picture.size)
        return cls(picture, shown, box)

    def check_aspect(self, height: int, width: int) -> None:
        """Refuse a size to draw at that would stretch the picture by more than what a multiple of 16 is off.

        Raises:
            InputError: with the way out.
        """
        wide, tall = self.picture.size
        if min(abs(width * tall / wide - height), abs(height * wide / tall - width)) >= PIXELS_PER_TOKEN:
            raise InputError(
                f"{width} x {height} is not the shape of the picture that is repainted, {wide} x {tall}; give one of "
                "width and height, and the other follows"
            )

    def array(self, size: tuple[int, int]) -> mx.array:
        """The region at a size (height, width) as (1, H, W, 3) in -1..1, float32."""
        if self.box == (0, 0, *self.picture.size) and size == reference_size(self.picture):
            return init_array(self.picture, size)
        return picture_array(self.picture.crop(self.box).resize(size[::-1], Image.Resampling.LANCZOS))

    def tokens(self, size: tuple[int, int]) -> mx.array:
        """How much of each token of the region is repainted at a size (height, width): (1, S, 1), of 0, 1/4, ..., 1.

        The mask is made black and white, and a token is the mean of the four pixels in its middle: bilinear
        interpolation to the grid of tokens, as in diffusers.

        Raises:
            InputError: where no token is.
        """
        height, width = size
        scaled = self.mask.crop(self.box).resize((width, height), Image.Resampling.LANCZOS)
        white = (np.asarray(scaled) >= 128).astype(np.float32)
        grid = white.reshape(height // PIXELS_PER_TOKEN, PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN, PIXELS_PER_TOKEN)
        middle = slice(PIXELS_PER_TOKEN // 2 - 1, PIXELS_PER_TOKEN // 2 + 1)
        tokens = grid[:, middle, :, middle].mean(axis=(1, 3))
        if not tokens.any():
            raise InputError(
                f"the mask is too small, or too dark, to repaint anything at {width} x {height}; mask_padding "
                "(--mask-padding 32) draws what it shows larger"
            )
        return mx.array(tokens.reshape(1, -1, 1))

    def paste(self, drawn: Image.Image) -> Image.Image:
        """The whole picture with the region as it was drawn, at any size, where the mask shows it."""
        left, top, right, bottom = self.box
        whole = self.picture.copy()
        whole.paste(drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return Image.composite(whole, self.picture, self.mask)


def repainting_of(
    picture: Image.Image | None,
    mask: Image.Image | str | None,
    blur: float,
    padding: int | None,
    expand: Mapping[str, int] | None,
) -> Repainting | None:
    """The repainting that options of Flux2Pipeline.stream ask for, if any.

    Raises:
        InputError: for options without what they belong to; see Repainting.of.
    """
    if mask is None and expand is None:
        if blur or padding is not None:
            raise InputError("mask_blur and mask_padding belong to mask, or expand, and neither is given")
        return None
    if picture is None:
        raise InputError(f"{'expand' if mask is None else 'mask'} belongs to init_image, and none is given")
    return Repainting.of(picture, mask, blur=blur, padding=padding, expand=expand)


def check_expand(expand: Mapping[str, int] | None) -> None:
    """Refuse what is no way to expand a picture.

    Raises:
        InputError: naming the value.
    """
    if expand is None:
        return
    if not (
        isinstance(expand, Mapping)
        and expand
        and set(expand) <= set(SIDES)
        and all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in expand.values())
        and all(0 <= value <= MAX_MARGIN for value in expand.values())
        and any(expand.values())
    ):
        raise InputError(
            f"expand must give pixels, up to {MAX_MARGIN}, to add on some of {', '.join(SIDES)}, got {expand!r}"
        )


def _transparency(picture: Image.Image, name: str) -> Image.Image:
    if name != ALPHA:
        raise InputError(f'a mask must be a PIL.Image.Image or "{ALPHA}", got {name!r}')
    if not picture.has_transparency_data:
        raise InputError("the mask is to be what is transparent in the picture, and the picture has no transparency")
    return ImageOps.invert(picture.convert("RGBA").getchannel("A"))


def _levels_of(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask as 8-bit grey of a size (width, height); what is transparent in it is black."""
    if not isinstance(mask, Image.Image):
        raise InputError(f'a mask must be a PIL.Image.Image or "{ALPHA}", got {type(mask).__name__}')
    shown = flatten(mask, "black").convert("L")
    if shown.size == size:
        return shown
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.01 * mask.width * size[1]:
        raise InputError(
            f"the mask is {mask.width} x {mask.height} and the picture {size[0]} x {size[1]}; they must have the same "
            "shape"
        )
    return shown.resize(size, Image.Resampling.BILINEAR)


def _padded(found: tuple[int, int, int, int], padding: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom), padded, and grown to the aspect of a picture of this size (width, height) that
    it stays within.
    """
    sides = [
        [max(low - padding, 0), min(high + padding, most)]
        for low, high, most in zip(found[:2], found[2:], size, strict=True)
    ]
    lengths = [high - low for low, high in sides]
    scale = max(length / most for length, most in zip(lengths, size, strict=True))
    for side, length, most in zip(sides, lengths, size, strict=True):
        more = int(scale * most) - length
        if more > 0:
            low = side[0] - more // 2
            side[0] = min(max(low, 0), most - length - more)
            side[1] = side[0] + length + more
    (left, right), (top, bottom) = sides
    return left, top, right, bottom
