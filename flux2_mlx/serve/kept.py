"""The latents of the images that were drawn last, by ids that nobody guesses, for requests that start from one."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .events import Failure

GONE = 410  # HTTP's status of what was there
PER_CLIENT = 10  # images: as many as a request draws
MOST_BYTES = 64 * 2**20  # of all clients; latents of 1024 x 1024 take 2 MB


@dataclass(frozen=True)
class Kept:
    """Latents (1, H/8, W/8, 32) of a client's image, and the model that drew it."""

    client: str
    model: str
    latents: np.ndarray


class KeptLatents:
    """Latents by id, the oldest first. The worker's thread keeps them, others ask."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._lock = threading.Lock()

    def keep(self, client: str, model: str, latents: mx.array) -> str:
        """Keep an image's latents, in the place of the oldest of the client, or of any where they are too many.

        Returns:
            their id.
        """
        own = Kept(client, model, np.array(latents))
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[name] = own
            of_client = [name for name, kept in self._kept.items() if kept.client == client]
            for old in of_client[:-PER_CLIENT]:
                del self._kept[old]
            while sum(kept.latents.nbytes for kept in self._kept.values()) > MOST_BYTES and len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
        return name

    def find(self, name: object, model: str) -> np.ndarray:
        """The latents with an id, for a request that this model answers.

        Raises:
            Failure: where they are not kept (any more).
        """
        with self._lock:
            kept = self._kept.get(name) if isinstance(name, str) else None
        if kept is None or kept.model != model:
            raise Failure(
                "the latents of init_latents are not kept here any more, or are another model's; send the image as "
                "init_image, or draw without",
                GONE,
            )
        return kept.latents

    def forget(self) -> None:
        """Keep none, since their model goes."""
        with self._lock:
            self._kept.clear()
