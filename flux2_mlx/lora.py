"""python -m flux2_mlx.lora: a folder of pictures and captions to a LoRA.

    python -m flux2_mlx.lora --data photos --output fox --trigger "sks fox"
    python -m flux2_mlx.lora --config fox.json --steps 2000
    python -m flux2_mlx.lora --resume fox

The folder of a run has lora.safetensors (the latest), checkpoints/ (LoRAs of earlier steps, and the state to go on
with), samples/, log.jsonl (a line a step), loss.png, config.json (the options), and cache/ (latents, prompts).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ._version import __version__
from .adapters.lora import NAMES
from .checkpoints.checkpoint import materialize
from .cli.common import MODEL_HELP, MODEL_OPTIONS, PART_OPTIONS, Parser, add_model_options, gigabytes, launched
from .imaging.files import open_image, reference_size, written_beside
from .models.autoencoder import AutoEncoder
from .models.config import MAX_SEQUENCE_LENGTH, RELEASED, InputError
from .models.flux2 import FluxKlein
from .models.qwen3 import Qwen3TextEncoder
from .pipeline import Flux2Pipeline, check_prompt, dtype_of
from .quantization.layers import parse_options, tune
from .runtime.activations import machine_memory, weight_bytes, wired, within
from .runtime.plan import TrainingPlan, make_training_plan, released_modules
from .sampling.latents import PIXELS_PER_TOKEN
from .training.dataset import Batches, DataError, Example, Size, bucket, fingerprint, read_captions, read_dataset
from .training.trainer import (
    DECAYS,
    DTYPES,
    TIMESTEPS,
    Encoded,
    Progress,
    Trainer,
    TrainingOptions,
    adapter_size,
    pictures_of,
    training_dtype,
)

CONFIG, LORA, LOG, CURVE = "config.json", "lora.safetensors", "log.jsonl", "loss.png"
CHECKPOINTS = "checkpoints"
STATE = f"{CHECKPOINTS}/state.safetensors"  # beside lora.safetensors it would make the folder one of two LoRAs
MAX_FAULTS = 20  # of a data set that are printed
SMOOTHED = 50  # steps whose losses are averaged to be looked at
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


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


# ---------------------------------------------------------------------------------------------------- a run


def train(options: TrainingOptions, run: argparse.Namespace) -> int:
    """Train, and write what comes of it.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        InputError: for what cannot be used, a DataError for the data set.
        FloatingPointError: where the numbers stop being finite.
    """
    group = launched()
    is_first = group is None or group.rank() == 0
    quiet = bool(run.quiet) or not is_first
    examples = read_dataset(Path(options.data), options.resolution, options.trigger)
    preserved = read_captions(Path(options.preserve), examples) if options.preserve else []
    identity = fingerprint(examples, preserved)
    _agree(identity, group)
    pipe = open_pipeline(options, run)
    modules = pipe.text_encoder, pipe.transformer, pipe.autoencoder
    length, shapes = pipe.tokenizer.default_length, sorted({example.shape for example in examples})
    plan = plan_of(modules, options, pipe.dtype, length, shapes, pipe.memory_limit)
    if not quiet:
        print(f"{summary(examples, options)}\n{plan.summary()}", file=sys.stderr)
    validation = Validation.of(options, pipe)
    output = Path(options.output)
    (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    encoded = Encoded(pipe, output / "cache")
    prompts = {"": None, **dict.fromkeys([*(example.caption for example in examples), *preserved])}
    pictures = [sized for example in examples for sized in pictures_of(example)]
    if validation is not None:
        prompts[validation.prompt] = None
        pictures += validation.references
    with tqdm(desc="encoding", total=len(set(pictures)) + len(prompts), leave=False, disable=quiet) as bar:
        for count in encoded.encode(prompts, pictures):
            bar.update(count)
    load(pipe, quiet)
    trainer = Trainer(pipe.transformer, options, examples, encoded, preserved, group)
    log = Log(output / LOG)
    if run.resume is not None:
        trainer.load(output / STATE, identity)
    if is_first:
        log.cut(trainer.step)
        _write_text(output / CONFIG, json.dumps(options.metadata(), indent=2) + "\n")
    working = plan.stages[-1].working
    with wired(pipe.memory_limit), within(pipe.memory_limit, working), _interrupts() as interrupted:
        is_stopped = _steps(trainer, log, identity, validation, interrupted, quiet, is_first)
    if is_stopped and is_first:
        print(f"interrupted after step {trainer.step}; flux2-lora --resume {output} goes on", file=sys.stderr)
    elif is_first:
        print(output / LORA)
    return INTERRUPTED if is_stopped else 0


def _steps(
    trainer: Trainer,
    log: Log,
    identity: str,
    validation: Validation | None,
    interrupted: list[bool],
    quiet: bool,
    is_first: bool,
) -> bool:
    """Take the steps that are left; whether they were interrupted."""
    options, output = trainer.options, Path(trainer.options.output)

    def save() -> None:
        trainer.save_lora(output / LORA)
        trainer.save(output / STATE, identity)
        log.draw(output / CURVE)

    is_stopped = False
    mx.reset_peak_memory()
    with tqdm(desc="training", total=options.steps, initial=trainer.step, disable=quiet, unit="step") as bar:
        if is_first and validation is not None and trainer.step == 0:
            validation.draw(trainer)
        while trainer.step < options.steps and not is_stopped:
            started = time.perf_counter()
            progress = trainer.take_step()
            seconds = time.perf_counter() - started
            is_stopped = _any(bool(interrupted), trainer.group)
            if not is_first:
                continue
            log.add(progress, seconds)
            bar.set_postfix(log.postfix(), refresh=False)
            bar.update()
            is_last = trainer.step == options.steps
            if trainer.step % options.save_every == 0 and not is_last:
                trainer.save_lora(output / CHECKPOINTS / f"step-{trainer.step:06}.safetensors")
            if trainer.step % options.save_every == 0 or is_last or is_stopped:
                save()
            if validation is not None and not is_stopped and (trainer.step % options.validate_every == 0 or is_last):
                validation.draw(trainer)
    return is_stopped and trainer.step < options.steps


def open_pipeline(options: TrainingOptions, run: argparse.Namespace) -> Flux2Pipeline:
    """The model, none of its weights read.

    Raises:
        InputError: for one that is not to be trained.
    """
    pipe = Flux2Pipeline.from_pretrained(
        options.model,
        revision=options.revision,
        dtype=training_dtype(options.dtype),
        cache=False,
        memory_limit=run.memory_limit,
        progress=not run.quiet,
        **{name: getattr(options, name) for name in MODEL_OPTIONS},
    )
    if pipe.checkpoint.has_kv_cache:
        raise InputError(
            f"{options.model} keeps its references, which is not trained here; klein-base-9b can be trained"
        )
    if pipe.checkpoint.is_distilled and not run.allow_distilled and run.resume is None:
        raise InputError(
            f"{options.model} is distilled, and training it undoes that: train the base model (klein-base-4b, "
            "klein-base-9b) and draw with the LoRA on either; --allow-distilled trains it all the same"
        )
    return pipe


def plan_of(
    modules: tuple[Qwen3TextEncoder, FluxKlein, AutoEncoder],
    options: TrainingOptions,
    dtype: mx.Dtype,
    length: int,
    shapes: Sequence[Sequence[Size]],
    limit: int,
) -> TrainingPlan:
    """What training needs, on pictures and references of these shapes."""
    return make_training_plan(
        *modules,
        dtype=dtype,
        shapes=shapes,
        length=length,
        batch=options.batch_size,
        adapters=adapter_size(modules[1], options),
        averages=options.ema > 0,
        again=options.grad_checkpoint,
        draws=options.validation_prompt is not None,
        limit=limit,
    )


def print_plan(options: TrainingOptions, run: argparse.Namespace) -> None:
    """Print what training needs: of a released model from its known shapes, else from the files; without a data set, on
    pictures of the full resolution and no references.
    """
    side = options.resolution // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
    shapes: list[tuple[Size, ...]] = [((side, side),)]
    if options.data:
        examples = read_dataset(Path(options.data), options.resolution, options.trigger)
        shapes = sorted({example.shape for example in examples})
    name = next((name for name, repo in RELEASED.items() if options.model in (name, repo)), None)
    others = [getattr(options, part) for part in PART_OPTIONS if part not in ("distilled", "kv_cache")]
    if name is None or any(others) or Path(options.model).exists():
        pipe = open_pipeline(options, run)
        modules = pipe.text_encoder, pipe.transformer, pipe.autoencoder
        print(plan_of(modules, options, pipe.dtype, pipe.tokenizer.default_length, shapes, pipe.memory_limit))
        return
    dtype = dtype_of(training_dtype(options.dtype))
    packed = parse_options(options.quantize, options.quantize_text_encoder, options.group_size)
    limit = run.memory_limit or machine_memory()
    print(plan_of(released_modules(name, dtype, packed), options, dtype, MAX_SEQUENCE_LENGTH, shapes, limit))


def load(pipe: Flux2Pipeline, quiet: bool) -> None:
    """Bring the transformer into memory."""
    total = weight_bytes(pipe.transformer)
    with tqdm(desc="loading transformer", total=total, unit="B", unit_scale=True, leave=False, disable=quiet) as bar:
        for count in materialize(pipe.transformer):
            bar.update(count)
    tune(pipe.transformer, pipe.dtype)
    mx.clear_cache()


def summary(examples: Sequence[Example], options: TrainingOptions) -> str:
    """How many pictures there are of which sizes, and how often each is seen."""
    counts = Counter(example.size for example in examples)
    sizes = ", ".join(f"{count} of {width} x {height}" for (height, width), count in counts.most_common(5))
    rest = f", and {len(counts) - 5} more sizes" if len(counts) > 5 else ""
    passes = Batches(examples, options.batch_size, options.seed).per_epoch
    times = options.steps * options.accumulate / passes
    return f"{len(examples)} pictures ({sizes}{rest}), each is seen about {times:.3g} times"


@dataclass(frozen=True)
class Validation:
    """What is drawn now and then, always from the same noise."""

    prompt: str
    references: list[tuple[Path, Size]]
    size: Size
    steps: int
    guidance: float

    @classmethod
    def of(cls, options: TrainingOptions, pipe: Flux2Pipeline) -> Validation | None:
        """As the options say, with what drawing takes for the model.

        Raises:
            InputError: for a picture that cannot be read.
        """
        if options.validation_prompt is None:
            return None
        references = []
        for path in map(Path, options.validation_image):
            image = open_image(path)
            try:
                reference_size(image)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            references.append((path, bucket(image.height, image.width, options.resolution)))
        side = options.resolution // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
        size = references[0][1] if references else (side, side)
        is_distilled = pipe.checkpoint.is_distilled
        steps = options.validation_steps or (4 if is_distilled else 25)
        return cls(options.validation_prompt, references, size, steps, 1.0 if is_distilled else 4.0)

    def draw(self, trainer: Trainer) -> None:
        """Draw it, as samples/step-000250.png of the run's folder."""
        folder = Path(trainer.options.output) / "samples"
        folder.mkdir(exist_ok=True)
        picture = trainer.draw(self.prompt, self.references, self.size, self.steps, self.guidance)
        _write_image(folder / f"step-{trainer.step:06}.png", picture)


# ---------------------------------------------------------------------------------------------------- the log


class Log:
    """log.jsonl: a line a step, with "step", "loss", "learning_rate", "norm", "change" (see training.Progress),
    "pictures_per_second", "peak_bytes".

    Args:
        path: of the file; lines are added to what it has.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, float]] = []

    def cut(self, step: int) -> None:
        """Go on after ``step`` steps: lines of later ones, of what was killed before it saved, are taken out."""
        with contextlib.suppress(OSError, ValueError):
            lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.lines = [line for line in lines if line["step"] <= step]
        _write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, progress: Progress, seconds: float) -> None:
        line = {
            "step": progress.step,
            "loss": progress.loss,
            "learning_rate": progress.learning_rate,
            "norm": progress.norm,
            "change": progress.change,
            "pictures_per_second": progress.pictures / seconds,
            "peak_bytes": mx.get_peak_memory(),
        }
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def postfix(self) -> dict[str, str]:
        """The latest line for the progress bar, its loss the mean of the last ones."""
        line = self.lines[-1]
        return {
            "loss": f"{np.mean([other['loss'] for other in self.lines[-SMOOTHED:]]):.4f}",
            "lr": f"{line['learning_rate']:.1e}",
            "pictures/s": f"{line['pictures_per_second']:.2f}",
            "peak": f"{line['peak_bytes'] / 1e9:.2f} GB",
        }

    def draw(self, path: Path) -> None:
        """The curve of the loss, and of its running mean, as a PNG."""
        _write_image(path, curve([line["loss"] for line in self.lines]))


def curve(losses: Sequence[float], size: tuple[int, int] = (960, 480)) -> Image.Image:
    """A picture (width, height) of a curve and, darker, its running mean over SMOOTHED steps."""
    width, height = size
    left, top, right, bottom = 64, 16, width - 16, height - 32
    image = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(image)
    means = [float(np.mean(losses[max(0, k + 1 - SMOOTHED) : k + 1])) for k in range(len(losses))]
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        across, down = (right - left) / max(1, len(values) - 1), (bottom - top) / (high - low)
        return [(left + k * across, bottom - (value - low) * down) for k, value in enumerate(values)]

    for value in np.linspace(low, high, 5):
        y = bottom - (value - low) * (bottom - top) / (high - low)
        drawing.line([(left, y), (right, y)], fill=(225, 225, 225))
        drawing.text((8, y - 6), f"{value:.4f}", fill=(90, 90, 90))
    for k in np.linspace(1, len(losses), 5).round():
        x = left + (k - 1) * (right - left) / max(1, len(losses) - 1)
        drawing.text((x - 12, bottom + 8), f"{k:.0f}", fill=(90, 90, 90))
    drawing.line(points(losses), fill=(170, 200, 235), width=1)
    drawing.line(points(means), fill=(20, 80, 160), width=3)
    return image


def _write_text(path: Path, text: str) -> None:
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def _write_image(path: Path, image: Image.Image) -> None:
    with written_beside(path) as temporary:
        image.save(temporary, format="PNG")
        temporary.replace(path)


# ---------------------------------------------------------------------------------------------------- processes


def _agree(identity: str, group: mx.distributed.Group | None) -> None:
    """Refuse a data set that is not the same in all processes."""
    if group is None:
        return
    own = mx.array(list(bytes.fromhex(identity)), mx.uint32)[None]
    if np.ptp(np.array(mx.distributed.all_gather(own, group=group)), axis=0).any():
        raise InputError("the processes have different pictures or captions; each needs the same folder")


def _any(flag: bool, group: mx.distributed.Group | None) -> bool:
    """Whether it is so in any process."""
    if group is None:
        return flag
    return bool(mx.distributed.all_sum(mx.array(int(flag)), group=group).item())


@contextlib.contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C; a second one interrupts at once."""
    pressed: list[bool] = []

    def handle(*_: Any) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------- command


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
            return train(options, run)
        except DataError as error:
            count = len(error.faults)
            print(f"error: {error.where} has {count} {'fault' if count == 1 else 'faults'}:", file=sys.stderr)
            print("\n".join(f"  {fault}" for fault in error.faults[:MAX_FAULTS]), file=sys.stderr)
            if count > MAX_FAULTS:
                print(f"  and {count - MAX_FAULTS} more", file=sys.stderr)
            return 2
        except (InputError, FloatingPointError, OSError) as error:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; what was saved before is kept", file=sys.stderr)
            return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
