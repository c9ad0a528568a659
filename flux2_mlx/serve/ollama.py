"""Ollama's API as it drew images until July 2026: /api/generate, /api/tags, /api/show.

Reference: ollama 4713800b0^, docs/api.md.
"""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import InputError
from .answers import encoded, events_answer, pictures_of
from .arguments import duration
from .events import Event, Failure, Picture, StepDone
from .native import pictures_in
from .studio import Studio, client_of, json_of

OPTIONS = ("seed", "steps", "width", "height", "negative_prompt", "guidance")  # also within "options"
NANOSECONDS = 10**9


async def generate(request: Request) -> Response:
    """An image of a prompt, and of pictures, which it edits: lines of JSON, the last with the image."""
    studio: Studio = request.app.state.studio
    values = await json_of(request)
    inner = values.get("options") or {}
    if not isinstance(inner, dict):
        raise InputError(f"options must be an object, got {inner!r}")
    given = {name: found for name in OPTIONS if (found := values.get(name, inner.get(name))) not in (None, 0, -1, "")}
    seed = values.get("seed", inner.get("seed"))
    if seed == 0 and not isinstance(seed, bool):
        given["seed"] = 0
    keep_alive = keep_alive_of(values.get("keep_alive"))
    pictures = pictures_in({"image": values.get("images")})
    named = {"model": str(values["model"]).removesuffix(":latest")} if values.get("model") else {}
    if not values.get("prompt"):  # as clients load and unload a model
        return JSONResponse(line(studio.catalogue.default, done=True, done_reason="load", response=""))
    options = {"prompt": values["prompt"], **given, **named}
    order = await studio.order(client_of(request), options, pictures, keep_alive=keep_alive)
    started = time.perf_counter()

    def last(image: Picture, text: str) -> dict[str, Any]:
        total = time.perf_counter() - started
        return line(
            order.model,
            image=text,
            done=True,
            done_reason="stop",
            total_duration=int(total * NANOSECONDS),
            load_duration=int(max(0.0, total - image.seconds) * NANOSECONDS),
            seed=image.settings["seed"],
            warnings=list(image.warnings),
        )

    if values.get("stream") is False:
        (image,) = await pictures_of(request, studio.worker, order)
        return JSONResponse(last(image, await encoded(image)))

    async def lines(event: Event) -> str:
        if isinstance(event, StepDone):
            return json.dumps(line(order.model, completed=event.index, total=event.steps, done=False)) + "\n"
        return json.dumps(last(event, await encoded(event))) + "\n" if isinstance(event, Picture) else ""

    return await events_answer(studio.worker, order, lines, fault_line, silence="", media_type="application/x-ndjson")


def line(model: str, **values: Any) -> dict[str, Any]:
    return {"model": model, "created_at": datetime.now(timezone.utc).isoformat(), **values}


def fault_line(failure: Failure) -> str:
    return json.dumps({"error": str(failure)}) + "\n"


def keep_alive_of(value: Any) -> float | None:
    """Seconds of "10m", or of a number; below 0 a day, which comes to the same.

    Raises:
        InputError: for what is no duration.
    """
    if value is None:
        return None
    try:
        seconds = duration(str(value))
    except Exception:
        raise InputError(f"keep_alive must be seconds or a duration such as 10m, got {value!r}") from None
    return seconds if seconds >= 0 else 86400.0


async def tags(request: Request) -> Response:
    """The models that there are."""
    studio: Studio = request.app.state.studio
    return JSONResponse({"models": [described(name) for name in studio.catalogue.models]})


def described(name: str) -> dict[str, Any]:
    details = {"family": "flux2", "families": ["flux2"], "format": "safetensors"}
    return {
        "name": name,
        "model": name,
        "modified_at": "1970-01-01T00:00:00Z",
        "size": 0,
        "digest": "",
        "details": details,
    }


async def show(request: Request) -> Response:
    """What a model can do; a name that is not listed is answered by the first one."""
    studio: Studio = request.app.state.studio
    values = await json_of(request)
    name = str(values.get("model") or values.get("name") or "").removesuffix(":latest")
    found, _ = studio.catalogue.model_named(name)
    more = {"capabilities": ["image"], "modelfile": "", "parameters": "", "template": "", "model_info": {}}
    return JSONResponse({**described(found), **more})
