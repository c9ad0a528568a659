"""Classifier-free guidance (CFG): its formula, the three ways to compute its two passes, and when it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..collectives import all_gather
from .denoiser import Velocity
from .schedules import StepPlan


def apply_cfg(v: mx.array, v_uncond: mx.array, scale: float, rescale: float = 0.0) -> mx.array:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): v_uncond + scale * (v - v_uncond).

    Args:
        v, v_uncond: (B, S, C) velocities with the prompt and with the negative one.
        scale: 1 is v itself.
        rescale: 0..1, the share of the result whose standard deviation is made that of v (Lin et al., arXiv
            2305.08891, which counters the loss of contrast of strong guidance).
    """
    v_cfg = v_uncond + scale * (v - v_uncond)
    if rescale == 0:
        return v_cfg
    ratio = mx.std(v, axis=(1, 2), keepdims=True) / mx.std(v_cfg, axis=(1, 2), keepdims=True)
    return rescale * ratio * v_cfg + (1 - rescale) * v_cfg


# (x (B, S, C), prompt and negative embeddings (B, L, D) each, step) -> (v, v_uncond)
Passes = Callable[[mx.array, mx.array, mx.array, StepPlan], tuple[mx.array, mx.array]]


def batched(denoiser: Velocity) -> Passes:
    """Both passes of CFG as one batch of twice the rows."""

    def passes(x: mx.array, txt: mx.array, negative: mx.array, step: StepPlan) -> tuple[mx.array, mx.array]:
        v, v_uncond = mx.split(denoiser(mx.concatenate([x, x]), mx.concatenate([txt, negative]), step), 2)
        return v, v_uncond

    return passes


def sequential(cond: Velocity, uncond: Velocity) -> Passes:
    """One pass after the other, where both as one batch do not fit; ``uncond``'s cache may follow ``cond``'s."""

    def passes(x: mx.array, txt: mx.array, negative: mx.array, step: StepPlan) -> tuple[mx.array, mx.array]:
        return cond(x, txt, step), uncond(x, negative, step)

    return passes


def distributed(denoiser: Velocity, group: mx.distributed.Group) -> Passes:
    """One of the two passes on each of two processes."""

    def passes(x: mx.array, txt: mx.array, negative: mx.array, step: StepPlan) -> tuple[mx.array, mx.array]:
        velocity = denoiser(x, (txt, negative)[group.rank()], step)
        v, v_uncond = mx.split(all_gather(velocity, group), 2)
        return v, v_uncond

    return passes


@dataclass
class Guidance:
    """The velocity of a step: with CFG where the step is guided, else that of the prompt alone.

    Attributes:
        cond: the denoiser of the prompt.
        passes: computes (v, v_uncond), the velocities with the prompt and with the negative prompt.
        txt, negative: embeddings (B, L, D) of both prompts; ``negative`` is not used without CFG.
        scale, rescale: apply_cfg's.
    """

    cond: Velocity
    passes: Passes
    txt: mx.array
    negative: mx.array
    scale: float
    rescale: float = 0.0

    def __call__(self, x: mx.array, step: StepPlan) -> mx.array:
        if not step.is_guided:
            return self.cond(x, self.txt, step)
        return apply_cfg(*self.passes(x, self.txt, self.negative, step), self.scale, self.rescale)
