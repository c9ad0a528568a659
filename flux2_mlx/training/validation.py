"""Validation: images that are generated during training."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..checkpoints.load import load_all
from ..errors import InputError
from ..families import BASE, DISTILLED
from ..imaging.files import open_image
from ..imaging.preprocess import reference_size, to_pil, to_unit
from ..pipeline import Flux2Pipeline
from ..sampling.denoiser import Denoiser
from ..sampling.guidance import Guidance, sequential
from ..sampling.latents import PIXELS_PER_TOKEN, initial_noise, unpack_latents
from ..sampling.samplers import sample_euler
from ..sampling.schedules import flux2_sigmas, plan_steps
from .dataset import Size, bucket
from .log import write_image
from .options import TrainingOptions
from .trainer import Trainer

MAX_STEPS = 25  # denoising steps of a validation image, unless the options set another number


@dataclass(frozen=True)
class Validation:
    """An image that is generated now and then, always from the same noise, to see what has been learned."""

    prompt: str
    references: list[tuple[Path, Size]]
    size: Size
    steps: int
    guidance: float

    @classmethod
    def of(cls, options: TrainingOptions, pipe: Flux2Pipeline) -> Validation | None:
        """The validation that the options ask for, with the model's default CFG scale; None without a prompt.

        Raises:
            InputError: for an image that cannot be read.
        """
        if options.validation_prompt is None:
            return None
        references = []
        for path in map(Path, options.validation_image):
            image = open_image(path)
            try:
                reference_size(image)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            references.append((path, bucket(image.height, image.width, options.resolution)))
        side = options.resolution // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
        size = references[0][1] if references else (side, side)
        is_distilled = pipe.checkpoint.is_distilled
        variant = DISTILLED if is_distilled else BASE
        steps = options.validation_steps or min(variant.num_steps, MAX_STEPS)
        return cls(options.validation_prompt, references, size, steps, variant.guidance)

    def is_due(self, trainer: Trainer, *, again: bool = False) -> bool:
        """Whether the step that the trainer is at has an image; ``again``, of a run that was stopped there, and yet
        lacks it.
        """
        is_due = trainer.step % trainer.options.validate_every == 0 or trainer.step == trainer.options.steps
        return is_due and not (again and self.path(trainer).is_file())

    def path(self, trainer: Trainer) -> Path:
        """The file of the image at the trainer's step, as samples/step-000250.png of the run's folder."""
        return Path(trainer.options.output) / "samples" / f"step-{trainer.step:06}.png"

    def generate(self, trainer: Trainer) -> None:
        """Generate it with what has been learned."""
        self.path(trainer).parent.mkdir(exist_ok=True)
        write_image(self.path(trainer), self._image(trainer))

    def _image(self, trainer: Trainer) -> Image.Image:
        cache, (height, width) = trainer.cache, self.size
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        references = [cache.latents(*reference) for reference in self.references]
        rope = trainer.rope((self.size, *(size for _, size in self.references)))
        noise = initial_noise(trainer.options.seed, height, width, trainer.model.params.in_channels)
        steps = plan_steps(flux2_sigmas(self.steps, tokens), uses_cfg=self.guidance > 1)
        with trainer.generating() as model:
            denoiser = Denoiser(lambda: nullcontext(model), rope, tokens, references)
            passes = sequential(denoiser, denoiser)
            velocity = Guidance(
                denoiser, passes, cache.prompt_embeds(self.prompt), cache.prompt_embeds(""), self.guidance
            )
            ((_, latents, _),) = deque(sample_euler(velocity, noise, steps), maxlen=1)
        autoencoder = load_all(cache.pipe.autoencoder, lambda name: not name.startswith("encoder."))
        decoded = autoencoder.decoder(unpack_latents(autoencoder.bn.denormalize(latents), height, width))
        image = to_pil(np.array(to_unit(decoded)[0]))
        cache.pipe.unload("autoencoder")
        return image
