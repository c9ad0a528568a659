"""python -m flux2_mlx.convert: a checkpoint to the diffusers layout, quantized or not, or to BFL's files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .cli.command import run_command
from .errors import InputError


def build_parser() -> argparse.ArgumentParser:
    from .cli.common import MODEL_HELP, Parser, add_writing_options, path

    parser = Parser(
        prog="flux2-convert", description="Convert or quantize a FLUX.2 [klein] checkpoint, or check a folder."
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    parser.add_argument("target", nargs="?", type=path, help="folder to write, which must not exist")
    add_writing_options(parser)
    parser.add_argument("--check", type=path, metavar="FOLDER", help="verify a folder of weights instead of converting")
    parser.add_argument(
        "--upload",
        metavar="ID",
        help="push the written folder to the Hub, into a new private repository or an existing one",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Check or convert, as the arguments say.

    Raises:
        InputError: for what cannot be used.
    """
    from .checkpoints.publish import check, upload
    from .cli.common import write_model

    if arguments.check is not None:
        if arguments.model is not None:
            raise InputError("give either a model and a target, or --check FOLDER")
        for line in check(arguments.check):
            print(line)
        return
    if arguments.target is None:
        raise InputError("give a model and a target, as in flux2-convert klein-4b klein-4b-4bit --quantize 4")
    write_model(arguments)
    if arguments.upload is not None:
        try:
            print(upload(arguments.target, arguments.upload))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{arguments.target} is written, and not all of it uploaded") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see run_command for the exit code. What takes long to import is imported once interrupts are
    handled.
    """
    return run_command(lambda: run(build_parser().parse_args(argv)), interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
