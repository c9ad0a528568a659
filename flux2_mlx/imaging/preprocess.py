"""Images to arrays and back: sizes of references and init images, crops, scaling."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from ..sampling.latents import PIXELS_PER_TOKEN

REFERENCE_MIN_SIDE = 64
REFERENCE_MAX_ASPECT = 8
REFERENCE_MAX_PIXELS = 1024 * 1024


def to_unit(decoded: mx.array) -> mx.array:
    """The decoder's output (B, H, W, 3) in -1..1 to 0..1 in float32, clipped."""
    return mx.clip(decoded.astype(mx.float32) * 0.5 + 0.5, 0, 1)


def to_pil(unit: np.ndarray) -> Image.Image:
    """(H, W, 3) in 0..1 to an 8-bit RGB picture, rounding half to even."""
    return Image.fromarray((unit * 255).round().astype(np.uint8))


def flatten(image: Image.Image, ground: str = "white") -> Image.Image:
    """A picture as RGB, with a colour where it is transparent."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


def reference_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a reference picture as it is encoded: at most 1024 x 1024 pixels, sides multiples of 16.

    Raises:
        InputError: for what is no PIL picture, is smaller than 64 pixels a side or more elongated than 8 to 1.
    """
    width, height = (side // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for side in _scaled(image))
    return height, width


def reference_array(image: Image.Image) -> mx.array:
    """A reference picture as the transformer takes it: (1, H, W, 3) in -1..1, float32.

    More than 1024 x 1024 pixels are scaled down (Lanczos); sides are cropped around the centre to multiples of 16.
    Source: diffusers' Flux2ImageProcessor.

    Raises:
        InputError: see reference_size.
    """
    height, width = reference_size(image)
    scaled = _scaled(image)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    image = image.crop((left, top, left + width, top + height)).convert("RGB")
    return picture_array(image)


def init_array(image: Image.Image, size: tuple[int, int]) -> mx.array:
    """A picture to begin from at a size (height, width): (1, H, W, 3) in -1..1, float32.

    Scaled (Lanczos) to its reference_size as diffusers' Flux2KleinInpaintPipeline does, which may change its aspect by
    what a multiple of 16 is off; to another size, scaled to cover it and cropped around the centre.
    """
    height, width = size
    image = image.convert("RGB")
    if size == reference_size(image):
        scaled = image.resize(_scaled(image), Image.Resampling.LANCZOS)
        image = scaled.resize((width, height), Image.Resampling.LANCZOS)
    else:
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return picture_array(image)


def picture_array(image: Image.Image) -> mx.array:
    """8-bit RGB as (1, H, W, 3) in -1..1, float32."""
    return mx.array(np.asarray(image, np.float32)[None] / 255 * 2 - 1)


def _scaled(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a reference picture before it is cropped."""
    if not isinstance(image, Image.Image):
        raise InputError(f"a picture must be a PIL.Image.Image, got {type(image).__name__}")
    width, height = image.size
    if min(width, height) < REFERENCE_MIN_SIDE:
        raise InputError(f"a picture of {width} x {height} is too small: at least {REFERENCE_MIN_SIDE} pixels a side")
    if max(width, height) > REFERENCE_MAX_ASPECT * min(width, height):
        raise InputError(f"a picture of {width} x {height} is too elongated: at most {REFERENCE_MAX_ASPECT} to 1")
    if width * height > REFERENCE_MAX_PIXELS:
        scale = math.sqrt(REFERENCE_MAX_PIXELS / (width * height))
        return int(width * scale), int(height * scale)
    return width, height
