"""The server's application: which path is answered by what."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..cli.command import tell_fault
from ..errors import InputError
from . import native
from .answers import fault_answer
from .events import Failure
from .security import Guard, Rules, TooLarge
from .studio import Studio

PAGE = Path(__file__).parent / "page"


async def health(request: Request) -> Response:
    """Whether the server answers, and how many wait."""
    queue = request.app.state.studio.worker.queue
    return JSONResponse({"status": "ok", "waiting": len(queue), "running": queue.running is not None})


async def answer_failure(request: Request, error: Exception) -> Response:
    """A refusal in the form of the API that was asked."""
    studio: Studio = request.app.state.studio
    if isinstance(error, HTTPException):
        return fault_answer(request.url.path, Failure(str(error.detail), error.status_code))
    if isinstance(error, InputError):
        return fault_answer(request.url.path, Failure(studio.catalogue.tell(error), 400))
    if isinstance(error, Failure):
        return fault_answer(request.url.path, error)
    tell_fault(error)
    return fault_answer(request.url.path, Failure(f"{type(error).__name__}: a fault of flux2_mlx", 500))


def guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose every fault is its request's alone."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except TooLarge:
            raise
        except Exception as error:
            return await answer_failure(request, error)

    handle.__doc__ = handler.__doc__
    return handle


ROUTES: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
    ("GET", "/health", health),
    ("GET", "/api/info", native.info),
    ("POST", "/api/images", native.draw),
    ("POST", "/api/settings", native.settings),
]


def build_app(studio: Studio, rules: Rules) -> Starlette:
    """The application; its worker runs as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        studio.worker.queue.close()

    routes: list[Route | Mount] = [Route(path, guarded(handler), methods=[method]) for method, path, handler in ROUTES]
    routes.append(Mount("/", StaticFiles(directory=PAGE, html=True)))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, rules=rules)],
        exception_handlers={HTTPException: answer_failure},
        lifespan=lifespan,
    )
    app.state.studio = studio
    return app
