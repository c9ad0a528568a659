"""What does the strength of a reference change? By nano, on edits and combinations that training never saw.

    python -m benchmarks.strengths --count 40

Of a combination (a thing of one image on the ground of the other) the strength of the thing's image is changed, then
that of the ground's: the share of the thing's pixels, and of the ground's, that have the right colour. Of edits of one
image: the share that are right in every part. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from benchmarks.common import print_json
from examples.nano_score import unseen_tasks
from examples.nano_world import EDITS, Task, judge, nearest_colours, render
from flux2_mlx import Flux2Pipeline
from flux2_mlx.families import NANO

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
SIDE = 128
FIRST = re.compile(r"of the first \w+ on")  # in captions whose thing is the first image's


def drawn(pipe: Flux2Pipeline, task: Task, seed: int, strengths: Sequence[float]) -> np.ndarray:
    """A task's image (SIDE, SIDE, 3)."""
    references = [Image.fromarray(render(scene, SIDE, SIDE)) for scene in task.references]
    result = pipe(task.caption, image=references, reference_strength=strengths, height=SIDE, width=SIDE, seed=seed)
    return np.asarray(result.images[0])


def shares(picture: np.ndarray, task: Task) -> tuple[float, float, bool]:
    """Shares of the thing's and of the ground's pixels that have their right colour; whether every part is right."""
    found, wanted = nearest_colours(picture), nearest_colours(render(task.scene, SIDE, SIDE))
    ground = np.bincount(wanted.ravel()).argmax()
    of_thing, right = wanted != ground, found == wanted
    is_right = all(all(verdict) for verdict in judge(picture, task.scene).values())
    return float(right[of_thing].mean()), float(right[~of_thing].mean()), is_right


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="combinations, and as many edits (%(default)s)")
    arguments = parser.parse_args(argv)
    pipe = Flux2Pipeline.from_pretrained(NANO)
    combined, edits = (unseen_tasks(arguments.count, kinds) for kinds in (("combine",), tuple(EDITS)))
    report = {}
    print(f"{'strength':10}{'thing':>8}{'ground':>8}{'edits right':>14}")
    for strength in STRENGTHS:
        thing, ground, right = [], [], []
        for seed, task in enumerate(combined):
            of_thing = [strength, 1.0] if FIRST.search(task.caption) else [1.0, strength]
            thing.append(shares(drawn(pipe, task, seed, of_thing), task)[0])
            ground.append(shares(drawn(pipe, task, seed, of_thing[::-1]), task)[1])
        for seed, task in enumerate(edits):
            right.append(shares(drawn(pipe, task, seed, [strength]), task)[2])
        report[strength] = [round(100 * float(np.mean(own)), 1) for own in (thing, ground, right)]
        print(f"{strength:<10g}" + "{:8.1f}{:8.1f}{:14.1f}".format(*report[strength]), flush=True)
    print_json("strengths", arguments, {"percent": report})


if __name__ == "__main__":
    main()
