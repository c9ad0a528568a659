"""python -m flux2_mlx.fuse: a checkpoint with LoRAs merged into its transformer, packed or not, as a new folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli.common import LORA_HELP, MODEL_HELP, PARTIAL_HELP, Parser, add_writing_options, run_command, write_model


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flux2-fuse",
        description="Merge LoRAs into a FLUX.2 [klein] checkpoint, in float32, and write it; with --quantize packed "
        "afterwards.",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("target", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--lora", action="append", required=True, metavar="FILE[:SCALE]", help=LORA_HELP)
    parser.add_argument("--lora-partial", action="store_true", help=PARTIAL_HELP)
    add_writing_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see commands.run_command for the exit code."""

    def run() -> None:
        arguments = build_parser().parse_args(argv)
        write_model(arguments, arguments.lora, arguments.lora_partial)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
