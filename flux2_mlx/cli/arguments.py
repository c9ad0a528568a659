"""The command line of flux2-generate to options, prompt and images."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from .._version import __version__
from ..adapters.lora import parse_lora
from ..checkpoints.hub import HUB_FILE, HUB_ID, is_cached, local_path
from ..checks import MAX_PROMPT, check_prompt
from ..errors import InputError
from ..families import NANO, RELEASED
from ..imaging.files import FORMATS, check_output, check_preview, read_metadata
from ..imaging.inpaint import ALPHA, Inpaint
from ..imaging.terminal import PROTOCOLS
from ..inputs import INPUTS, Inputs
from ..models.config import AutoEncoderConfig
from ..options import (
    ADAPTERS,
    BATCH,
    MEMORY,
    MODEL,
    OUTPUT,
    PROMPT,
    SAMPLING,
    BatchOptions,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    RuntimeOptions,
)
from ..paths import HIDDEN, expand
from ..request import Settings, Size, paths_of
from ..runtime.distributed import random_seed
from ..samplings import image_sizes
from .common import Parser, given_options, path
from .streams import shows_bars

DEFAULT_OUTPUT = "flux2-{seed}.png"
OUTPUT_TEMPLATE = re.compile(r"(?:[^{}]|\{(?:seed|index)(?::\d{1,2})?\}|\{prompt\})+")
MAX_SLUG = 40  # letters of a prompt in a file's name


@dataclass(frozen=True)
class Task:
    """What a command line, a job or a line of a session asks for: every value checked, every image opened."""

    options: GenerationOptions
    batch: BatchOptions
    inputs: Inputs
    inpaint: Inpaint | None
    model: ModelOptions
    runtime: RuntimeOptions
    output: str
    write_metadata: bool
    mask_output: str | None
    preview: Path | None
    show: str | None
    stats: bool
    quiet: bool

    @property
    def seed(self) -> int:
        return self.options.seed or 0

    @property
    def outputs(self) -> list[Path]:
        """The file of each image."""
        return [self.output_path(self.seed + k, k) for k in range(self.batch.num_images)]

    @property
    def masks(self) -> list[Path]:
        """The file of each edit's mask."""
        paths = [self.mask_path(self.seed + k, k) for k in range(self.batch.num_images)]
        return [path for path in paths if path is not None]

    @property
    def is_edit(self) -> bool:
        """Whether the transformer sees an image."""
        return any(self.inputs.strengths(self.options.reference_strength)) or self.inpaint is not None

    def output_path(self, seed: int, index: int) -> Path:
        return output_path(self.output, seed, index, self.inputs.prompt)

    def mask_path(self, seed: int, index: int) -> Path | None:
        if self.mask_output is None:
            return None
        return output_path(self.mask_output, seed, index, self.inputs.prompt)

    def sizes(self, side: int) -> tuple[Size, list[Size]]:
        """The size to generate at, where ``side`` is what the model is for, and sizes of what the transformer sees."""
        return image_sizes(self.options, self.inputs, self.inpaint, side)


class Dimensions(argparse.Action):
    """512x768 to width and height."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        match = re.fullmatch(r"(\d+)[x×](\d+)", values)
        if match is None:
            raise argparse.ArgumentError(self, f"invalid size {values!r}, as in 1024x768")
        namespace.width, namespace.height = map(int, match.groups())


class LoraStrengths(argparse.Action):
    """Strengths of the LoRAs that were given last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        loras = list(namespace.lora or ())
        if len(values) > len(loras):
            raise argparse.ArgumentError(self, "belongs behind the --lora whose strength it is")
        named = [f"{parse_lora(lora)[0]}:{value:g}" for lora, value in zip(loras[-len(values) :], values, strict=True)]
        namespace.lora = loras[: -len(values)] + named


def build_parser() -> Parser:
    """The command line; an option that is not given is None."""
    parser = Parser(
        prog="flux2-generate",
        usage="%(prog)s PROMPT [options]",
        titles=(PROMPT, MODEL, ADAPTERS, SAMPLING, OUTPUT, MEMORY, BATCH),
        description="Generate images from a prompt with FLUX.2 [klein]: text to image, editing with reference images, "
        "img2img, inpainting and outpainting.",
        epilog=f"Released models: {', '.join(RELEASED)}. {NANO} comes with this package: it generates flat scenes, "
        'such as "a large red circle on the left, white background".',
    )
    add_prompt_options(parser)
    for cls in (ModelOptions, GenerationOptions, BatchOptions, OutputOptions, RuntimeOptions):
        parser.add_options(cls)
    add_run_options(parser)
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS}
    parser.add_argument("--size", action=Dimensions, **hidden)
    parser.add_argument("--lora-paths", dest="lora", nargs="+", action="extend", **hidden)
    parser.add_argument("--lora-scale", nargs=1, type=float, action=LoraStrengths, **hidden)
    parser.add_argument("--lora-scales", nargs="+", type=float, action=LoraStrengths, **hidden)
    parser.add_argument("--image-strength", dest="strength", type=lambda text: 1 - float(text), **hidden)
    return parser


def add_prompt_options(parser: Parser) -> None:
    """The prompt and images, which are no options of a field."""
    group = parser.titles[PROMPT]
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS}
    group.add_argument("prompt", nargs="?", help='what to generate; "-" or nothing reads standard input')
    group.add_argument("-p", "--prompt", dest="prompt_option", metavar="PROMPT", **hidden)
    group.add_argument("--prompt-file", type=path, metavar="FILE", help="read the prompt from a file")
    group.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="reference image: to edit, or to take a subject or a style from; repeat it for several",
    )
    group.add_argument("--init-image", metavar="FILE", help="img2img: start from this image instead of pure noise")
    group.add_argument("--init", "--image-path", dest="init_image", **hidden)
    group.add_argument(
        "--mask",
        metavar="FILE",
        help=f'inpainting mask: white is generated anew, black is kept; "{ALPHA}" inpaints where --init-image is '
        "transparent; with --color-match or --edit-composite, where the edit is",
    )
    group.add_argument("--mask-image", dest="mask", **hidden)


def add_run_options(parser: Parser) -> None:
    """Options of the output, and what the command does besides generating."""
    group = parser.titles[OUTPUT]
    for names, more in ((("--output",), True), (("-o",), False)):
        shown = f"image file ({', '.join(FORMATS)}) or folder; {{seed}}, {{index}} and {{prompt}} are filled in; "
        shown += f"an existing file is never replaced, the new one is numbered ({DEFAULT_OUTPUT})"
        group.add_argument(*names, dest="output", metavar="FILE", help=shown if more else argparse.SUPPRESS)
    group.add_argument(
        "--mask-output",
        metavar="FILE",
        help="write where the edit is, as --color-match and --edit-composite find it, to this image file, for --mask",
    )
    group.add_argument(
        "--preview", type=path, metavar="FILE", help="rewrite this PNG file after each step with a preview of the image"
    )
    group.add_argument(
        "--show",
        nargs="?",
        const="auto",
        choices=("auto", *PROTOCOLS),
        help="show finished images in the terminal, by the protocol that it understands unless one is given",
    )
    group.add_argument("--stats", action="store_true", help="print seconds and peak bytes of each stage as JSON")
    group.add_argument(
        "--quiet", action="store_true", help="no progress bars and no summary, only the seed and the file name"
    )
    group = parser.titles[MEMORY]
    group.add_argument(
        "--plan",
        action="store_true",
        help="print the memory plan and generate nothing; a released model is not downloaded for it",
    )
    group.add_argument(
        "--measure",
        action="store_const",
        const="measure",
        dest="plan",
        help="measure this machine's speed, in a few seconds, then do as --plan, which from then on estimates the "
        "seconds of an image, too",
    )
    group = parser.titles[BATCH]
    group.add_argument(
        "--from-image",
        type=path,
        metavar="FILE",
        help="generate with the settings in an image's file; options given here replace them",
    )
    group.add_argument(
        "--jobs",
        type=path,
        metavar="FILE",
        help="batch: a file of one JSON object a line, whose keys are these options; those given here hold for all",
    )
    group.add_argument("--resume", action="store_true", help="with --jobs: skip the images that exist")
    group.add_argument(
        "--interactive",
        action="store_true",
        help="session: read prompts and commands line by line, with the model kept loaded",
    )
    parser.add_argument("--version", action="version", version=f"flux2_mlx {__version__}")


def complete(
    arguments: argparse.Namespace,
    stdin: TextIO | None,
    seed: Callable[[], int] = random_seed,
    inputs: Sequence[str] = (),
) -> Task:
    """Read prompt and images, fill in what is not given (from --from-image, else the defaults), and check it as far as
    that can be done without the model.

    Args:
        seed: gives a seed where no option does.
        inputs: those of INPUTS that the caller provides otherwise.

    Raises:
        InputError: for what cannot be used.
    """
    given = given_options(arguments)
    values = given if arguments.from_image is None else replayed(given, inputs) | given
    if arguments.plan:
        values["prompt"] = arguments.prompt or ""
    elif any(name in given for name in ("prompt", "prompt_option", "prompt_file")) or "prompt" not in values:
        values["prompt"] = read_prompt(arguments, stdin)
    if values.get("seed") is None:
        values["seed"] = seed()
    options, model = GenerationOptions.collect(values), ModelOptions.collect(values)
    images = Inputs(**{f.name: values[f.name] for f in fields(Inputs) if f.name in values}).opened()
    loras = [parse_lora(text)[0] for text in model.lora]
    if len(set(loras)) < len(loras):
        raise InputError(f"a LoRA is given twice: {', '.join(loras)}")
    return Task(
        options=options,
        batch=BatchOptions.collect(values),
        inputs=images,
        inpaint=images.inpaint(options),
        model=model,
        runtime=RuntimeOptions.collect(values | {"progress": shows_bars(arguments.quiet)}),
        output=arguments.output or DEFAULT_OUTPUT,
        write_metadata=OutputOptions.collect(values).write_metadata,
        mask_output=arguments.mask_output,
        preview=arguments.preview,
        show=arguments.show,
        stats=arguments.stats,
        quiet=arguments.quiet,
    )


def replayed(given: Mapping[str, Any], inputs: Sequence[str]) -> dict[str, Any]:
    """The settings of --from-image, without those that the given options replace: with a model also its LoRAs, parts
    and quantization, with steps the sigmas, with one side of the size the other.

    Raises:
        InputError: for an image that cannot be generated again.
    """
    settings = Settings.from_metadata(read_metadata(given["from_image"]), [*(INPUTS.keys() & given.keys()), *inputs])
    model = settings.select(ModelOptions)
    kept = {"dtype": settings.dtype, "vae_dtype": settings.vae_dtype}
    is_other = "model" in given and not (
        settings.model.startswith(HIDDEN) and Path(given["model"]).name == Path(settings.model).name
    )
    if not is_other:
        check_sources({name: value for name, value in model.items() if name not in given})
    values = (kept if is_other else model) | settings.select(GenerationOptions)
    values["prompt"] = (settings.original_prompt if given.get("enhance") else None) or settings.prompt
    if given.keys() & {"num_steps", "schedule", "sigmas"}:
        values["sigmas"] = None
    if "sigmas" in given or values["sigmas"] is not None:
        values["num_steps"] = None
    if given.keys() & {"width", "height", "expand"}:
        values["width"] = values["height"] = None
    return values


def check_sources(model: Mapping[str, Any]) -> None:
    """Refuse what an image's settings name and is neither a released model, nor here, nor in the Hub's cache: they may
    be a stranger's, and nothing is fetched, and no pipe or device opened, because a file says so.

    Raises:
        InputError: with the way out.
    """
    revision = model.get("revision")
    for name in paths_of(ModelOptions):
        value = model.get(name) or ()
        for text in (value,) if isinstance(value, str) else value:
            source = parse_lora(text)[0] if name == "lora" else text
            flag, shown = f"--{name.replace('_', '-')}", repr(source)
            if source.startswith(HIDDEN):
                way_out = f"{flag} FOLDER/{text.removeprefix(HIDDEN)}"
                raise InputError(f"the image does not carry the folders of its {name}, {shown}; give it: {way_out}")
            at = revision if name == "model" else None
            if (
                name == "model" and source in (NANO, *RELEASED) and not (at or "").startswith("refs/")
            ):  # a stranger's PR
                continue
            path = local_path(source)
            if path is not None and not (path.is_file() or path.is_dir()):
                raise InputError(f"the image's {name}, {shown}, is neither a file nor a folder; give another: {flag}")
            is_on_hub = HUB_ID.fullmatch(source) or HUB_FILE.fullmatch(source) or source in RELEASED
            if path is None and is_on_hub and not is_cached(source, at):
                version = f" of revision {at!r}" if at else ""
                raise InputError(
                    f"the image's {name}, {shown}{version}, is neither here nor in the Hub's cache, and what an image "
                    f"names is not fetched; if you trust it: hf download REPOSITORY, or {flag} with yours"
                )


def read_prompt(arguments: argparse.Namespace, stdin: TextIO | None) -> str:
    """The prompt from the command line, a file or standard input; one line break at its end does not count."""
    ways = [arguments.prompt, arguments.prompt_option, arguments.prompt_file]
    if sum(way is not None for way in ways) > 1:
        raise InputError("give the prompt either as an argument or as --prompt-file")
    if arguments.prompt_file is not None:
        try:
            with arguments.prompt_file.open("rb") as file:
                content = file.read(4 * MAX_PROMPT + 8)  # a character has at most four bytes
            text = content.decode("utf-8-sig", "strict" if len(content) < 4 * MAX_PROMPT + 8 else "replace")
        except UnicodeDecodeError as error:
            raise InputError(f"{arguments.prompt_file} is not UTF-8 text ({error.reason})") from None
        except OSError as error:
            raise InputError(f"cannot read {arguments.prompt_file}: {error.strerror}") from None
        return str(text).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    if arguments.prompt_option is not None:
        return str(arguments.prompt_option)
    if arguments.prompt is not None and arguments.prompt != "-":
        return str(arguments.prompt)
    if stdin is None or (arguments.prompt is None and stdin.isatty()):
        raise InputError('no prompt: give one, as in flux2-generate "a red fox in the snow", or --prompt-file FILE')
    try:
        text = stdin.read(MAX_PROMPT + 2).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not {error.encoding} text ({error.reason})") from None
    if not text:
        raise InputError('no prompt: give one, as in flux2-generate "a red fox in the snow"; standard input is empty')
    return text


def output_path(template: str, seed: int, index: int, prompt: str = "") -> Path:
    """The file of one image; {seed}, {index} or {index:03} with leading zeros, and the first letters of {prompt} are
    filled in. In a folder the file has the default name.

    Raises:
        InputError: for another placeholder.
    """
    template = expand(template)
    if template.endswith("/") or os.path.isdir(template):
        template = os.path.join(template, DEFAULT_OUTPUT)
    if not OUTPUT_TEMPLATE.fullmatch(template):
        raise InputError(f"--output takes {{seed}}, {{index}} and {{prompt}} only, got {template!r}")
    slug = re.sub(r"\W+", "-", prompt)[:MAX_SLUG].strip("-") or "image"
    return Path(template.format(seed=seed, index=index, prompt=slug))


def check(task: Task) -> None:
    """Refuse what can be refused without the model.

    Raises:
        InputError: naming the value.
    """
    check_inputs(task)
    if task.mask_output is not None and task.options.edit_option is None:
        raise InputError("--mask-output belongs to --color-match or --edit-composite, and neither is given")
    for output in (*task.outputs, *task.masks):
        check_output(output)
    if task.preview is not None:
        check_preview(task.preview)


def check_inputs(task: Task) -> None:
    """Refuse what can be refused without the model, whatever becomes of the images.

    Raises:
        InputError: naming the value.
    """
    if task.inputs.images or task.inputs.has_init:
        task.sizes(AutoEncoderConfig.sample_size)  # a model's own side, which is not needed here
    check_prompt(task.inputs.prompt)
