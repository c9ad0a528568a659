"""python -m flux2_mlx.generate: a prompt, or a file of jobs, to image files."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial

from .cli.command import run_command
from .errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. What takes a third of a second to import is imported once interrupts are handled.

    Returns:
        The exit code: 0, 1 where some of --jobs failed; see run_command for others.
    """
    started, seed = time.perf_counter(), list[int]()  # told where generating does not finish

    def run() -> int:
        from .cli.arguments import build_parser, check, complete

        arguments = build_parser().parse_args(argv)

        from .cli.common import silence_downloads
        from .cli.jobs import generate_jobs
        from .cli.plan import print_plan
        from .cli.runner import generate, open_pipeline, start
        from .cli.session import interact
        from .runtime.distributed import launched, random_seed, shared_seed

        silence_downloads(arguments.quiet)
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
        seed.append(task.seed)
        generate(steps, task, started, saves=group is None or group.rank() == 0)
        return 0

    return run_command(run, about=lambda: f" (seed {seed[0]})" if seed else "")


if __name__ == "__main__":
    sys.exit(main())
