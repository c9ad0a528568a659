"""python -m flux2_mlx.generate: a prompt to a picture file."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import string
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from ._version import __version__
from .config import MAX_SEQUENCE_LENGTH, RELEASED, InputError
from .images import FORMATS, check_output, read_metadata, save_image
from .latents import NOISES
from .pipeline import DEFAULT_SIZE, DTYPES, Flux2Pipeline, check_options
from .sampler import SCHEDULES

DEFAULT_OUTPUT = "flux2-{seed}.png"
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flux2-generate",
        description="Draw a prompt with FLUX.2 [klein].",
        epilog=f"Released models: {', '.join(RELEASED)}.",
    )
    parser.add_argument("prompt", nargs="?", help='what to draw; "-" or nothing reads standard input')
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from (base models)")
    parser.add_argument("--model", default="klein-4b", help="a released name, a folder or a Hub id (%(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--width", type=int, default=DEFAULT_SIZE, help="in pixels, a multiple of 16 (%(default)s)")
    parser.add_argument("--height", type=int, default=DEFAULT_SIZE, help="in pixels, a multiple of 16 (%(default)s)")
    parser.add_argument("--steps", type=int, dest="num_steps", help="4 for distilled models, 50 for base models")
    parser.add_argument("--guidance", type=float, help="1.0 for distilled models, 4.0 for base models")
    parser.add_argument(
        "--seed", type=int, help="of the first picture, the next have seed + 1, ...; random unless given"
    )
    parser.add_argument("--num-images", type=int, default=1, help="how many pictures (%(default)s)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="flux2", help="noise levels (%(default)s)")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", help="custom noise levels, falling from 1, without the last 0"
    )
    parser.add_argument("--noise", choices=NOISES, default="torch", help="the seed's meaning: torch's or MLX's numbers")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="bfloat16; float16 on M1 and M2; float32 on a CPU")
    parser.add_argument(
        "--max-sequence-length", type=int, default=MAX_SEQUENCE_LENGTH, help="tokens of the prompt (%(default)s)"
    )
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
    parser.add_argument("--stats", action="store_true", help="print seconds and peak bytes of each part as JSON")
    parser.add_argument("--quiet", action="store_true", help="no bars, no summary; the seed and the file are printed")
    parser.add_argument("--version", action="version", version=f"flux2_mlx {__version__}")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and with --from-image take what is not on the command line from that picture."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.from_image is None:
        return arguments
    metadata = read_metadata(arguments.from_image)
    known = ("model", "width", "height", "num_steps", "guidance", "seed", "schedule", "sigmas", "noise", "dtype")
    more = ("max_sequence_length", "negative_prompt")
    parser.set_defaults(**{name: metadata[name] for name in (*known, *more) if metadata.get(name) is not None})
    arguments = parser.parse_args(argv)
    if arguments.prompt is None and arguments.prompt_file is None:
        arguments.prompt = metadata["prompt"]
    return arguments


def read_prompt(arguments: argparse.Namespace, stdin: TextIO) -> str:
    """The prompt from the command line, a file or standard input; one line break at its end does not count."""
    if arguments.prompt_file is not None:
        if arguments.prompt is not None:
            raise InputError("give the prompt either as an argument or as --prompt-file")
        try:
            text = arguments.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{arguments.prompt_file} is not UTF-8 text ({error.reason})") from None
        except OSError as error:
            raise InputError(f"cannot read {arguments.prompt_file}: {error.strerror}") from None
        return str(text).removesuffix("\n")
    if arguments.prompt is not None and arguments.prompt != "-":
        return str(arguments.prompt)
    if arguments.prompt is None and stdin.isatty():
        raise InputError('no prompt: give one, as in flux2-generate "a red fox in the snow", or --prompt-file FILE')
    return stdin.read().removesuffix("\n")


def output_path(template: str, seed: int, index: int) -> Path:
    """The file of one picture; {seed} and {index} are filled in.

    Raises:
        InputError: for another placeholder.
    """
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if fields - {"seed", "index"}:
            raise ValueError
        return Path(template.format(seed=seed, index=index)).expanduser()
    except ValueError:
        raise InputError(f"--output takes {{seed}} and {{index}} alone, got {template!r}") from None


def run(arguments: argparse.Namespace) -> None:
    """Draw and save; everything that can be refused is refused before the model is opened."""
    started = time.perf_counter()
    prompt = read_prompt(arguments, sys.stdin)
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    options = {
        "height": arguments.height,
        "width": arguments.width,
        "num_steps": arguments.num_steps,
        "guidance": arguments.guidance,
        "seed": seed,
        "num_images": arguments.num_images,
        "schedule": arguments.schedule,
        "sigmas": arguments.sigmas,
        "noise": arguments.noise,
        "max_sequence_length": arguments.max_sequence_length,
    }
    check_options(**options)
    for index in range(arguments.num_images):
        check_output(output_path(arguments.output, seed + index, index))

    pipe = Flux2Pipeline.from_pretrained(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, progress=not arguments.quiet
    )
    steps = pipe.stream(prompt, negative_prompt=arguments.negative_prompt, **options)
    for step in steps:
        if step.is_last:
            picture, settings = step.picture(), step.settings
            path = output_path(arguments.output, settings.seed, step.image)
            written = save_image(picture, path, settings.metadata(), settings.parameters())
            tqdm.write(f"seed {settings.seed}  {written}")  # past the bars
            sys.stdout.flush()
    stats = step.stats
    peak = max(stats.peak_bytes.values())
    if not arguments.quiet:
        seconds = "  ".join(f"{part} {value:.1f} s" for part, value in stats.seconds.items())
        total = time.perf_counter() - started
        print(f"{total:.1f} s in all ({seconds}), peak memory {peak / 1e9:.2f} GB", file=sys.stderr)
    if arguments.stats:
        report: dict[str, Any] = {
            "seconds": stats.seconds,
            "peak_bytes": stats.peak_bytes,
            "model": pipe.checkpoint.name,
        }
        print(json.dumps(report))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, 2 for input that cannot be used (one line on standard error), 130 after Ctrl-C.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show_warning  # type: ignore[assignment]  # takes whatever comes after the message
        try:
            arguments = parse_arguments(argv)
            if arguments.quiet:
                _silence_downloads()
            run(arguments)
        except (InputError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
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
