"""The command line of training: options, what is refused before anything is read, plan, run, faults."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checks import check_prompt
from ..device import machine_memory
from ..dtypes import dtype_of, vae_dtype_of
from ..errors import InputError
from ..families import MAX_SEQUENCE_LENGTH
from ..fields import nearest
from ..options import MODEL, RuntimeOptions
from ..runtime.released import released_modules
from ..sampling.latents import PIXELS_PER_TOKEN
from ..training.dataset import Size, read_datasets
from ..training.folder import DataError
from ..training.options import ADAPTER, DATA, OPTIMIZATION, RUN, VALIDATION, TrainingOptions, training_dtype
from ..training.run import CONFIG, STATE, open_pipeline, plan_training, train
from .command import tell
from .common import Parser, path, silence_downloads
from .streams import shows_bars

MAX_FAULTS = 20  # most faults of a data set that are printed


HINTS = {
    "--epochs": "give --steps; an epoch is the number of images, with repeats, divided by --batch-size * --accumulate"
}


def build_parser() -> Parser:
    """The command line; an option that is not given is absent from the result."""
    parser = Parser(
        prog="flux2-lora",
        usage="%(prog)s --data FOLDER --output FOLDER [options]",
        argument_default=argparse.SUPPRESS,
        titles=(DATA, MODEL, ADAPTER, OPTIMIZATION, VALIDATION, RUN),
        hints={**HINTS, "--num-epochs": HINTS["--epochs"], "--num-train-epochs": HINTS["--epochs"]},
        description="Train a LoRA of FLUX.2 [klein] on a folder of images.",
        epilog="The folder has images, each with its caption in a .txt or .caption file of the same name; or a "
        'metadata.jsonl with a line {"file_name": "1.png", "text": "...", "reference": "before.png"} for each image; '
        "for edits, reference is the image before the edit. Images in a subfolder 10_NAME count ten times an epoch. Of "
        "several data sets each has the share of the passes that its weight has in their sum.",
    )
    parser.add_argument(
        "-c", "--config", type=path, metavar="FILE", help="options from a JSON or TOML file; flags replace them"
    )
    parser.add_argument("--resume", type=path, metavar="FOLDER", help="continue the run in this folder")
    parser.add_options(TrainingOptions)
    parser.titles[MODEL].add_argument(
        "--allow-distilled", action="store_true", help="train a distilled model, too, which undoes its distillation"
    )
    parser.add_option(RuntimeOptions, RuntimeOptions.field("memory_limit"))
    parser.add_argument("--plan", action="store_true", help="print the memory plan of training, and train nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
    parser.add_argument("--version", action="version", version=f"flux2_mlx {__version__}")
    return parser


# ---------------------------------------------------------------------------------------------------- options

_RUN = ("config", "resume", "allow_distilled", "memory_limit", "plan", "quiet")  # options that are of the command alone


def parse(argv: Sequence[str] | None) -> tuple[TrainingOptions, argparse.Namespace]:
    """The options of training, those of the command line before those of a file, and the command's own.

    Raises:
        InputError: for what cannot be used.
    """
    given = vars(build_parser().parse_args(argv))
    run = argparse.Namespace(**{name: given.pop(name, None) for name in _RUN})
    if run.resume is not None and run.config is not None:
        raise InputError("--resume goes on with the options of its run; --config is for a new one")
    file = run.config if run.resume is None else run.resume / CONFIG
    if run.resume is not None and not (run.resume / STATE).is_file():
        raise InputError(f"{run.resume} has no {STATE}: there is no run to go on with")
    values = {**({} if file is None else read_config(file)), **given}
    if run.resume is not None:
        values["output"] = str(run.resume)
    for name, example in (("data", "photos"), ("output", "my-lora")):
        if not values.setdefault(name, "") and not run.plan:
            raise InputError(f"no {name}: give one, as in --{name} {example}")
    return TrainingOptions(**values), run


def read_config(file: Path) -> dict[str, Any]:
    """Options from a JSON or TOML file.

    Raises:
        InputError: for an unreadable file, or an unknown option.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = _toml(text) if file.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} must be an object of options")
    known = [field.name for field in fields(TrainingOptions)]
    options = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in options:
        if name not in known:
            raise InputError(f"{file} has an unknown option {name!r}{nearest(name, known) or '; see --help'}")
    return options


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:
        raise InputError("TOML needs Python 3.11; write it as JSON") from None
    return tomllib.loads(text)


def check(options: TrainingOptions, resumes: bool) -> None:
    """Refuse what can be refused before anything is read.

    Raises:
        InputError: naming the value.
    """
    options.quantization()
    for text in (options.validation_prompt, options.trigger):
        if text:
            check_prompt(text)
    output = Path(options.output)
    if options.output and not resumes and (output / STATE).exists():
        raise InputError(f"{output} has a run: --resume {output} goes on with it; or give another --output")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output names a folder")


def print_plan(options: TrainingOptions, run: argparse.Namespace) -> None:
    """Print what training needs: of a released model from its known shapes, else from the files; without a data set, on
    images of the full resolution and no references.
    """
    side = options.resolution // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
    shapes: list[tuple[Size, ...]] = [((side, side),)]
    if options.data:
        examples = read_datasets(options.data, options.resolution, options.trigger)
        shapes = sorted({example.shape for example in examples})
    release = options.release
    if release is None:
        allow = bool(run.allow_distilled) or run.resume is not None
        pipe = open_pipeline(options, allow_distilled=allow, limit=run.memory_limit, progress=shows_bars(run.quiet))
        modules = pipe.text_encoder, pipe.transformer, pipe.autoencoder
        print(plan_training(modules, options, pipe.dtype, pipe.tokenizer.default_length, shapes, pipe.memory_limit))
        return
    dtype = dtype_of(training_dtype(options.dtype))
    limit = run.memory_limit or machine_memory()
    length = release.text_encoder.max_tokens or MAX_SEQUENCE_LENGTH
    modules = released_modules(release, dtype, options.quantization(), vae_dtype_of(options.vae_dtype))
    print(plan_training(modules, options, dtype, length, shapes, limit))


# ---------------------------------------------------------------------------------------------------- command


def run_training(options: TrainingOptions, run: argparse.Namespace) -> int:
    """Train and print the LoRA's path; returns the exit code."""
    result = train(
        options,
        resume=run.resume is not None,
        allow_distilled=bool(run.allow_distilled),
        limit=run.memory_limit,
        progress=shows_bars(run.quiet),
        report=None if run.quiet else lambda text: print(text, file=sys.stderr),
    )
    if result.lora is not None and result.ended_by is not None:
        tell(f"interrupted after step {result.step}; flux2-lora --resume {options.output} goes on")
    elif result.lora is not None:
        print(result.lora)
    return 0 if result.ended_by is None else 128 + result.ended_by


def tell_faults(error: DataError) -> None:
    """Print a line for each fault of a data set."""
    count = len(error.faults)
    tell(f"error: {error.source} has {count} {'fault' if count == 1 else 'faults'}:")
    for fault in error.faults[:MAX_FAULTS]:
        tell(f"  {fault}")
    if count > MAX_FAULTS:
        tell(f"  and {count - MAX_FAULTS} more")


def run(argv: Sequence[str] | None) -> int:
    """Train, or print the plan, as the command line says; each fault of a data set has a line.

    Returns:
        the exit code.

    Raises:
        InputError: for what cannot be used.
    """
    try:
        options, own = parse(argv)
        check(options, own.resume is not None)
        silence_downloads(own.quiet)
        if own.plan:
            print_plan(options, own)
            return 0
        return run_training(options, own)
    except DataError as error:
        tell_faults(error)
        return 2
