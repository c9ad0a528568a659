"""The flow-matching loss, its noise levels, and the learning rate's schedule."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..models.flux2 import FluxKlein
from ..sampling.schedules import empirical_mu, flux2_sigmas, shift_sigmas
from .options import TrainingOptions

SHIFT_STEPS = 50  # steps of the base models: "shifted" takes the shift of their schedule
FEW_STEPS = 4  # steps of the distilled models: "four" takes the noise levels of their schedule


def draw_timesteps(kind: str, rng: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """Random noise levels in 0..1 (count,), by ``kind``, one of TIMESTEPS:

    - "logit-normal": the logistic function of standard normal numbers (Esser et al. 2024).
    - "uniform".
    - "shifted": uniform, then shifted as the base models' schedule is for so many image tokens.
    - "four": one of the four noise levels of the distilled models' schedule, which were trained on these.
    """
    if kind == "logit-normal":
        return 1 / (1 + np.exp(-rng.standard_normal(count)))
    if kind == "four":
        return rng.choice(flux2_sigmas(FEW_STEPS, tokens)[:-1], count)
    sigmas = rng.random(count)
    if kind == "shifted":
        return np.array(shift_sigmas(sigmas.tolist(), empirical_mu(tokens, SHIFT_STEPS)))
    return sigmas


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """The learning rate after ``step`` steps: linear warmup, then cosine decay or constant."""
    peak, warmup = options.learning_rate, min(options.warmup, options.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.decay == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup))) / 2


def flow_loss(
    model: FluxKlein,
    clean: mx.array,
    noise: mx.array,
    timesteps: mx.array,
    references: mx.array | None,
    txt: mx.array,
    rope: tuple[mx.array, mx.array],
    target: mx.array | None = None,
) -> mx.array:
    """The mean squared error of the velocity that a model predicts for noised images: a float32 scalar.

    Args:
        clean: (B, S, 128) latent tokens of the images.
        noise: (B, S, 128).
        timesteps: (B,) noise levels, 0..1.
        references: (B, R, 128) clean latent tokens of the reference images.
        txt: (B, L, D) prompt embeddings.
        rope: rotation tables of text, image and references; see FluxKlein.compute_rope.
        target: (B, S, 128), the velocity to learn; noise - clean by default.
    """
    velocity = predict_velocity(model, clean, noise, timesteps, references, txt, rope)
    return mx.square(velocity - (noise - clean if target is None else target)).mean()


def predict_velocity(
    model: FluxKlein,
    clean: mx.array,
    noise: mx.array,
    timesteps: mx.array,
    references: mx.array | None,
    txt: mx.array,
    rope: tuple[mx.array, mx.array],
) -> mx.array:
    """The velocity (B, S, 128) that a model predicts for noised images, float32; arguments as in flow_loss."""
    t = timesteps[:, None, None]
    x = (1 - t) * clean + t * noise
    img = x if references is None else mx.concatenate([x, references], axis=1)
    return model.forward_with_rope(img, txt, timesteps, *rope, image_tokens=clean.shape[1]).astype(mx.float32)
