"""A request's options and pictures to an order's task, by the code that reads a line of a job file."""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image

from ..cli.arguments import Task, build_parser, check_inputs, complete
from ..cli.common import given_options
from ..cli.jobs import arguments_of
from ..errors import InputError
from ..fields import flag_of, nearest
from ..imaging.files import open_image, pixels_of
from ..imaging.inpaint import ALPHA
from ..imaging.preprocess import MAX_PIXELS
from ..options import BatchOptions, GenerationOptions, RuntimeOptions
from .catalogue import Catalogue

MAX_IMAGES = 10  # of a request
MAX_PICTURES = 16  # that a request brings
EXTRA_ARGUMENTS = re.compile(r"<sd_cpp_extra_args>(.*?)</sd_cpp_extra_args>", re.DOTALL)
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def option_names() -> dict[str, str]:
    """Every name that a request may give an option of an image, and the option's own: flags and their aliases."""
    names = {"size": "size", "image_strength": "image_strength"}
    for cls in (GenerationOptions, BatchOptions):
        for f in fields(cls):
            flags = (flag_of(f), f.name, *(flag[2:] for flag in f.metadata.get("also", ()) if flag.startswith("--")))
            names |= {flag.replace("-", "_"): flag_of(f).replace("-", "_") for flag in flags}
    return names


OPTIONS = option_names()


@dataclass
class Pictures:
    """The pictures of a request, as files' contents.

    Attributes:
        image: references.
        init_image: what img2img and inpainting start from.
        mask: white is drawn anew; or "alpha".
        mask_is_alpha: whether the mask's transparent part is drawn anew instead, as OpenAI has it.
        init_latents: (1, H/8, W/8, 32) of an image of before, in the place of init_image.
    """

    image: list[bytes] = field(default_factory=list)
    init_image: bytes | None = None
    mask: bytes | str | None = None
    mask_is_alpha: bool = False
    init_latents: np.ndarray | None = None

    @property
    def contents(self) -> list[bytes]:
        return [picture for picture in (*self.image, self.init_image, self.mask) if isinstance(picture, bytes)]

    def opened(self) -> dict[str, Any]:
        """The pictures, decoded, once it is known that they are not too many or too large.

        Raises:
            InputError: naming the picture.
        """
        if len(self.contents) > MAX_PICTURES:
            raise InputError(f"a request brings at most {MAX_PICTURES} pictures, and this one {len(self.contents)}")
        if sum(map(pixels_of, self.contents)) > MAX_PIXELS:
            raise InputError(f"a request's pictures have at most {MAX_PIXELS:,} pixels together; scale them down")
        opened: dict[str, Any] = {}
        if self.image:
            opened["image"] = [read(picture, f"image {k}") for k, picture in enumerate(self.image, 1)]
        if self.init_image is not None:
            opened["init_image"] = read(self.init_image, "init_image", alpha=self.mask == ALPHA)
        if self.init_latents is not None:
            opened["init_latents"] = self.init_latents
        if self.mask is not None:
            opened["mask"] = self.mask if isinstance(self.mask, str) else self._mask(self.mask)
        return opened

    def _mask(self, content: bytes) -> Image.Image:
        mask = read(content, "mask", alpha=True, as_data=True)
        if not self.mask_is_alpha:
            return mask
        if not mask.has_transparency_data:
            raise InputError("mask: it has no transparency, which says where to edit; transparent is drawn anew")
        return Image.eval(mask.getchannel("A"), lambda value: 255 - value)


def read(content: bytes, name: str, **how: bool) -> Image.Image:
    """
    Raises:
        InputError: with the picture's name.
    """
    try:
        return open_image(content, **how)
    except InputError as error:
        raise InputError(error.message, source=name) from None


def decode_picture(value: Any, name: str) -> bytes:
    """The content of a picture in JSON: base64, or a data URI.

    Raises:
        InputError: for anything else, as a path or an address.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} must be a picture as base64 or a data URI, got {type(value).__name__}")
    try:
        return base64.b64decode(DATA_URI.sub("", value, count=1), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(
            f"{name} must be a picture as base64 or a data URI, got {value[:40]!r}; no file or address is read"
        ) from None


def with_extra_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields, with those that clients of stable-diffusion.cpp write into the prompt.

    Reference: its examples/server; <sd_cpp_extra_args>{"seed": 1, "sample_params": {"sample_steps": 8, "guidance":
    {"txt_cfg": 1}}}</sd_cpp_extra_args>.

    Raises:
        InputError: for what is no JSON object.
    """
    prompt = values.get("prompt")
    found = EXTRA_ARGUMENTS.search(prompt) if isinstance(prompt, str) else None
    if found is None:
        return dict(values)
    try:
        extra = json.loads(found[1])
        sample = extra.get("sample_params") or {}
        more = {"steps": sample.get("sample_steps"), "cfg_scale": (sample.get("guidance") or {}).get("txt_cfg")}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"sd_cpp_extra_args in the prompt must be a JSON object, got {found[1][:40]!r}") from None
    known = {name: value for name, value in (more | extra).items() if name in OPTIONS and value is not None}
    return {**values, **known, "prompt": EXTRA_ARGUMENTS.sub("", str(prompt)).strip()}


class Reader:
    """Reads requests.

    Args:
        catalogue: what they may name.
        runtime: the server's options of computing.
    """

    def __init__(self, catalogue: Catalogue, runtime: RuntimeOptions):
        self.catalogue = catalogue
        self.parser = build_parser()
        given = self.parser.parse_args([])
        computing = {name: value for name, value in vars(runtime).items() if name != "progress"}
        self.given = argparse.Namespace(**{**vars(given), **computing, "quiet": True})

    def task(self, model: str, values: Mapping[str, Any], pictures: Pictures | None = None) -> Task:
        """The task of a request, checked as a job's line is.

        Args:
            model: its name in the catalogue.
            values: options by any of OPTIONS' names, and prompt and lora.

        Raises:
            InputError: for what cannot be drawn.
        """
        options = self.catalogue.models[model]
        given = argparse.Namespace(**vars(self.given) | given_options(argparse.Namespace(**vars(options))))
        words: dict[str, Any] = {}
        for name, value in values.items():
            if name == "lora":
                given.lora = self.catalogue.lora_words(value) if value else given.lora
            elif name == "prompt":
                words[name] = value
            elif name in OPTIONS:
                words[OPTIONS[name]] = value
            else:
                raise InputError(f"unknown option {name!r}{nearest(name, list(OPTIONS)) or '; see /docs'}")
        arguments = arguments_of(words, self.parser, given)
        for name, picture in (pictures or Pictures()).opened().items():
            setattr(arguments, name, picture)
        if not isinstance(words.get("prompt"), str):
            raise InputError("no prompt: a request needs one")
        arguments.prompt_option, arguments.prompt = arguments.prompt, None  # "-" too is a prompt here
        task = complete(arguments, None)
        if task.batch.num_images > MAX_IMAGES:
            raise InputError(f"a request draws at most {MAX_IMAGES} images, and {task.batch.num_images} are asked for")
        check_inputs(task)
        return task
