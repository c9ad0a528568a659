"""python -m flux2_mlx.doctor: whether this machine computes what a CPU computes in float32, and how fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli.command import run_command
from .errors import InputError


def build_parser() -> argparse.ArgumentParser:
    from .cli.common import Parser, path

    parser = Parser(
        prog="flux2-doctor",
        description="Check this machine with nano, in a minute or two: its GPU's numbers beside the CPU's, threads, "
        "memory beside the plan, speeds. One line a check: ok, slow, WRONG or skipped.",
    )
    parser.add_argument(
        "--full", action="store_true", help="klein-4b's true shapes too, in random weights, for minutes"
    )
    parser.add_argument("--report", type=path, metavar="FILE", help="write Markdown to paste into an issue; no names")
    return parser


def is_report(file: Path) -> bool:
    return file.read_bytes().startswith(b"flux2-doctor ")


def run(arguments: argparse.Namespace) -> int:
    """Run the checks, print what they find, and write the report.

    Raises:
        InputError: for a report's file that is something else.
    """
    from .cli.common import silence_downloads
    from .diagnosis import checks
    from .diagnosis.findings import CUT_OFF, WRONG, Finding, examine, markdown

    found: list[tuple[str, Finding]] = []
    if arguments.report is not None and arguments.report.exists() and not is_report(arguments.report):
        raise InputError(f"{arguments.report} exists and is no report; give --report another file")
    silence_downloads(quiet=True)
    for check in [*checks.quick_checks(), *(checks.full_checks() if arguments.full else ())]:
        if arguments.report is not None:  # before each check, since a GPU's fault may end the process
            arguments.report.write_text(markdown([*found, (check.name, CUT_OFF)]), encoding="utf-8")
        print(f"{check.name}: ", end="", flush=True)
        found.append((check.name, examine(check)))
        print(f"{found[-1][1].verdict}: {found[-1][1]}", flush=True)
    if arguments.report is not None:
        arguments.report.write_text(markdown(found), encoding="utf-8")
    return int(any(finding.verdict == WRONG for _, finding in found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. What takes long to import is imported once interrupts are handled.

    Returns:
        The exit code: 0, 1 where something is wrong; see run_command for others.
    """
    return run_command(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
