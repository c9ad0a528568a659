"""What comes back: a step of an image, and the finished images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .imaging.inpaint import Inpaint
from .imaging.preprocess import to_pil
from .request import Settings
from .runtime.stats import Stats


@dataclass(frozen=True)
class Step:
    """One finished step of one picture.

    Attributes:
        image: which picture of the run, from 0.
        index: steps done, 1 to settings.num_steps.
        sigma: the noise level that is left, 0 after the last step.
        latents: (1, S, 128) tokens at that level, float32.
        denoised: (1, S, 128) the picture as this step foresees it; equals latents after the last step.
        settings: of this picture.
        stats: of the run so far.
    """

    image: int
    index: int
    sigma: float
    latents: mx.array
    denoised: mx.array
    settings: Settings
    stats: Stats
    _decode: Callable[[mx.array, Settings, Stats], mx.array] = field(repr=False)
    _preview: Callable[[mx.array, Settings, Stats], Image.Image] = field(repr=False)
    _repainting: Inpaint | None = field(repr=False)

    @property
    def is_last(self) -> bool:
        return self.index == self.settings.num_steps

    def array(self) -> np.ndarray:
        """The foreseen picture, decoded: (H, W, 3) float32 in 0..1; what a mask was given with is of its own size.

        Decoding may unload the transformer, see ``Flux2Pipeline.memory``; the next step loads it again.

        Raises:
            FloatingPointError: where the decoder's output is not finite.
        """
        if self._repainting is not None:
            return np.asarray(self.picture(), np.float32) / 255
        return np.array(self._decode(self.denoised, self.settings, self.stats)[0])

    def picture(self) -> Image.Image:
        """The foreseen picture, decoded to 8-bit RGB; see ``array``."""
        return self._pasted(to_pil(np.array(self._decode(self.denoised, self.settings, self.stats)[0])))

    def preview(self) -> Image.Image:
        """The foreseen picture without the decoder: an eighth of the resolution, enlarged, or by preview_decoder."""
        return self._pasted(self._preview(self.denoised, self.settings, self.stats))

    def _pasted(self, drawn: Image.Image) -> Image.Image:
        return drawn if self._repainting is None else self._repainting.composite(drawn)


@dataclass(frozen=True)
class Result:
    """Finished pictures.

    Attributes:
        images: PIL pictures; (B, H, W, 3) float32 in 0..1 for output_type "np"; (B, H/8, W/8, 32) decoder input for
            "latent".
        settings: one a picture, prompt by prompt.
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
