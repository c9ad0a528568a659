"""How well a model draws the world of nano: python -m benchmarks.nano_score [--quantize 4 | ...]

Captions of scenes that training never saw are drawn and held against the rendered truth, and so are edits of rendered
pictures. Prints a table, writes a contact sheet (--sheet FILE), and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.common import machine
from benchmarks.nano_world import EDITS, HOME, Task, judge, random_task, render
from flux2_mlx import Flux2Pipeline
from flux2_mlx.cli.common import Parser, given_options
from flux2_mlx.families import NANO
from flux2_mlx.imaging.preprocess import to_unit
from flux2_mlx.options import REUSED, CheckpointOptions

# What nano is to reach, in percent and dB.
BOUNDS = {"ground": 99, "colour": 97, "place": 97, "shape": 93, "edits": 90, "psnr": 30}
SHEET_CAPTIONS, SHEET_EDITS, SHEET_COLUMNS = 24, 8, 8
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


def draw(
    pipe: Flux2Pipeline, tasks: Sequence[Task], size: tuple[int, int] = HOME, *, progress: bool = False, **options: Any
) -> list[Drawn]:
    """Draw every task at a size (height, width), the k-th with seed k; options are those of Flux2Pipeline."""
    drawn = []
    height, width = size
    for seed, task in enumerate(tqdm(tasks, disable=not progress, leave=False)):
        references = [Image.fromarray(render(scene, height, width)) for scene in task.references]
        result = pipe(task.caption, image=references or None, height=height, width=width, seed=seed, **options)
        (picture,) = result.images
        drawn.append(Drawn(task, picture, judge(np.array(picture), task.scene)))
    return drawn


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


def open_variant(arguments: argparse.Namespace) -> Flux2Pipeline:
    """The model as the command line asks for it."""
    options = CheckpointOptions.collect(given_options(arguments))
    return Flux2Pipeline.from_pretrained(**vars(options), cache=False)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model", default=NANO, help="one of this world, as examples/train_nano.py makes (%(default)s)"
    )
    parser.add_options(CheckpointOptions, skip=["model"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--step-cache", type=float)
    parser.add_argument("--reuse", choices=REUSED, help="references: of edits alone, as captions have none")
    parser.add_argument("--height", type=int, default=HOME[0])
    parser.add_argument("--width", type=int, default=HOME[1])
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    size = (arguments.height, arguments.width)
    pipe = open_variant(arguments)
    options = {"num_steps": arguments.steps, "guidance": arguments.guidance, "force_guidance": True}
    options["step_cache"] = arguments.step_cache
    reuse = {"reuse": arguments.reuse if arguments.reuse != "references" else None}
    captions = draw(pipe, unseen_tasks(arguments.captions), size, progress=True, **options, **reuse)
    edits = draw(pipe, unseen_edits(arguments.edits), size, progress=True, **options, reuse=arguments.reuse)
    figures = rates(captions)
    figures["edits"] = rates(edits)["whole"]
    figures["psnr"] = autoencoder_psnr(pipe, unseen_tasks(min(64, arguments.captions)), size)
    each = {kind: edits[k :: len(EDIT_KINDS)] for k, kind in enumerate(EDIT_KINDS)}
    by_kind = {kind: rates(drawn)["whole"] for kind, drawn in each.items() if drawn}
    print(f"{'':12}{'figure':>8}{'bound':>8}")
    for name, value in figures.items():
        print(f"{name:12}{value:8.1f}{BOUNDS.get(name, ''):>8}")
    for kind, value in by_kind.items():
        print(f"  {kind:10}{value:8.1f}")
    if arguments.sheet is not None:
        contact_sheet([*captions[:SHEET_CAPTIONS], *edits[:SHEET_EDITS]]).save(arguments.sheet)
    variant = {name: value for name, value in vars(arguments).items() if name != "sheet"}
    report = {"benchmark": "nano_score", "variant": variant, "figures": figures, "edits": by_kind}
    print(json.dumps({**report, **machine()}))


if __name__ == "__main__":
    main()
