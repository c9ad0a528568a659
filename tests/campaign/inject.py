"""Faults of the disk and the end of the process, at every operation on files that each command asks the system for.

    python -m tests.campaign.inject convert --modes kill half      # each operation of a command, or of "all"
    python -m tests.campaign.inject all --every 7 --seed 3         # a seventh of them
    python -m tests.campaign.inject all --kills 50                 # killed at random moments instead

A command runs in a forked child, disturbed by a library that stands between it and the system (shim.c, compiled with
cc), so that what MLX writes is disturbed too. Then, undisturbed, a second run: --resume where there is one.
"""

import argparse
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from tests.campaign import material
from tests.campaign.workloads import CACHED, WORKLOADS, Facts, Workload, is_partial

MODES = ("kill", "half", "enospc", "eio", "int", "term")  # as in shim.c, from 1 on
SECONDS = 120.0  # a run may take
SIGNALS = {"int": 130, "term": 143}
LINE = 2_100  # characters of a line that is told


def with_shim() -> None:
    """Begin this program anew with the library between it and the system, unless it is there."""
    if os.environ.get("FLUX2_MLX_SHIM"):
        return
    library = Path(tempfile.mkdtemp(prefix="campaign-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True)
    preload = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    environment = {**os.environ, "LD_PRELOAD": preload, "FLUX2_MLX_SHIM": str(library)}
    code = subprocess.run([sys.executable, "-m", "tests.campaign.inject", *sys.argv[1:]], env=environment).returncode
    shutil.rmtree(library.parent)
    sys.exit(code)


class Stage:
    """A folder for each run, beside one checkpoint."""

    def __init__(self) -> None:
        self.work = Path(os.path.realpath(tempfile.mkdtemp(prefix="campaign-")))
        self.model = self.work / "model"
        self.child(lambda: material.write_checkpoint(self.model))
        Image.init()  # imports that each child would do again
        importlib.import_module("huggingface_hub.utils")
        importlib.import_module("multiprocessing.synchronize")
        self.library = ctypes.CDLL(os.environ["FLUX2_MLX_SHIM"])
        self.library.campaign_kinds.restype = ctypes.c_char_p
        self.library.campaign_count.restype = ctypes.c_long

    def child(self, run, *, kill_after: float | None = None) -> tuple[int | None, str]:
        """(exit code, or minus a signal's number; what was told) of a function in a forked child; no code where it took
        too long. MLX has not computed anything here, or it could not in the child.
        """
        told = self.work / "told.txt"
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                output = os.open(told, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(output, 1)
                os.dup2(output, 2)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
                code = run() or 0
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code if isinstance(code, int) else 0)
        end = time.monotonic() + (SECONDS if kill_after is None else kill_after)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                code = None if kill_after is None else -signal.SIGKILL
                break
            time.sleep(0.002)
        return code, told.read_text(errors="replace") if told.exists() else ""

    def folder(self, name: str) -> Path:
        """A new folder with what the command reads."""
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.symlink(self.model, folder / "model")
        WORKLOADS[name].prepare(folder)
        return folder

    def run(
        self, name: str, folder: Path, argv: list[str], at: int = -1, mode: int = 0, kill_after: float | None = None
    ):
        """(exit code, what was told, the kinds of the operations) of one run of a command."""
        kinds = self.work / "kinds.txt"

        def run() -> int:
            os.chdir(folder)
            cache = (folder if name in CACHED else self.work) / "cache"  # outside of the folder it is not disturbed
            os.environ |= {"FLUX2_MLX_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
            if name not in CACHED:
                os.environ["FLUX2_MLX_DENSE_ROWS"] = "128"
            self.library.campaign_arm(str(folder).encode(), at, mode)
            code = WORKLOADS[name].main(argv)
            if mode == 0:
                kinds.write_bytes(self.library.campaign_kinds()[: self.library.campaign_count()])
            return code

        kinds.unlink(missing_ok=True)
        code, told = self.child(run, kill_after=kill_after)
        return code, told, kinds.read_bytes().decode() if kinds.exists() else ""


def faults_of(workload: Workload, folder: Path, expected: Facts, code: int | None, told: str, mode: str) -> list[str]:
    """What does not hold after a run that was disturbed."""
    faults = []
    if code is None:
        return [f"it hangs: {told[-300:]}"]
    killed = code == -signal.SIGKILL
    allowed = {0, *workload.codes, SIGNALS.get(mode, 0)} if not killed else {code}
    if code not in allowed:
        faults.append(f"exit code {code}: {told[-300:]}")
    if "Traceback" in told or any(len(line) > LINE for line in told.splitlines()):
        faults.append(f"no line: {told[-500:]}")
    if code == 2 and "error: " not in told:
        faults.append(f"no error is told: {told[-300:]}")
    if "a fault of flux2_mlx" in told:
        faults.append(f"an error that nobody expects: {told[-300:]}")
    try:
        found = workload.results(folder)
    except Exception as error:
        return [*faults, f"half a file under a final name: {type(error).__name__}: {error}"]
    if workload.results.__name__ == "written_folder" and found and found != expected:
        faults.append("half a folder under its name")
    if workload.results.__name__ == "images" and any(expected.get(name) != value for name, value in found.items()):
        faults.append(f"another image: {found}")
    left = [path.name for path in folder.rglob("*") if is_partial(path)]
    if left and not killed:
        faults.append(f"left behind: {left}")
    if code == 0 and found != expected:
        faults.append(f"success is told, and there is {difference(found, expected)}")
    return faults


def difference(found: Facts, expected: Facts) -> list[str]:
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def again(stage: Stage, name: str, folder: Path, expected: Facts) -> list[str]:
    """What does not hold after the second run, which nothing disturbs."""
    workload = WORKLOADS[name]
    argv = workload.again(folder)
    if argv is not None:
        code, told, _ = stage.run(name, folder, argv)
        if code != 0:
            return [f"the second run ends with {code}: {told[-300:]}"]
    try:
        found = workload.results(folder)
    except Exception as error:
        return [f"after the second run: {type(error).__name__}: {error}"]
    faults = [] if found == expected else [f"the second run gives another result: {difference(found, expected)}"]
    left = [path.name for path in folder.rglob("*") if is_partial(path)]
    return [*faults, f"left after the second run: {left}"] if left and argv is not None else faults


def tell(where: str, faults: list[str]) -> list[str]:
    for fault in faults:
        print(f"  {where}: {fault}", flush=True)
    return faults


def inject(stage: Stage, name: str, modes: list[str], every: int, rng: random.Random) -> tuple[Counter, list[str]]:
    """Disturb each operation, or one of ``every``, of a command in each mode."""
    workload, counts, finds = WORKLOADS[name], Counter(), []
    folder = stage.folder(name)
    stage.run(name, folder, workload.argv)  # compiles kernels
    folder = stage.folder(name)
    code, told, kinds = stage.run(name, folder, workload.argv)
    assert code == 0, told
    expected = workload.results(folder)
    counts["operations"] = len(kinds)
    for number, mode in enumerate(MODES, 1):
        if mode not in modes:
            continue
        for at, kind in enumerate(kinds):
            if (mode == "half" and kind != "w") or rng.randrange(every):
                continue
            folder = stage.folder(name)
            code, told, _ = stage.run(name, folder, workload.argv, at, number)
            faults = faults_of(workload, folder, expected, code, told, mode)
            faults += again(stage, name, folder, expected)
            counts[mode] += 1
            finds += tell(f"{name} {mode} at {at} ({kind})", faults)
    return counts, finds


def kill(stage: Stage, name: str, times: int, rng: random.Random) -> tuple[Counter, list[str]]:
    """Kill a command at random moments."""
    workload, counts, finds = WORKLOADS[name], Counter(), []
    folder = stage.folder(name)
    stage.run(name, folder, workload.argv)
    folder, started = stage.folder(name), time.monotonic()
    code, told, _ = stage.run(name, folder, workload.argv)
    seconds = time.monotonic() - started
    assert code == 0, told
    expected = workload.results(folder)
    while counts["kills"] < times:
        folder, moment = stage.folder(name), rng.uniform(0, seconds)
        code, told, _ = stage.run(name, folder, workload.argv, kill_after=moment)
        faults = faults_of(workload, folder, expected, code, told, "kill") + again(stage, name, folder, expected)
        counts["kills" if code == -signal.SIGKILL else "ended before"] += 1
        finds += tell(f"{name} killed after {moment:.3f} s", faults)
    return counts, finds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.inject")
    parser.add_argument("command", choices=("all", *WORKLOADS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--every", type=int, default=1, help="disturb one of so many operations, chosen by --seed")
    parser.add_argument("--kills", type=int, help="kill so often at random moments, and disturb nothing else")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with_shim()
    stage, found = Stage(), 0
    try:
        for name in WORKLOADS if arguments.command == "all" else [arguments.command]:
            rng, started = random.Random(f"{name} {arguments.seed}"), time.perf_counter()
            if arguments.kills is None:
                counts, finds = inject(stage, name, arguments.modes, arguments.every, rng)
            else:
                counts, finds = kill(stage, name, arguments.kills, rng)
            seconds = round(time.perf_counter() - started, 1)
            print(json.dumps({"command": name, **counts, "finds": len(finds), "seconds": seconds}), flush=True)
            found += len(finds)
    finally:
        shutil.rmtree(stage.work, ignore_errors=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
