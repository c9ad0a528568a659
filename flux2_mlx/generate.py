"""python -m flux2_mlx.generate: a prompt, or a file of jobs, to picture files."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ._version import __version__
from .adapters.lora import parse_lora
from .checkpoints.checkpoint import check_keeps
from .cli.common import (
    LORA_HELP,
    MODEL_HELP,
    MODEL_OPTIONS,
    PART_OPTIONS,
    PARTIAL_HELP,
    Parser,
    add_model_options,
    gigabytes,
    launched,
)
from .cli.jobs import Job, missing_runs, read_jobs
from .cli.session import HELP, Picture, Session, completed
from .disk_cache import cache_folder
from .imaging.files import (
    FORMATS,
    check_output,
    check_preview,
    open_image,
    read_metadata,
    reference_size,
    save_image,
    save_preview,
)
from .imaging.inpaint import ALPHA, SIDES, repainting_of
from .imaging.terminal import PROTOCOLS, escaped, protocol_of
from .models.config import KV, MAX_SEQUENCE_LENGTH, NANO, RELEASED, AutoEncoderConfig, InputError
from .pipeline import (
    DTYPES,
    REUSED,
    STRENGTH,
    Flux2Pipeline,
    Settings,
    Step,
    check_options,
    check_prompt,
    drawn_size,
    dtype_of,
    first_step,
    noise_levels,
    usual_guidance,
    usual_strength,
)
from .quantization.layers import parse_options
from .runtime.activations import machine_memory
from .runtime.plan import MODES, Plan, between, download_bytes, make_plan, released_modules
from .runtime.roofline import measure
from .sampling.latents import NOISES, PIXELS_PER_TOKEN
from .sampling.samplers import SCHEDULES

DEFAULT_OUTPUT = "flux2-{seed}.png"
OUTPUT_TEMPLATE = re.compile(r"(?:[^{}]|\{(?:seed|index)(?::\d{1,2})?\})+")
ENCODED_AHEAD = 16  # jobs whose prompts are encoded together
JOB_FAULTS = (
    InputError,
    FloatingPointError,
    OSError,
    RuntimeError,
)  # the last is what MLX raises, as for want of memory
HISTORY = 1000  # lines that a session keeps
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# What --from-image takes from the picture, and what stands where neither it nor the command line says anything.
SETTINGS: dict[str, Any] = {
    "prompt": None,
    "negative_prompt": "",
    "model": "klein-4b",
    "revision": None,
    **dict.fromkeys(MODEL_OPTIONS),
    "lora": (),
    "lora_merge": False,
    "lora_partial": False,
    "width": None,
    "height": None,
    "num_steps": None,
    "guidance": None,
    "guidance_interval": None,
    "guidance_rescale": 0.0,
    "force_guidance": False,
    "step_cache": None,
    "reuse": None,
    "seed": None,
    "schedule": "flux2",
    "sigmas": None,
    "noise": "torch",
    "dtype": None,
    "max_sequence_length": None,
    "strength": None,
    "mask_blur": 0.0,
    "mask_padding": None,
    "expand": None,
}


def numbers(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(number) for number in text.split(",")]


def sides(text: str) -> dict[str, int]:
    """Pixels on each side: left=128,top=64."""
    pairs = [part.partition("=") for part in text.split(",")]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError
    return {name.strip(): int(pixels) for name, _, pixels in pairs}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flux2-generate",
        allow_abbrev=False,
        description="Draw a prompt with FLUX.2 [klein].",
        epilog=f"Released models: {', '.join(RELEASED)}. {NANO} comes with this package: it draws flat scenes, such as "
        '"a large red circle on the left, white background".',
    )
    parser.add_argument("prompt", nargs="?", help='what to draw; "-" or nothing reads standard input')
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--negative-prompt", help="what guidance leads away from (base models)")
    parser.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="a picture to edit or to take things from; given again for each further one",
    )
    parser.add_argument("--init-image", metavar="FILE", help="a picture to begin from, in place of noise alone")
    parser.add_argument(
        "--strength", type=float, help=f"how much of it is drawn anew, 1: all of it ({STRENGTH}; with --mask 1)"
    )
    parser.add_argument(
        "--mask",
        metavar="FILE",
        help=f'what of --init-image is repainted: white in this picture, or "{ALPHA}" for what is transparent in it',
    )
    parser.add_argument("--mask-blur", type=float, metavar="PIXELS", help="soften the mask by a blur of this radius")
    parser.add_argument(
        "--mask-padding", type=int, metavar="PIXELS", help="draw what the mask shows and so much around it, enlarged"
    )
    parser.add_argument(
        "--expand",
        type=sides,
        metavar="SIDE=PIXELS,...",
        help=f"paint --init-image on beyond its edges ({', '.join(SIDES)})",
    )
    parser.add_argument("--model", help=f"{MODEL_HELP} ({SETTINGS['model']})")
    add_model_options(parser)
    parser.add_argument("--lora", action="append", metavar="FILE[:SCALE]", help=LORA_HELP)
    parser.add_argument(
        "--lora-merge",
        action=argparse.BooleanOptionalAction,
        help="merge LoRAs into the weights, unless these are packed: the steps of many pictures take a little less",
    )
    parser.add_argument("--lora-partial", action=argparse.BooleanOptionalAction, help=PARTIAL_HELP)
    parser.add_argument("--width", type=int, help="in pixels, a multiple of 16 (a given picture's; 1024, nano 128)")
    parser.add_argument("--height", type=int, help="in pixels, a multiple of 16 (a given picture's; 1024, nano 128)")
    parser.add_argument(
        "--steps", "--num-steps", type=int, dest="num_steps", help="4 for distilled models, 50 for base models"
    )
    parser.add_argument("--guidance", type=float, help="1.0 for distilled models, 4.0 for base models")
    parser.add_argument(
        "--guidance-interval", type=numbers, metavar="LOW,HIGH", help="guide between these noise levels alone (0,1)"
    )
    parser.add_argument(
        "--guidance-rescale", type=float, metavar="SHARE", help="against the harshness of strong guidance, 0 to 1 (0)"
    )
    parser.add_argument(
        "--force-guidance", action=argparse.BooleanOptionalAction, help="guide a distilled model all the same"
    )
    parser.add_argument(
        "--step-cache",
        type=float,
        metavar="THRESHOLD",
        help="leave out most blocks in steps that differ less than this from one before, as 0.1; for tens of steps (0)",
    )
    parser.add_argument(
        "--reuse",
        choices=REUSED,
        help="in later steps of a distilled model use what the picture saw of these tokens in the first (neither)",
    )
    parser.add_argument(
        "--seed", type=int, help="of the first picture, the next have seed + 1, ...; random unless given"
    )
    parser.add_argument("--num-images", type=int, default=1, help="how many pictures (%(default)s)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="the most pictures in a pass (1; streamed: what fits)"
    )
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--schedule", choices=SCHEDULES, help=f"noise levels ({SETTINGS['schedule']})")
    levels.add_argument(
        "--sigmas", type=numbers, metavar="S,S,...", help="custom noise levels, from 1 without the last 0"
    )
    parser.add_argument("--noise", choices=NOISES, help=f"whose numbers a seed stands for ({SETTINGS['noise']})")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="bfloat16; float16 on M1 and M2; float32 on a CPU")
    parser.add_argument("--max-sequence-length", type=int, help="tokens of the prompt (512; nano 48)")
    parser.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        metavar="FILE",
        help=f"takes {{seed}} and {{index}}; {', '.join(FORMATS)} (%(default)s); an existing file is kept, and the new "
        "one numbered",
    )
    parser.add_argument(
        "--from-image", type=Path, metavar="FILE", help="repeat a picture with the settings in its file"
    )
    parser.add_argument(
        "--jobs",
        type=Path,
        metavar="FILE",
        help="draw a file of jobs: one JSON object a line, with any of these options; what is given here is for all",
    )
    parser.add_argument("--interactive", action="store_true", help="draw what is typed, line by line; help tells more")
    parser.add_argument("--resume", action="store_true", help="draw only those pictures of --jobs that do not exist")
    parser.add_argument(
        "--no-cache", action="store_false", dest="cache", help="neither use nor keep prompt embeddings on disk"
    )
    parser.add_argument(
        "--memory",
        choices=MODES,
        default="auto",
        help="what stays loaded: everything, a stage, or a block at a time (auto: what fits)",
    )
    parser.add_argument(
        "--memory-limit", type=gigabytes, metavar="GB", help="memory to keep to (what the machine has now)"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what drawing needs, and draw nothing; a released model is not downloaded for it",
    )
    parser.add_argument(
        "--measure",
        action="store_const",
        const="measure",
        dest="plan",
        help="the same, after measuring this machine's speed, in a few seconds: from then on --plan tells how long "
        "drawing takes",
    )
    parser.add_argument(
        "--preview", type=Path, metavar="FILE", help="rewrite this PNG file after each step with what is foreseen"
    )
    parser.add_argument(
        "--preview-decoder", metavar="FILE", help="draw --preview with TAEF2, here or on the Hub, instead of coarsely"
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const="auto",
        choices=("auto", *PROTOCOLS),
        help="show finished pictures in the terminal, in its own way unless one is named",
    )
    parser.add_argument("--stats", action="store_true", help="print seconds and peak bytes of each part as JSON")
    parser.add_argument("--quiet", action="store_true", help="no bars, no summary; the seed and the file are printed")
    parser.add_argument("--version", action="version", version=f"flux2_mlx {__version__}")
    return parser


def random_seed() -> int:
    return secrets.randbelow(2**32)


def parse_arguments(argv: Sequence[str] | None, stdin: TextIO | None) -> argparse.Namespace:
    """The command line of one drawing, completed.

    Raises:
        InputError: for what cannot be used.
    """
    return complete(build_parser().parse_args(argv), stdin)


def complete(
    arguments: argparse.Namespace,
    stdin: TextIO | None,
    seed: Callable[[], int] = random_seed,
    inputs: Sequence[str] = (),
) -> argparse.Namespace:
    """Read prompt and pictures, fill in what is not given (from --from-image, else the defaults), and check it as far
    as that can be done without the model.

    What is given wins over the picture: its revision goes with its model, its custom noise levels with its steps, one
    of its sides with the other.

    Args:
        seed: gives one where none is said.
        inputs: what pictures besides are given otherwise, of pipeline.INPUTS.

    Raises:
        InputError: for what cannot be used.
    """
    defaults = dict(SETTINGS)
    if arguments.from_image is not None:
        given = [name for name in ("image", "init_image", "mask") if getattr(arguments, name) is not None]
        picture = Settings.from_metadata(read_metadata(arguments.from_image), [*given, *inputs])
        defaults = {name: getattr(picture, name) for name in SETTINGS}
        if arguments.model is not None:
            defaults |= dict.fromkeys(("revision", *MODEL_OPTIONS)) | {"lora": ()}
        if any(value is not None for value in (arguments.num_steps, arguments.schedule, arguments.sigmas)):
            defaults["sigmas"] = None
        if arguments.sigmas is not None or defaults["sigmas"] is not None:
            defaults["num_steps"] = None
        if any(value is not None for value in (arguments.width, arguments.height, arguments.expand)):
            defaults |= {"width": None, "height": None}
    if arguments.plan:
        arguments.prompt = arguments.prompt or ""
    elif arguments.prompt is not None or arguments.prompt_file is not None or defaults["prompt"] is None:
        arguments.prompt = read_prompt(arguments, stdin)
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.seed is None:
        arguments.seed = seed()
    arguments.image = [open_reference(path) for path in arguments.image or ()]
    if arguments.init_image is not None:
        arguments.init_image = open_reference(arguments.init_image, alpha=arguments.mask == ALPHA)
    if arguments.mask not in (None, ALPHA):
        arguments.mask = open_image(arguments.mask, alpha=True)
    check_options(**drawing_options(arguments))
    given = [parse_lora(text)[0] for text in arguments.lora]
    if len(set(given)) < len(given):
        raise InputError(f"a LoRA is given twice: {', '.join(given)}")
    if arguments.strength is not None and arguments.init_image is None:
        raise InputError("--strength belongs to --init-image, and none is given")
    arguments.repainting = repainting_of(
        arguments.init_image, arguments.mask, arguments.mask_blur, arguments.mask_padding, arguments.expand
    )
    return arguments


def open_reference(path: str, *, alpha: bool = False) -> Image.Image:
    """A picture from a file, for the transformer to see, with its transparency or on white.

    Raises:
        InputError: naming the file.
    """
    image = open_image(path, alpha=alpha)
    try:
        reference_size(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return image


def read_prompt(arguments: argparse.Namespace, stdin: TextIO | None) -> str:
    """The prompt from the command line, a file or standard input; one line break at its end does not count."""
    if arguments.prompt_file is not None:
        if arguments.prompt is not None:
            raise InputError("give the prompt either as an argument or as --prompt-file")
        try:
            text = arguments.prompt_file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{arguments.prompt_file} is not UTF-8 text ({error.reason})") from None
        except OSError as error:
            raise InputError(f"cannot read {arguments.prompt_file}: {error.strerror}") from None
        return str(text).removesuffix("\n")
    if arguments.prompt is not None and arguments.prompt != "-":
        return str(arguments.prompt)
    if stdin is None or (arguments.prompt is None and stdin.isatty()):
        raise InputError('no prompt: give one, as in flux2-generate "a red fox in the snow", or --prompt-file FILE')
    try:
        return stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not {error.encoding} text ({error.reason})") from None


def output_path(template: str, seed: int, index: int) -> Path:
    """The file of one picture; {seed} and {index}, or {index:03} with leading zeros, are filled in.

    Raises:
        InputError: for another placeholder.
    """
    if not OUTPUT_TEMPLATE.fullmatch(template):
        raise InputError(f"--output takes {{seed}} and {{index}} alone, got {template!r}")
    try:
        return Path(template.format(seed=seed, index=index)).expanduser()
    except RuntimeError as error:  # the home folder of nobody
        raise InputError(f"cannot write {template}: {error}") from None


def drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of Flux2Pipeline.stream that are no texts and no pictures."""
    return {name: getattr(arguments, name) for name in signature(check_options).parameters}


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused without the model.

    Raises:
        InputError: naming the value.
    """
    if arguments.image or arguments.init_image is not None:
        sizes_of(arguments, AutoEncoderConfig.sample_size)  # which is not needed here
    for prompt in (arguments.prompt, arguments.negative_prompt):
        check_prompt(prompt)
    for path in outputs_of(arguments):
        check_output(path)
    if arguments.preview is not None:
        check_preview(arguments.preview)


def outputs_of(arguments: argparse.Namespace) -> list[Path]:
    return [output_path(arguments.output, arguments.seed + k, k) for k in range(arguments.num_images)]


def use_loras(pipe: Flux2Pipeline, arguments: argparse.Namespace) -> None:
    """Load the LoRAs that are asked for and are not loaded yet, and unload the others."""
    wanted = dict(map(parse_lora, arguments.lora))
    how = {"merge": arguments.lora_merge, "partial": arguments.lora_partial}
    for name, lora in list(pipe.loras.items()):
        if name not in wanted or (lora.merge, lora.partial) != tuple(how.values()):
            pipe.unload_lora(name)
    for name, scale in wanted.items():
        if name not in pipe.loras:
            lora = pipe.load_lora(name, scale=scale, **how)
            if not arguments.quiet:
                print(f"{lora}: {lora.summary}", file=sys.stderr)
        elif pipe.loras[name].scale != scale:
            pipe.set_lora(name, scale)


def start(arguments: argparse.Namespace, pipe: Flux2Pipeline) -> Iterator[Step]:
    """The steps to draw."""
    use_loras(pipe, arguments)
    if not arguments.quiet:
        print(plan_of(pipe, arguments).summary(), file=sys.stderr)
    return pipe.stream(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        image=arguments.image or None,
        init_image=arguments.init_image,
        mask=arguments.mask,
        force_guidance=arguments.force_guidance,
        **drawing_options(arguments),
    )


def open_pipeline(arguments: argparse.Namespace, group: mx.distributed.Group | None = None) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        cache=arguments.cache,
        memory=arguments.memory,
        memory_limit=arguments.memory_limit,
        group=group,
        preview_decoder=arguments.preview_decoder,
        progress=not arguments.quiet,
        **{name: getattr(arguments, name) for name in MODEL_OPTIONS},
    )


def plan_of(pipe: Flux2Pipeline, arguments: argparse.Namespace) -> Plan:
    height, width, references = sizes_of(arguments, pipe.checkpoint.autoencoder.sample_size)
    more = {name: getattr(arguments, name) for name in ("step_cache", "reuse")}
    return pipe.plan(height, width, arguments.max_sequence_length, references, **more)


def sizes_of(arguments: argparse.Namespace, side: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Height and width to draw at, where ``side`` is what the model is for, and sizes of what the transformer sees."""
    references = [reference_size(image) for image in arguments.image]
    repainting = arguments.repainting
    begun = arguments.init_image if repainting is None else repainting.picture
    models = references if begun is None else [reference_size(begun), *references]
    height, width = drawn_size(arguments.height, arguments.width, models, side)
    if repainting is not None:
        repainting.check_aspect(height, width)
        references = [(height, width), *references]
    return height, width, references


def print_plan(arguments: argparse.Namespace) -> None:
    """Print what drawing needs: of a released model from its known shapes, else from the files."""
    name = next((name for name, repo in RELEASED.items() if arguments.model in (name, repo)), None)
    others = [getattr(arguments, part) for part in PART_OPTIONS if part not in ("distilled", "kv_cache")]
    dtype = dtype_of(arguments.dtype)
    if arguments.plan == "measure":
        measure(dtype)
    if name is None or any(others) or arguments.lora or Path(arguments.model).exists():
        pipe = open_pipeline(arguments)
        use_loras(pipe, arguments)
        plan, checkpoint = plan_of(pipe, arguments), pipe.checkpoint
        print(f"{plan}\n{duration(plan, arguments, checkpoint.autoencoder.sample_size, checkpoint.is_distilled)}")
        return
    if arguments.kv_cache:
        check_keeps(name)
    packed = parse_options(arguments.quantize, arguments.quantize_text_encoder, arguments.group_size)
    side = AutoEncoderConfig.sample_size
    height, width, references = sizes_of(arguments, side)
    plan = make_plan(
        *released_modules(name, dtype, packed),
        dtype=dtype,
        height=height,
        width=width,
        references=references,
        keeps_references=name == KV if arguments.kv_cache is None else arguments.kv_cache,
        caches_steps=arguments.step_cache is not None,
        reuse=arguments.reuse,
        length=arguments.max_sequence_length or MAX_SEQUENCE_LENGTH,
        limit=arguments.memory_limit or machine_memory(),
        memory=arguments.memory,
    )
    distilled = "base" not in name if arguments.distilled is None else arguments.distilled
    print(f"{plan}\n{duration(plan, arguments, side, distilled)}")
    print(f"download: up to {download_bytes(name) / 1e9:.1f} GB")


def duration(plan: Plan, arguments: argparse.Namespace, side: int, distilled: bool) -> str:
    """One line: how long a picture takes, where this machine was measured."""
    height, width, _ = sizes_of(arguments, side)
    tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
    levels = noise_levels(distilled, tokens, arguments.num_steps, arguments.schedule, arguments.sigmas)[:-1]
    if arguments.init_image is not None:
        usual = usual_strength(len(levels), repaints=arguments.repainting is not None)
        strength = usual if arguments.strength is None else arguments.strength
        levels = levels[first_step(strength, len(levels)) :]
    guidance = usual_guidance(distilled) if arguments.guidance is None else arguments.guidance
    guided = guidance > 1 and (not distilled or arguments.force_guidance)
    low, high = arguments.guidance_interval or (0, 1)
    passes = sum(2 if guided and low <= sigma <= high else 1 for sigma in levels)
    seconds = plan.seconds(2 if guided else 1, passes)
    if seconds is None:
        return "time: not known; --measure measures this machine, once and in a few seconds"
    return f"time: about {between(*seconds)} s a picture, {passes} passes of the transformer, without loading it"


def draw(
    steps: Iterator[Step],
    arguments: argparse.Namespace,
    started: float,
    *,
    first: int = 0,
    saves: bool = True,
    saved: Callable[[Image.Image, Settings], object] | None = None,
) -> None:
    """Draw, save each picture when it is done, and report.

    Args:
        started: time.perf_counter() when the work began.
        first: index of the first picture.
        saves: whether it is this process that saves them.
        saved: is told of each picture once it is.
    """
    protocol = protocol_of(os.environ) if arguments.show == "auto" else arguments.show
    if arguments.show and protocol is None:
        warnings.warn(
            f"this terminal is not known to show pictures; --show {', --show '.join(PROTOCOLS)} try one way",
            stacklevel=2,
        )
    for step in steps:
        if arguments.preview is not None and saves:
            save_preview(step.preview(), arguments.preview)
        if step.is_last and saves:
            picture, settings = step.picture(), step.settings
            path = output_path(arguments.output, settings.seed, first + step.image)
            written = save_image(picture, path, settings.metadata(), settings.parameters())
            if saved is not None:
                saved(picture, settings)
            tqdm.write(f"seed {settings.seed}  {written}")  # past the bars
            if protocol is not None:
                tqdm.write(escaped(picture, protocol), end="")
            sys.stdout.flush()
    stats = step.stats
    if not arguments.quiet:
        seconds = "  ".join(f"{part} {value:.1f} s" for part, value in stats.seconds.items())
        total, peak = time.perf_counter() - started, max(stats.peak_bytes.values())
        counted = f", {stats.steps['computed']} of {sum(stats.steps.values())} steps computed"
        cached = "" if arguments.step_cache is None else counted
        print(f"{total:.1f} s in all ({seconds}){cached}, peak memory {peak / 1e9:.2f} GB", file=sys.stderr)
    if arguments.stats:
        figures = {"seconds": stats.seconds, "peak_bytes": stats.peak_bytes, "steps": stats.steps}
        print(json.dumps({"model": step.settings.model, **figures}))


# ---------------------------------------------------------------------------------------------------- jobs


class Jobs:
    """A file of jobs, drawn line by line.

    Attributes:
        failed: numbers of the lines that could not be drawn.
        drawn, skipped: numbers of pictures.
    """

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.parser = build_parser()
        self.failed: list[int] = []
        self.drawn = self.skipped = 0
        self.claimed: dict[Path, int] = {}  # outputs, and the lines that write them
        self.pipe: Flux2Pipeline | None = None
        self.opened: Any = None  # what decides a pipeline, of the one that is open

    def run(self, jobs: Sequence[Job]) -> None:
        for k in range(0, len(jobs), ENCODED_AHEAD):
            self._encode(jobs[k : k + ENCODED_AHEAD])
            for job in jobs[k : k + ENCODED_AHEAD]:
                try:
                    self._draw(job)
                except JOB_FAULTS as error:
                    self.failed.append(job.number)
                    print(f"error: line {job.number}: {' '.join(str(error).splitlines())}", file=sys.stderr)

    def _encode(self, jobs: Sequence[Job]) -> None:
        """Encode the prompts of the jobs that use the same model as the first, in one go. A fault is told when the job
        itself is drawn.
        """
        prompts: dict[str, None] = {}
        wanted = None
        for job in jobs:
            with contextlib.suppress(*JOB_FAULTS):
                arguments = self._arguments(job)
                check(arguments)
                if self.given.resume and not missing_runs(outputs_of(arguments)):
                    continue
                own = (_pipeline_options(arguments), arguments.max_sequence_length)
                wanted = wanted or own
                if own == wanted:
                    pipe = self._open(arguments)
                    prompts[arguments.prompt] = None
                    if arguments.force_guidance or not pipe.checkpoint.is_distilled:
                        prompts[arguments.negative_prompt] = None
        with contextlib.suppress(*JOB_FAULTS):
            if wanted is not None and self.pipe is not None:
                self.pipe.encode(list(prompts), wanted[1])

    def _draw(self, job: Job) -> None:
        arguments = self._arguments(job)
        check(arguments)
        outputs = outputs_of(arguments)
        if self.given.resume and len(set(outputs)) < len(outputs):
            raise InputError(
                f"{arguments.num_images} pictures of one name; with --resume give {{seed}} or {{index}} in it"
            )
        for output in outputs if self.given.resume else ():
            writer = self.claimed.setdefault(output.resolve(), job.number)
            if writer != job.number:
                raise InputError(f"line {writer} writes {output} too; with --resume each job needs files of its own")
        runs = missing_runs(outputs) if self.given.resume else [range(arguments.num_images)]
        self.skipped += arguments.num_images - sum(map(len, runs))
        seed = arguments.seed
        for run in runs:
            arguments.seed, arguments.num_images = seed + run.start, len(run)
            started = time.perf_counter()
            draw(start(arguments, self._open(arguments)), arguments, started, first=run.start, saved=self._count)

    def _count(self, *_: object) -> None:
        self.drawn += 1

    def _arguments(self, job: Job) -> argparse.Namespace:
        return complete(job.arguments(self.parser, self.given), None, lambda: job.seed)

    def _open(self, arguments: argparse.Namespace) -> Flux2Pipeline:
        options = _pipeline_options(arguments)
        if self.pipe is None or self.opened != options:
            self.pipe = None  # give its memory back first
            self.pipe, self.opened = open_pipeline(arguments), options
        return self.pipe

    def report(self) -> str:
        parts = [f"{self.drawn} pictures drawn"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped, which exist")
        if self.failed:
            parts.append(f"{len(self.failed)} lines failed: {', '.join(map(str, self.failed))}")
        return f"jobs: {', '.join(parts)}"


def _pipeline_options(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """What decides which pipeline is open."""
    names = ("model", "revision", *MODEL_OPTIONS, "dtype", "cache", "memory", "memory_limit", "preview_decoder")
    return tuple(getattr(arguments, name) for name in names)


def draw_jobs(given: argparse.Namespace) -> int:
    """Draw the lines of --jobs, of several processes each its share, and report.

    Returns:
        The exit code: 0, 1 where a line failed, 130 after Ctrl-C.
    """
    if given.plan or given.prompt_file is not None:
        raise InputError("--jobs goes neither with --plan nor with --prompt-file")
    lines, group = read_jobs(given.jobs), launched()
    jobs = Jobs(given)
    try:
        jobs.run(lines if group is None else lines[group.rank() :: group.size()])
    except KeyboardInterrupt:
        print("interrupted; --resume draws what is missing", file=sys.stderr)
        return INTERRUPTED
    finally:
        print(jobs.report(), file=sys.stderr)
    return 1 if jobs.failed else 0


# ---------------------------------------------------------------------------------------------------- session


def interact(given: argparse.Namespace) -> None:
    """A session: a prompt that was given is drawn first, pictures of --image are its first ones."""
    if given.plan or given.jobs is not None:
        raise InputError("--interactive goes neither with --plan nor with --jobs")
    references, given.image = given.image or [], None
    first = given.prompt

    def completed(prompt: str) -> argparse.Namespace:
        arguments = argparse.Namespace(**{**vars(given), "prompt": prompt})
        return complete(arguments, None, inputs=["image"] if references else [])

    usual = completed("")
    check(usual)
    is_seeded = given.seed is not None or given.from_image is not None
    pipe = open_pipeline(usual)

    def drawn(
        prompt: str, images: Sequence[Image.Image], own: Mapping[str, Any], add: Callable[[Picture], None]
    ) -> None:
        arguments = completed(prompt)
        vars(arguments).update({name: value for name, value in own.items() if value is not None})
        arguments.seed = random_seed() if own["seed"] is None else own["seed"]
        arguments.image = list(images)
        check_options(**drawing_options(arguments))
        check(arguments)
        steps = start(arguments, pipe)
        draw(steps, arguments, time.perf_counter(), saved=lambda image, settings: add(Picture(image, settings)))

    session = Session(drawn, seed=usual.seed if is_seeded else None, lora=tuple(usual.lora) or None)
    session.pictures += [Picture(open_reference(path), None) for path in references]
    if not given.quiet:
        print(HELP)
    converse(session, first)


def converse(session: Session, first: str | None = None) -> None:
    """Do what lines say until the end, the first of which may be given; a fault is told, and costs one line."""
    line: str | None = first
    with _line_editing():
        while True:
            try:
                said = session.handle(input("> ") if line is None else line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
            except UnicodeDecodeError as error:
                print(f"error: that is not {error.encoding} text", file=sys.stderr)
            except JOB_FAULTS as error:
                print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            else:
                if said is None:
                    return
                if said:
                    print(said)
            line = None


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """History, kept between sessions, and completion of commands and files, where Python has them."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home folder
        readline.read_history_file(cache_folder() / "history")
    readline.set_history_length(HISTORY)
    readline.set_completer(completed)
    readline.set_completer_delims(" ")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            readline.write_history_file(cache_folder() / "history")


def shared_seed(group: mx.distributed.Group) -> int:
    """The first process's random seed."""
    seeds = mx.distributed.all_gather(mx.array([random_seed()], mx.uint32), group=group)
    return int(np.array(seeds)[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, 1 where some of --jobs failed, 2 for input that cannot be used (one line on standard error),
        130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter must not end the run
    if sys.stdin is None:  # closed: keep its number, since MLX takes a file with the number 0 for one that did not open
        os.open(os.devnull, os.O_RDONLY)
    started = time.perf_counter()
    seed = ""  # told at the end of a drawing that does not finish
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show_warning  # type: ignore[assignment]  # takes whatever comes after the message
        try:
            arguments = build_parser().parse_args(argv)
            if arguments.quiet:
                _silence_downloads()
            if arguments.interactive:
                interact(arguments)
                return 0
            if arguments.jobs is not None:
                return draw_jobs(arguments)
            if arguments.resume:
                raise InputError("--resume belongs to --jobs, and none is given")
            group = launched()
            if group is not None:
                arguments.quiet = arguments.quiet or group.rank() > 0
            complete(arguments, sys.stdin, random_seed if group is None else partial(shared_seed, group))
            if arguments.plan:
                print_plan(arguments)
                return 0
            check(arguments)
            steps = start(arguments, open_pipeline(arguments, group))
            seed = f" (seed {arguments.seed})"
            draw(steps, arguments, started, saves=group is None or group.rank() == 0)
        except (InputError, FloatingPointError, OSError) as error:
            print(f"error: {' '.join(str(error).splitlines())}{seed}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"interrupted{seed}", file=sys.stderr)
            return INTERRUPTED
    return 0


def show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as one line, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)


def _silence_downloads() -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
