"""From events to answers: following an order in the event loop, pictures as text, server-sent events, errors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..imaging.files import encode_image
from .events import Event, Failure, Picture, StepDone
from .queue import Order
from .worker import Worker

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
SILENCE = 15  # seconds after which a stream says that it lives
BEHIND = 4  # events that a slow reader may have before it; further previews are left out
PREVIEW_QUALITY = 70
HUNG_UP = 499  # as nginx has it; nobody reads it


async def follow(worker: Worker, order: Order) -> AsyncGenerator[Event | None, None]:
    """An order's events, from where it has a place in the queue; None after each SILENCE. Closing this cancels it.

    Raises:
        Failure: where it cannot be taken, or was not done.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def put(event: Event) -> None:
        if isinstance(event, StepDone) and event.preview is not None and events.qsize() >= BEHIND:
            return
        events.put_nowait(event)

    def emit(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(put, event)

    order.emit = emit
    worker.queue.put(order)
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), SILENCE)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Failure):
                raise event
            yield event
            if isinstance(event, Picture) and event.is_last:
                return
    finally:
        worker.queue.cancel(order)


async def pictures_of(request: Request, worker: Worker, order: Order) -> list[Picture]:
    """The images of an order, for an answer in one piece; a client that hangs up cancels it.

    Raises:
        Failure: where they cannot be had.
    """

    async def collect() -> list[Picture]:
        async with contextlib.aclosing(follow(worker, order)) as events:
            return [event async for event in events if isinstance(event, Picture)]

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(hang_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Failure("the client has hung up", HUNG_UP)
        return tasks[0].result() or []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def events_answer(
    worker: Worker,
    order: Order,
    lines: Callable[[Event], Any],
    fault: Callable[[Failure], str],
    *,
    silence: str = ": still here\n\n",
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """A streamed answer: ``lines`` awaits the text of each event, "" for none; ``fault`` gives that of a failure.

    Raises:
        Failure: where the order is not taken.
    """
    events = follow(worker, order)
    first = await anext(events)  # it has a place, or a Failure is told as any other

    async def body() -> AsyncIterator[str]:
        try:
            async with contextlib.aclosing(events):
                if first is not None:
                    yield await lines(first)
                async for event in events:
                    text = silence if event is None else await lines(event)
                    if text:
                        yield text
        except Failure as failure:
            yield fault(failure)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type=media_type, headers=headers)


def sse(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def encoded(picture: Picture, suffix: str = ".png", quality: int | None = None) -> str:
    """An image's file with its settings, as base64."""
    settings = picture.settings, picture.parameters
    content = await run_in_threadpool(encode_image, picture.picture, suffix, *settings, quality)
    return base64.b64encode(content).decode()


async def encoded_preview(image: Image.Image, suffix: str) -> str:
    content = await run_in_threadpool(encode_image, image, suffix, None, "", PREVIEW_QUALITY)
    return base64.b64encode(content).decode()


def data_uri(base64_text: str, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64_text}"


KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def fault_body(message: str, status: int) -> dict[str, Any]:
    """A fault in OpenAI's form."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def fault_answer(path: str, failure: Failure) -> Response:
    """A failure in the form of the API that was asked."""
    message = str(failure)
    body: dict[str, Any] = fault_body(message, failure.status)
    if path.startswith("/sdapi/"):
        body = {"error": message, "detail": message, "errors": message}
    elif path in ("/api/generate", "/api/tags", "/api/show"):
        body = {"error": message}
    headers = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
    return JSONResponse(body, failure.status, headers)
