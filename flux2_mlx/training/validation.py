"""Images that are generated during training to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..imaging.files import open_image
from ..imaging.preprocess import reference_size
from ..pipeline import Flux2Pipeline
from ..sampling.latents import PIXELS_PER_TOKEN
from .dataset import Size, bucket
from .log import write_image
from .options import TrainingOptions
from .trainer import Trainer


@dataclass(frozen=True)
class Validation:
    """What is drawn now and then, always from the same noise."""

    prompt: str
    references: list[tuple[Path, Size]]
    size: Size
    steps: int
    guidance: float

    @classmethod
    def of(cls, options: TrainingOptions, pipe: Flux2Pipeline) -> Validation | None:
        """As the options say, with what drawing takes for the model.

        Raises:
            InputError: for a picture that cannot be read.
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
        steps = options.validation_steps or (4 if is_distilled else 25)
        return cls(options.validation_prompt, references, size, steps, 1.0 if is_distilled else 4.0)

    def draw(self, trainer: Trainer) -> None:
        """Draw it, as samples/step-000250.png of the run's folder."""
        folder = Path(trainer.options.output) / "samples"
        folder.mkdir(exist_ok=True)
        picture = trainer.draw(self.prompt, self.references, self.size, self.steps, self.guidance)
        write_image(folder / f"step-{trainer.step:06}.png", picture)
