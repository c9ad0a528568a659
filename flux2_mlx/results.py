"""The results of a call: steps of images, and the finished images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .decoding import LatentDecoder
from .errors import InputError
from .imaging.edits import Edit
from .imaging.inpaint import Inpaint
from .imaging.preprocess import to_pil
from .inputs import Size
from .request import Settings
from .runtime.stats import Stats


@dataclass(frozen=True)
class Step:
    """One finished step of one image.

    Attributes:
        image: the image's index in the call, from 0.
        index, steps: the steps done, of how many: settings.num_steps, with hires those of both passes.
        timestep: 1000 times the noise level that the step began at, as diffusers counts.
        sigma: the noise level after the step, 0 after the last one.
        size: (height, width) in pixels of what is denoised; smaller than the image in the first pass of hires.
        latents: (1, S, 128) tokens at that level, float32.
        denoised: (1, S, 128) the image as this step predicts it; equals latents after the last step.
        settings: this image's settings.
        stats: seconds and peak bytes of the call so far.
    """

    image: int
    index: int
    steps: int
    timestep: float
    sigma: float
    size: Size
    latents: mx.array
    denoised: mx.array
    settings: Settings
    stats: Stats
    _decoder: LatentDecoder = field(repr=False)
    _inpaint: Inpaint | None = field(repr=False)
    _edit: Edit | None = field(repr=False)

    @property
    def is_last(self) -> bool:
        return self.index == self.steps

    def array(self) -> np.ndarray:
        """The predicted image, decoded: (H, W, 3) float32 in 0..1; with a mask at the init image's own size.

        Decoding may unload the transformer, see ``Flux2Pipeline.memory``; the next step loads it again.

        Raises:
            FloatingPointError: where the decoder's output is not finite.
        """
        if self._inpaint is not None or self._edit is not None:
            return np.asarray(self.picture(), np.float32) / 255
        return np.array(self._decoder.decode(self.denoised, self.size, self.stats)[0])

    def unpacked(self) -> mx.array:
        """The latents as the decoder takes them: (1, H/8, W/8, 32)."""
        latents = self._decoder.unpack(self.latents, self.size)
        mx.eval(latents)  # a caller may look at them in another thread
        return latents

    def picture(self) -> Image.Image:
        """The predicted image, decoded to 8-bit RGB; see ``array``."""
        return self.picture_and_mask()[0]

    def picture_and_mask(self) -> tuple[Image.Image, Image.Image | None]:
        """The picture, and of a finished one with color_match or edit_composite the mask of what the edit changed:
        8-bit grey of its size, white there.
        """
        image = self._composite(to_pil(np.array(self._decoder.decode(self.denoised, self.size, self.stats)[0])))
        return (image, None) if self._edit is None or not self.is_last else self._edit.finish(image, self.latents)

    def preview(self) -> Image.Image:
        """The predicted image without the decoder: an eighth of the resolution, enlarged, or by preview_decoder."""
        return self._composite(self._decoder.preview(self.denoised, self.size, self.stats))

    def _composite(self, image: Image.Image) -> Image.Image:
        """The image within its init image, where there is a mask."""
        return image if self._inpaint is None else self._inpaint.composite(image)


@dataclass(frozen=True)
class Result:
    """Finished images.

    Attributes:
        images: PIL images; (B, H, W, 3) float32 in 0..1 for output_type "np"; (B, H/8, W/8, 32) decoder input for
            "latent".
        settings: one for each image, prompt by prompt.
        seconds, peak_bytes: figures of each part of the run; see Stats.
        steps: how many were "computed", and how many "reused" earlier ones; see Stats.
        masks: of PIL images with color_match or edit_composite, what each edit changed: 8-bit grey, white there.
    """

    images: Any
    settings: list[Settings]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    steps: dict[str, int]
    masks: list[Image.Image] = field(default_factory=list)

    @classmethod
    def collect(cls, steps: Iterable[Step], output_type: str) -> Result:
        """The finished images of some steps, in one of OUTPUT_TYPES."""
        images: list[Any] = []
        masks: list[Image.Image] = []
        settings: list[Settings] = []
        stats = Stats()
        for step in steps:
            if not step.is_last:
                continue
            stats = step.stats
            settings.append(step.settings)
            if output_type == "pil":
                image, mask = step.picture_and_mask()
                images.append(image)
                masks += [] if mask is None else [mask]
            else:
                images.append(step.array() if output_type == "np" else step.unpacked())
        batch: Any = images
        if output_type == "np":
            batch = np.stack(images)
        elif output_type == "latent":
            batch = mx.concatenate(images)
            mx.eval(batch)
        return cls(batch, settings, stats.seconds, stats.peak_bytes, stats.steps, masks)

    @property
    def seeds(self) -> list[int]:
        return [settings.seed for settings in self.settings]


def watch(steps: Iterable[Step], callback: Callable[[int, float, dict[str, mx.array]], Any]) -> Iterator[Step]:
    """The same steps, each passed to diffusers' callback_on_step_end: its number from 0, its timestep, its latents.

    Raises:
        InputError: where the callback wants to change the latents.
    """
    for step in steps:
        returned = callback(step.index - 1, step.timestep, {"latents": step.latents})
        if isinstance(returned, Mapping) and returned.get("latents", step.latents) is not step.latents:
            raise InputError("callback_on_step_end cannot change latents; FluxSampler is for loops of your own")
        yield step
