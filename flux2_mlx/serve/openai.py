"""OpenAI's image API: /v1/images/generations, /v1/images/edits, /v1/models.

Reference: openai-python's types/image_*.py and resources/images.py. What OpenAI does not have goes by ``extra_body``:
any option of an image, under any of its names, and ``lora``; fields of other vendors are ignored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import InputError
from ..fields import check_choice
from ..imaging.preprocess import reference_size
from ..sampling.latents import PIXELS_PER_TOKEN
from ..sampling.schedules import SCHEDULES
from .answers import data_uri, encoded, encoded_preview, events_answer, fault_body, pictures_of, sse
from .events import Event, Failure, Picture, StepDone
from .native import FORMATS, form_of, is_multipart, number_of
from .orders import MAX_PICTURES, OPTIONS, Pictures, decode_picture, with_extra_arguments
from .queue import Order
from .studio import Studio, client_of, json_of

MAX_PARTIAL = 3
PICTURES = ("image", "images", "ref_images")  # the names of pictures in JSON, of several vendors
QUALITIES = ("low", "medium", "high", "xhigh", "max", "standard", "hd")  # taken, and without effect
MASKED_SIZE = "size is left out: with a mask the image keeps its own size"
OPAQUE = "background is left out: images are opaque"


@dataclass(frozen=True)
class Wish:
    """What a request wants of its answer.

    Attributes:
        kind: "image_generation" or "image_edit", as the events are called.
        suffix, quality: of the images' files.
        has_url: whether ``url`` is wanted, which is a data URI here.
        streams: whether the answer is a stream of events.
        echoed: fields of the request that the answer repeats.
    """

    kind: str
    suffix: str
    quality: int | None
    has_url: bool
    streams: bool
    echoed: dict[str, str]


def options_of(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of an image among a request's fields, and what was left out."""
    known = {*OPTIONS, "prompt", "model", "lora"}
    options = {name: value for name, value in values.items() if name in known and value is not None}
    options["num_images"] = values.get("n") or options.get("num_images") or 1
    told = []
    if options.get("size") == "auto":
        del options["size"]
    if str(options.get("seed")) == "-1":
        del options["seed"]
    if options.get("scheduler") is not None and options["scheduler"] not in SCHEDULES:
        told.append(f"scheduler {str(options.pop('scheduler'))[:40]!r} is left out: there are {', '.join(SCHEDULES)}")
    if values.get("background") == "transparent":
        told.append(OPAQUE)
    return options, told


def wish_of(values: dict[str, Any], kind: str) -> Wish:
    """
    Raises:
        InputError: for an answer that cannot be given.
    """
    output = values.get("output_format") or "png"
    check_choice("output_format", output, tuple(FORMATS))
    echoed = {"output_format": "jpeg" if output == "jpg" else output, "background": "opaque"}
    echoed["quality"] = values["quality"] if values.get("quality") in QUALITIES else "auto"
    return Wish(
        kind,
        FORMATS[output],
        number_of(values, "output_compression", 100),
        values.get("response_format") == "url",
        values.get("stream") is True,
        echoed,
    )


async def generations(request: Request) -> Response:
    """Images of a prompt, as OpenAI has it, and of pictures, as LocalAI has it beside (``ref_images``)."""
    values = await json_of(request)
    return await answer(request, values, pictures_in(values), [], "image_generation")


async def edits(request: Request) -> Response:
    """Images of a prompt and pictures, as OpenAI has it: multipart, or JSON with data URIs.

    With a mask the first picture is inpainted where the mask is transparent; with a strength it is what img2img starts
    from; all others are references.
    """
    if is_multipart(request):
        values, files = await form_of(request)
        pictures = [*files.get("image", []), *files.get("image[]", [])]
        masks = files.get("mask", [])
    else:
        values = await json_of(request)
        pictures = pictures_in(values)
        masks = [] if values.get("mask") is None else [decode_picture(uri_of(values["mask"]), "mask")]
    if not pictures:
        raise InputError("no image: an edit needs one, as image or several as image[]")
    return await answer(request, values, pictures, masks, "image_edit")


def pictures_in(values: dict[str, Any]) -> list[bytes]:
    """
    Raises:
        InputError: for what is no picture, or too many of them.
    """
    given: Any = next((values[name] for name in PICTURES if values.get(name)), [])
    given = given if isinstance(given, list) else [given]
    if len(given) > MAX_PICTURES:
        raise InputError(f"a request brings at most {MAX_PICTURES} pictures, and this one {len(given)}")
    return [decode_picture(uri_of(one), f"image {k}") for k, one in enumerate(given, 1)]


def uri_of(value: Any) -> Any:
    """A picture's text, where it stands in an object as OpenAI's JSON has it."""
    return value.get("image_url") if isinstance(value, dict) else value


async def answer(
    request: Request, given: dict[str, Any], contents: list[bytes], masks: list[bytes], kind: str
) -> Response:
    """The answer to a request of pictures, which may be none, and at most one mask."""
    studio: Studio = request.app.state.studio
    values = with_extra_arguments(given)
    if contents and values.get("denoising_strength") is not None:
        values.setdefault("strength", values["denoising_strength"])
    is_begun = bool(masks) or any(values.get(name) is not None for name in ("strength", "image_strength"))
    first = contents.pop(0) if contents and is_begun else None
    pictures = Pictures(contents, first, masks[0] if masks else None, mask_is_alpha=True)
    wish = wish_of(values, kind)
    partial = number_of(values, "partial_images", MAX_PARTIAL) or 0
    options, told = options_of(values)
    if pictures.mask is not None and options.pop("size", None) is not None:
        told.append(MASKED_SIZE)
    previews = partial if wish.streams else 0
    order = await studio.order(client_of(request), options, pictures, previews=previews, warnings=tuple(told))
    if wish.streams:
        return await stream(studio, order, wish)
    created = int(time.time())
    images = await pictures_of(request, studio.worker, order)
    data = []
    for image in images:
        text = await encoded(image, wish.suffix, wish.quality)
        url = {"url": data_uri(text, wish.suffix)} if wish.has_url else {}
        is_written = image.settings["original_prompt"] is not None
        revised = {"revised_prompt": image.settings["prompt"]} if is_written else {}
        data.append({"b64_json": text, "seed": image.settings["seed"], **url, **revised})
    return JSONResponse(
        {
            "created": created,
            "data": data,
            "size": size_of(images[0]),
            **wish.echoed,
            "usage": usage_of(order, images),
            "model": order.model,
            "warnings": images[-1].warnings,
        }
    )


async def stream(studio: Studio, order: Order, wish: Wish) -> Response:
    """The events of OpenAI's stream."""
    created, shown = int(time.time()), dict[int, int]()

    async def lines(event: Event) -> str:
        common = {"created_at": created, **wish.echoed}
        if isinstance(event, StepDone) and event.preview is not None:
            number = shown[event.image] = shown.get(event.image, -1) + 1
            name, text = f"{wish.kind}.partial_image", await encoded_preview(event.preview, wish.suffix)
            size = f"{event.preview.width}x{event.preview.height}"
            return sse(name, {"type": name, "b64_json": text, "partial_image_index": number, "size": size, **common})
        if isinstance(event, Picture):
            name, text = f"{wish.kind}.completed", await encoded(event, wish.suffix, wish.quality)
            more = {"usage": usage_of(order, [event]), "seed": event.settings["seed"], "warnings": event.warnings}
            more["model"] = order.model
            return sse(name, {"type": name, "b64_json": text, "size": size_of(event), **common, **more})
        return ""

    return await events_answer(studio.worker, order, lines, fault_event)


def fault_event(failure: Failure) -> str:
    return sse("error", {"type": "error", **fault_body(str(failure), failure.status)})


def size_of(image: Picture) -> str:
    return f"{image.picture.width}x{image.picture.height}"


def usage_of(order: Order, images: list[Picture]) -> dict[str, Any]:
    """The tokens that went through the transformer: of the prompt, the pictures and the images."""
    inputs, settings = order.task.inputs, images[0].settings
    sizes = [reference_size(one) for one in inputs.images]
    seen = sum(tall * wide for tall, wide in sizes) // PIXELS_PER_TOKEN**2
    own = sum(image.settings["width"] * image.settings["height"] for image in images) // PIXELS_PER_TOKEN**2
    text = settings["max_sequence_length"]
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        "output_tokens": own,
        "total_tokens": text + seen + own,
    }


async def models(request: Request) -> Response:
    """The names that requests may give."""
    studio: Studio = request.app.state.studio
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "flux2_mlx"} for name in studio.catalogue.models]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """One of them."""
    studio: Studio = request.app.state.studio
    name = request.path_params["name"]
    if name not in studio.catalogue.models:
        raise Failure(f"there is no model {name!r} here", 404)
    return JSONResponse({"id": name, "object": "model", "created": 0, "owned_by": "flux2_mlx"})
