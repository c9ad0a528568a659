"""Seconds from the command to the picture: python -m benchmarks.start --model FOLDER [--size 512]

Each situation is a process of its own, and they take turns: files read before ("warm") or dropped from the system's
memory first ("cold", where the system has posix_fadvise; on a Mac run `sudo purge` between runs with --repeats 1),
without reading the next stage's files ahead, and with a prompt that was drawn before. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import machine, process_peak_gb
from flux2_mlx import open_checkpoint

DRAW = "from flux2_mlx.generate import main; raise SystemExit(main())"
NOT_AHEAD = f"import flux2_mlx.pipeline; flux2_mlx.pipeline.read_through = lambda *_: 0; {DRAW}"
# What each situation runs, whether files are dropped before, and whether the prompt is a new one.
SITUATIONS = {
    "cold": (DRAW, True, True),
    "cold, nothing read ahead": (NOT_AHEAD, True, True),
    "warm": (DRAW, False, True),
    "warm, a prompt drawn before": (DRAW, False, False),
}


def drop(files: Sequence[Path]) -> None:
    """Let the system forget what it holds of these files."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--text-length", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    files = [file for source in open_checkpoint(arguments.model).sources.values() for file in source.files]
    size, steps = str(arguments.size), str(arguments.steps)
    options = [
        "--model",
        arguments.model,
        "--width",
        size,
        "--height",
        size,
        "--steps",
        steps,
        "--max-sequence-length",
        str(arguments.text_length),
        "--seed",
        "1",
        "--quiet",
    ]
    seconds: dict[str, list[float]] = {name: [] for name in SITUATIONS}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FLUX2_MLX_CACHE": str(Path(folder) / "cache")}
        for repeat in range(arguments.repeats):
            for name, (code, dropped, new) in SITUATIONS.items():
                if dropped and hasattr(os, "posix_fadvise"):
                    drop(files)
                prompt = f"a fox, {name}, {repeat}" if new else f"a fox, warm, {repeat}"
                output = str(Path(folder) / f"{len(seconds[name])}-{name}.png")
                start = time.perf_counter()
                command = [sys.executable, "-c", code, prompt, *options, "--output", output]
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':30}{'median s':>10}{'of warm':>10}")
    for name, value in medians.items():
        print(f"{name:30}{value:10.2f}{value / medians['warm']:10.2f}")
    print(
        json.dumps(
            {
                "benchmark": "start",
                "variant": vars(arguments),
                "seconds": seconds,
                "process_peak_gb": process_peak_gb(),
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
