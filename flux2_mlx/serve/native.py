"""The native API, which the page speaks.

POST /api/images draws. The body is JSON, or multipart with the same names. Answer: server-sent events.

    prompt          text
    any option      of docs/options.md by its Python name or a flag's ("num_steps" or "steps", "guidance", "seed",
                    "width", "height", "size": "512x768", "num_images" up to 10, "negative_prompt", "strength",
                    "mask_blur", "mask_padding", "expand": {"left": 64}, "region": ["a fox@0,0,0.5,1"],
                    "enhance": true, ...); null for its default
    model           a name of GET /api/info; any other is answered by the model that is loaded, as "warnings" tells
    lora            a name, "name:0.8", a list of them, or {"name": 0.8}; absent for the server's own, [] too
    image           references: a picture or a list; in multipart a file part for each, all called "image"
    init_image      picture: img2img, inpainting, outpainting
    init_latents    the "id" of an image event: img2img from that image's latents, enlarged to the size that is asked
                    for, without encoding a picture; with "strength". 410 where they are not kept any more
    mask            picture: white is drawn anew, black is kept; or "alpha", where init_image is transparent
    format          "png" (default), "jpeg", "webp"
    quality         0 to 100, of JPEG and WebP
    preview         "webp" (default), "jpeg", "none"
    previews        how many previews an image has at most; null for one a step

A picture in JSON is base64 or a data URI; in multipart a file. Events, each with a JSON object:

    queued          {"position"}: orders that come before; 0 when it is drawn. Again whenever that changes
    step            {"image", "index", "steps", "sigma", "seconds_left", "preview"}: image from 0, index from 1;
                    preview is a data URI or null
    image           {"image", "data", "id", "seed", "width", "height", "settings", "parameters", "seconds",
                    "warnings"}: data is a data URI of a file with its settings in it; id names its latents, of the last
                    ten images of a client, until the model is unloaded or another one opened (null with a mask); the
                    stream ends after the last one
    error           {"message", "status"}: ends the stream

Lines that begin with ":" keep a silent stream alive. Hanging up (AbortController) cancels: an order that waits leaves
the queue, one that is drawn stops at its next step. What is refused before it has a place is answered by a status and
{"error": {"message", "type", "param", "code"}}: 400 for what cannot be drawn, 401 without the API key, 403 for another
Host or Origin, 410 for latents that are not kept, 413 for a body that is too large, 429 with Retry-After where the
queue is full.

GET /api/info: {"version", "status": "opening" | "ready" | "unloaded" | "failed", "fault", "model": {"name",
"is_distilled", "side", "steps", "guidance"} with nulls until it is open, "models", "loras": names, "lora": {name:
strength} of those that the server has without being asked, "options": {name: {"type", "default", "help", "minimum",
"maximum", "choices"}}, "limits": {"images", "pictures", "pixels", "hires_pixels" (with hires), "body"}, "queue":
{"running", "waiting", "places"}}.

POST /api/settings: an image's file as the body; answers {"settings", "parameters", "inputs"}, to draw it again: the
options by the names above, with prompt; "lora" and "model" name what the image was drawn with; "inputs" what was given
besides ("image", "init_latents", ...), which no file holds. 400 for other images.

With an API key, send it as Authorization: Bearer KEY; /, /health and the page's files need none.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .._version import __version__
from ..checks import MAX_HIRES_PIXELS
from ..checks import MAX_PIXELS as MAX_GENERATED
from ..errors import InputError
from ..fields import check_choice, type_of
from ..imaging.files import read_metadata
from ..imaging.inpaint import ALPHA
from ..imaging.preprocess import MAX_PIXELS
from ..options import BatchOptions, GenerationOptions, ModelOptions
from ..request import Settings, paths_of
from .answers import data_uri, encoded, encoded_preview, events_answer, sse
from .events import Event, Failure, Picture, Queued, StepDone
from .orders import MAX_IMAGES, MAX_PICTURES, Pictures, decode_picture
from .security import MAX_BODY
from .studio import Studio, client_of, json_of

FORMATS = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "webp": ".webp"}
PICTURES = ("image", "init_image", "mask")
CONSTANTS = {"true": True, "false": False, "null": None}


async def form_of(request: Request) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The fields and the files of a multipart body, by their names.

    Raises:
        HTTPException: for a body that is none, or has too many parts.
    """
    values: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    async with request.form(max_files=MAX_PICTURES + 1, max_fields=100) as form:
        for name, part in form.multi_items():
            if isinstance(part, UploadFile):
                files.setdefault(name, []).append(await part.read())
            elif name.endswith("[]"):  # as openai-python sends lists
                values.setdefault(name[:-2], []).append(part)
            elif name not in ("prompt", "negative_prompt"):
                values[name] = CONSTANTS.get(part, part)
            else:
                values[name] = part
    return values, files


def is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith("multipart/")


def pictures_in(values: dict[str, Any]) -> Pictures:
    """The pictures of a JSON body, which are taken out of it.

    Raises:
        InputError: for what is no picture.
    """
    image, init_image, mask = (values.pop(name, None) for name in PICTURES)
    several = image if isinstance(image, list) else [] if image is None else [image]
    if len(several) > MAX_PICTURES:
        raise InputError(f"a request brings at most {MAX_PICTURES} pictures, and this one {len(several)}")
    return Pictures(
        [decode_picture(one, f"image {k}") for k, one in enumerate(several, 1)],
        None if init_image is None else decode_picture(init_image, "init_image"),
        mask if mask in (None, ALPHA) else decode_picture(mask, "mask"),
    )


def pictures_of_form(files: dict[str, list[bytes]], mask: Any) -> Pictures:
    """
    Raises:
        InputError: for a file under another name, or several where one is meant.
    """
    for name, contents in files.items():
        if name not in PICTURES or (name != "image" and len(contents) > 1):
            raise InputError(f"{len(contents)} files are called {name!r}; pictures are image, init_image and one mask")
    if mask not in (None, ALPHA):
        raise InputError(f'mask must be a file or "{ALPHA}"')
    init_image, own_mask = (files.get(name, [None])[0] for name in ("init_image", "mask"))
    return Pictures(files.get("image", []), init_image, own_mask or mask)


async def draw(request: Request) -> Response:
    """Draw images.

    Body: JSON or multipart; see /docs. Answer: server-sent events queued, step, image, error.
    """
    studio: Studio = request.app.state.studio
    if is_multipart(request):
        values, files = await form_of(request)
        pictures = pictures_of_form(files, values.pop("mask", None))
    else:
        values = await json_of(request)
        pictures = pictures_in(values)
    kind, preview = values.pop("format", None) or "png", values.pop("preview", None) or "webp"
    check_choice("format", kind, tuple(FORMATS))
    check_choice("preview", preview, ("webp", "jpeg", "none"))
    quality, previews = number_of(values, "quality", 100), number_of(values, "previews", 1000)
    init_latents, client = values.pop("init_latents", None), client_of(request)
    previews = 0 if preview == "none" else previews
    order = await studio.order(client, values, pictures, init_latents=init_latents, previews=previews)

    async def lines(event: Event) -> str:
        if isinstance(event, Queued):
            return sse("queued", {"position": event.position})
        if isinstance(event, StepDone):
            return sse("step", await step_data(event, FORMATS.get(preview, ".webp")))
        return sse("image", await image_data(event, FORMATS[kind], quality)) if isinstance(event, Picture) else ""

    return await events_answer(studio.worker, order, lines, fault_event)


def number_of(values: dict[str, Any], name: str, most: int) -> int | None:
    """A number of a request that is no option of an image, taken out of it.

    Raises:
        InputError: for what is none.
    """
    value = values.pop(name, None)
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not 0 <= number <= most:
        raise InputError(f"{name} must be a whole number from 0 to {most}, got {value!r}")
    return number


def fault_event(failure: Failure) -> str:
    return sse("error", {"message": str(failure), "status": failure.status})


async def step_data(event: StepDone, suffix: str) -> dict[str, Any]:
    shown = None if event.preview is None else data_uri(await encoded_preview(event.preview, suffix), suffix)
    return {
        "image": event.image,
        "index": event.index,
        "steps": event.steps,
        "sigma": event.sigma,
        "seconds_left": event.seconds_left,
        "preview": shown,
    }


async def image_data(event: Picture, suffix: str, quality: int | None) -> dict[str, Any]:
    return {
        "image": event.image,
        "data": data_uri(await encoded(event, suffix, quality), suffix),
        "id": event.id,
        "seed": event.settings["seed"],
        "width": event.picture.width,
        "height": event.picture.height,
        "settings": event.settings,
        "parameters": event.parameters,
        "seconds": event.seconds,
        "warnings": event.warnings,
    }


async def info(request: Request) -> Response:
    """The models, LoRAs, options and limits, and the state of the queue."""
    studio: Studio = request.app.state.studio
    state, queue = studio.worker.state, studio.worker.queue
    status = "failed" if state.fault else "opening" if state.model is None else "ready"
    if status == "ready" and not state.is_loaded:
        status = "unloaded"
    return JSONResponse(
        {
            "version": __version__,
            "status": status,
            "fault": state.fault,
            "model": {
                "name": state.model or studio.catalogue.default,
                "is_distilled": state.is_distilled,
                "side": state.side,
                "steps": state.steps,
                "guidance": state.guidance,
            },
            "models": list(studio.catalogue.models),
            "loras": list(studio.catalogue.loras),
            "lora": studio.catalogue.own_loras(studio.catalogue.default),
            "options": options_schema(),
            "limits": {
                "images": MAX_IMAGES,
                "pictures": MAX_PICTURES,
                "pixels": MAX_GENERATED,
                "hires_pixels": MAX_HIRES_PIXELS,
                "picture_pixels": MAX_PIXELS,
                "body": MAX_BODY,
            },
            "queue": {"running": queue.running is not None, "waiting": len(queue), "places": queue.places},
        }
    )


TYPES: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def options_schema() -> dict[str, Any]:
    """Every option of an image, as JSON Schema describes one."""
    schema = {}
    for cls in (GenerationOptions, BatchOptions):
        for f in fields(cls):
            meta, kind = f.metadata, type_of(cls, f.name)
            own: dict[str, Any] = {"type": TYPES.get(kind, "array" if kind == tuple[float, ...] else "object")}
            own |= {"default": f.default, "description": meta["help"]}
            low = meta["ge"] if meta["ge"] is not None else meta["gt"]
            more = {"minimum": low, "maximum": meta["le"], "enum": list(meta["choices"] or ()) or None}
            schema[f.name] = own | {name: value for name, value in more.items() if value is not None}
    return schema


async def settings(request: Request) -> Response:
    """The settings that an image's file carries; the body is the file."""
    studio: Studio = request.app.state.studio
    found, parameters = await run_in_threadpool(settings_in, await request.body())
    names = {f.name for cls in (GenerationOptions, ModelOptions) for f in fields(cls)}
    values = {name: value for name, value in found.items() if name in names | {"prompt"} and value is not None}
    values["model"] = studio.catalogue.model_named(values.get("model"))[0]
    return JSONResponse({"settings": values, "parameters": parameters, "inputs": found["inputs"]})


def settings_in(content: bytes) -> tuple[dict[str, Any], str]:
    """The settings of an image's file, and the line that other tools read.

    Raises:
        InputError: where there are none, or they cannot be read.
    """
    metadata = read_metadata(content)
    hidden = {name: last_part(metadata.get(name)) for name in paths_of(Settings)}
    read = Settings.from_metadata(metadata | hidden, [str(name) for name in metadata.get("inputs") or ()])
    return json.loads(json.dumps(read.metadata())), read.parameters()


def last_part(value: Any) -> Any:
    """A path of an image's settings, which may be a stranger's, without anything that could be filled in from this
    machine: variables, a home folder.
    """
    if isinstance(value, list):
        return [last_part(one) for one in value]
    if not isinstance(value, str):
        return value
    name = value.replace("$", "").lstrip("~")
    return PurePath(name).name if name.startswith(("/", ".")) else name
