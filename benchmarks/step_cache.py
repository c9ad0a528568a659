"""What step caching saves and costs with nano: python -m benchmarks.step_cache [--thresholds 0.05 0.1]

Captions and edits that training never saw are drawn in many steps with every step computed, then with each threshold,
and, to compare with, in fewer steps. Prints a table and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.common import machine, process_peak_gb
from benchmarks.nano_score import Drawn, open_variant, rates, unseen_edits, unseen_tasks
from benchmarks.nano_world import HOME, judge, render
from flux2_mlx.cli.common import Parser
from flux2_mlx.families import NANO
from flux2_mlx.options import CheckpointOptions


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=NANO, help="one of nano's world (%(default)s)")
    parser.add_options(CheckpointOptions, skip=["model"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--edits", type=int, default=16)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.05, 0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--fewer", type=int, nargs="*", default=[25, 15], help="steps to compare with")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    pipe = open_variant(arguments)
    usual = {"guidance": arguments.guidance, "force_guidance": True, "height": HOME[0], "width": HOME[1]}
    ways: dict[str, dict[str, Any]] = {f"{arguments.steps} steps": {"num_steps": arguments.steps}}
    for threshold in arguments.thresholds:
        ways[f"threshold {threshold:g}"] = {"num_steps": arguments.steps, "step_cache": threshold}
    ways |= {f"{steps} steps": {"num_steps": steps} for steps in arguments.fewer}
    tasks = unseen_tasks(arguments.captions) + unseen_edits(arguments.edits)
    pipe(tasks[0].caption, **usual, num_steps=2)  # warms up
    drawn: dict[str, list[Drawn]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    computed = dict.fromkeys(ways, 0)
    for seed, task in enumerate(tqdm(tasks, leave=False)):
        references = [Image.fromarray(render(scene, *HOME)) for scene in task.references]
        for name, options in ways.items():  # in turn, so that other work on the machine slows all of them
            result = pipe(task.caption, image=references or None, seed=seed, **usual, **options)
            (picture,) = result.images
            drawn[name].append(Drawn(task, picture, judge(np.array(picture), task.scene)))
            seconds[name].append(result.seconds["denoise"])
            computed[name] += result.steps["computed"]
    plain = next(iter(ways))
    columns = ("steps", "seconds", "error", "worst", "captions", "edits")
    print(f"{'':16}" + "".join(f"{column:>10}" for column in columns))
    figures = {}
    for name in ways:
        errors = [
            np.abs(np.asarray(one.picture, float) - np.asarray(other.picture)).mean()
            for one, other in zip(drawn[name], drawn[plain], strict=True)
        ]
        shares = [own / whole for own, whole in zip(seconds[name], seconds[plain], strict=True)]
        parts = {"captions": drawn[name][: arguments.captions], "edits": drawn[name][arguments.captions :]}
        figures[name] = {
            "steps": computed[name] / len(tasks),
            "seconds": statistics.median(shares),
            "error": float(np.mean(errors)),
            "worst": float(max(errors)),
            **{part: rates(those)["whole"] for part, those in parts.items() if those},
        }
        print(f"{name:16}" + "".join(f"{figures[name].get(column, float('nan')):10.2f}" for column in columns))
    report = {"benchmark": "step_cache", "variant": vars(arguments), "figures": figures, "plain_s": sum(seconds[plain])}
    print(json.dumps({**report, **machine(), "process_peak_gb": process_peak_gb()}))


if __name__ == "__main__":
    main()
