"""What a worker tells of an order, in this order: Queued, each Step, each Picture; or a Failure, which ends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Queued:
    """Attributes:
    position: orders that come before; 0 when it is drawn.
    """

    position: int


@dataclass(frozen=True)
class StepDone:
    """One step of one image.

    Attributes:
        image: the image's number in the order, from 0.
        index, steps: steps done, and how many there are.
        sigma: the noise level after the step.
        seconds_left: until the order is done, as far as its steps so far tell.
        preview: the image that the step foresees, where one is wanted.
    """

    image: int
    index: int
    steps: int
    sigma: float
    seconds_left: float
    preview: Image.Image | None


@dataclass(frozen=True)
class Picture:
    """A finished image.

    Attributes:
        image: its number in the order, from 0.
        picture: 8-bit RGB.
        id: of its latents, from which another request may start; None of what a mask was pasted into.
        settings: those that generate it again, without paths of this machine.
        parameters: the same in the line that other tools read.
        seconds: since the order's turn came.
        warnings: what was not done as it was asked for.
        is_last: whether the order is done.
    """

    image: int
    picture: Image.Image
    id: str | None
    settings: dict[str, Any]
    parameters: str
    seconds: float
    warnings: tuple[str, ...]
    is_last: bool


class Failure(Exception):
    """What ends an order before it is done, or keeps it from being taken.

    Attributes:
        status: HTTP's.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(self, message: str, status: int = 500, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


Event = Queued | StepDone | Picture | Failure
