"""python -m flux2_mlx.fuse: a checkpoint with LoRAs merged into its transformer, as a new folder, quantized or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .cli.command import run_command


def build_parser() -> argparse.ArgumentParser:
    from .cli.common import MODEL_HELP, Parser, add_writing_options, path
    from .options import ModelOptions

    parser = Parser(
        prog="flux2-fuse",
        description="Merge LoRAs into a FLUX.2 [klein] checkpoint, in float32, and write it; --quantize quantizes the "
        "merged weights.",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("target", type=path, help="folder to write, which must not exist")
    parser.add_option(ModelOptions, ModelOptions.field("lora"), required=True)
    parser.add_option(ModelOptions, ModelOptions.field("lora_partial"))
    add_writing_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see run_command for the exit code. What takes long to import is imported once interrupts are
    handled.
    """

    def run() -> None:
        arguments = build_parser().parse_args(argv)

        from .cli.common import write_model

        write_model(arguments, arguments.lora, bool(arguments.lora_partial))

    return run_command(run, interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
