"""python -m flux2_mlx.serve: the page and the APIs of a model, until Ctrl-C."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence

from ..cli.command import run_command, tell
from ..errors import InputError

PATIENCE = 1.0  # seconds that the threads have to end
CONNECTIONS = 100  # beside those that wait; others are refused, since each may bring MAX_BODY
NEEDED = ("starlette", "uvicorn", "python_multipart")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code; see run_command.
    """
    return run_server(lambda unfinished: serve(argv, unfinished))


def run_server(run: Callable[[list[bool]], int]) -> int:
    """Run a command that has a thread of MLX, and end the process at once where that is still at work: a step cannot be
    interrupted, and the process would abort.

    Args:
        run: does it; puts into its argument whether the thread was still at work at the end.

    Returns:
        The exit code; see run_command.
    """
    unfinished: list[bool] = []
    code = run_command(lambda: run(unfinished))
    if any(unfinished):
        sys.stderr.flush()
        os._exit(code)
    return code


def serve(argv: Sequence[str] | None, unfinished: list[bool]) -> int:
    """Serve until a signal ends it.

    Args:
        unfinished: gets whether the thread of MLX was still at work then.

    Raises:
        InputError: for what cannot be used, as a port that is taken.
    """
    try:
        import uvicorn

        from .app import build_app
        from .arguments import build_parser, rules_of, studio_of
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise InputError(f'flux2-serve needs {error.name}: pip install "flux2_mlx[serve]"') from None
    arguments = build_parser().parse_args(argv)
    rules = rules_of(arguments)
    studio = studio_of(arguments)
    with listen(arguments.host, arguments.port) as listener:
        config = uvicorn.Config(
            build_app(studio, rules),
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=1,
            limit_concurrency=arguments.queue + CONNECTIONS,
            server_header=False,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
        studio.worker.start()
        thread.start()
        try:
            host = "127.0.0.1" if arguments.host in ("0.0.0.0", "::") else arguments.host
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
            tell(f"{address}  {studio.catalogue.default}; Ctrl-C ends it")
            if arguments.open:
                webbrowser.open(address)
            while thread.is_alive():
                thread.join(0.2)
        finally:
            until = time.monotonic() + PATIENCE
            studio.worker.queue.close()
            server.should_exit = True
            thread.join(PATIENCE)
            unfinished.append(not studio.worker.stop(max(0.0, until - time.monotonic())))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: for a port that is taken, or an address that is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is taken; --port {port + 1} takes another, --port 0 a free one"
            ) from None
        raise InputError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
