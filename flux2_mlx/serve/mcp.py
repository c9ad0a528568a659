"""flux2-mcp: tools that generate and edit images, for assistants that speak the Model Context Protocol over stdio."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .__main__ import PATIENCE, run_server

FOLDER = "~/Pictures/flux2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. What takes long to import is imported once interrupts are handled.

    Returns:
        The exit code; see run_command.
    """
    return run_server(lambda unfinished: serve(argv, unfinished))


def build_parser() -> argparse.ArgumentParser:
    from ..cli.common import Parser, path
    from ..options import ADAPTERS, MEMORY, MODEL, OUTPUT
    from .arguments import SERVER, add_model_options

    parser = Parser(
        prog="flux2-mcp",
        titles=(SERVER, MODEL, ADAPTERS, MEMORY, OUTPUT),
        description="Tools that generate and edit images, for assistants that speak MCP over stdio.",
    )
    add_model_options(parser)
    group = parser.titles[SERVER]
    group.add_argument(
        "--output", type=path, default=path(FOLDER), metavar="DIR", help=f"folder of the images ({FOLDER})"
    )
    group.add_argument(
        "--images",
        type=path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder whose pictures the assistant may edit, beside that of --output; repeat it for several",
    )
    return parser


def serve(argv: Sequence[str] | None, unfinished: list[bool]) -> int:
    """Serve until standard input ends.

    Raises:
        InputError: for what cannot be used.
    """
    from ..cli.common import silence_downloads

    try:
        from .arguments import studio_of
        from .tools import build_server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("mcp", "starlette"):
            raise
        raise InputError('flux2-mcp needs mcp, version 2: pip install "flux2_mlx[mcp]"') from None
    arguments = build_parser().parse_args(argv)
    silence_downloads(quiet=True)
    studio = studio_of(arguments)
    make_folder(arguments.output)
    studio.worker.start()
    try:
        build_server(studio, arguments.output, arguments.images).run("stdio")
    finally:
        unfinished.append(not studio.worker.stop(PATIENCE))
    return 0


def make_folder(folder: Path) -> None:
    """
    Raises:
        InputError: where it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another with --output") from None


if __name__ == "__main__":
    sys.exit(main())
