"""The data set of a LoRA: a folder, checked as a whole, becomes examples of a few sizes, sampled in batches.

    folder -> read_dataset -> examples, each with its size -> BatchSampler: the examples of pass 0, 1, 2, ...

A folder has images, each with its caption in a .txt or .caption file of the same name; or a metadata.jsonl, one object
a line:

    {"file_name": "1.png", "text": "a red fox in the snow"}
    {"file_name": "after.png", "text": "make it night", "reference": "before.png"}

"file_name" and "text" are the keys of Hugging Face's image folders; "reference" is the image to edit, or a list of
images. Paths are within the folder. What lies beside them and is not read is told, in warnings.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError, summarize
from ..imaging.files import open_image
from ..imaging.preprocess import image_array, reference_size
from ..sampling.latents import PIXELS_PER_TOKEN

METADATA = "metadata.jsonl"
KEYS = ("file_name", "text", "reference")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
CAPTIONS = (".txt", ".caption")
_OTHER_METADATA = re.compile(r"(metadata|captions?|meta_cap|meta_lat|dataset)\.(csv|json|jsonl|parquet|toml|tsv)")
# Keys of other trainers for the caption, which must not be passed over as columns of something else.
_CAPTION_KEYS = ("caption", "captions", "prompt", "prompts", "description", "additional_feature")
MIN_IMAGES = 3
MIN_SIDE = 64  # pixels of a training image
MAX_CAPTION_BYTES = 100_000  # a caption is truncated to 512 tokens in any case

Size = tuple[int, int]  # height, width in pixels


class DataError(InputError):
    """A data set that cannot be trained on.

    Attributes:
        faults: all faults of the folder or file ``source``, one line each.
    """

    def __init__(self, source: Path, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("; ".join(self.faults), source=source)


@dataclass(frozen=True)
class Example:
    """An image to learn.

    Attributes:
        image: its file.
        caption: the prompt for it, or the instruction of an edit.
        references: files of the reference images of an edit.
        size: the size that the image is trained at; see bucket.
        reference_sizes: the sizes of the references.
    """

    image: Path
    caption: str
    references: tuple[Path, ...]
    size: Size
    reference_sizes: tuple[Size, ...]

    @property
    def shape(self) -> tuple[Size, ...]:
        """Sizes of the image and its references; the examples of a batch have the same."""
        return (self.size, *self.reference_sizes)


# ---------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Entry:
    """An image as the folder names it; ``label`` names the entry in messages about its caption."""

    label: str
    image: Path
    caption: str
    references: tuple[Path, ...] = ()


def read_dataset(folder: Path, resolution: int, trigger: str = "") -> list[Example]:
    """Check every file of a folder and give each image its training size; see bucket.

    Args:
        resolution: an image is trained on resolution x resolution pixels at most.
        trigger: a word to prepend to every caption without it; an image without a caption gets the word alone.

    Raises:
        DataError: with all faults of the folder.
    """
    if not folder.is_dir():
        raise DataError(folder, ["there is no such folder"])
    faults: list[str] = []
    try:
        names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(folder, [error.strerror or str(error)]) from None
    metadata = folder / METADATA
    entries = _from_metadata(metadata, faults) if metadata.is_file() else _from_captions(names, faults)
    subfolders = _subfolders(names, {path.parent for entry in entries for path in (entry.image, *entry.references)})
    if not entries and not faults:
        more = f"; subfolders are not read, give one of them: {summarize(subfolders)}" if subfolders else ""
        faults.append(f"no images ({', '.join(SUFFIXES[:4])}, ...) and no {METADATA}{more}")
    elif len(entries) < MIN_IMAGES and not faults:
        count = "1 image" if len(entries) == 1 else f"{len(entries)} images"
        faults.append(f"{count}, and at least {MIN_IMAGES} are needed")
    sizes: dict[Path, Size | None] = {}
    examples = []
    for entry in entries:
        caption = _with_trigger(entry.caption, trigger)
        if not caption:
            unread = [path.name for path in names if path.stem == entry.image.stem and not _is_read(path)]
            more = f" ({summarize(unread)} {'is' if len(unread) == 1 else 'are'} not read)" if unread else ""
            faults.append(f"{entry.label}: the caption is empty; write one, or give a trigger word{more}")
        for path in (entry.image, *entry.references):
            if path not in sizes:
                sizes[path] = _size(folder, path, faults)
        size, *others = (sizes[path] for path in (entry.image, *entry.references))
        reference_sizes = tuple(bucket(*other, resolution) for other in others if other is not None)
        if size is not None:
            target = bucket(*size, resolution)
            examples.append(Example(entry.image, caption, entry.references, target, reference_sizes))
    if faults:
        raise DataError(folder, faults)
    _tell_what_is_left_out(folder, names, subfolders, entries, set(sizes))
    return examples


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in (*SUFFIXES, *CAPTIONS) or path.is_dir()


def _subfolders(names: Iterable[Path], used: set[Path]) -> list[str]:
    """Subfolders with images in them, and how many, but for those that are used."""
    found = []
    for path in names:
        if path.is_dir() and not any(path == other or path in other.parents for other in used):
            try:
                count = sum(file.suffix.lower() in SUFFIXES for file in path.iterdir())
            except OSError:
                continue
            if count:
                found.append(f"{path.name} ({count} image{'s' * (count > 1)})")
    return found


def _tell_what_is_left_out(
    folder: Path, names: Sequence[Path], subfolders: list[str], entries: Sequence[_Entry], images: set[Path]
) -> None:
    """Warn of what a folder has and the data set has not."""

    def tell(found: Iterable[str], what: str) -> None:
        found = list(found)
        if found:
            warnings.warn(f"{folder}: {what}: {summarize(found)}", stacklevel=4)

    stems = {entry.image.stem for entry in entries}
    is_listed = (folder / METADATA).is_file()
    tell(subfolders, "subfolders are not read")
    tell(
        (entry.label for entry in entries if not entry.caption), "without a caption, trained on the trigger word alone"
    )
    tell(
        (path.name for path in names if _OTHER_METADATA.fullmatch(path.name) and path.name != METADATA),
        f"not read, captions are in {' or '.join(CAPTIONS)} files or {METADATA}",
    )
    tell(
        (path.name for path in names if path.stem in stems and not _is_read(path)),
        f"not read, captions are {' or '.join(CAPTIONS)}",
    )
    if is_listed:
        captions = (path.name for path in names if path.suffix.lower() in CAPTIONS and path.stem in stems)
        tell(captions, f"not read, {METADATA} has the captions")
        unused = (path.name for path in names if path.suffix.lower() in SUFFIXES and path not in images)
        tell(unused, f"images that {METADATA} does not name are left out")


def _with_trigger(caption: str, trigger: str) -> str:
    if not trigger or trigger in caption:
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _size(folder: Path, path: Path, faults: list[str]) -> Size | None:
    """An image's (height, width), or None with a fault added."""
    name = path.relative_to(folder)
    try:
        if not path.is_file():  # a pipe would block
            raise InputError("there is no such file", source=path)
        image = open_image(path)
        reference_size(image)
    except InputError as error:
        faults.append(f"{name}: {' '.join(error.message.splitlines())}")
        return None
    except OSError as error:
        faults.append(f"{name}: {error.strerror or error}")
        return None
    return image.height, image.width


def _from_captions(names: Sequence[Path], faults: list[str]) -> list[_Entry]:
    images = [path for path in names if path.suffix.lower() in SUFFIXES]
    captions: dict[str, list[Path]] = {path.stem: [] for path in images}
    for path in names:
        if path.suffix.lower() in CAPTIONS and path.is_file():
            if path.stem in captions:
                captions[path.stem].append(path)
            else:
                faults.append(f"{path.name}: there is no image of this name")
    faults += [
        f"{' and '.join(path.name for path in paths)}: captions of one image; keep one of them"
        for paths in captions.values()
        if len(paths) > 1
    ]
    read = {stem: _caption(paths[0], faults) if paths else "" for stem, paths in captions.items()}
    return [_Entry(path.name, path, read[path.stem]) for path in images]


def _caption(path: Path, faults: list[str]) -> str:
    """The text of a file. A file that cannot be read adds a fault, and its name stands for the text, or the caption
    would count as empty too.
    """
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
    unknown: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label = f"{path.name}, line {number}"
        try:
            entries.append(_parse_entry(path.parent, label, line, unknown.setdefault))
        except InputError as error:
            faults.append(f"{label}: {error}")
    if not entries and not faults:
        faults.append(f"{path.name} is empty: one JSON object a line")
    if unknown and not faults:
        columns = summarize([repr(name) for name in unknown])
        warnings.warn(f"{path}: keys that are not read: {columns} (known are {', '.join(KEYS)})", stacklevel=4)
    return entries


def _parse_entry(folder: Path, label: str, line: str, tell: Callable[[str], object]) -> _Entry:
    """One line of metadata; ``tell`` gets the keys that mean nothing here.

    Raises:
        InputError: for a line of another form, and for a key that is a known one misspelt, or another trainer's.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"an object is expected, got {line.strip()[:40]}")
    for name in values:
        if name in KEYS:
            continue
        near = difflib.get_close_matches(name, [key for key in KEYS if key not in values], n=1)
        if "text" not in values and name.lower() in _CAPTION_KEYS:
            near = ["text"]
        if near:
            raise InputError(f"unknown key {name!r}; {near[0]}?")
        tell(name)
    caption, references = values.get("text", ""), values.get("reference") or []
    references = [references] if isinstance(references, str) else references
    if not isinstance(caption, str) or len(caption) > MAX_CAPTION_BYTES or _has_surrogates(caption):
        raise InputError(f"text must be a caption, got {str(caption)[:40]!r}")
    if not isinstance(references, list):
        raise InputError(f"reference must be a file or a list of files, got {references!r}")
    image, *others = (_path_within(folder, name) for name in (values.get("file_name"), *references))
    return _Entry(label, image, caption.strip(), tuple(others))


def _path_within(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name or "\0" in name or _has_surrogates(name):
        raise InputError(f"a file's name is expected, got {name!r}")
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{name!r} is outside of the folder")
    return path


def _has_surrogates(text: str) -> bool:
    """Whether a text has lone surrogates, which JSON can write and UTF-8 cannot encode."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def read_captions(path: Path, examples: Sequence[Example]) -> list[str]:
    """The captions to preserve from a file, one a line; blank lines are skipped.

    Raises:
        DataError: for a file that cannot be read or has no captions, and for captions that examples have too.
    """
    try:
        captions = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(path, [f"not UTF-8 text ({error.reason})"]) from None
    except OSError as error:
        raise DataError(path, [error.strerror or str(error)]) from None
    training_captions = {example.caption for example in examples}
    faults = [
        f"{text!r} is a caption of the data set, too; take it out of one"
        for text in dict.fromkeys(captions)
        if text in training_captions
    ]
    too_long = f"is too long: {MAX_CAPTION_BYTES:,} characters at most"
    faults += [f"{text[:40]!r}... {too_long}" for text in captions if len(text) > MAX_CAPTION_BYTES]
    if faults or not captions:
        raise DataError(path, faults or ["no captions; write one a line"])
    return captions


def fingerprint(examples: Sequence[Example], preserved: Sequence[str] = ()) -> str:
    """A hash of a data set and the captions to preserve: of images, captions, sizes and their order."""
    digest = hashlib.sha256(repr(list(preserved)).encode() if preserved else b"")
    for example in examples:
        images = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (example.image, *example.references)]
        digest.update(repr((images, example.caption, example.shape)).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- sizes, batches


def bucket(height: int, width: int, resolution: int) -> Size:
    """The training size (height, width) of an image of this size: of the sizes with at most resolution x resolution
    pixels, and no more than the image has, the one of the nearest aspect. Sides are multiples of 16 and of about a
    sixteenth of the resolution, so that images of similar aspects share a size.
    """
    area = min(resolution**2, height * width)
    grain = max(PIXELS_PER_TOKEN, math.isqrt(area) // 256 * PIXELS_PER_TOKEN)
    least = -(-MIN_SIDE // grain) * grain
    sizes = [(tall, area // tall // grain * grain) for tall in range(least, area // MIN_SIDE + 1, grain)]
    fitting = [size for size in sizes if size[1] >= MIN_SIDE]
    return min(fitting, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))


def fit_image(image: Image.Image, size: Size) -> mx.array:
    """An image scaled to cover a size (Lanczos) and cropped around the centre: (1, H, W, 3) in -1..1, float32."""
    height, width = size
    return image_array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


class BatchSampler:
    """The endless order of training: batch k has the indices of the examples of pass k. Each epoch has an order of its
    own, which depends on the arguments alone.

    Args:
        batch_size: examples in a batch, all of one shape; the last batch of a shape in an epoch may have fewer.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int):
        self.shapes = [example.shape for example in examples]
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = len(self._epoch(0))
        self._latest: tuple[int, list[list[int]]] = -1, []

    def __getitem__(self, k: int) -> list[int]:
        epoch, index = divmod(k, self.batches_per_epoch)
        if self._latest[0] != epoch:
            self._latest = epoch, self._epoch(epoch)
        return self._latest[1][index]

    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        groups: dict[tuple[Size, ...], list[int]] = {}
        for number in rng.permutation(len(self.shapes)):
            groups.setdefault(self.shapes[number], []).append(int(number))
        size = self.batch_size
        batches = [group[k : k + size] for group in groups.values() for k in range(0, len(group), size)]
        return [batches[k] for k in rng.permutation(len(batches))]
