"""What a training step minimizes: noise levels, the flow-matching loss, the learning rate."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..models.flux2 import FluxKlein
from ..sampling.schedules import empirical_mu, flux2_sigmas, shift_sigmas
from .options import TrainingOptions

SHIFT_STEPS = 50  # of the base models' schedule, whose shift "shifted" takes
FEW_STEPS = 4  # of the distilled models' schedule, whose levels "four" takes


def draw_timesteps(kind: str, rng: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """Noise levels within 0..1 (count,) by one of TIMESTEPS: the logistic function of standard normal numbers (Esser et
    al. 2024), uniform ones, those shifted as the base models' schedule shifts its levels for so many image tokens, or
    the four that distilled models draw such a picture with, and know little besides.
    """
    if kind == "logit-normal":
        return 1 / (1 + np.exp(-rng.standard_normal(count)))
    if kind == "four":
        return rng.choice(flux2_sigmas(FEW_STEPS, tokens)[:-1], count)
    levels = rng.random(count)
    if kind == "shifted":
        return np.array(shift_sigmas(levels.tolist(), empirical_mu(tokens, SHIFT_STEPS)))
    return levels


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Of the step after ``step`` steps: it rises linearly for ``warmup`` steps, then falls along half a cosine."""
    full, warmup = options.learning_rate, min(options.warmup, options.steps)
    if step < warmup:
        return full * (step + 1) / warmup
    if options.decay == "constant":
        return full
    return full * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup))) / 2


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
    """The mean squared error of the velocity that a model says of a noised picture: float32.

    Args:
        clean: (B, S, 128) tokens of the pictures.
        noise: likewise.
        timesteps: (B,) noise levels, 0..1.
        references: (B, R, 128) tokens of pictures that are seen as they are.
        txt: (B, L, D) prompt embeddings.
        rope: of text, picture and references; see FluxKlein.compute_rope.
        target: the velocity (B, S, 128) that is right; unless given, noise - clean.
    """
    velocity = noised_velocity(model, clean, noise, timesteps, references, txt, rope)
    return mx.square(velocity - (noise - clean if target is None else target)).mean()


def noised_velocity(
    model: FluxKlein,
    clean: mx.array,
    noise: mx.array,
    timesteps: mx.array,
    references: mx.array | None,
    txt: mx.array,
    rope: tuple[mx.array, mx.array],
) -> mx.array:
    """What a model says of a noised picture: (B, S, 128) in float32; arguments as flow_loss takes them."""
    t = timesteps[:, None, None]
    x = (1 - t) * clean + t * noise
    img = x if references is None else mx.concatenate([x, references], axis=1)
    return model.forward_with_rope(img, txt, timesteps, *rope)[:, : clean.shape[1]].astype(mx.float32)
