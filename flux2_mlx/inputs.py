"""What a call is given beside its options: prompts, images or their files, embeddings, latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from PIL import Image

from .errors import InputError
from .imaging.colour import to_srgb
from .imaging.edits import Edit, lay_over
from .imaging.files import open_image
from .imaging.inpaint import ALPHA, Inpaint, grey_mask, inpaint_from
from .imaging.preprocess import reference_array, reference_size
from .options import GenerationOptions
from .paths import expand

Size = tuple[int, int]  # (height, width)

# Inputs of a call that an image's settings cannot carry, and their flags; "" for those of Python alone.
INPUTS = {
    "image": "--image",
    "init_image": "--init-image",
    "init_latents": "",
    "mask": "--mask",
    "prompt_embeds": "",
    "latents": "",
}


@dataclass(frozen=True)
class Reference:
    """A reference image that the transformer sees.

    Attributes:
        pixels: (1, H, W, 3) in -1..1.
        place: how many were given before it, by which its tokens' positions go.
        strength: above 0; 1 as the model was trained.
    """

    pixels: mx.array
    place: int
    strength: float


@dataclass(frozen=True)
class Inputs:
    """What a call is given beside its options: prompts or their embeddings, images or their files, latents."""

    prompt: Any = None
    image: Any = None
    init_image: Any = None
    init_latents: Any = None
    mask: Any = None
    prompt_embeds: Any = None
    latents: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """Which of INPUTS are given."""
        return tuple(name for name in INPUTS if getattr(self, name) is not None)

    @property
    def prompts(self) -> list[Any]:
        return list(self.prompt) if isinstance(self.prompt, (list, tuple)) else [self.prompt]

    @property
    def images(self) -> list[Image.Image]:
        """The reference images."""
        if self.image is None:
            return []
        return list(self.image) if isinstance(self.image, (list, tuple)) else [self.image]

    def strengths(self, given: Sequence[float]) -> list[float]:
        """The strength of each reference image: those that are given, then 1."""
        return [*given, *[1.0] * (len(self.images) - len(given))]

    def references(self, strengths: Sequence[float]) -> list[Reference]:
        """The reference images, without those of strength 0. The others keep their places: a prompt means the same
        second image at every strength of the first, and a strength near 0 draws nearly what 0 draws.
        """
        pairs = zip(self.images, self.strengths(strengths), strict=True)
        return [Reference(reference_array(image), k, strength) for k, (image, strength) in enumerate(pairs) if strength]

    @property
    def has_init(self) -> bool:
        """Whether there is what to start from, for a strength."""
        return self.init_image is not None or self.init_latents is not None

    @property
    def init_size(self) -> Size | None:
        """The size of the image whose latents ``init_latents`` are, if they are given.

        Raises:
            InputError: for another shape.
        """
        if self.init_latents is None:
            return None
        shape = np.shape(self.init_latents)
        if len(shape) != 4 or any(side % 2 or not side for side in shape[1:3]):
            raise InputError(f'init_latents must be (B, H/8, W/8, 32), as output_type="latent" gives them, got {shape}')
        return 8 * shape[1], 8 * shape[2]

    def opened(self) -> Inputs:
        """The same inputs, with image files opened.

        Raises:
            InputError: for a file that cannot be read, or an image that the transformer cannot see.
        """
        images = [open_reference(image) for image in self.images] or None
        init_image = None if self.init_image is None else open_reference(self.init_image, alpha=self.mask == ALPHA)
        is_file = isinstance(self.mask, (str, os.PathLike)) and self.mask != ALPHA
        return replace(self, image=images, init_image=init_image, mask=open_mask(self.mask) if is_file else self.mask)

    def inpaint(self, options: GenerationOptions) -> Inpaint | None:
        """The inpainting or outpainting that the inputs ask for, if any; images must be opened.

        Raises:
            InputError: for options without what they belong to.
        """
        if options.strength is not None and not self.has_init:
            raise InputError("strength belongs to init_image (--init-image), and none is given")
        if len(options.reference_strength) > len(self.images):
            raise InputError(
                f"reference_strength has {len(options.reference_strength)} numbers, one for each reference image "
                f"(--image), and of these there are {len(self.images)}"
            )
        if self.init_image is not None and self.init_latents is not None:
            raise InputError("init_image and init_latents are both what to start from; give one of them")
        if options.hires is not None:
            self._check_hires(options)
        mask = self.mask
        if options.edit_option is not None:
            inpaints = self.init_image is not None and (mask is not None or options.expand is not None)
            self._check_edit(options.edit_option, inpaints=inpaints)
            mask = None  # which says where the edit is
        return inpaint_from(self.init_image, mask, options.mask_blur, options.mask_padding, options.expand)

    def _check_hires(self, options: GenerationOptions) -> None:
        if self.latents is not None:
            raise InputError("hires draws noise of its own for each size, and latents is given; give one of them")
        if options.strength is not None:
            raise InputError("strength is hires_strength (--hires-strength) where hires enlarges the init_image")
        for name, value in (("mask", self.mask), ("expand", options.expand)):
            if self.init_image is not None and value is not None:
                raise InputError(
                    f"hires enlarges whole images, and {name} is given; enlarge the result in another call"
                )

    def _check_edit(self, name: str, *, inpaints: bool) -> None:
        if not self.images:
            raise InputError(f"{name} belongs to image (--image), and none is given")
        if inpaints:
            raise InputError(
                f"{name} is for edits of image (--image); inpainting and outpainting keep the rest as it is"
            )
        if self.mask == ALPHA:
            raise InputError(f'the mask "{ALPHA}" is for init_image; {name} takes one that is white where the edit is')

    def edit(self, options: GenerationOptions, size: tuple[int, int]) -> Edit | None:
        """How results of a size (height, width) are brought back to the first reference, if they are; images must be
        opened, and ``inpaint`` have refused what does not go together.

        Raises:
            InputError: for a mask of another aspect.
        """
        if options.edit_option is None:
            return None
        mask = None if self.mask is None else grey_mask(self.mask, size[::-1])
        return Edit(lay_over(self.images[0], size), options.color_match, options.edit_composite, mask)


def open_mask(path: str | os.PathLike[str]) -> Image.Image:
    """A mask's file with its transparency, its numbers as they are: they say how much, not which colour.

    Raises:
        InputError: naming the file.
    """
    return open_image(expand(path), alpha=True, as_data=True)


def open_reference(image: Any, *, alpha: bool = False) -> Image.Image:
    """An image, or an image from a file, that the transformer is to see, in sRGB.

    Raises:
        InputError: naming the file.
    """
    if not isinstance(image, (str, os.PathLike)):
        reference_size(image)
        return to_srgb(cast(Image.Image, image))
    opened = open_image(expand(image), alpha=alpha)
    try:
        reference_size(opened)
    except InputError as error:
        raise InputError(f"{os.fspath(image)}: {error}") from None
    return opened
