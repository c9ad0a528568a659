"""Do regions put things where they belong more often than one prompt that says all? By nano, on unseen scenes.

    python -m benchmarks.regions --count 200
    python -m benchmarks.regions --things 3 --count 40

Each region's prompt is a caption of its thing alone. Regions are boxes around the things, where the main prompt, which
says all things or the ground alone, is for the rest; or of two things the halves of the image, cut between them.
Percent of grounds, of things' colours, places and shapes, and of whole images that are right. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from benchmarks.common import print_json
from examples.nano_score import draw_task, rates
from examples.nano_world import (
    COLOURS,
    HOME,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Task,
    Thing,
    describe,
    held_out,
    random_scene,
)
from flux2_mlx import Flux2Pipeline
from flux2_mlx.families import NANO

MARGIN = 0.06  # around a thing in its box, half a token of a nano image
Boxes = dict[Thing, tuple[float, float, float, float]]


def unseen_tasks(count: int, things: int) -> list[Task]:
    """Scenes of so many things that training never draws, which of three things it never does; always the same ones."""
    rng = random.Random("unseen pairs" if things == 2 else f"{things} things")
    tasks: list[Task] = []
    while len(tasks) < count:
        scene = random_scene(rng, 2) if things == 2 else several(rng, things)
        if held_out(scene):
            caption = describe(rng, scene) if things == 2 else f"{', '.join(map(words, scene.things))}, {ground(scene)}"
            tasks.append(Task(caption, (), scene))
    return tasks


def several(rng: random.Random, count: int) -> Scene:
    """A scene of things that do not touch, each in a colour of its own."""
    while True:
        own, *colours = rng.sample(tuple(COLOURS), count + 1)
        places = sorted(rng.sample(PLACES, count), key=PLACES.index)
        things = tuple(
            Thing(rng.choice(SHAPES), colour, rng.choice(tuple(SIZES)), place)
            for colour, place in zip(colours, places, strict=True)
        )
        pairs = combinations(things, 2)
        if all(np.hypot(*np.subtract(a.centre, b.centre)) >= SIZES[a.size] + SIZES[b.size] for a, b in pairs):
            return Scene(own, things)


def words(thing: Thing) -> str:
    corner = "in" if " " in thing.place or thing.place == "centre" else "on"
    return f"a {thing.size} {thing.colour} {thing.shape} {corner} the {thing.place}"


def ground(scene: Scene) -> str:
    return f"{scene.ground} background"


def halves(scene: Scene) -> Boxes:
    """The image, cut in the middle of the gap between two things, across their larger distance."""
    one, two = scene.things
    axis = int(np.argmax(np.abs(np.subtract(one.centre, two.centre))))  # 0 is down, 1 across
    first, second = sorted(scene.things, key=lambda thing: thing.centre[axis])
    middle = (first.centre[axis] + SIZES[first.size] + second.centre[axis] - SIZES[second.size]) / 2
    if axis == 0:
        return {first: (0, 0, 1, middle), second: (0, middle, 1, 1)}
    return {first: (0, 0, middle, 1), second: (middle, 0, 1, 1)}


def around(scene: Scene) -> Boxes:
    """What each thing covers, with a margin."""
    return {thing: _around(thing) for thing in scene.things}


def _around(thing: Thing) -> tuple[float, float, float, float]:
    (y, x), reach = thing.centre, 1.15 * SIZES[thing.size] + MARGIN
    return max(x - reach, 0), max(y - reach, 0), min(x + reach, 1), min(y + reach, 1)


def regions_of(task: Task, boxes: Boxes) -> list[str]:
    """A caption of each thing alone, at its box."""
    rng, scene = random.Random(task.caption), task.scene
    regions = []
    for thing in scene.things:
        caption = describe(rng, Scene(scene.ground, (thing,)))
        if len(scene.things) > 2:
            caption = f"{words(thing)}, {ground(scene)}"
        regions.append(f"{caption}@{','.join(f'{side:g}' for side in boxes[thing])}")
    return regions


# What each way is given: (the main prompt, regions).
WAYS: dict[str, Callable[[Task], tuple[str, list[str]]]] = {
    "one prompt": lambda task: (task.caption, []),
    "halves": lambda task: (task.caption, regions_of(task, halves(task.scene))),
    "boxes": lambda task: (task.caption, regions_of(task, around(task.scene))),
    "boxes, ground": lambda task: (ground(task.scene), regions_of(task, around(task.scene))),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="scenes (%(default)s)")
    parser.add_argument("--things", type=int, default=2, help="in a scene (%(default)s)")
    arguments = parser.parse_args(argv)
    pipe, tasks, report = Flux2Pipeline.from_pretrained(NANO), unseen_tasks(arguments.count, arguments.things), {}
    for way, given in WAYS.items():
        if way == "halves" and arguments.things != 2:
            continue
        drawn = []
        for seed, task in enumerate(tasks):
            prompt, region = given(task)
            drawn.append(draw_task(pipe, replace(task, caption=prompt), seed, HOME, region=region)[0])
        report[way] = {part: round(rate, 1) for part, rate in rates(drawn).items()}
        print(f"{way:16}", *(f"{part} {rate:.1f}" for part, rate in report[way].items()), flush=True)
    print_json("regions", arguments, {"percent": report})


if __name__ == "__main__":
    main()
