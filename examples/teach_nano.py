"""Teach nano a look that it does not know, from twelve pictures: python -m examples.teach_nano FOLDER

"a landscape picture with ..." is to have a blue sky over a green meadow behind its things, where nano knows grounds of
one colour alone. Makes the pictures and their captions in FOLDER/pictures, and captions that are to be drawn as before
in FOLDER/preserve.txt; trains a LoRA on them as flux2-lora does, into FOLDER/run; draws unseen captions without it and
with it. FOLDER/teach_nano.png shows them, and the table says how many are right, of the new word and of the old ones.
Further options are those of flux2-lora.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.nano_score import contact_sheet, draw, rates, unseen_tasks
from examples.nano_world import COLOURS, HOME, LANDSCAPE, Task, landscape_task, random_task, render
from flux2_mlx import Flux2Pipeline
from flux2_mlx.lora import main as train

PICTURES = 12
SHEET = 8  # drawings a row
OPTIONS = [
    *("--model", "nano", "--allow-distilled", "--no-grad-checkpoint", "--resolution", str(HOME[0])),
    *("--batch-size", "4", "--rank", "16", "--learning-rate", "1.5e-3", "--timesteps", "four"),
    *("--targets", "context_embedder", "transformer_blocks", "single_transformer_blocks"),
]


def landscapes(seed: int, count: int) -> list[Task]:
    """As many scenes, others for every seed."""
    rng = random.Random(f"landscape {seed}")
    return [landscape_task(rng) for _ in range(count)]


def write_data(folder: Path) -> list[str]:
    """The data set in folder/pictures, captions to preserve in folder/preserve.txt: the options that name them."""
    pictures, preserved = folder / "pictures", folder / "preserve.txt"
    pictures.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random("preserved"), []
    for k, task in enumerate(landscapes(0, PICTURES)):
        Image.fromarray(render(task.scene, *HOME)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(task.caption)
        for colour in COLOURS:
            lines += [task.caption.replace(LANDSCAPE, colour), random_task(rng).caption]
    preserved.write_text("\n".join(lines))
    return ["--data", str(pictures), "--preserve", str(preserved)]


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Teach and score; the rates of each row of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=200, help="to score, of each kind (%(default)s)")
    parser.add_argument("--quiet", action="store_true")
    arguments, others = parser.parse_known_args(argv)
    run, quiet = arguments.folder / "run", ["--quiet"] * arguments.quiet
    started = time.perf_counter()
    words = [*write_data(arguments.folder), "--output", str(run), "--steps", str(arguments.steps)]
    if code := train([*OPTIONS, *words, *quiet, *others]):
        raise SystemExit(code)
    print(f"taught in {time.perf_counter() - started:.0f} seconds")

    pipe = Flux2Pipeline.from_pretrained("nano")
    tasks = {"landscapes": landscapes(1, arguments.captions), "others": unseen_tasks(arguments.captions)}
    found, sheet = {}, []
    print(f"{'% right':20}{'ground':>8}{'colour':>8}{'place':>8}{'shape':>8}")
    for when in ("before", "after"):
        if when == "after":
            pipe.load_lora(run)
        for what, asked in tasks.items():
            drawn = draw(pipe, asked, progress=not arguments.quiet)
            sheet += drawn[:SHEET]
            name = f"{what}, {when}"
            found[name] = rates(drawn)
            print(
                f"{name:20}" + "".join(f"{found[name][part]:8.1f}" for part in ("ground", "colour", "place", "shape"))
            )
    contact_sheet(sheet).save(arguments.folder / "teach_nano.png")
    return found


if __name__ == "__main__":
    main()
