"""python -m flux2_mlx.generate: a prompt, or a file of jobs, to image files."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial

from .cli.arguments import build_parser, check, complete
from .cli.common import INTERRUPTED, show_warning, silence_downloads
from .cli.jobs import generate_jobs
from .cli.plan import print_plan
from .cli.runner import generate, open_pipeline, start
from .cli.session import interact
from .errors import DeviceError, InputError, one_line
from .runtime.distributed import launched, random_seed, shared_seed


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
    seed = ""  # added to the message where generating does not finish
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show_warning  # type: ignore[assignment]  # takes whatever comes after the message
        try:
            arguments = build_parser().parse_args(argv)
            if arguments.quiet:
                silence_downloads()
            if arguments.interactive:
                interact(arguments)
                return 0
            if arguments.jobs is not None:
                return generate_jobs(arguments)
            if arguments.resume:
                raise InputError("--resume belongs to --jobs, and none is given")
            group = launched()
            if group is not None:
                arguments.quiet = arguments.quiet or group.rank() > 0
            task = complete(arguments, sys.stdin, random_seed if group is None else partial(shared_seed, group))
            if arguments.plan:
                print_plan(task, arguments.plan == "measure")
                return 0
            check(task)
            steps = start(task, open_pipeline(task, group))
            seed = f" (seed {task.seed})"
            generate(steps, task, started, saves=group is None or group.rank() == 0)
        except (InputError, DeviceError, FloatingPointError, OSError) as error:
            print(f"error: {one_line(error)}{seed}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"interrupted{seed}", file=sys.stderr)
            return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
