"""Image files: reading any format safely, and writing images with the settings that made them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from ..errors import InputError
from ..writing import atomic_write, move_to_free_name, sync
from .colour import to_srgb, without_profile
from .preprocess import MAX_PIXELS, flatten

# File suffix to Pillow's format and options.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95, "method": 6}),
}
ImageFile = str | os.PathLike | bytes  # a file, or its content

METADATA_KEY = "flux2_mlx"
PREVIEW_KEY = "flux2_mlx preview"
JPEG_EXIF_BYTES = 65_533
MAX_METADATA = 2**22  # characters of the settings that are read

# Formats in which several frames are an animation; in others (MPO, TIFF) they are previews and pages.
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
# What is read: Pillow knows more, and hands some of it to other programs, as EPS to Ghostscript.
READ = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "MPO", "PPM", "JPEG2000")
ROWS = 256  # of an image of 16 bits, converted at a time
_HEIC = re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL)


def open_image(path: ImageFile, *, alpha: bool = False, as_data: bool = False) -> Image.Image:
    """Read an image as 8-bit RGB in sRGB, rotated as its EXIF orientation says; transparent pixels become white.

    Args:
        path: the file, or its content.
        alpha: return RGBA for a file with transparency.
        as_data: take the numbers as they are, whatever colours an embedded profile means by them: a mask's.

    Raises:
        InputError: with the file as ``source``; for a file that is no image, or is damaged, animated, of 32-bit values,
            or of more than MAX_PIXELS.
    """
    name = _name(path)
    try:
        with _opened(path, READ) as image:
            if getattr(image, "is_animated", False) and image.format in ANIMATED:
                raise InputError("has several frames; save the one that is meant as an image of its own", source=name)
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(name)
            image.load()
            kind = image.format
            bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
            with contextlib.suppress(SyntaxError, ValueError, TypeError):  # a damaged EXIF block is ignored
                image = ImageOps.exif_transpose(image)
            image = _to_eight_bits(image, name, kind, bits)
            image = without_profile(image) if as_data else to_srgb(image, name or "the image")
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            return image if alpha else flatten(image)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # far above MAX_PIXELS
        raise _too_large(name) from None
    except UnidentifiedImageError:
        with io.BytesIO(path) if isinstance(path, bytes) else open(path, "rb") as file:
            is_heic = _HEIC.match(file.read(16)) is not None
        way_out = " but HEIC; on a Mac, sips -s format png FILE --out FILE.png makes a PNG of it" if is_heic else ""
        raise InputError(f"cannot be read: it is no image of a known format{way_out}", source=name) from None
    except Exception as error:  # a damaged image makes Pillow raise errors of many kinds
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is cut short or damaged"
        raise InputError(f"cannot be read: {reason}", source=name) from None


def pixels_of(path: ImageFile) -> int:
    """The pixels of an image, by its header; 0 for what is no image, which open_image tells."""
    try:
        with _opened(path, READ) as image:
            return image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return MAX_PIXELS + 1
    except Exception:  # a damaged image makes Pillow raise errors of many kinds
        return 0


def _name(path: ImageFile) -> str | None:
    """A file's name for messages; None for a content."""
    return None if isinstance(path, bytes) else os.fspath(path)


def _opened(path: ImageFile, formats: tuple[str, ...]) -> Image.Image:
    """An image's header, by the readers of these formats alone, those that this Pillow has."""
    Image.init()
    return Image.open(
        io.BytesIO(path) if isinstance(path, bytes) else path, formats=[name for name in formats if name in Image.OPEN]
    )


def _too_large(name: str | None) -> InputError:
    return InputError(f"has more than {MAX_PIXELS:,} pixels; scale it down", source=name)


def _to_eight_bits(image: Image.Image, name: str | None, kind: str | None, bits: int) -> Image.Image:
    """An image with 8 bits a channel, of 16 the upper ones, rounded.

    Args:
        name: the file's, for messages.
        kind: the file's format, as Pillow calls it.
        bits: the bits of a channel's values, for images of more than 8.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # convert() would clip at 255
        values, most = np.asarray(image), 2**bits - 1
        table = (np.arange(most + 1) / most * 255).round().astype(np.uint8)
        levels = np.empty(values.shape, np.uint8)
        for top in range(0, len(values), ROWS):  # indices take eight bytes each
            levels[top : top + ROWS] = table[np.clip(values[top : top + ROWS], 0, most)]
        grey = Image.fromarray(levels)
        if "transparency" in image.info:  # the one value that means transparent
            grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
        if "icc_profile" in image.info:
            grey.info["icc_profile"] = image.info["icc_profile"]
        return grey
    if image.mode in ("I", "F"):
        raise InputError("cannot be read: its values have no known range; save it with 8 or 16 bits", source=name)
    return image


def check_output(path: Path) -> None:
    """Refuse an image's file name that could not be written, before any work is done.

    Raises:
        InputError: with the fault and the way out.
    """
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:  # a lone surrogate
        raise InputError(f"cannot write {str(path)!r}: that cannot be a file's name") from None
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: the suffix must be one of {', '.join(FORMATS)}")
    try:
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}; mkdir -p {path.parent} makes it")
        path.with_stem(f"{path.stem}-0000").exists()  # fails where the name, once numbered, would be too long
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another file") from None


def check_preview(path: Path) -> None:
    """Refuse a file for previews that could not be written or holds something else, before any work is done.

    Raises:
        InputError: with the fault and the way out.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"a preview is a PNG file, got {path}")
    check_output(path)
    if os.path.lexists(path):
        try:
            with _opened(path, ("PNG",)) as image:
                is_preview = PREVIEW_KEY in image.info
        except Exception:  # no image, or a damaged one
            is_preview = False
        if not is_preview:
            raise InputError(f"{path} exists and is no preview; previews would replace it")


def save_preview(image: Image.Image, path: Path) -> None:
    """Write an image in the place of the preview before it."""
    info = PngImagePlugin.PngInfo()
    info.add_text(PREVIEW_KEY, "")
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info, icc_profile=None)


def save_image(
    image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None, parameters: str = ""
) -> Path:
    """Write an image with its settings as metadata; never over an existing file, never half a file.

    PNG carries both texts as text chunks; JPEG and WebP carry the JSON as ImageDescription and the line as
    UserComment. JPEG has room for about 64 kB of EXIF; longer metadata is left out with a warning.

    Args:
        image: 8-bit RGB.
        path: the file; its suffix sets the format. "-2", "-3", ... is added to a name that exists.
        metadata: the settings, written as JSON; None for a file without any.
        parameters: the settings in the line that other tools read.

    Returns:
        The path that was written.

    Raises:
        InputError: for a full disk or another failure to write; nothing stays on the disk.
    """
    path = Path(path)
    check_output(path)
    image, options = _with_settings(image, path.suffix, metadata, parameters, str(path))
    with atomic_write(path) as temporary:
        image.save(temporary, **options)
        sync(temporary)  # before it gets its name, so that a power cut does not empty it
        return move_to_free_name(temporary, path)


def encode_image(
    image: Image.Image,
    suffix: str,
    metadata: Mapping[str, Any] | None = None,
    parameters: str = "",
    quality: int | None = None,
) -> bytes:
    """The content of the file that save_image writes.

    Args:
        suffix: one of FORMATS.
        quality: 0 to 100, of JPEG and WebP; None takes that of files.
    """
    image, options = _with_settings(image, suffix, metadata, parameters, "the image")
    if quality is not None and options["format"] != "PNG":
        options["quality"] = quality
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _with_settings(
    image: Image.Image, suffix: str, metadata: Mapping[str, Any] | None, parameters: str, name: str
) -> tuple[Image.Image, dict[str, Any]]:
    """An image and the options of Pillow that write it, with its settings, where there are any."""
    kind, options = FORMATS[suffix.lower()]
    text = json.dumps(metadata, ensure_ascii=True)
    if metadata is None:
        image = Image.frombytes(image.mode, image.size, image.tobytes())  # without what it carries itself
    elif kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text(METADATA_KEY, text)
        info.add_itxt("parameters", parameters)
        options = {"pnginfo": info}
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = text
        comment = b"UNICODE\0" + parameters.encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        if kind == "JPEG" and len(exif.tobytes()) > JPEG_EXIF_BYTES:
            warnings.warn(f"{name} is written without its settings: the prompt is too long for a JPEG", stacklevel=3)
            exif = Image.Exif()
        options = {**options, "exif": exif}
    return image, {**options, "format": kind, "icc_profile": None}  # no profile is sRGB


def read_metadata(path: ImageFile) -> dict[str, Any]:
    """The settings that save_image wrote into an image's file, or its content.

    Raises:
        InputError: for a file that is no image, or has no settings of this package.
    """
    try:
        with _opened(path, tuple(kind for kind, _ in FORMATS.values())) as image:
            text = image.info.get(METADATA_KEY) or image.getexif().get(ExifTags.Base.ImageDescription)
    except Exception as error:  # a damaged image makes Pillow raise errors of many kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image"
        raise InputError(f"cannot be read: {reason}", source=_name(path)) from None
    try:
        metadata = json.loads(text) if isinstance(text, str) and len(text) <= MAX_METADATA else None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise InputError(
            "has no settings of flux2_mlx; only images that it wrote can be generated again", source=_name(path)
        )
    return metadata
