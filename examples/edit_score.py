"""How much of a picture do edits leave alone, as the model draws them, with color_match and with edit_composite?

    python -m examples.edit_score [--edits 200] [--copies 200]

With nano, edits that training never saw. Told of each way: the mean error (levels of 255) outside of what is edited,
which is where the rendered truths of reference and result are the same, two pixels and more from where they are not (as
scenes are judged, whose edges blend); percent of edits that are right; and of the composite the seams: at each two
neighbouring pixels of which the mask says another share, by how many levels their step exceeds the larger of the
reference's and the edit's own, the mean over such pairs of an image, then over images, and the worst image's.

Then copies of made-up photos whose gain, offset, gamma and saturation are drawn at random, a part of each replaced: the
mean error where nothing was replaced, and by how much the replaced part's own colours changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from examples.nano_score import EDIT_KINDS, unseen_edits
from examples.nano_world import HOME, Task, judge, render
from flux2_mlx import Flux2Pipeline
from flux2_mlx.imaging.edits import THRESHOLD, Edit

WAYS: dict[str, dict[str, Any]] = {
    "as drawn": {},
    "color_match": {"match": True, "threshold": None},
    "edit_composite": {"match": False, "threshold": THRESHOLD},
    "both": {"match": True, "threshold": THRESHOLD},
}
EDGE = 2  # pixels around what is edited


def levels(image: Image.Image | np.ndarray) -> np.ndarray:
    return np.asarray(image, np.float64)


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and what is at most so many pixels from it."""
    wide = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * pixels + 1))
    return np.asarray(wide) > 0


def seams(image: Image.Image, reference: Image.Image, edited: Image.Image, mask: Image.Image) -> np.ndarray:
    """Of each two neighbouring pixels of which the mask says another share, the levels by which their step exceeds the
    larger of the reference's and the edit's own, the largest of the channels.
    """
    found = []
    for axis in (0, 1):
        ours, first, second = (np.abs(np.diff(levels(one), axis=axis)) for one in (image, reference, edited))
        beyond = (ours - np.maximum(first, second)).clip(0).max(-1)
        found.append(beyond[np.diff(levels(mask), axis=axis) != 0])
    return np.concatenate(found)


def draw_edit(pipe: Flux2Pipeline, task: Task, seed: int, size: tuple[int, int]) -> dict[str, tuple[Any, Any]]:
    """(picture, mask) of one edit in each of WAYS, of the same latents."""
    height, width = size
    images = [Image.fromarray(render(scene, height, width)) for scene in task.references]
    options: dict[str, Any] = {"image": images, "height": height, "width": width, "force_guidance": True}
    *_, last = pipe.stream(task.caption, seed=seed, edit_composite=THRESHOLD, **options)
    assert last._edit is not None
    return {
        name: replace(last, _edit=replace(last._edit, **way) if way else None).picture_and_mask()
        for name, way in WAYS.items()
    }


def score_edits(
    pipe: Flux2Pipeline, tasks: Sequence[Task], size: tuple[int, int] = HOME, *, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Of each of WAYS: "error" outside of what is edited over all edits that are right as drawn, "each" kind's, "right"
    in percent, "seam" and "worst" in levels.
    """
    errors: dict[str, dict[str, list[np.ndarray]]] = {name: {kind: [] for kind in EDIT_KINDS} for name in WAYS}
    rights: dict[str, list[bool]] = {name: [] for name in WAYS}
    steps: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed, task in enumerate(tqdm(tasks, disable=not progress, leave=False)):
        before, truth = render(task.references[0], *size), render(task.scene, *size)
        kept = ~grown((before != truth).any(-1), EDGE)
        drawn = draw_edit(pipe, task, seed, size)
        plain = drawn["as drawn"][0]
        is_right = {name: all(map(all, judge(np.array(one), task.scene).values())) for name, (one, _) in drawn.items()}
        for name, (picture, mask) in drawn.items():
            rights[name].append(is_right[name])
            if is_right["as drawn"]:
                kind = EDIT_KINDS[seed % len(EDIT_KINDS)]
                errors[name][kind].append(np.abs(levels(picture) - before).mean(-1)[kept])
            if mask is not None and WAYS[name]["threshold"]:
                own = seams(picture, Image.fromarray(before), plain, mask)
                steps[name].append(float(own.mean()) if own.size else 0.0)
    return {
        name: {
            "error": _mean([one for kind in errors[name].values() for one in kind]),
            **{kind: _mean(own) for kind, own in errors[name].items()},
            "right": 100 * float(np.mean(rights[name])),
            "seam": float(np.mean(steps[name])) if steps[name] else 0.0,
            "worst": max(steps[name], default=0.0),
        }
        for name in WAYS
    }


def _mean(parts: Sequence[np.ndarray]) -> float:
    joined = np.concatenate([*parts, np.zeros(0)])
    return float(joined.mean()) if joined.size else float("nan")


# ------------------------------------------------------------------------------------------------ shifted copies


def photo(rng: np.random.Generator, side: int) -> np.ndarray:
    """Levels (side, side, 3) with the spectrum of photos, 1 / f in amplitude and steeper, and a few discs on it."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf

    def field(fall: float) -> np.ndarray:
        real, imaginary = rng.standard_normal((2, *frequency.shape))
        noise = np.fft.irfft2((real + 1j * imaginary) / frequency**fall, s=(side, side))
        return np.asarray(noise / noise.std())[..., None]

    levels = rng.uniform(90, 160, 3) + 45 * field(1.3)
    levels = levels + 25 * field(1.6) * [1, -0.2, -0.8] + 20 * field(1.6) * [-0.5, 1, -0.5]
    for _ in range(4):
        disc = _radius(rng, side, 0.08, 0.2) < 1
        levels[disc] = 0.4 * levels[disc] + 0.6 * rng.uniform(20, 235, 3)
    return np.asarray(levels.clip(0, 255).round())


def shifted_copy(rng: np.random.Generator, levels: np.ndarray) -> np.ndarray:
    """A copy with gamma from 0.85 to 1.15, saturation 0.8 to 1.2, and of each channel gain 0.9 to 1.1 and an offset of
    up to 8 levels.
    """
    unit = (levels / 255) ** rng.uniform(0.85, 1.15)
    luma = (unit @ [0.299, 0.587, 0.114])[..., None]
    unit = luma + rng.uniform(0.8, 1.2) * (unit - luma)
    unit = unit * rng.uniform(0.9, 1.1, 3) + rng.uniform(-8, 8, 3) / 255
    return np.asarray((255 * unit.clip(0, 1)).round())


def _radius(rng: np.random.Generator, side: int, least: float, most: float) -> np.ndarray:
    """(side, side) the distance from the centre of an ellipse, over that of its edge; half axes from ``least`` to
    ``most`` of the side.
    """
    centre, axes = side * rng.uniform(0.3, 0.7, 2), side * rng.uniform(least, most, 2)
    y, x = np.mgrid[:side, :side]
    return np.hypot((y - centre[0]) / axes[0], (x - centre[1]) / axes[1])


def match_copy(seed: int, side: int = 256) -> dict[str, float]:
    """What color_match makes of one copy: the mean "error" where nothing was replaced, "before" and after; how far the
    "edit" is from its own colours on average, in the middle of it, half as far from the centre as its edge.
    """
    rng = np.random.default_rng(seed)
    original = photo(rng, side)
    radius = _radius(rng, side, 0.18, 0.3)
    part = radius < 1
    replaced = original.copy()
    replaced[part] = (rng.uniform(20, 235, 3) + 0.3 * (photo(rng, side) - 128)).clip(0, 255)[part]
    copy = shifted_copy(rng, replaced)
    image, reference = (Image.fromarray(one.astype(np.uint8)) for one in (copy, original))
    matched = levels(Edit(reference, True, None).finish(image, mx.zeros((1, 0, 0)))[0])
    return {
        "before": float(np.abs(copy - original)[~part].mean()),
        "error": float(np.abs(matched - original)[~part].mean()),
        "edit": float(np.abs(matched - copy)[radius < 0.5].mean()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=200, metavar="N")
    parser.add_argument("--copies", type=int, default=200, metavar="N")
    parser.add_argument("--height", type=int, default=HOME[0])
    parser.add_argument("--width", type=int, default=HOME[1])
    arguments = parser.parse_args(argv)
    if arguments.edits:
        pipe = Flux2Pipeline.from_pretrained("nano", cache=False)
        found: Mapping[str, Mapping[str, float]] = score_edits(
            pipe, unseen_edits(arguments.edits), (arguments.height, arguments.width), progress=True
        )
        print(f"{'':16}" + "".join(f"{column:>10}" for column in found["both"]))
        for name, figures in found.items():
            print(f"{name:16}" + "".join(f"{value:10.3f}" for value in figures.values()))
    copies = [match_copy(seed) for seed in tqdm(range(arguments.copies), leave=False)]
    for column in copies[0] if copies else ():
        values = [one[column] for one in copies]
        print(f"copies, {column:8} mean {np.mean(values):8.3f}   worst {max(values):8.3f}")


if __name__ == "__main__":
    main()
