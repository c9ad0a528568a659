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
MAX_PIXELS = 2**26  # of an image that is read, or extended: 200 MB of RGB, and a few times that while it is converted


def to_unit(decoded: mx.array) -> mx.array:
    """The decoder's output (B, H, W, 3) in -1..1, scaled and clipped to 0..1, float32."""
    return mx.clip(decoded.astype(mx.float32) * 0.5 + 0.5, 0, 1)


def to_pil(unit: np.ndarray) -> Image.Image:
    """(H, W, 3) in 0..1 to an 8-bit RGB image, rounding half to even."""
    return Image.fromarray((unit * 255).round().astype(np.uint8))


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """An image as RGB, composited over a background colour where it is transparent."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def reference_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a reference image as it is encoded: at most 1024 x 1024 pixels, sides multiples of 16.

    Raises:
        InputError: for another type than PIL.Image.Image, a side below 64 pixels, or an aspect above 8 to 1.
    """
    width, height = (side // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for side in _scaled_size(image))
    return height, width


def reference_array(image: Image.Image) -> mx.array:
    """A reference image, scaled and cropped for the autoencoder: (1, H, W, 3) in -1..1, float32.

    Raises:
        InputError: see reference_size.
    """
    return image_array(crop_reference(image))


def crop_reference(image: Image.Image) -> Image.Image:
    """A reference image as the transformer sees it: RGB, of its reference_size.

    An image of more than 1024 x 1024 pixels is scaled down (Lanczos); both sides are cropped around the centre to
    multiples of 16.
    Source: diffusers' Flux2ImageProcessor.

    Raises:
        InputError: see reference_size.
    """
    height, width = reference_size(image)
    scaled = _scaled_size(image)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height)).convert("RGB")


def init_array(image: Image.Image, size: tuple[int, int]) -> mx.array:
    """The init image of img2img at a size (height, width): (1, H, W, 3) in -1..1, float32.

    To its own reference_size the image is scaled (Lanczos) as diffusers' Flux2KleinInpaintPipeline does, which changes
    the aspect by rounding to multiples of 16; to another size it is scaled to cover it and cropped around the centre.
    """
    height, width = size
    image = image.convert("RGB")
    if size == reference_size(image):
        scaled = image.resize(_scaled_size(image), Image.Resampling.LANCZOS)
        image = scaled.resize((width, height), Image.Resampling.LANCZOS)
    else:
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return image_array(image)


def image_array(image: Image.Image) -> mx.array:
    """An 8-bit RGB image as (1, H, W, 3) in -1..1, float32."""
    return mx.array(np.asarray(image, np.float32)[None] / 255 * 2 - 1)


def _scaled_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a reference image after scaling and before cropping."""
    if not isinstance(image, Image.Image):
        raise InputError(f"an image must be a PIL.Image.Image, got {type(image).__name__}")
    width, height = image.size
    if min(width, height) < REFERENCE_MIN_SIDE:
        raise InputError(f"an image of {width} x {height} is too small: at least {REFERENCE_MIN_SIDE} pixels a side")
    if max(width, height) > REFERENCE_MAX_ASPECT * min(width, height):
        raise InputError(f"an image of {width} x {height} is too elongated: at most {REFERENCE_MAX_ASPECT} to 1")
    if width * height > REFERENCE_MAX_PIXELS:
        scale = math.sqrt(REFERENCE_MAX_PIXELS / (width * height))
        return int(width * scale), int(height * scale)
    return width, height
