"""The server's application: which path is answered by what."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..cli.command import tell_fault
from ..errors import InputError
from . import a1111, native, ollama, openai, openapi
from .answers import fault_answer
from .events import Failure
from .security import Guard, Rules, TooLarge
from .studio import Studio

PAGE = Path(__file__).parent / "page"


async def health(request: Request) -> Response:
    """Whether the server answers, and how many wait."""
    queue = request.app.state.studio.worker.queue
    return JSONResponse({"status": "ok", "waiting": len(queue), "running": queue.running is not None})


async def unknown(request: Request) -> Response:
    """What no API has."""
    raise Failure(f"there is no {request.method} {request.url.path[:100]} here; see /docs", 404)


async def openapi_json(_: Request) -> Response:
    """All of this, as OpenAPI describes it."""
    return JSONResponse(openapi.describe(ROUTES))


async def docs(_: Request) -> Response:
    """The same to read."""
    return HTMLResponse(openapi.page(openapi.describe(ROUTES)))


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
    ("GET", "/docs", docs),
    ("GET", "/openapi.json", openapi_json),
    ("GET", "/api/info", native.info),
    ("POST", "/api/images", native.draw),
    ("POST", "/api/settings", native.settings),
    ("GET", "/v1/models", openai.models),
    ("GET", "/v1/models/{name:path}", openai.model),
    ("POST", "/v1/images/generations", openai.generations),
    ("POST", "/v1/images/edits", openai.edits),
    ("POST", "/sdapi/v1/txt2img", a1111.txt2img),
    ("POST", "/sdapi/v1/img2img", a1111.img2img),
    ("GET", "/sdapi/v1/options", a1111.get_options),
    ("POST", "/sdapi/v1/options", a1111.set_options),
    ("GET", "/sdapi/v1/sd-models", a1111.models),
    ("GET", "/sdapi/v1/samplers", a1111.samplers),
    ("GET", "/sdapi/v1/schedulers", a1111.schedulers),
    ("GET", "/sdapi/v1/loras", a1111.loras),
    ("GET", "/sdapi/v1/upscalers", a1111.nothing),
    ("GET", "/sdapi/v1/latent-upscale-modes", a1111.nothing),
    ("GET", "/sdapi/v1/sd-vae", a1111.nothing),
    ("GET", "/sdapi/v1/progress", a1111.progress),
    ("POST", "/sdapi/v1/interrupt", a1111.interrupt),
    ("POST", "/sdapi/v1/png-info", a1111.png_info),
    ("POST", "/api/generate", ollama.generate),
    ("GET", "/api/tags", ollama.tags),
    ("POST", "/api/show", ollama.show),
]


def build_app(studio: Studio, rules: Rules) -> Starlette:
    """The application; its worker runs as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        studio.worker.queue.close()

    routes: list[Route | Mount] = [Route(path, guarded(handler), methods=[method]) for method, path, handler in ROUTES]
    for prefix in ("api", "v1", "sdapi"):
        routes.append(Route(f"/{prefix}/{{rest:path}}", guarded(unknown), methods=["GET", "POST"]))
    routes.append(Mount("/", StaticFiles(directory=PAGE, html=True)))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, rules=rules)],
        exception_handlers={HTTPException: answer_failure},
        lifespan=lifespan,
    )
    app.state.studio = studio
    return app
