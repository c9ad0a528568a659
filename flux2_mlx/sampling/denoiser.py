"""The denoiser: the transformer with everything that stays the same in all steps, as a velocity of noisy tokens.

Denoisers are called as (x (B, S, C), txt (B, L, D), step) and give the velocity (B, S, C) in float32. Those that reuse
something of earlier steps wrap the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ..models.first_block_cache import FirstBlockCache
from ..models.flux2 import FluxKlein
from ..models.kv_cache import KV, BlockKV, FrozenKV, KVReader, MaskedKV
from .regions import Regions
from .schedules import StepPlan


class Velocity(Protocol):
    """A denoiser, plain or wrapped."""

    def __call__(self, x: mx.array, txt: mx.array, step: StepPlan) -> mx.array: ...


def strength_bias(others: int, tokens: Sequence[int], strengths: Sequence[float]) -> mx.array | None:
    """What is added to attention's scores, so that a reference of strength s counts as if each of its tokens were
    there s times: log s, since exp(score + log s) = s exp(score).

    Args:
        others: tokens before the references, the text's and the image's.
        tokens: of each reference.
        strengths: of each reference, above 0.

    Returns:
        (1, 1, 1, keys) in float32; None where every strength is 1.
    """
    if all(strength == 1 for strength in strengths):
        return None
    of_references = [log for n, s in zip(tokens, strengths, strict=True) for log in [math.log(s)] * n]
    return mx.array([0.0] * others + of_references)[None, None, None]


@dataclass
class Denoiser:
    """The transformer's velocity, evaluated.

    Attributes:
        use: lends the transformer for one pass. Each pass asks anew, since its owner may unload it in between.
        rope: tables (cos, sin) of text, image and references; see FluxKlein.compute_rope.
        num_tokens: S, the image's tokens.
        references: clean tokens (1, R, C) of each reference image, which follow the image's.
        reference_kv: keys and values of the references in every block, in place of their tokens (klein-9b-kv).
        bias: strength_bias of the references.
        regions: where the text is a prompt and those of regions, of one length each. A negative prompt has no regions,
            and its text is one of that length.
    """

    use: Callable[[], AbstractContextManager[FluxKlein]]
    rope: tuple[mx.array, mx.array]
    num_tokens: int
    references: Sequence[mx.array] = ()
    reference_kv: Sequence[KV] | None = None
    bias: mx.array | None = None
    regions: Regions | None = None

    def __call__(
        self,
        x: mx.array,
        txt: mx.array,
        step: StepPlan,
        *,
        cache: FirstBlockCache | None = None,
        frozen: FrozenKV | None = None,
    ) -> mx.array:
        references = [mx.broadcast_to(tokens, (len(x), *tokens.shape[1:])) for tokens in self.references]
        img, (cos, sin) = mx.concatenate([x, *references], axis=1), self.rope
        text: mx.array | None = txt
        kv: Sequence[BlockKV] | None = None
        with self.use() as transformer:
            blocks = transformer.params.blocks
            mask = None if self.bias is None else self.bias.astype(transformer.dtype)
            if extra := cos.shape[1] - txt.shape[1] - img.shape[1]:  # a negative prompt, without the regions' texts
                cos, sin, mask = cos[:, extra:], sin[:, extra:], None if mask is None else mask[..., extra:]
            elif self.regions is not None:
                mask = self.regions.mask(mask)
            if self.reference_kv is not None:
                kv = [KVReader(own, mask) for own in self.reference_kv]
            elif mask is not None:
                kv = [MaskedKV(mask)] * blocks
            if frozen is not None:
                img, text, cos, sin, kv = frozen.begin_step(img, txt, cos, sin, blocks, mask)
            del mask  # which frozen KV has in another order, and which would stay in memory
            v = transformer.forward_with_rope(
                img, text, mx.array([step.sigma]), cos, sin, image_tokens=self.num_tokens, kv=kv, cache=cache
            ).astype(mx.float32)
            mx.eval(v)
        return v


@dataclass
class CachedDenoiser:
    """First Block Cache: a step that is near an earlier one leaves out all blocks but the first.

    Attributes:
        new_cache: makes the cache of the steps to come, whenever a step restarts.
        cache: the First Block Cache of the steps so far; None before the first step, and in the last one, which is
            computed in full.
    """

    denoiser: Denoiser
    new_cache: Callable[[], FirstBlockCache]
    cache: FirstBlockCache | None = None

    def __call__(self, x: mx.array, txt: mx.array, step: StepPlan) -> mx.array:
        if step.restarts:
            self.cache = self.new_cache()
        if step.is_last:
            self.cache = None
        return self.denoiser(x, txt, step, cache=self.cache)


@dataclass
class FrozenDenoiser:
    """The keys and values of text or references are frozen after the first step, and freed after the last one."""

    denoiser: Denoiser
    frozen: FrozenKV

    def __call__(self, x: mx.array, txt: mx.array, step: StepPlan) -> mx.array:
        v = self.denoiser(x, txt, step, frozen=self.frozen)
        if step.is_last:
            self.frozen.clear()
        return v
