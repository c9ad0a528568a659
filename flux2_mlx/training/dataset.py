"""What a LoRA is trained on: a folder is checked as a whole, its pictures are sorted into sizes and batches.

folder -> read_dataset -> examples, each with its size -> Batches: which are trained on together, and when

A folder has pictures, each with its caption in a .txt file of the same name; or a metadata.jsonl, one object a line:

    {"file_name": "1.png", "text": "a red fox in the snow"}
    {"file_name": "after.png", "text": "make it night", "reference": "before.png"}

whose first names are those of Hugging Face's image folders, and ``reference`` is what the picture is edited from, one
file or a list. Paths are within the folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from ..imaging.files import open_image
from ..imaging.preprocess import image_array, reference_size
from ..sampling.latents import PIXELS_PER_TOKEN

METADATA = "metadata.jsonl"
KEYS = ("file_name", "text", "reference")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
MIN_PICTURES = 3
MIN_SIDE = 64  # of what is trained on
MAX_CAPTION_BYTES = 100_000  # far beyond what the text encoder reads

Size = tuple[int, int]  # height, width in pixels


class DataError(InputError):
    """A data set that cannot be trained on.

    Attributes:
        where: the folder.
        faults: all that is wrong with it, a line for each.
    """

    def __init__(self, where: Path, faults: Sequence[str]):
        self.where, self.faults = where, list(faults)
        super().__init__(f"{where}: {'; '.join(self.faults)}")


@dataclass(frozen=True)
class Example:
    """A picture that is to be learned.

    Attributes:
        picture: its file.
        caption: what it is drawn for, or the instruction of an edit.
        references: files of the pictures that it is edited from.
        size: that it is trained at.
        reference_sizes: that those are seen at.
    """

    picture: Path
    caption: str
    references: tuple[Path, ...]
    size: Size
    reference_sizes: tuple[Size, ...]

    @property
    def shape(self) -> tuple[Size, ...]:
        """What it must have in common with what it shares a pass with."""
        return (self.size, *self.reference_sizes)


# ---------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Entry:
    """A picture as the folder names it; ``where`` is how a fault of its caption is told."""

    where: str
    picture: Path
    caption: str
    references: tuple[Path, ...] = ()


def read_dataset(folder: Path, resolution: int, trigger: str = "") -> list[Example]:
    """Check a folder, every file of it, and give each picture the size that it is trained at; see bucket.

    Args:
        resolution: pixels; a picture has at most its square.
        trigger: a word to stand before every caption that does not have it, and alone where there is none.

    Raises:
        DataError: with everything that is wrong.
    """
    if not folder.is_dir():
        raise DataError(folder, ["there is no such folder"])
    faults: list[str] = []
    metadata = folder / METADATA
    entries = _from_metadata(metadata, faults) if metadata.is_file() else _from_captions(folder, faults)
    if not entries and not faults:
        faults.append(f"no pictures ({', '.join(SUFFIXES[:4])}, ...) and no {METADATA}")
    elif len(entries) < MIN_PICTURES and not faults:
        count = "1 picture" if len(entries) == 1 else f"{len(entries)} pictures"
        faults.append(f"{count}, and at least {MIN_PICTURES} are needed")
    sizes: dict[Path, Size | None] = {}
    examples = []
    for entry in entries:
        caption = _with_trigger(entry.caption, trigger)
        if not caption:
            faults.append(f"{entry.where}: the caption is empty; write one, or give a trigger word")
        for path in (entry.picture, *entry.references):
            if path not in sizes:
                sizes[path] = _size(folder, path, faults)
        size, *others = (sizes[path] for path in (entry.picture, *entry.references))
        found = tuple(bucket(*other, resolution) for other in others if other is not None)
        if size is not None:
            examples.append(Example(entry.picture, caption, entry.references, bucket(*size, resolution), found))
    if faults:
        raise DataError(folder, faults)
    return examples


def _with_trigger(caption: str, trigger: str) -> str:
    if not trigger or trigger in caption:
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _size(folder: Path, path: Path, faults: list[str]) -> Size | None:
    """A picture's size, or None and a fault."""
    name = path.relative_to(folder)
    try:
        if not path.is_file():  # also what would block, as a pipe does
            raise InputError(f"{path}: there is no such file")
        image = open_image(path)
        reference_size(image)
    except (InputError, OSError) as error:
        reason = str(error).replace(f"cannot read {path}: ", "").replace(f"{path}: ", "").replace(str(path), "it")
        faults.append(f"{name}: {' '.join(reason.splitlines())}")
        return None
    return image.height, image.width


def _from_captions(folder: Path, faults: list[str]) -> list[_Entry]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    stems = {path.stem for path in pictures}
    faults += [f"{path.name}: there is no picture of this name" for path in files if _is_stray(path, stems)]
    return [_Entry(path.name, path, _caption(path.with_suffix(".txt"), faults)) for path in pictures]


def _is_stray(path: Path, stems: set[str]) -> bool:
    return path.suffix.lower() == ".txt" and path.stem not in stems


def _caption(path: Path, faults: list[str]) -> str:
    """The text of a file, or nothing where there is none; a fault of its own is told, and the text then not empty."""
    if not path.is_file():
        return ""
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            raise InputError(f"{path.stat().st_size:,} bytes are no caption")
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        faults.append(f"{path.name}: not UTF-8 text ({error.reason})")
    except (InputError, OSError) as error:
        faults.append(f"{path.name}: {getattr(error, 'strerror', None) or error}")
    return path.name


def _from_metadata(path: Path, faults: list[str]) -> list[_Entry]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line breaks
    except UnicodeDecodeError as error:
        faults.append(f"{path.name}: not UTF-8 text ({error.reason})")
        return []
    except OSError as error:
        faults.append(f"{path.name}: {error.strerror}")
        return []
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            entries.append(_entry(path.parent, where, line))
        except InputError as error:
            faults.append(f"{where}: {error}")
    if not entries and not faults:
        faults.append(f"{path.name} is empty: one JSON object a line")
    return entries


def _entry(folder: Path, where: str, line: str) -> _Entry:
    """One line of metadata.

    Raises:
        InputError: for what is none.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"an object is expected, got {line.strip()[:40]}")
    for name in values:
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            raise InputError(f"unknown key {name!r}; " + (f"{near[0]}?" if near else f"known are {', '.join(KEYS)}"))
    caption, references = values.get("text", ""), values.get("reference") or []
    references = [references] if isinstance(references, str) else references
    if not isinstance(caption, str) or len(caption) > MAX_CAPTION_BYTES or _is_broken(caption):
        raise InputError(f"text must be a caption, got {str(caption)[:40]!r}")
    if not isinstance(references, list):
        raise InputError(f"reference must be a file or a list of files, got {references!r}")
    picture, *others = (_inside(folder, name) for name in (values.get("file_name"), *references))
    return _Entry(where, picture, caption.strip(), tuple(others))


def _inside(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name or "\0" in name or _is_broken(name):
        raise InputError(f"a file's name is expected, got {name!r}")
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{name!r} is outside of the folder")
    return path


def _is_broken(text: str) -> bool:
    """Whether there are halves of characters in it, as JSON may have them."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def read_captions(path: Path, examples: Sequence[Example]) -> list[str]:
    """The captions of a file, one a line, blank lines left out.

    Raises:
        DataError: for a file that cannot be read or has none, and for those that the examples have, too.
    """
    try:
        captions = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(path, [f"not UTF-8 text ({error.reason})"]) from None
    except OSError as error:
        raise DataError(path, [error.strerror or str(error)]) from None
    learned = {example.caption for example in examples}
    faults = [
        f"{text!r} is a caption of the data set, too; take it out of one"
        for text in dict.fromkeys(captions)
        if text in learned
    ]
    most = f"is too long: {MAX_CAPTION_BYTES:,} characters at most"
    faults += [f"{text[:40]!r}... {most}" for text in captions if len(text) > MAX_CAPTION_BYTES]
    if faults or not captions:
        raise DataError(path, faults or ["no captions; write one a line"])
    return captions


def fingerprint(examples: Sequence[Example], preserved: Sequence[str] = ()) -> str:
    """What a data set and captions to preserve come to: with another picture, caption, size or order it is another."""
    found = hashlib.sha256(repr(list(preserved)).encode() if preserved else b"")
    for example in examples:
        pictures = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (example.picture, *example.references)]
        found.update(repr((pictures, example.caption, example.shape)).encode())
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------- sizes, batches


def bucket(height: int, width: int, resolution: int) -> Size:
    """The size that a picture of this one is trained at: of the sizes with at most resolution x resolution pixels, and
    no more than the picture has, that of the nearest aspect. Sides are multiples of a sixteenth of the resolution, and
    of 16, so that pictures of like aspects share one.
    """
    area = min(resolution**2, height * width)
    grain = max(PIXELS_PER_TOKEN, math.isqrt(area) // 256 * PIXELS_PER_TOKEN)
    least = -(-MIN_SIDE // grain) * grain
    sizes = [(tall, area // tall // grain * grain) for tall in range(least, area // MIN_SIDE + 1, grain)]
    fitting = [size for size in sizes if size[1] >= MIN_SIDE]
    return min(fitting, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))


def fitted(image: Image.Image, size: Size) -> mx.array:
    """A picture at a size: scaled to cover it (Lanczos), cropped around the centre; (1, H, W, 3) in -1..1, float32."""
    height, width = size
    return image_array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


class Batches:
    """The order of training: batch k is the examples, by their numbers, that share pass k; epoch after epoch, each in
    an order of its own, without end. It depends on the arguments alone.

    Args:
        batch_size: the most examples of one shape in a pass; the last of an epoch may have less.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int):
        self.shapes = [example.shape for example in examples]
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = len(self._epoch(0))
        self._latest: tuple[int, list[list[int]]] = -1, []

    def __getitem__(self, k: int) -> list[int]:
        epoch, place = divmod(k, self.per_epoch)
        if self._latest[0] != epoch:
            self._latest = epoch, self._epoch(epoch)
        return self._latest[1][place]

    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        groups: dict[tuple[Size, ...], list[int]] = {}
        for number in rng.permutation(len(self.shapes)):
            groups.setdefault(self.shapes[number], []).append(int(number))
        size = self.batch_size
        batches = [group[k : k + size] for group in groups.values() for k in range(0, len(group), size)]
        return [batches[k] for k in rng.permutation(len(batches))]
