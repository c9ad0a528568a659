"""Sampling of a rectified flow by Euler steps. The velocity is noise minus image.

Reference: Black Forest Labs' flux2 sampling and diffusers' FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import InputError
from .schedules import StepPlan, linear_sigmas

GuidedVelocity = Callable[[mx.array, StepPlan], mx.array]  # of tokens (B, S, C) in a step, with CFG where that is


def add_noise(clean: mx.array, noise: mx.array, sigma: float) -> mx.array:
    """Clean tokens at a noise level: (1 - sigma) * clean + sigma * noise."""
    return (1 - sigma) * clean + sigma * noise


def euler_step(x: mx.array, velocity: mx.array, sigma: float, sigma_next: float) -> mx.array:
    """x + (sigma_next - sigma) * velocity, in x's dtype or the wider of the two."""
    return x + (sigma_next - sigma) * velocity.astype(x.dtype)


@dataclass(frozen=True)
class MaskBlend:
    """Inpainting: tokens outside of the mask are those of the init image, noised to the step's sigma.

    Attributes:
        clean, noise: the init image's tokens (1, S, C), and each image's noise (B, S, C).
        mask: (1, S, 1) in 0..1, 1 where the image is generated anew.
    """

    clean: mx.array
    noise: mx.array
    mask: mx.array

    def __call__(self, x: mx.array, sigma: float) -> mx.array:
        """x (B, S, C) at a noise level, blended."""
        return self.mask * x + (1 - self.mask) * add_noise(self.clean, self.noise, sigma)


def sample_euler(
    velocity: GuidedVelocity,
    x: mx.array,
    steps: Sequence[StepPlan],
    blend: MaskBlend | None = None,
) -> Iterator[tuple[StepPlan, mx.array, mx.array]]:
    """Euler's steps along a rectified flow.

    Args:
        velocity: gives the velocity (noise minus image) of tokens (B, S, C) in a step.
        x: (B, S, C) tokens at the first step's noise level.
        blend: inpainting's, which brings the tokens outside of the mask back after each step.

    Yields:
        each step with the tokens at its lower noise level, and the denoised image that it predicts, both (B, S, C).
    """
    for step in steps:
        v = velocity(x, step)
        x = euler_step(x, v, step.sigma, step.sigma_next)
        denoised = x - step.sigma_next * v
        if blend is not None:
            x, denoised = blend(x, step.sigma_next), blend(denoised, 0)
        mx.eval(x, denoised)
        yield step, x, denoised


@dataclass(frozen=True)
class FluxSamplerConfig:
    """Settings of FluxSampler: linear when ``is_schnell``, else shifted by s -> shift s / (1 + (shift - 1) s)."""

    num_steps: int = 4
    is_schnell: bool = True
    shift: float = 1.0

    @classmethod
    def klein(cls) -> FluxSamplerConfig:
        """Four linear steps. Flux2Pipeline samples with the official schedule instead: see flux2_sigmas."""
        return cls()


class FluxSampler:
    """A small Euler sampler for loops written by hand."""

    def __init__(self, config: FluxSamplerConfig):
        self.config = config

    @classmethod
    def schnell(cls) -> FluxSampler:
        """Four linear steps."""
        return cls(FluxSamplerConfig())

    def timesteps(self, num_steps: int | None = None) -> list[float]:
        """num_steps + 1 noise levels from 1.0 to 0.0; the config's number of steps unless given.

        Raises:
            InputError: for fewer than one step.
        """
        steps = self.config.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise InputError(f"num_steps must be at least 1, got {steps}")
        sigmas = linear_sigmas(steps)
        if self.config.is_schnell:
            return sigmas
        shift = self.config.shift
        return [shift * s / (1 + (shift - 1) * s) for s in sigmas]

    def step(self, x_t: mx.array, v_pred: mx.array, t: float, t_prev: float) -> mx.array:
        """x_t + (t_prev - t) * v_pred: one Euler step from noise level t to the lower t_prev, both in 0..1.

        x_t and v_pred have the same shape, (B, S, 128) here; so has the result.
        """
        return euler_step(x_t, v_pred, t, t_prev)

    def sample_prior(self, shape: Sequence[int], key: mx.array | None = None) -> mx.array:
        """Standard normal numbers of the shape, in float32."""
        return mx.random.normal(tuple(shape), key=key)
