"""The folder of a data set, as it lies there: images with their captions, repeats and references.

A folder has images, each with its caption in a .txt or .caption file of the same name; or a metadata.jsonl, one object
a line:

    {"file_name": "1.png", "text": "a red fox in the snow"}
    {"file_name": "after.png", "text": "make it night", "reference": "before.png"}

"file_name" and "text" are the keys of Hugging Face's image folders; "reference" is the image to edit, or a list of
images. Paths are within the folder. Without a metadata.jsonl it may also have subfolders 10_NAME, as kohya's scripts
read them: folders like itself, each of whose images counts ten times an epoch. What lies beside these and is not read
is told, in warnings.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, summarize

METADATA = "metadata.jsonl"
KEYS = ("file_name", "text", "reference")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
CAPTIONS = (".txt", ".caption")
_OTHER_METADATA = re.compile(r"(metadata|captions?|meta_cap|meta_lat|dataset)\.(csv|json|jsonl|parquet|toml|tsv)")
# Keys of other trainers for the caption, which must not be passed over as columns of something else.
_CAPTION_KEYS = ("caption", "captions", "prompt", "prompts", "description", "additional_feature")
_REPEATED = re.compile("([0-9]+)_.*", re.DOTALL)
MIN_IMAGES = 3
MAX_REPEATS = 1000  # a larger number is a date, or another name
MAX_CAPTION_BYTES = 100_000  # a caption is truncated to 512 tokens in any case


class DataError(InputError):
    """A data set that cannot be trained on.

    Attributes:
        faults: all faults of the folder or file ``source``, one line each.
    """

    def __init__(self, source: object, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("; ".join(self.faults), source=source)


@dataclass(frozen=True)
class Entry:
    """An image as a folder names it.

    Attributes:
        label: names the entry in messages about its caption.
        image: its file.
        caption: as written, or "".
        references: files of the reference images of an edit.
        repeats: how often it counts an epoch.
    """

    label: str
    image: Path
    caption: str
    references: tuple[Path, ...] = ()
    repeats: int = 1

    @property
    def images(self) -> tuple[Path, ...]:
        return self.image, *self.references


@dataclass(frozen=True)
class Listing:
    """What a folder has: its names, and the entries of its own."""

    folder: Path
    names: list[Path]
    entries: list[Entry]

    def unread_beside(self, image: Path) -> str:
        """The end of a message about an image without a caption: files of its name that are not read."""
        unread = [path.name for path in self.names if path.stem == image.stem and not _is_read(path)]
        return f" ({summarize(unread)} {'is' if len(unread) == 1 else 'are'} not read)" if unread else ""


def read_folder(folder: Path, faults: list[str]) -> list[Listing]:
    """What a folder and its subfolders with repeats have; what is wrong with them is added to the faults."""
    listings = [_list(folder, faults)]
    repeated = [path for path in listings[0].names if path.is_dir() and _REPEATED.fullmatch(path.name)]
    for path in [] if (folder / METADATA).is_file() else repeated:
        number = path.name.partition("_")[0]
        if not 1 <= int(number) <= MAX_REPEATS:
            faults.append(
                f"{path.name}: {number} is no number of repeats, which is from 1 to {MAX_REPEATS}; rename the folder"
            )
            continue
        count = len(faults)
        listings.append(_list(path, faults, f"{path.name}/", int(number)))
        if not listings[-1].entries and len(faults) == count:
            faults.append(f"{path.name}: no images; remove the folder, or fill it")
    count = sum(len(listing.entries) for listing in listings)
    subfolders = _subfolders(listings[0], listings)
    if not count and not faults:
        more = f"; subfolders are not read, give one of them: {summarize(subfolders)}" if subfolders else ""
        faults.append(f"no images ({', '.join(SUFFIXES[:4])}, ...) and no {METADATA}{more}")
    elif count < MIN_IMAGES and not faults:
        faults.append(f"{count} image{'s' * (count > 1)}, and at least {MIN_IMAGES} are needed")
    return listings


def _list(folder: Path, faults: list[str], prefix: str = "", repeats: int = 1) -> Listing:
    """What a folder has, its entries labelled and its faults begun with ``prefix``."""
    try:
        names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        faults.append((f"{folder.name}: " if prefix else "") + (error.strerror or str(error)))
        return Listing(folder, [], [])
    own: list[str] = []
    metadata = folder / METADATA
    entries = _from_metadata(metadata, own) if metadata.is_file() else _from_captions(names, own)
    faults += [prefix + fault for fault in own]
    return Listing(folder, names, [replace(entry, label=prefix + entry.label, repeats=repeats) for entry in entries])


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in (*SUFFIXES, *CAPTIONS) or path.is_dir()


def _subfolders(listing: Listing, listings: Sequence[Listing]) -> list[str]:
    """Subfolders of a listing with images in them, and how many, but for those that are used."""
    used = {path.parent for other in listings for entry in other.entries for path in entry.images}
    found = []
    for path in listing.names:
        if path.is_dir() and not any(path == other or path in other.parents for other in used):
            try:
                count = sum(file.suffix.lower() in SUFFIXES for file in path.iterdir())
            except OSError:
                continue
            if count:
                found.append(f"{path.name} ({count} image{'s' * (count > 1)})")
    return found


def tell_what_is_left_out(listings: Sequence[Listing]) -> None:
    """Warn of what folders have and the data set has not."""
    for listing in listings:
        _tell_what_is_left_out(listing, _subfolders(listing, listings))


def _tell_what_is_left_out(listing: Listing, subfolders: list[str]) -> None:
    folder, names, entries = listing.folder, listing.names, listing.entries

    def tell(found: Iterable[str], what: str) -> None:
        found = list(found)
        if found:
            warnings.warn(f"{folder}: {what}: {summarize(found)}", stacklevel=5)

    stems, images = {entry.image.stem for entry in entries}, {path for entry in entries for path in entry.images}
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


def _from_captions(names: Sequence[Path], faults: list[str]) -> list[Entry]:
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
    return [Entry(path.name, path, read[path.stem]) for path in images]


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


def _from_metadata(path: Path, faults: list[str]) -> list[Entry]:
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


def _parse_entry(folder: Path, label: str, line: str, tell: Callable[[str], object]) -> Entry:
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
    return Entry(label, image, caption.strip(), tuple(others))


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
