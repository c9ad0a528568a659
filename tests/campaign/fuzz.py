"""A seeded fuzzer of every parser: each input ends in success or in one of the project's errors, in time and memory.

    python -m tests.campaign.fuzz picture --seed 0 --count 1000     # one target, or "all"
    python -m tests.campaign.fuzz picture --seed 123 --count 1      # replays a find

Inputs are read in a forked child, which is watched: what hangs or kills it is a find like any other. A find is printed
with its target and seed, and its input is kept below --keep.
"""

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from flux2_mlx.errors import DeviceError, InputError, one_line
from tests.campaign import material
from tests.campaign.mutate import mutate
from tests.campaign.targets import TARGETS, Target

EXPECTED = (InputError, DeviceError, FloatingPointError, OSError)
SECONDS = 60.0  # an input may take, on a machine that others use too
GROWTH = 1 << 30  # bytes that the reader may grow by
MESSAGE = 20_000  # characters of an error; what a command prints of it is shorter still


def classify(target: Target, folder: Path, common: Path) -> tuple[str, str]:
    """("accepted" | "refused" | "find", what it was) of one input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UserWarning)  # what a user is told of
            target.run(folder, common)
    except EXPECTED as error:
        text = str(error)
        return (
            ("refused", one_line(error))
            if len(text) <= MESSAGE
            else ("find", f"a message of {len(text):,} characters: {text[:200]!r}")
        )
    except SystemExit as end:
        return ("accepted", "") if end.code in (0, None) else ("find", f"SystemExit {end.code}")
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "flux2_mlx" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "the harness"
        return "find", f"{type(error).__name__} in {place}: {str(error)[:200]!r}"
    return "accepted", ""


class Reader:
    """The inputs of a target, one after another in one folder."""

    def __init__(self, name: str, work: Path):
        self.name, self.target = name, TARGETS[name]
        self.common, self.work = work / "common", work
        material.write_checkpoint(self.common)
        self.seeds = self.target.seeds(self.common)

    def mutated(self, seed: int) -> tuple[int, dict[str, bytes]]:
        """(which seed, the files that are other than there) of the input of this number."""
        rng = random.Random(f"{self.name} {seed}")
        k = rng.randrange(len(self.seeds))
        names = sorted(name for name in self.seeds[k] if name.startswith(self.target.mutated))
        changed = {
            name: mutate(rng, name, self.seeds[k][name])
            for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2))))
        }
        return k, changed

    def read(self, seed: int) -> tuple[str, str]:
        k, changed = self.mutated(seed)
        folder = self.work / f"seed-{k}"
        if not folder.exists():
            for name, content in self.seeds[k].items():
                material.write(folder / name, content)
        before = set(folder.iterdir())
        for name, content in changed.items():
            (folder / name).write_bytes(content)
        try:
            return classify(self.target, folder, self.common)
        finally:
            for path in set(folder.iterdir()) - before:
                path.unlink()
            for name in changed:
                (folder / name).write_bytes(self.seeds[k][name])


def child(name: str, seeds: range, work: Path, pipe: int) -> None:
    """Read inputs, and tell the parent of each: that it begins, and what came of it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= {"FLUX2_MLX_CACHE": os.devnull, "FLUX2_MLX_DENSE_ROWS": "128", "HF_HUB_OFFLINE": "1"}
    reader = Reader(name, work)
    for k in range(len(reader.seeds)):  # a seed that is refused tests little
        reader.mutated = lambda _, k=k: (k, {})
        kind, what = reader.read(0)
        if kind != "accepted":
            raise SystemExit(f"{name}: seed {k} is {kind}: {what}")
    del reader.mutated
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + GROWTH
    for seed in seeds:
        os.write(pipe, f"{seed}\tbegins\t\n".encode())
        kind, what = reader.read(seed)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > limit:
            kind, what = "find", f"more than {GROWTH:,} bytes of memory"
        os.write(pipe, f"{seed}\t{kind}\t{what if kind == 'find' else ''}\n".encode("utf-8", "replace"))
        if what.startswith("more than"):
            return


def fuzz(name: str, seeds: range, keep: Path | None) -> tuple[Counter, dict[str, tuple[int, int]]]:
    """(how many inputs ended how, of each find its first seed and how often) of a target."""
    counts: Counter = Counter()
    finds: dict[str, tuple[int, int]] = {}
    while seeds:
        work = Path(tempfile.mkdtemp(prefix="campaign-"))
        here, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(name, seeds, work, there)
                os._exit(0)
            except SystemExit as end:
                print(end, file=sys.stderr)
                os._exit(3)
            except BaseException:
                traceback.print_exc()
                os._exit(4)
        os.close(there)
        last, kind, what = seeds.start - 1, "", ""
        with open(here, "rb", buffering=0) as pipe:
            rest = b""
            while True:
                if not select.select([pipe], [], [], SECONDS)[0]:
                    os.kill(pid, signal.SIGKILL)
                    what = f"nothing for {SECONDS:g} seconds"
                    break
                block = pipe.read(1 << 16)
                if not block:
                    break
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number, kind, text = line.decode().split("\t", 2)
                    last = int(number)
                    if kind != "begins":
                        counts[kind] += 1
                    if kind == "find":
                        first, often = finds.get(text, (last, 0))
                        finds[text] = first, often + 1
                        if not often and keep is not None:
                            save(name, last, keep)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        shutil.rmtree(work, ignore_errors=True)
        if code in (3, 4):
            raise SystemExit(f"{name}: the harness failed")
        if kind == "begins":
            counts["find"] += 1
            text = what or f"the process ended with {code}"
            finds[text] = finds.get(text, (last, 0))[0], finds.get(text, (last, 0))[1] + 1
            if keep is not None:
                save(name, last, keep)
        seeds = range(last + 1, seeds.stop)
    return counts, finds


def save(name: str, seed: int, keep: Path) -> None:
    """Keep the files of a find, made in a process of their own."""
    pid = os.fork()
    if pid == 0:
        try:
            work = Path(tempfile.mkdtemp(prefix="campaign-"))
            for file, content in Reader(name, work).mutated(seed)[1].items():
                material.write(keep / f"{name}-{seed}" / file, content)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.fuzz")
    parser.add_argument("target", choices=("all", *TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the next ones have the next numbers")
    parser.add_argument("--count", type=int, default=100, help="inputs of each target")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of finds")
    arguments = parser.parse_args()
    found: collections.Counter = Counter()
    for name in TARGETS if arguments.target == "all" else [arguments.target]:
        started = time.perf_counter()
        counts, finds = fuzz(name, range(arguments.seed, arguments.seed + arguments.count), arguments.keep)
        figures = {kind: counts[kind] for kind in ("accepted", "refused", "find")}
        print(json.dumps({"target": name, **figures, "seconds": round(time.perf_counter() - started, 1)}), flush=True)
        for what, (seed, often) in finds.items():
            print(f"  {often} x {name} --seed {seed} --count 1: {what}", flush=True)
        found += counts
    print(json.dumps({"inputs": sum(found.values()), **found}))
    return 1 if found["find"] else 0


if __name__ == "__main__":
    sys.exit(main())
