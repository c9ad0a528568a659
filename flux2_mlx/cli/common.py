"""What the commands share: a parser that tells faults in one line, the options that say which model to open, those that
say what to write of it, and the processes that were started together.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..adapters.lora import fuse, parse_lora
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.write import LAYOUTS, convert
from ..errors import InputError, one_line
from ..quantization.spec import AFFINE_BITS, FLOAT_MODES, parse_options

# What belongs to the model besides its name, as Flux2Pipeline.from_pretrained takes it.
PART_OPTIONS = ("transformer", "text_encoder", "vae", "tokenizer", "distilled", "kv_cache")
MODEL_OPTIONS = (*PART_OPTIONS, "quantize", "quantize_text_encoder", "group_size")
MODEL_HELP = "a released name, nano, a folder, a file, a Hub id or owner/name/file"


class Parser(argparse.ArgumentParser):
    """Tells a fault in one line, as the rest of a command does, instead of with its usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that opens a model, besides its name."""
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    for part, what in (("transformer", "transformer"), ("text-encoder", "text encoder"), ("vae", "autoencoder")):
        parser.add_argument(f"--{part}", metavar="FILE", help=f"another {what}: a file, a folder, or one on the Hub")
    parser.add_argument("--tokenizer", metavar="DIR", help="another folder with tokenizer.json")
    parser.add_argument(
        "--distilled",
        action=argparse.BooleanOptionalAction,
        help="whether the transformer draws in few steps without guidance, where its file does not say",
    )
    parser.add_argument(
        "--kv-cache",
        action=argparse.BooleanOptionalAction,
        help="whether the transformer was trained to keep its references (klein-9b-kv), where its file does not say",
    )
    parser.add_argument(
        "--quantize",
        metavar="BITS",
        help=f"pack matrices: {', '.join(map(str, AFFINE_BITS))} bits, {', '.join(FLOAT_MODES)}; below 8 "
        "bits the most sensitive layers get more",
    )
    parser.add_argument("--quantize-text-encoder", metavar="BITS", help="the same of the text encoder, to differ")
    parser.add_argument("--group-size", type=int, help="weights that share a scale: 32, 64, 128 (64)")


LORA_HELP = (
    "a LoRA, and how much of its change is made (1): a safetensors file, a folder, a Hub id or owner/name/file; given "
    "again for each further one"
)
PARTIAL_HELP = "pass over what of a LoRA fits no layer, instead of refusing it"


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that writes a model."""
    add_model_options(parser)
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of the result (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def write_model(arguments: argparse.Namespace, loras: Sequence[str] = (), partial: bool = False) -> None:
    """Write the model that the options name, with these LoRAs merged, as they say, to ``target``.

    Raises:
        InputError: for what cannot be used.
    """
    packed = parse_options(arguments.quantize, arguments.quantize_text_encoder, arguments.group_size)
    parts = {name: getattr(arguments, name) for name in PART_OPTIONS}
    given = [parse_lora(text) for text in loras]
    checkpoint = fuse(open_checkpoint(arguments.model, revision=arguments.revision, **parts), given, partial)
    convert(checkpoint, arguments.target, layout=arguments.layout, quantization=packed, progress=not arguments.quiet)
    print(arguments.target)


def run_command(run: Callable[[], None]) -> int:
    """Run a command that writes.

    Returns:
        The exit code: 0, 2 for input that cannot be used (one line on standard error), 130 after Ctrl-C.
    """
    try:
        run()
    except (InputError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def gigabytes(text: str) -> int:
    """GB of 10^9 bytes in bytes."""
    size = float(text) * 1e9
    if not 1 <= size < 2**63:
        raise ValueError
    return int(size)


INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as one line, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)


def silence_downloads() -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
