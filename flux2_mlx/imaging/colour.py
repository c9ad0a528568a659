"""Colour: images whose embedded profile is another than sRGB, converted to it.

Models are trained on sRGB numbers, and images are written without a profile, which means sRGB. Phones and Macs write
Display P3, cameras Adobe RGB, printers CMYK: their numbers mean other colours.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageCms

from ..errors import one_line

_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space to Pillow's mode
_TOLERANCE = 1  # levels of 255 by which another writer's sRGB differs from LittleCMS's, of rounding


def to_srgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """An image with its colours in sRGB and without a profile; the same image where none is embedded.

    Pixels of a profile that is sRGB keep their values. Others become RGB, or RGBA with transparency, by relative
    colorimetric intent with black point compensation; what lies outside of sRGB's gamut is clipped. A profile that
    cannot be used is left out, with a UserWarning.

    Args:
        name: the file's, for the warning.
    """
    if not image.info.get("icc_profile"):
        return image
    plain = without_profile(image)
    try:
        return _convert(plain, image.info["icc_profile"])
    except Exception as error:  # a damaged profile makes LittleCMS raise errors of many kinds; Pillow may lack it
        warnings.warn(
            f"{name}: the colour profile cannot be used ({one_line(error)}); colours are taken for sRGB", stacklevel=2
        )
        return plain


def without_profile(image: Image.Image) -> Image.Image:
    """An image whose numbers are taken as they are, whatever profile is embedded."""
    image = image.copy()
    image.info.pop("icc_profile", None)
    return image


def _convert(image: Image.Image, content: bytes) -> Image.Image:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    space = profile.profile.xcolor_space
    mode = _MODES.get(space)
    base = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA") else "RGB"
    if mode is None or (base != mode and (base, mode) != ("L", "RGB")):
        raise ValueError(f"it is for {space.strip()}, and the image has {image.mode}")
    transform = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode != "CMYK" and _is_identity(transform, mode):
        return image
    converted = Image.new("RGB", image.size)
    transform.apply(image if image.mode == mode else image.convert(mode), converted)
    del converted.info["icc_profile"]  # sRGB's
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves the numbers of sRGB as they are, but for rounding."""
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    grid = levels[:, None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(256, 16, 3)
    probe = Image.fromarray(grid)
    result = Image.new("RGB", probe.size)
    transform.apply(probe, result)
    off = np.asarray(result, np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    return bool(np.abs(off).max() <= _TOLERANCE)
