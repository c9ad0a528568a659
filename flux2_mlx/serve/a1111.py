"""AUTOMATIC1111's API, as its clients use it: /sdapi/v1.

Its clients send what Stable Diffusion needs, and show nobody an error: what this model cannot do is left out, and
``info`` says so.
Reference: stable-diffusion-webui's modules/api; Open WebUI's routers/images.py; SillyTavern's sdcpp and auto sources.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..checks import MIN_SIDE
from ..errors import InputError
from ..options import MAX_HIRES, GenerationOptions
from ..sampling.latents import PIXELS_PER_TOKEN
from ..sampling.schedules import SCHEDULES
from .answers import encoded, pictures_of
from .native import settings_in
from .orders import Pictures, decode_picture, with_extra_arguments
from .queue import Order
from .studio import Studio, client_of, json_of

SAMPLER = "Euler"
LORA = re.compile(r"<lora:([^:>]+)(?::(-?[\d.]+))?[^>]*>")
MOST_STEPS = 12  # of a distilled model; clients send their own defaults, 20 to 50, which it gains nothing by
SIDES = ("width", "height")
SIDE = 512  # stable-diffusion-webui's own default, of the image that hires fix begins with


async def txt2img(request: Request) -> Response:
    """Images of a prompt."""
    return await answer(request, with_extra_arguments(await json_of(request)), Pictures())


async def img2img(request: Request) -> Response:
    """Images from another one: img2img, with a mask inpainting; white is drawn anew."""
    values = with_extra_arguments(await json_of(request))
    images = values.get("init_images") or []
    if not isinstance(images, list) or not images:
        raise InputError("img2img needs a picture in init_images")
    pictures = [decode_picture(one, f"init_images {k}") for k, one in enumerate(images, 1)]
    mask = None if values.get("mask") is None else decode_picture(values["mask"], "mask")
    values["strength"] = values.get("denoising_strength")
    return await answer(request, values, Pictures(pictures[1:], pictures[0], mask))


async def answer(request: Request, values: Mapping[str, Any], pictures: Pictures) -> Response:
    studio: Studio = request.app.state.studio
    options, told = options_of(values, studio, pictures)
    order = await studio.order(client_of(request), options, pictures, warnings=tuple(told), suit=suit)
    images = await pictures_of(request, studio.worker, order)
    first, last = images[0], images[-1]
    info = {
        "prompt": first.settings["prompt"],
        "negative_prompt": first.settings["negative_prompt"],
        "seed": first.settings["seed"],
        "all_seeds": [image.settings["seed"] for image in images],
        "all_prompts": [image.settings["prompt"] for image in images],
        "width": first.settings["width"],
        "height": first.settings["height"],
        "steps": first.settings["num_steps"],
        "cfg_scale": first.settings["guidance"],
        "sampler_name": SAMPLER,
        "sd_model_name": order.model,
        "batch_size": len(images),
        "infotexts": [image.parameters for image in images],
        "warnings": last.warnings,
    }
    texts = [await encoded(image) for image in images]
    return JSONResponse({"images": texts, "parameters": dict(options), "info": json.dumps(info)})


def options_of(values: Mapping[str, Any], studio: Studio, pictures: Pictures) -> tuple[dict[str, Any], list[str]]:
    """The options of an image, and what was left out or changed."""
    told: list[str] = []
    prompt, loras = loras_in(str(values.get("prompt") or ""), studio, told)
    options: dict[str, Any] = {"prompt": prompt, "negative_prompt": values.get("negative_prompt") or ""}
    if loras:
        options["lora"] = loras
    for name in ("seed", "strength"):
        if values.get(name) is not None and values[name] != -1:
            options[name] = values[name]
    for name in ("steps", "cfg_scale"):
        if values.get(name) is not None:
            options[name] = values[name]
    if pictures.init_image is None:
        hires = hires_of(values, told)
        options |= hires | sizes_of(values, hires.get("hires", 1), told)
    elif pictures.mask is not None:
        options["mask_blur"] = values.get("mask_blur") or 0
    scheduler = str(values.get("scheduler") or "")
    if scheduler in SCHEDULES:
        options["schedule"] = scheduler
    elif scheduler.lower() not in ("", "automatic", "default", "discrete"):
        told.append(f"scheduler {scheduler[:40]!r} is left out: there are {', '.join(SCHEDULES)}")
    sampler = str(values.get("sampler_name") or values.get("sampler_index") or SAMPLER)
    if sampler.lower() not in ("euler", "default"):
        told.append(f"sampler {sampler[:40]!r} is left out: there is {SAMPLER}")
    for name in ("restore_faces", "tiling", "alwayson_scripts", "script_name", "styles"):
        if values.get(name):
            told.append(f"{name} is left out: there is no such thing here")
    options["num_images"] = count_of(values)
    override = values.get("override_settings")
    if isinstance(override, dict) and override.get("sd_model_checkpoint"):
        options["model"] = override["sd_model_checkpoint"]
    return options, told


def suit(options: GenerationOptions, is_distilled: bool) -> tuple[GenerationOptions, list[str]]:
    """The options, of a distilled model without tens of steps and CFG; and what was left out."""
    told: list[str] = []
    if is_distilled and options.num_steps is not None and options.num_steps > MOST_STEPS:
        told.append(
            f"{options.num_steps} steps are for other models: this one is distilled to a few, its default was taken"
        )
        options = replace(options, num_steps=None)
    if is_distilled and options.guidance is not None:
        told.append(f"cfg_scale {options.guidance} is left out: the model is distilled and needs no CFG")
        options = replace(options, guidance=None)
    return options, told


def count_of(values: Mapping[str, Any]) -> int:
    """Images of a request.

    Raises:
        InputError: for what is no number.
    """
    try:
        return max(1, int(values.get("batch_size") or 1)) * max(1, int(values.get("n_iter") or 1))
    except (TypeError, ValueError):
        raise InputError("batch_size and n_iter must be whole numbers") from None


def hires_of(values: Mapping[str, Any], told: list[str]) -> dict[str, Any]:
    """The options of hires fix, where it is asked for."""
    if not values.get("enable_hr"):
        return {}
    scale, strength = values.get("hr_scale", 2), values.get("denoising_strength")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1 < scale <= MAX_HIRES:
        told.append(f"enable_hr is left out: hr_scale {str(scale)[:40]} is none above 1 and up to {MAX_HIRES}")
        return {}
    names = ("hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y")
    told += [f"{name} is left out" for name in names if values.get(name)]
    return {"hires": scale} if strength is None else {"hires": scale, "hires_strength": strength}


def sizes_of(values: Mapping[str, Any], scale: float, told: list[str]) -> dict[str, int]:
    """Width and height, each the nearest that can be drawn to so many times what is asked for."""
    sizes = {}
    for name in SIDES:
        value = values.get(name, SIDE if scale > 1 else None)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            continue
        sizes[name] = max(MIN_SIDE, round(scale * value / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN)
        if sizes[name] != scale * value:
            told.append(f"{name} {scale * value:g} is drawn as {sizes[name]}")
    return sizes


def loras_in(prompt: str, studio: Studio, told: list[str]) -> tuple[str, dict[str, float]]:
    """The prompt without <lora:name:0.8>, and the LoRAs that it names."""
    loras: dict[str, float] = {}
    for name, scale in LORA.findall(prompt):
        if name in studio.catalogue.loras and re.fullmatch(r"-?\d+(\.\d*)?|", scale):
            loras[name] = float(scale or 1)
        else:
            told.append(f"<lora:{name[:40]}> is left out: there is no LoRA of that name here")
    return LORA.sub("", prompt).strip() if loras or told else prompt, loras


async def get_options(request: Request) -> Response:
    """The settings that clients look at."""
    studio: Studio = request.app.state.studio
    name = studio.worker.state.model or studio.catalogue.default
    return JSONResponse({"sd_model_checkpoint": name, "sd_vae": "Automatic", "samples_format": "png"})


async def set_options(request: Request) -> Response:
    """Taken, and without effect: the model is the server's, or that of a request's override_settings."""
    await json_of(request)
    return JSONResponse(None)


async def models(request: Request) -> Response:
    """The models that there are."""
    studio: Studio = request.app.state.studio
    names = list(studio.catalogue.models)
    more = {"hash": None, "sha256": None, "filename": "", "config": None}
    return JSONResponse([{"title": name, "model_name": name, **more} for name in names])


async def samplers(_: Request) -> Response:
    """There is one."""
    return JSONResponse([{"name": SAMPLER, "aliases": ["euler"], "options": {}}])


async def schedulers(_: Request) -> Response:
    """The noise schedules."""
    return JSONResponse([{"name": name, "label": name, "aliases": None} for name in SCHEDULES])


async def loras(request: Request) -> Response:
    """The LoRAs that there are."""
    studio: Studio = request.app.state.studio
    return JSONResponse([{"name": name, "alias": name, "path": "", "metadata": {}} for name in studio.catalogue.loras])


async def nothing(_: Request) -> Response:
    """Upscalers, VAEs and such, of which there is none."""
    return JSONResponse([])


async def progress(request: Request) -> Response:
    """How far the order is that is drawn now."""
    queue = request.app.state.studio.worker.queue
    order: Order | None = queue.running
    step = None if order is None else order.last_step
    done = 0.0 if step is None else step.index / step.steps
    return JSONResponse(
        {
            "progress": done,
            "eta_relative": 0.0 if step is None else step.seconds_left,
            "state": {
                "job_count": int(order is not None) + len(queue),
                "sampling_step": 0 if step is None else step.index,
                "sampling_steps": 0 if step is None else step.steps,
            },
            "current_image": None,
        }
    )


async def interrupt(request: Request) -> Response:
    """Stop what this client has drawn, at its next step."""
    queue = request.app.state.studio.worker.queue
    order: Order | None = queue.running
    if order is not None and order.client == client_of(request):
        order.interrupt()
    return JSONResponse({})


async def png_info(request: Request) -> Response:
    """The settings in an image's file."""
    values = await json_of(request)
    content = decode_picture(values.get("image"), "image")
    settings, parameters = await run_in_threadpool(settings_in, content)
    return JSONResponse({"info": parameters, "items": {"parameters": parameters}, "parameters": settings})
