"""All that a GPU can tell of this library, in ten minutes or less: for a Mac or a CUDA machine that is at hand.

    python -m benchmarks.gpu FOLDER                  # on the GPU; peers that are installed are measured beside it
    python -m benchmarks.gpu FOLDER --tiny           # tiny shapes on any machine, to see that it runs

Sections, the most wanted first, each in a process and with a time limit of its own, so that neither a failure nor a cut
costs the others: what a section printed is in FOLDER/SECTION.txt as it comes, and FOLDER/report.json is written anew
after each. Nothing is downloaded: klein-4b is its true shapes in random weights.

doctor: flux2-doctor --full, its Markdown in FOLDER/doctor.md. compare: text encoder, step and decode at 512 and 1024
pixels in bfloat16 and in 4 bits, in turns with mflux, mlx-vlm and diffusers (benchmarks.compare says how). parity: the
tests of tests/parity on the GPU, which take the dev extra. plan: each stage's peak memory beside what was planned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, print_json, print_row
from benchmarks.contenders import PACKAGES, missing
from flux2_mlx.device import on_gpu

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 10  # a section that has less is not begun


@dataclass(frozen=True)
class Section:
    """A module to run in a process of its own.

    Attributes:
        words: the module's name and options.
        seconds: the most that it may take.
        is_benchmark: whether its last line is a report in JSON.
    """

    name: str
    words: tuple[str, ...]
    seconds: int
    is_benchmark: bool = True


def sections(folder: Path, *, tiny: bool) -> list[Section]:
    """The sections, the most wanted first."""
    shapes = ("--random", "tiny", "--text-length", "16") if tiny else ("--random", "4b", "--dtype", "bfloat16")
    against = [word for name in PACKAGES if missing(name) is None for word in ("--against", name)]
    against = against or ["--against", "floor"]

    def compare(size: int, bits: int, seconds: int) -> Section:
        stages = ("text_encoder", "step", "decode") if size == sizes[0] else ("step", "decode")
        packed = ("--quantize", str(bits)) if bits else ()
        words = (*shapes, "--size", str(size), *packed, "--stages", *stages, *against)
        rest = ("--repeats", "1" if tiny else "3", "--tolerance", "inf")
        name = f"compare-{size}-{f'{bits}-bits' if bits else 'dense'}"
        return Section(name, ("benchmarks.compare", *words, *rest), seconds)

    sizes = (64, 32) if tiny else (1024, 512)
    report, checkpoint = str(folder / "doctor.md"), str(folder / "checkpoint")
    only = "tests/parity/test_taef2.py" if tiny else "tests/parity"
    planned = ("--tiny", "--text-length", "16") if tiny else ("--quantize", "4", "--dtype", "bfloat16")
    doctor = ("flux2_mlx.doctor", "--report", report, *(() if tiny else ("--full",)))
    return [
        Section("doctor", doctor, 240, is_benchmark=False),
        compare(sizes[0], 0, 150),
        compare(sizes[0], 4, 120),
        Section("parity", ("pytest", "-q", "-p", "no:cacheprovider", only), 120, is_benchmark=False),
        Section("plan", ("benchmarks.plan", checkpoint, "--size", str(sizes[0]), *planned), 120),
        compare(sizes[1], 0, 90),
        compare(sizes[1], 4, 90),
    ]


def run(section: Section, folder: Path, seconds: float) -> dict[str, Any]:
    """What became of a section, and its report where it has one."""
    path, start = folder / f"{section.name}.txt", time.perf_counter()
    command = [sys.executable, "-u", "-m", *section.words]
    environment = {"FLUX2_MLX_TEST_DEVICE": "gpu" if on_gpu() else "cpu", **os.environ}
    with path.open("wb") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=seconds
            ).returncode
            became = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            became = "cut off"
    found: dict[str, Any] = {"became": became, "seconds": time.perf_counter() - start}
    if became == "done" and section.is_benchmark:
        found["report"] = json.loads(path.read_text().splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where outputs and report.json are written")
    parser.add_argument("--seconds", type=float, default=600, help="of all sections together (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="SECTION", help="these sections alone, by the start of their names"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args(argv)
    end, folder = time.perf_counter() + arguments.seconds, arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = tuple(arguments.only or [""])
    found: dict[str, dict[str, Any]] = {}
    for section in sections(folder, tiny=arguments.tiny):
        if not section.name.startswith(wanted):
            continue
        left = min(section.seconds, end - time.perf_counter())
        found[section.name] = run(section, folder, left) if left >= LEAST_SECONDS else {"became": "not begun"}
        print_row(section.name, (found[section.name]["became"], found[section.name].get("seconds")), width=16)
        (folder / "report.json").write_text(json.dumps({"sections": found, **machine()}, indent=1) + "\n")
    print_json("gpu", arguments, {"sections": found})


if __name__ == "__main__":
    main()
