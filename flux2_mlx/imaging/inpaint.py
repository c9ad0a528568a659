"""Inpainting, which generates a masked part of an image anew, and outpainting, which extends an image beyond its edges.

    image, mask --expand--> larger image, mask --crop--> box, generated at a size of its own --composite--> image

The box is scaled back and composited through the mask, so pixels that are black in the mask keep their values.
Reference: diffusers' Flux2KleinInpaintPipeline and its VaeImageProcessor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..errors import InputError
from ..sampling.latents import PIXELS_PER_TOKEN
from .preprocess import MAX_PIXELS, flatten, image_array, init_array, reference_size

ALPHA = "alpha"  # given for a mask: inpaint where the image is transparent
SIDES = ("left", "top", "right", "bottom")
MAX_MARGIN = 10_000  # pixels added on one side


@dataclass(frozen=True)
class Inpaint:
    """An image and the part of it to inpaint.

    Attributes:
        image: RGB, after outpainting's margins were added.
        mask: 8-bit grey of the same size: white is inpainted, black is kept, grey is blended.
        box: (left, top, right, bottom) of the region to generate, of about the image's aspect.
    """

    image: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    @classmethod
    def prepare(
        cls,
        image: Image.Image,
        mask: Image.Image | str | None,
        *,
        blur: float = 0,
        padding: int | None = None,
        expand: Mapping[str, int] | None = None,
    ) -> Inpaint:
        """
        Args:
            image: the image to inpaint.
            mask: an image of the same size or aspect; "alpha" for the transparent part of ``image``; None, with
                ``expand``, for the added margins alone.
            blur: radius, in the image's pixels, of a Gaussian blur of the mask.
            padding: margin in pixels around the mask's white part that is generated with it; None generates the whole
                image.
            expand: pixels to add on each of SIDES (outpainting).

        Raises:
            InputError: for a mask of another aspect than the image, or one that is black everywhere.
        """
        reference_size(image)  # raises for other types, and for sizes that cannot be encoded
        if mask is None:
            grey = Image.new("L", image.size)
        elif isinstance(mask, str):
            grey = _transparency(image, mask)
        else:
            grey = grey_mask(mask, image.size)
        image = flatten(image) if mask == ALPHA else image.convert("RGB")
        if expand is not None:
            edges = [int(expand.get(side, 0)) for side in SIDES]
            borders = ((edges[1], edges[3]), (edges[0], edges[2]))
            width, height = image.width + edges[0] + edges[2], image.height + edges[1] + edges[3]
            if width * height > MAX_PIXELS:
                raise InputError(f"{width} x {height} is more than can be outpainted; expand by less")
            image = Image.fromarray(np.pad(np.asarray(image), (*borders, (0, 0)), mode="edge"))
            grey = Image.fromarray(np.pad(np.asarray(grey), borders, constant_values=255))
        if blur:
            grey = grey.filter(ImageFilter.GaussianBlur(blur))
        white_box = grey.getbbox()
        if white_box is None:
            raise InputError("the mask is black everywhere: nothing would be inpainted (white is)")
        box = (0, 0, *image.size) if padding is None else _pad_box(white_box, padding, image.size)
        return cls(image, grey, box)

    def check_aspect(self, height: int, width: int) -> None:
        """Refuse a size that would stretch the image by more than rounding its sides to multiples of 16 does.

        Raises:
            InputError: with the way out.
        """
        wide, tall = self.image.size
        if min(abs(width * tall / wide - height), abs(height * wide / tall - width)) >= PIXELS_PER_TOKEN:
            raise InputError(
                f"{width} x {height} has another aspect than the image to inpaint, {wide} x {tall}; give one of width "
                "and height, and the other follows"
            )

    def array(self, size: tuple[int, int]) -> mx.array:
        """The box scaled to a size (height, width): (1, H, W, 3) in -1..1, float32."""
        if self.box == (0, 0, *self.image.size) and size == reference_size(self.image):
            return init_array(self.image, size)
        return image_array(self.image.crop(self.box).resize(size[::-1], Image.Resampling.LANCZOS))

    def mask_tokens(self, size: tuple[int, int]) -> mx.array:
        """The mask of the box's tokens at a size (height, width): (1, S, 1) in 0 (kept), 1/4, ..., 1 (inpainted).

        The scaled mask is thresholded at half, and a token gets the mean of the four pixels in its middle, which is
        diffusers' bilinear interpolation to the grid of tokens.

        Raises:
            InputError: for a mask of which no token is left.
        """
        height, width = size
        scaled = self.mask.crop(self.box).resize((width, height), Image.Resampling.LANCZOS)
        white = (np.asarray(scaled) >= 128).astype(np.float32)
        grid = white.reshape(height // PIXELS_PER_TOKEN, PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN, PIXELS_PER_TOKEN)
        middle = slice(PIXELS_PER_TOKEN // 2 - 1, PIXELS_PER_TOKEN // 2 + 1)
        tokens = grid[:, middle, :, middle].mean(axis=(1, 3))
        if not tokens.any():
            raise InputError(
                f"the mask is too small, or too dark, to inpaint anything at {width} x {height}; mask_padding "
                "(--mask-padding 32) enlarges what it shows"
            )
        return mx.array(tokens.reshape(1, -1, 1))

    def composite(self, generated: Image.Image) -> Image.Image:
        """The whole image, with the generated box (of any size) blended in where the mask is white."""
        left, top, right, bottom = self.box
        whole = self.image.copy()
        whole.paste(generated.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return Image.composite(whole, self.image, self.mask)


def inpaint_from(
    image: Image.Image | None,
    mask: Image.Image | str | None,
    blur: float,
    padding: int | None,
    expand: Mapping[str, int] | None,
) -> Inpaint | None:
    """The Inpaint that these options of Flux2Pipeline.stream ask for, or None without mask and expand.

    Raises:
        InputError: for an option without the one that it belongs to, and as Inpaint.prepare does.
    """
    if mask is None and expand is None:
        if blur or padding is not None:
            raise InputError("mask_blur and mask_padding belong to mask, or expand, and neither is given")
        return None
    if image is None:
        raise InputError(f"{'expand' if mask is None else 'mask'} belongs to init_image, and none is given")
    return Inpaint.prepare(image, mask, blur=blur, padding=padding, expand=expand)


def check_expand(expand: Mapping[str, int] | None) -> None:
    """Refuse margins that are no mapping from some of SIDES to pixels.

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


def _transparency(image: Image.Image, name: str) -> Image.Image:
    if name != ALPHA:
        raise InputError(f'a mask must be a PIL.Image.Image or "{ALPHA}", got {name!r}')
    if not image.has_transparency_data:
        raise InputError("the mask is to be the transparent part of the image, and the image has no transparency")
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def grey_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask as 8-bit grey, scaled to a size (width, height); its own transparent pixels become black.

    Raises:
        InputError: for another type, or a mask of another aspect.
    """
    if not isinstance(mask, Image.Image):
        raise InputError(f'a mask must be a PIL.Image.Image or "{ALPHA}", got {type(mask).__name__}')
    grey = flatten(mask, "black").convert("L")
    if grey.size == size:
        return grey
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.01 * mask.width * size[1]:
        raise InputError(
            f"the mask is {mask.width} x {mask.height} and the image {size[0]} x {size[1]}; they must have the same "
            "aspect"
        )
    return grey.resize(size, Image.Resampling.BILINEAR)


def _pad_box(box: tuple[int, int, int, int], padding: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) with a margin, then grown to the aspect of the image of this size (width,
    height), without leaving the image.
    """
    sides = [
        [max(low - padding, 0), min(high + padding, most)]
        for low, high, most in zip(box[:2], box[2:], size, strict=True)
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
