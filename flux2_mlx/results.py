"""What comes back: a step of an image, and the finished images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .decoding import LatentDecoder
from .imaging.inpaint import Inpaint
from .imaging.preprocess import to_pil
from .request import Settings
from .runtime.stats import Stats


@dataclass(frozen=True)
class Step:
    """One finished step of one image.

    Attributes:
        image: which image of the call, from 0.
        index: steps done, 1 to settings.num_steps.
        sigma: the noise level that is left, 0 after the last step.
        latents: (1, S, 128) tokens at that level, float32.
        denoised: (1, S, 128) the image as this step foresees it; equals latents after the last step.
        settings: of this image.
        stats: of the call so far.
    """

    image: int
    index: int
    sigma: float
    latents: mx.array
    denoised: mx.array
    settings: Settings
    stats: Stats
    _decoder: LatentDecoder = field(repr=False)
    _inpaint: Inpaint | None = field(repr=False)

    @property
    def is_last(self) -> bool:
        return self.index == self.settings.num_steps

    def array(self) -> np.ndarray:
        """The foreseen image, decoded: (H, W, 3) float32 in 0..1; what a mask was given with is of its own size.

        Decoding may unload the transformer, see ``Flux2Pipeline.memory``; the next step loads it again.

        Raises:
            FloatingPointError: where the decoder's output is not finite.
        """
        if self._inpaint is not None:
            return np.asarray(self.picture(), np.float32) / 255
        return np.array(self._decoder.decode(self.denoised, self.settings, self.stats)[0])

    def picture(self) -> Image.Image:
        """The foreseen image, decoded to 8-bit RGB; see ``array``."""
        return self._composite(to_pil(np.array(self._decoder.decode(self.denoised, self.settings, self.stats)[0])))

    def preview(self) -> Image.Image:
        """The foreseen image without the decoder: an eighth of the resolution, enlarged, or by preview_decoder."""
        return self._composite(self._decoder.preview(self.denoised, self.settings, self.stats))

    def _composite(self, image: Image.Image) -> Image.Image:
        """The image within its init image, where there is a mask."""
        return image if self._inpaint is None else self._inpaint.composite(image)


@dataclass(frozen=True)
class Result:
    """Finished images.

    Attributes:
        images: PIL pictures; (B, H, W, 3) float32 in 0..1 for output_type "np"; (B, H/8, W/8, 32) decoder input for
            "latent".
        settings: one an image, prompt by prompt.
        seconds, peak_bytes: of each part; see Stats.
        steps: how many were "computed", and how many "reused" earlier ones; see Stats.
    """

    images: Any
    settings: list[Settings]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    steps: dict[str, int]

    @property
    def seeds(self) -> list[int]:
        return [settings.seed for settings in self.settings]
