"""What the injector disturbs: a command line of each command on the smallest checkpoint, and what must hold."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors import safe_open

from flux2_mlx import convert, fuse, generate, lora
from flux2_mlx.writing import PARTIAL
from tests.campaign import material

Facts = dict[str, str]  # what a folder holds, by name: digests of what does not depend on the time of day
SMALL = ["--width", "64", "--height", "64", "--steps", "2", "--max-sequence-length", "16", "--quiet"]


@dataclass(frozen=True)
class Workload:
    """A command, and the truth of its folder.

    Attributes:
        main: the command.
        argv: its command line, in a folder beside the checkpoint "model".
        again: the command line after a fault, by what is there; None where the target is whole.
        results: the digests of the finished results, which a second run must bring; an unfinished one has some of them.
        prepare: writes what the command reads into the folder.
        codes: exit codes of an error that was told.
    """

    main: Callable[[list[str]], int]
    argv: list[str]
    again: Callable[[Path], list[str] | None]
    results: Callable[[Path], Facts]
    prepare: Callable[[Path], object] = lambda _: None
    codes: tuple[int, ...] = (2,)


def digest(content: bytes | str) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]


def image_digest(path: Path) -> str:
    with Image.open(path) as image:
        return digest(image.convert("RGB").tobytes())


def arrays_digest(path: Path) -> str:
    """Of the arrays of a file, whatever their order."""
    with safe_open(path, framework="numpy") as file:
        names = sorted(file.keys())
        return digest(
            b"".join(
                f"{name} {file.get_slice(name).get_dtype()}".encode() + file.get_tensor(name).tobytes()
                for name in names
            )
        )


def is_partial(path: Path) -> bool:
    return PARTIAL in path.name


# ---------------------------------------------------------------------------------------------------- images


def images(folder: Path) -> Facts:
    """Every image, by the name that it would have where nothing stood in its way."""
    found: Facts = {}
    for path in sorted(folder.glob("[!.]*.png")):
        name = re.sub(r"-\d+$", "", path.stem) if path.stem != "preview" else path.stem
        value = image_digest(path)
        if path.stem == "preview":
            continue  # of any step: it could be opened
        assert found.setdefault(name, value) == value, f"two images of {name}"
    return found


JOBS = [{"prompt": text, "seed": seed, "output": f"{text}.png"} for seed, text in enumerate(("a", "b", "c"))]


def write_jobs(folder: Path) -> None:
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, JOBS)))


# ---------------------------------------------------------------------------------------------------- checkpoints


def written_folder(folder: Path) -> Facts:
    target = folder / "new"
    return {
        file.relative_to(target).as_posix(): digest(file.read_bytes()) for file in target.rglob("*") if file.is_file()
    }


def write_lora(folder: Path) -> None:
    (folder / "l.safetensors").write_bytes(material.lora())


def unless_there(argv: list[str]) -> Callable[[Path], list[str] | None]:
    return lambda folder: None if (folder / "new").exists() else argv


def writing(
    main: Callable[[list[str]], int], *more: str, prepare: Callable[[Path], object] = lambda _: None
) -> Workload:
    argv = ["model", "new", "--quiet", *more]
    return Workload(main, argv, unless_there(argv), written_folder, prepare)


# ---------------------------------------------------------------------------------------------------- training

TRAIN = ["--data", "data", "--output", "run", "--model", "model", "--steps", "3", "--save-every", "2", "--rank", "2"]
TRAIN += ["--resolution", "64", "--dtype", "float32", "--allow-distilled", "--quiet"]
TRAIN += ["--validation-prompt", "a fox", "--validate-every", "2", "--validation-steps", "1"]


def train_again(folder: Path) -> list[str] | None:
    return ["--resume", "run", "--quiet"] if (folder / "run/checkpoints/state.safetensors").exists() else TRAIN


def run_folder(folder: Path) -> Facts:
    """All of a run's files can be read; those of the last step are compared."""
    run, found = folder / "run", {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or is_partial(path) or name.startswith("cache/"):
            continue
        if path.suffix == ".png":
            value = image_digest(path)
        elif path.suffix == ".safetensors":
            value = arrays_digest(path)
        elif path.name == "config.json":
            value = digest(json.dumps(json.loads(path.read_text()), sort_keys=True))
        elif path.name == "log.jsonl":
            value = log_digest(path)
        else:
            continue
        found[name] = value
    return found


def log_digest(path: Path) -> str:
    """Of the steps and losses; a last line that was cut short is no step, and none may be there twice."""
    steps = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)
        except ValueError:
            continue
        steps.append((step["step"], step["loss"]))
    return digest(repr(steps))


GENERATE = ["a fox", "--model", "model", *SMALL]
RESUMED = ["--jobs", "jobs.jsonl", "--resume", "--model", "model", *SMALL]
ONE = [*GENERATE, "--seed", "1", "--output", "{seed}.png"]
IMAGES = [*GENERATE, "--seed", "1", "--num-images", "2", "--output", "{seed}.png", "--preview", "preview.png"]
WORKLOADS: Mapping[str, Workload] = {
    "images": Workload(generate.main, IMAGES, lambda _: IMAGES, images),
    "jobs": Workload(generate.main, RESUMED, lambda _: RESUMED, images, write_jobs, (1, 2)),
    "cache": Workload(generate.main, ONE, lambda _: ONE, images),
    "convert": writing(convert.main),
    "convert-4bit": writing(convert.main, "--quantize", "4", "--group-size", "32"),
    "convert-bfl": writing(convert.main, "--layout", "bfl"),
    "fuse": writing(fuse.main, "--lora", "l.safetensors", prepare=write_lora),
    "training": Workload(
        lora.main, TRAIN, train_again, run_folder, lambda folder: material.write_dataset(folder / "data")
    ),
}
# Of these the prompt cache and tables are in the folder too, and disturbed as the results are.
CACHED = ("cache",)
# Results that differ until a run is at its end.
GROWING = ("run/log.jsonl",)
