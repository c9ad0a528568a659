"""Noise schedules: functions that return sigmas.

A schedule of n steps is n + 1 noise levels from 1.0 (noise) to 0.0 (image).
Reference: Black Forest Labs' flux2 sampling and diffusers' FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import InputError

# The constant shift of ComfyUI's FLUX.2 model, used there as mu whatever the size.
COMFY_MU = 2.02


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """Black Forest Labs' fitted time shift (mu) for an image of num_tokens tokens sampled in num_steps.

    Linear in the tokens at 10 and at 200 steps, and linear in the steps between and beyond; above 4300 tokens the
    200-step line alone. References never count as tokens.
    Source: Black Forest Labs' compute_empirical_mu.
    """
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_steps + (at_200 - 200.0 * slope)


def shift_sigmas(sigmas: Sequence[float], mu: float) -> list[float]:
    """e^mu / (e^mu + 1/s - 1) of each noise level: larger mu spends more steps at high noise. 0 and 1 stay exactly."""
    return [0.0 if s == 0 else math.exp(mu) / (math.exp(mu) + (1 / s - 1)) for s in sigmas]


def linear_sigmas(num_steps: int) -> list[float]:
    """1, 1 - 1/n, ..., 0."""
    return [1 - i / num_steps for i in range(num_steps)] + [0.0]


def flux2_sigmas(num_steps: int, num_tokens: int) -> list[float]:
    """The official schedule: linear, shifted by empirical_mu."""
    return shift_sigmas(linear_sigmas(num_steps), empirical_mu(num_tokens, num_steps))


def comfy_sigmas(num_steps: int) -> list[float]:
    """ComfyUI's default: linear, shifted by 2.02 at every size."""
    return shift_sigmas(linear_sigmas(num_steps), COMFY_MU)


def power_sigmas(num_steps: int) -> list[float]:
    """1 - (i/n)^2: more steps at high noise, not shifted.

    Source: flux2.c (antirez/flux2.c, --power, whose exponent is 2 unless it is given).
    """
    return [1 - (i / num_steps) ** 2 for i in range(num_steps)] + [0.0]


def custom_sigmas(sigmas: Sequence[float], num_tokens: int) -> list[float]:
    """A caller's sigmas, shifted by empirical_mu and closed with 0, as diffusers does with them."""
    return [*shift_sigmas(sigmas, empirical_mu(num_tokens, len(sigmas))), 0.0]


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Refuse custom sigmas that do not lead from noise to an image.

    Raises:
        InputError: unless they fall strictly from at most 1 and stay above 0.
    """
    try:
        values = [float(s) for s in sigmas]
    except (TypeError, ValueError):
        raise InputError(f"sigmas must be a list of numbers, got {sigmas!r}") from None
    if not values or not 0 < values[-1] <= values[0] <= 1 or any(a <= b for a, b in pairwise(values)):
        raise InputError(f"sigmas must fall strictly within 1 to 0, both ends above 0 (0 is added), got {values}")


SCHEDULES = ("flux2", "linear", "comfy", "power")


def schedule_sigmas(schedule: str, num_steps: int, num_tokens: int) -> list[float]:
    """The sigmas of a schedule by its name, one of SCHEDULES, for an image of num_tokens = H/16 * W/16 tokens.

    Raises:
        InputError: for another name.
    """
    if schedule == "flux2":
        return flux2_sigmas(num_steps, num_tokens)
    if schedule == "linear":
        return linear_sigmas(num_steps)
    if schedule == "comfy":
        return comfy_sigmas(num_steps)
    if schedule == "power":
        return power_sigmas(num_steps)
    raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


@dataclass(frozen=True)
class StepPlan:
    """What one step does, decided before the first.

    Attributes:
        index: the step's number from 1, counting the steps that a strength leaves out.
        sigma, sigma_next: the noise level before the step and the lower one after it.
        is_guided: whether CFG applies, which takes two passes.
        restarts: whether caches start anew: in the first step, and where CFG begins or ends, since what was cached
            before belongs to another batch.
        is_last: whether it is the last step, which is always computed in full.
    """

    index: int
    sigma: float
    sigma_next: float
    is_guided: bool = False
    restarts: bool = False
    is_last: bool = False

    @property
    def passes(self) -> int:
        """Passes through the transformer."""
        return 2 if self.is_guided else 1


def plan_steps(
    sigmas: Sequence[float], start: int = 0, *, uses_cfg: bool = False, interval: Sequence[float] | None = None
) -> list[StepPlan]:
    """The steps along a schedule.

    Args:
        sigmas: n + 1 noise levels of n steps, falling to 0.
        start: how many steps are left out at the beginning (img2img).
        uses_cfg: whether there is CFG.
        interval: (low, high), the noise levels between which it applies; None for all.
    """
    low, high = interval or (0.0, 1.0)
    pairs = list(pairwise(sigmas))[start:]
    guided = [uses_cfg and low <= sigma <= high for sigma, _ in pairs]
    return [
        StepPlan(
            index=start + k + 1,
            sigma=sigma,
            sigma_next=sigma_next,
            is_guided=guided[k],
            restarts=k == 0 or guided[k] != guided[k - 1],
            is_last=k == len(pairs) - 1,
        )
        for k, (sigma, sigma_next) in enumerate(pairs)
    ]
