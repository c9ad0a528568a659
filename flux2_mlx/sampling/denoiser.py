"""The denoiser: a transformer and what no step of an image changes, as a velocity of noisy tokens.

Denoisers are called as (x (B, S, C), txt (B, L, D), step) and give the velocity (B, S, C) in float32. Those that reuse
something of earlier steps wrap the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ..models.first_block_cache import StepCache
from ..models.flux2 import FluxKlein
from ..models.kv_cache import Kept, Reuse
from .schedules import StepPlan


class Velocity(Protocol):
    """A denoiser, plain or wrapped."""

    def __call__(self, x: mx.array, txt: mx.array, step: StepPlan) -> mx.array: ...


@dataclass
class Denoiser:
    """The transformer's velocity, evaluated.

    Attributes:
        use: lends the transformer while a pass is computed. It is asked anew for every pass and never kept, since
            whoever owns it may unload it between two passes.
        rope: tables (cos, sin) of text, image and references; see FluxKlein.compute_rope.
        num_tokens: S, of the image.
        references: clean tokens (1, R, C) of each reference image, which follow the image's.
        reference_kv: keys and values of the references in every block, in place of their tokens (klein-9b-kv).
    """

    use: Callable[[], AbstractContextManager[FluxKlein]]
    rope: tuple[mx.array, mx.array]
    num_tokens: int
    references: Sequence[mx.array] = ()
    reference_kv: Sequence[Kept] | None = None

    def __call__(
        self,
        x: mx.array,
        txt: mx.array,
        step: StepPlan,
        *,
        cache: StepCache | None = None,
        frozen: Reuse | None = None,
    ) -> mx.array:
        references = [mx.broadcast_to(tokens, (len(x), *tokens.shape[1:])) for tokens in self.references]
        img = mx.concatenate([x, *references], axis=1)
        with self.use() as transformer:
            v = transformer.forward_with_rope(
                img, txt, mx.array([step.sigma]), *self.rope, self.reference_kv, cache, frozen
            )
            v = v[:, : self.num_tokens].astype(mx.float32)
            mx.eval(v)
        return v


@dataclass
class CachedDenoiser:
    """First Block Cache: a step that is near an earlier one leaves out all blocks but the first.

    Attributes:
        new_cache: makes the cache of the steps to come, whenever a step restarts.
        cache: of the steps so far; None before the first step, and in the last one, which is computed in full.
    """

    denoiser: Denoiser
    new_cache: Callable[[], StepCache]
    cache: StepCache | None = None

    def __call__(self, x: mx.array, txt: mx.array, step: StepPlan) -> mx.array:
        if step.restarts:
            self.cache = self.new_cache()
        if step.is_last:
            self.cache = None
        return self.denoiser(x, txt, step, cache=self.cache)


@dataclass
class FrozenDenoiser:
    """Keys and values of text or references are those of the first step; they are given back after the last one."""

    denoiser: Denoiser
    frozen: Reuse

    def __call__(self, x: mx.array, txt: mx.array, step: StepPlan) -> mx.array:
        v = self.denoiser(x, txt, step, frozen=self.frozen)
        if step.is_last:
            self.frozen.kept.clear()
        return v
