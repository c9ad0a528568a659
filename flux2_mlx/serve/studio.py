"""What the handlers of every API share: the worker, what reads requests, and who asks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ..errors import InputError
from .catalogue import Catalogue
from .orders import Pictures, Reader
from .queue import Order
from .worker import Worker


@dataclass(frozen=True)
class Studio:
    """A server's parts, behind its APIs."""

    catalogue: Catalogue
    reader: Reader
    worker: Worker

    async def order(
        self,
        client: str,
        values: Mapping[str, Any],
        pictures: Pictures,
        *,
        init_latents: Any = None,
        previews: int | None = 0,
        warnings: tuple[str, ...] = (),
        **more: Any,
    ) -> Order:
        """The order of a client's request, checked.

        Args:
            init_latents: the id of an image of before, to start from its latents.
            more: of the order's, as Order has them.

        Raises:
            InputError: for what cannot be drawn.
            Failure: where that image's latents are not kept.
        """
        options = dict(values)
        model, other = self.catalogue.model_named(options.pop("model", None), self.worker.state.model)
        if init_latents is not None:
            pictures = replace(pictures, init_latents=self.worker.kept.find(init_latents, model))
        task = await run_in_threadpool(self.reader.task, model, options, pictures)
        told = (*warnings, other) if other else warnings
        return Order(client, model, task, lambda event: None, previews, told, **more)


def client_of(request: Request) -> str:
    """Who asks, as far as turns are concerned."""
    return f"{request.client.host if request.client else ''} {request.headers.get('user-agent', '')}"


async def json_of(request: Request) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        InputError: for anything else.
    """
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise InputError("the body must be a JSON object")
    return values
