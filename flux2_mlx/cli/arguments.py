"""The command line of flux2-generate to options, prompt and images."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from .._version import __version__
from ..adapters.lora import parse_lora
from ..errors import InputError
from ..families import NANO, RELEASED
from ..imaging.files import FORMATS, check_output, check_preview, open_image, read_metadata
from ..imaging.inpaint import ALPHA, SIDES, inpaint_from
from ..imaging.preprocess import reference_size
from ..imaging.terminal import PROTOCOLS
from ..models.config import AutoEncoderConfig
from ..options import DTYPES, REUSED, check_options, check_prompt
from ..request import STRENGTH, Settings, drawn_size
from ..runtime.distributed import random_seed
from ..runtime.plan import MODES
from ..sampling.latents import NOISES
from ..sampling.schedules import SCHEDULES
from .common import LORA_HELP, MODEL_HELP, MODEL_OPTIONS, PARTIAL_HELP, Parser, add_model_options, gigabytes

DEFAULT_OUTPUT = "flux2-{seed}.png"
OUTPUT_TEMPLATE = re.compile(r"(?:[^{}]|\{(?:seed|index)(?::\d{1,2})?\})+")

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
    arguments.repainting = inpaint_from(
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


def sizes_of(arguments: argparse.Namespace, side: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Height and width to draw at, where ``side`` is what the model is for, and sizes of what the transformer sees."""
    references = [reference_size(image) for image in arguments.image]
    repainting = arguments.repainting
    begun = arguments.init_image if repainting is None else repainting.image
    models = references if begun is None else [reference_size(begun), *references]
    height, width = drawn_size(arguments.height, arguments.width, models, side)
    if repainting is not None:
        repainting.check_aspect(height, width)
        references = [(height, width), *references]
    return height, width, references
