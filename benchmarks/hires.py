"""How well does the composition stay where a large image is begun from a small one, and what does that cost?

    python -m benchmarks.hires [--small 64] [--size 128] [--strengths 0.25 0.5 0.75] [--tile 128]

Captions of nano's world that training never saw are drawn at a small size, and then larger: anew from the same seed,
from the small image's latents (as --hires does) and from the image (img2img), by each strength, in turn; with --tile
also in tiles (as --hires-tile does). The table says of each how far it is from the enlarged small image (levels of
255), how many captions are right, its share of the seconds of drawing anew, the small image aside, and with --tile its
seams: by how many levels neighbouring pixels differ more at tiles' edges than elsewhere. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.common import print_json, print_row
from examples.nano_score import Drawn, rates, unseen_tasks
from examples.nano_world import judge
from flux2_mlx import Flux2Pipeline
from flux2_mlx.sampling.latents import PIXELS_PER_TOKEN
from flux2_mlx.sampling.tiles import divide


def seams(picture: Image.Image, tile: int) -> float:
    """The mean difference of neighbouring pixels at the edges of the tiles of a picture, less that elsewhere."""
    levels = np.asarray(picture, float)
    tiling = divide(levels.shape[:2], tile)
    if tiling is None:
        return 0.0
    excess = []
    for axis, own in enumerate((tiling.rows, tiling.columns)):
        steps = np.abs(np.diff(levels, axis=axis)).mean((1 - axis, 2))  # of each pixel to the next one
        edges = {edge * PIXELS_PER_TOKEN for start in own.starts for edge in (start, start + own.length)}
        is_edge = np.isin(np.arange(1, len(steps) + 1), list(edges))
        excess += [] if not is_edge.any() else [steps[is_edge].mean() - steps[~is_edge].mean()]
    return float(np.mean(excess))


def draw_all(pipe: Flux2Pipeline, arguments: argparse.Namespace) -> dict[str, list[tuple[Drawn, float, float]]]:
    """Of each way every caption's drawing, how far it is from the small one, and its seconds."""
    found: dict[str, list[tuple[Drawn, float, float]]] = {}
    size = {"height": arguments.size, "width": arguments.size}
    for seed, task in enumerate(tqdm(unseen_tasks(arguments.captions), leave=False)):
        common = {"seed": seed, "num_steps": arguments.steps}
        own = {"height": arguments.small, "width": arguments.small, **common}
        latents = pipe(task.caption, output_type="latent", **own).images
        small = pipe(task.caption, **own).images[0]
        ways = {"small": own, "anew": size | common}
        for k, strength in enumerate(arguments.strengths):
            image = small.copy()
            image.putpixel((0, 0), (k, k, k))  # or what was encoded for the strength before would be taken again
            ways[f"latents {strength:g}"] = {"init_latents": latents, "strength": strength, **size, **common}
            ways[f"image {strength:g}"] = {"init_image": image, "strength": strength, **size, **common}
            if arguments.tile is not None:
                tiles = {"hires": arguments.size / arguments.small, "hires_tile": arguments.tile}
                tiles |= {"init_latents": latents, "hires_strength": strength}
                ways[f"tiles {strength:g}"] = tiles | size | common
        for name, options in ways.items():
            started = time.perf_counter()
            (picture,) = pipe(task.caption, **options).images
            seconds = time.perf_counter() - started
            enlarged = small.resize(picture.size, Image.Resampling.BICUBIC)
            off = float(np.abs(np.asarray(picture, float) - np.asarray(enlarged)).mean())
            drawn = Drawn(task, picture, judge(np.array(picture), task.scene))
            found.setdefault(name, []).append((drawn, off, seconds))
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="one of this world (%(default)s)")
    parser.add_argument("--small", type=int, default=64, help="width and height of the small images (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="and of the large ones (%(default)s)")
    parser.add_argument("--captions", type=int, default=20, help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (%(default)s)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="(0.25 0.5 0.75)")
    parser.add_argument("--tile", type=int, help="most pixels a side of tiles; unless given there are none")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    pipe = Flux2Pipeline.from_pretrained(arguments.model, cache=False)
    pipe("a star", height=arguments.size, width=arguments.size, num_steps=1)  # warms up
    found = draw_all(pipe, arguments)
    columns = ("off", "right", "seconds") if arguments.tile is None else ("off", "right", "seconds", "seams")
    print_row("", columns, width=10, first=14)
    ways = {}
    for name, own in found.items():
        shares = [seconds / anew for (*_, seconds), (*_, anew) in zip(own, found["anew"], strict=True)]
        ways[name] = {
            "off": statistics.mean(off for _, off, _ in own),
            "right": rates([drawn for drawn, *_ in own])["whole"],
            "seconds": statistics.median(shares),
        }
        if arguments.tile is not None:
            ways[name]["seams"] = statistics.mean(seams(drawn.picture, arguments.tile) for drawn, *_ in own)
        print_row(name, ways[name].values(), width=10, first=14)
    print_json("hires", arguments, {"ways": ways})


if __name__ == "__main__":
    main()
