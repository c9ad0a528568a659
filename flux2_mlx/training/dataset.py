"""The data set of a LoRA: folders, checked as a whole, become examples of a few sizes, sampled in batches.

    folders -> read_datasets -> examples, each with its size -> PassSampler: the examples of pass 0, 1, 2, ...

Several folders are data sets that take turns by their weights. What a folder may have, says folder.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from ..imaging.files import open_image
from ..imaging.preprocess import image_array, reference_size
from ..sampling.latents import PIXELS_PER_TOKEN
from .folder import MAX_CAPTION_BYTES, DataError, read_folder, tell_what_is_left_out

MIN_SIDE = 64  # pixels of a training image
MAX_WEIGHT = 1000

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Example:
    """An image to learn.

    Attributes:
        image: its file.
        caption: the prompt for it, or the instruction of an edit.
        references: files of the reference images of an edit.
        size: the size that the image is trained at; see bucket.
        reference_sizes: the sizes of the references.
        repeats: how often it counts an epoch of its data set.
        dataset: the number of its data set.
        weight: the weight of its data set; see PassSampler.
    """

    image: Path
    caption: str
    references: tuple[Path, ...]
    size: Size
    reference_sizes: tuple[Size, ...]
    repeats: int = 1
    dataset: int = 0
    weight: float = 1.0

    @property
    def shape(self) -> tuple[Size, ...]:
        """Sizes of the image and its references; the examples of a batch have the same."""
        return (self.size, *self.reference_sizes)


def parse_data(data: str | Sequence[str]) -> list[tuple[Path, float]]:
    """(folder, weight) of each data set: of "folder" or "folder:weight", as commands take one.

    Raises:
        InputError: for a weight that is none.
    """
    return [_parse_data(text) for text in ([data] if isinstance(data, str) else data)]


def _parse_data(text: str) -> tuple[Path, float]:
    folder, _, number = text.rpartition(":")
    try:
        weight = float(number) if folder and not os.path.exists(text) else None
    except ValueError:
        weight = None
    if weight is None:
        return Path(text), 1.0
    if not 0 < weight <= MAX_WEIGHT:
        raise InputError(
            f"the weight of a data set must be a number above 0, up to {MAX_WEIGHT}, got {number} for {folder}"
        )
    return Path(folder), weight


def read_datasets(data: str | Sequence[str], resolution: int, trigger: str = "") -> list[Example]:
    """The examples of one data set or of several; see parse_data and read_dataset.

    Raises:
        DataError: with all faults of all folders.
    """
    examples: list[Example] = []
    errors: list[DataError] = []
    for number, (folder, weight) in enumerate(parse_data(data)):
        try:
            read = read_dataset(folder, resolution, trigger)
            examples += [replace(example, dataset=number, weight=weight) for example in read]
        except DataError as error:
            errors.append(error)
    if len(errors) > 1:
        faults = [f"{error.source}: {fault}" for error in errors for fault in error.faults]
        raise DataError("the data", faults)
    if errors:
        raise errors[0]
    return examples


def read_dataset(folder: Path, resolution: int, trigger: str = "") -> list[Example]:
    """Check every file of a folder and give each image its training size; see bucket.

    Args:
        resolution: an image is trained on resolution x resolution pixels at most.
        trigger: a word to prepend to every caption without it; an image without a caption gets the word alone.

    Raises:
        DataError: with all faults of the folder.
    """
    if not os.path.isdir(folder):
        raise DataError(folder, ["there is no such folder"])
    faults: list[str] = []
    listings = read_folder(folder, faults)
    sizes: dict[Path, Size | None] = {}
    examples = []
    for listing in listings:
        for entry in listing.entries:
            caption = _with_trigger(entry.caption, trigger)
            if not caption:
                more = listing.unread_beside(entry.image)
                faults.append(f"{entry.label}: the caption is empty; write one, or give a trigger word{more}")
            for path in entry.images:
                if path not in sizes:
                    sizes[path] = _size(folder, path, faults)
            size, *others = (sizes[path] for path in entry.images)
            reference_sizes = tuple(bucket(*other, resolution) for other in others if other is not None)
            if size is not None:
                target = bucket(*size, resolution)
                examples.append(Example(entry.image, caption, entry.references, target, reference_sizes, entry.repeats))
    if faults:
        raise DataError(folder, faults)
    tell_what_is_left_out(listings)
    return examples


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
    """A hash of data sets and the captions to preserve: of images, captions, sizes, repeats and their order."""
    digest = hashlib.sha256(repr(list(preserved)).encode() if preserved else b"")
    for example in examples:
        images = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (example.image, *example.references)]
        counted = () if (example.repeats, example.dataset) == (1, 0) else (example.repeats, example.dataset)
        digest.update(repr((images, example.caption, example.shape, *counted)).encode())
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
    """The endless order of a data set: batch k has the indices of its examples. In each epoch an example counts
    ``repeats`` times; each has an order of its own, which depends on the arguments alone.

    Args:
        batch_size: examples in a batch, all of one shape; the last batch of a shape in an epoch may have fewer.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int):
        self.shapes = [example.shape for example in examples]
        self.numbers = [number for number, example in enumerate(examples) for _ in range(example.repeats)]
        self.batch_size, self.seed = batch_size, seed
        self.dataset = examples[0].dataset if examples else 0
        self.batches_per_epoch = len(self._epoch(0))
        self._latest: tuple[int, list[list[int]]] = -1, []

    def __getitem__(self, k: int) -> list[int]:
        epoch, index = divmod(k, self.batches_per_epoch)
        if self._latest[0] != epoch:
            self._latest = epoch, self._epoch(epoch)
        return self._latest[1][index]

    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch, self.dataset])
        groups: dict[tuple[Size, ...], list[int]] = {}
        for place in rng.permutation(len(self.numbers)):
            number = self.numbers[place]
            groups.setdefault(self.shapes[number], []).append(number)
        size = self.batch_size
        batches = [group[k : k + size] for group in groups.values() for k in range(0, len(group), size)]
        return [batches[k] for k in rng.permutation(len(batches))]


class PassSampler:
    """The endless order of training: pass k has the indices of its examples, all of one data set; each data set has a
    BatchSampler of its own.

    Data sets take turns: of the passes each gets the share that its weight has in the sum of weights, and of the first
    n passes what is nearest to that, as Webster's method apportions seats: the next one is that of the largest
    weight / (2 passes so far + 1), of equals the first.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int):
        numbers: dict[int, list[int]] = {}
        for number, example in enumerate(examples):
            numbers.setdefault(example.dataset, []).append(number)
        self.members = list(numbers.values())
        self.weights = [examples[members[0]].weight for members in self.members]
        self.batches = [BatchSampler([examples[k] for k in members], batch_size, seed) for members in self.members]
        self._taken = [0] * len(self.members)
        self._turns: list[tuple[int, int]] = []  # of each pass the data set, and how many passes it had before

    def __getitem__(self, k: int) -> list[int]:
        while len(self._turns) <= k:
            place = max(range(len(self.weights)), key=lambda i: self.weights[i] / (2 * self._taken[i] + 1))
            self._turns.append((place, self._taken[place]))
            self._taken[place] += 1
        place, turn = self._turns[k]
        return [self.members[place][number] for number in self.batches[place][turn]]

    def share(self, place: int) -> float:
        """The share of the passes that a data set gets."""
        return self.weights[place] / sum(self.weights)
