"""python -m flux2_mlx.lora: a folder of pictures and captions to a LoRA.

    python -m flux2_mlx.lora --data photos --output fox --trigger "sks fox"
    python -m flux2_mlx.lora --config fox.json --steps 2000
    python -m flux2_mlx.lora --resume fox

The folder of a run has lora.safetensors (the latest), checkpoints/ (LoRAs of earlier steps, and the state to go on
with), samples/, log.jsonl (a line a step), loss.png, config.json (the options), and cache/ (latents, prompts).
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ._version import __version__
from .adapters.keys import NAMES
from .cli.common import INTERRUPTED, MODEL_HELP, PART_OPTIONS, Parser, add_model_options, gigabytes
from .device import machine_memory
from .errors import InputError, one_line
from .families import MAX_SEQUENCE_LENGTH, find_release
from .options import check_prompt, dtype_of
from .quantization.spec import parse_options
from .runtime.released import released_modules
from .sampling.latents import PIXELS_PER_TOKEN
from .training.dataset import DataError, Size, read_dataset
from .training.options import DECAYS, DTYPES, TIMESTEPS, TrainingOptions, training_dtype
from .training.run import CONFIG, STATE, open_pipeline, plan_training, train

MAX_FAULTS = 20  # of a data set that are printed


def build_parser() -> argparse.ArgumentParser:
    """The command line; what is not given is not among its results."""
    default = {field.name: field.default for field in fields(TrainingOptions)}
    parser = Parser(
        prog="flux2-lora",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a LoRA of FLUX.2 [klein] on a folder of pictures.",
        epilog="A folder has pictures, each with its caption in a .txt file of the same name, or metadata.jsonl: "
        '{"file_name": "1.png", "text": "...", "reference": "before.png"} a line, the reference for edits.',
    )

    def add(name: str, kind: Any = str, what: str = "", **options: Any) -> None:
        shown = "" if default[name] in (None, "", ()) else f" ({default[name]})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=what + shown, **options)

    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="options, as JSON or TOML; those here win")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    add("data", what="folder of pictures and captions", metavar="FOLDER")
    add("output", what="folder of the run, which must not have one", metavar="FOLDER")
    add("model", what=f"{MODEL_HELP}; a base model is the one to train")
    add_model_options(parser)
    parser.add_argument("--allow-distilled", action="store_true", help="train a distilled model all the same")
    add("dtype", what="of the transformer (bfloat16; float32 on a CPU)", choices=DTYPES)
    add("resolution", int, "pixels; pictures have at most its square")
    add("trigger", what="a word to stand before every caption that has it not", metavar="WORD")
    add("steps", int, "of the optimizer")
    add("batch_size", int, "pictures in a pass, as far as so many have one size")
    add("accumulate", int, "passes in a step; processes of mlx.launch share them")
    add("rank", int, "of the LoRA")
    add("alpha", float, "its change is scaled by alpha / rank (the rank)")
    add("targets", what="layers to change, by parts of their paths (all of the blocks)", nargs="+", metavar="NAME")
    add("dropout", float, "share of a layer's inputs that its LoRA does not see")
    add("learning_rate", float, "of AdamW")
    add("weight_decay", float, "of AdamW")
    add("warmup", int, "steps in which the learning rate rises")
    add("decay", what="of the learning rate then", choices=DECAYS)
    add("clip", float, "largest norm of all gradients")
    add("timesteps", what="how noise levels are drawn", choices=TIMESTEPS)
    add("caption_dropout", float, "share of the captions that are left out")
    add(
        "preserve",
        what="captions, one a line, for which the model is to stay as it was; more than twice the time",
        metavar="FILE",
    )
    add("preserve_weight", float, "what a change of these counts, beside what is learned")
    add("ema", float, "decay of a moving average of the weights, which is then the result; 0: none")
    parser.add_argument(
        "--grad-checkpoint",
        action=argparse.BooleanOptionalAction,
        help="compute blocks again in the backward pass, to save memory (on)",
    )
    add("seed", int, "of everything that is drawn at random")
    add("names", what="of the layers in the written file", choices=NAMES)
    add("save_every", int, "steps between checkpoints")
    add("validation_prompt", what="draw this now and then")
    add("validation_image", what="pictures that it is edited from", nargs="+", metavar="FILE")
    add("validate_every", int, "steps between these pictures")
    add("validation_steps", int, "that they are drawn in (25; distilled 4)")
    parser.add_argument(
        "--memory-limit", type=gigabytes, metavar="GB", help="memory to keep to (what the machine has now)"
    )
    parser.add_argument("--plan", action="store_true", help="print what training needs, and train nothing")
    parser.add_argument("--quiet", action="store_true", help="no bars, no summary")
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


def read_config(path: Path) -> dict[str, Any]:
    """Options from a JSON or TOML file.

    Raises:
        InputError: for a file that is none, or an option that there is not.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = _toml(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be an object of options")
    known = [field.name for field in fields(TrainingOptions)]
    options = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{path} has an unknown option {name!r}" + (f"; {near[0]}?" if near else "; see --help"))
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
    parse_options(options.quantize, options.quantize_text_encoder, options.group_size)
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
    pictures of the full resolution and no references.
    """
    side = options.resolution // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
    shapes: list[tuple[Size, ...]] = [((side, side),)]
    if options.data:
        examples = read_dataset(Path(options.data), options.resolution, options.trigger)
        shapes = sorted({example.shape for example in examples})
    release = find_release(options.model)
    others = [getattr(options, part) for part in PART_OPTIONS if part not in ("distilled", "kv_cache")]
    if release is None or any(others) or Path(options.model).exists():
        allow = bool(run.allow_distilled) or run.resume is not None
        pipe = open_pipeline(options, allow_distilled=allow, limit=run.memory_limit, progress=not run.quiet)
        modules = pipe.text_encoder, pipe.transformer, pipe.autoencoder
        print(plan_training(modules, options, pipe.dtype, pipe.tokenizer.default_length, shapes, pipe.memory_limit))
        return
    dtype = dtype_of(training_dtype(options.dtype))
    packed = parse_options(options.quantize, options.quantize_text_encoder, options.group_size)
    limit = run.memory_limit or machine_memory()
    modules = released_modules(release.name, dtype, packed)
    print(plan_training(modules, options, dtype, MAX_SEQUENCE_LENGTH, shapes, limit))


# ---------------------------------------------------------------------------------------------------- command


def run_training(options: TrainingOptions, run: argparse.Namespace) -> int:
    """Train and print the LoRA's path; returns the exit code."""
    result = train(
        options,
        resume=run.resume is not None,
        allow_distilled=bool(run.allow_distilled),
        limit=run.memory_limit,
        progress=not run.quiet,
        report=None if run.quiet else lambda line: print(line, file=sys.stderr),
    )
    if result.lora is not None and result.is_interrupted:
        print(f"interrupted after step {result.step}; flux2-lora --resume {options.output} goes on", file=sys.stderr)
    elif result.lora is not None:
        print(result.lora)
    return INTERRUPTED if result.is_interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, 2 for input that cannot be used (on standard error, of a data set a line for each fault), 130
        after Ctrl-C, which finishes the step and saves.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            options, run = parse(argv)
            check(options, run.resume is not None)
            if run.plan:
                print_plan(options, run)
                return 0
            return run_training(options, run)
        except DataError as error:
            count = len(error.faults)
            print(f"error: {error.source} has {count} {'fault' if count == 1 else 'faults'}:", file=sys.stderr)
            print("\n".join(f"  {fault}" for fault in error.faults[:MAX_FAULTS]), file=sys.stderr)
            if count > MAX_FAULTS:
                print(f"  and {count - MAX_FAULTS} more", file=sys.stderr)
            return 2
        except (InputError, FloatingPointError, OSError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; what was saved before is kept", file=sys.stderr)
            return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
