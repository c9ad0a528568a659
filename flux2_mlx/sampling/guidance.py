"""Classifier-free guidance (CFG)."""

from __future__ import annotations

import mlx.core as mx


def guide(v: mx.array, away: mx.array, guidance: float, rescale: float = 0.0) -> mx.array:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): from a velocity away to v, and beyond.

    Args:
        v, away: (B, S, 128) velocities with the prompt and with the negative one.
        guidance: 1 is v itself.
        rescale: 0..1, the share of the result whose standard deviation is made that of v (Lin et al., arXiv
            2305.08891, which counters the loss of contrast of strong guidance).
    """
    guided = away + guidance * (v - away)
    if rescale == 0:
        return guided
    spread = mx.std(v, axis=(1, 2), keepdims=True) / mx.std(guided, axis=(1, 2), keepdims=True)
    return rescale * spread * guided + (1 - rescale) * guided
