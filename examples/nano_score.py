"""How drawings of nano's world are made and scored: captions and edits that training never saw, held against the
rendered truth. benchmarks/quality.py prints the score.
"""

from __future__ import annotations

import math
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from examples.nano_world import EDITS, HOME, Task, judge, random_task, render
from flux2_mlx import Flux2Pipeline
from flux2_mlx.imaging.preprocess import to_unit

# What nano is to reach, in percent and dB.
BOUNDS = {"ground": 99, "colour": 97, "place": 97, "shape": 93, "edits": 90, "psnr": 30}
SHEET_COLUMNS = 8
EDIT_KINDS = (*EDITS, "combine")


@dataclass(frozen=True)
class Drawn:
    """A task, what the model drew for it, and what is right of that; see nano_world.judge."""

    task: Task
    picture: Image.Image
    verdict: dict[str, list[bool]]

    @property
    def is_right(self) -> bool:
        return all(all(parts) for parts in self.verdict.values())


def unseen_tasks(count: int, kinds: Sequence[str] = ("draw",)) -> list[Task]:
    """The first tasks, always the same ones, whose scenes training never draws; of each kind in turn."""
    rng = random.Random(f"unseen {' '.join(kinds)}")
    return [random_task(rng, kind, unseen=True) for kind in islice(cycle(kinds), count)]


def unseen_edits(count: int) -> list[Task]:
    """Edits of every kind in turn, with one reference or two."""
    return unseen_tasks(count, EDIT_KINDS)


def draw_task(
    pipe: Flux2Pipeline, task: Task, seed: int, size: tuple[int, int], **options: Any
) -> tuple[Drawn, float, int]:
    """A task drawn at a size (height, width); seconds of its steps, and how many were computed."""
    height, width = size
    references = [Image.fromarray(render(scene, height, width)) for scene in task.references]
    if options.get("reuse") == "references" and not references:
        options = {**options, "reuse": None}
    result = pipe(task.caption, image=references or None, height=height, width=width, seed=seed, **options)
    (picture,) = result.images
    drawn = Drawn(task, picture, judge(np.array(picture), task.scene))
    return drawn, result.seconds["denoise"], result.steps["computed"]


def draw(
    pipe: Flux2Pipeline, tasks: Sequence[Task], size: tuple[int, int] = HOME, *, progress: bool = False, **options: Any
) -> list[Drawn]:
    """Draw every task, the k-th with seed k; options are those of Flux2Pipeline."""
    bar = tqdm(tasks, disable=not progress, leave=False)
    return [draw_task(pipe, task, seed, size, **options)[0] for seed, task in enumerate(bar)]


def rates(drawn: Sequence[Drawn]) -> dict[str, float]:
    """Percent of grounds, object colours, places, shapes and clean grounds that are right, and of whole pictures."""
    parts = {
        part: [right for one in drawn for right in one.verdict[part]]
        for part in ("ground", "colour", "place", "shape", "clean")
    }
    parts["whole"] = [one.is_right for one in drawn]
    return {part: 100 * sum(right) / len(right) for part, right in parts.items() if right}


def autoencoder_psnr(pipe: Flux2Pipeline, tasks: Sequence[Task], size: tuple[int, int] = HOME) -> float:
    """Peak signal-to-noise ratio in dB, over all pictures together, of encoding and decoding rendered scenes."""
    errors = []
    for task in tasks:
        truth = mx.array(render(task.scene, *size))[None] / 255
        decoded = to_unit(pipe.autoencoder.decoder(pipe.autoencoder.encoder(2 * truth - 1)))
        errors.append(((decoded - truth) ** 2).mean().item())
    return 10 * math.log10(1 / float(np.mean(errors)))


def contact_sheet(drawn: Sequence[Drawn], columns: int = SHEET_COLUMNS) -> Image.Image:
    """Pictures with their captions, an edit's references before it; what is not wholly right has a red frame."""
    font = ImageFont.load_default(10)
    gap, lines = 6, 4
    tiles = []
    for one in drawn:
        width, height = one.picture.size
        references = [Image.fromarray(render(scene, height, width)) for scene in one.task.references]
        tile = Image.new("RGB", ((width + gap) * (len(references) + 1), height + gap + 12 * lines), "white")
        for k, picture in enumerate([*references, one.picture]):
            tile.paste(picture, (k * (width + gap), gap))
        pen = ImageDraw.Draw(tile)
        if not one.is_right:
            left = (width + gap) * len(references)
            pen.rectangle((left, gap, left + width - 1, gap + height - 1), outline="red", width=2)
        text = textwrap.wrap(one.task.caption, (width + gap) * (len(references) + 1) // 6, max_lines=lines)
        pen.multiline_text((0, height + gap + 1), "\n".join(text), "black", font, spacing=1)
        tiles.append(tile)
    cell = min(tile.width for tile in tiles)
    sheet = Image.new("RGB", (gap + columns * cell, len(tiles) * tiles[0].height), "white")
    column = row = 0
    for tile in tiles:
        cells = tile.width // cell
        if column + cells > columns:
            column, row = 0, row + 1
        sheet.paste(tile, (gap + column * cell, row * tile.height))
        column += cells
    return sheet.crop((0, 0, sheet.width, (row + 1) * tiles[0].height))
