"""First Block Cache: in a step that differs little from an earlier one, all blocks but the first are left out, and what
they would add is extrapolated from what they added before.

The first block is computed in every step, and its residual tells how far the step is from the last one computed in
full: the idea of ParaAttention's First Block Cache (https://github.com/chengzeyi/ParaAttention). The residual of the
other blocks, the tail, goes on in a straight line from the last two such steps: the idea of TaylorSeer (arXiv
2503.06923), to the first order.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..collectives import all_gather


class FirstBlockCache:
    """The residuals of an image's tokens in the last full steps of a pass, from which later steps are predicted.

    The first step is computed in full.

    A step calls start, predict and, where that gives None, update.

    Args:
        threshold: the tail is left out where the mean absolute difference between the first block's residual and that
            of the last full step is less than this share of the latter's mean absolute value, for each image of the
            pass. With 0 every step is computed in full.
        group: processes that decide together, each with a pass of its own.
        leader: cache of a pass that comes before this one in every step, and decides for both.

    Attributes:
        is_used: whether blocks were left out in the last pass.
    """

    def __init__(
        self,
        threshold: float,
        *,
        group: mx.distributed.Group | None = None,
        leader: FirstBlockCache | None = None,
    ):
        self.threshold, self.group, self.leader = threshold, group, leader
        self.is_used = False
        self._timesteps: Any = None  # (B,), of this step
        self._inputs: Any = None  # the stream before the first block, between start and predict
        self._outputs: Any = None  # the stream after the first block, between predict and update
        self._first_residual: Any = None  # the first block's residual in the last full step
        self._tail_residuals: list[tuple[mx.array, mx.array]] = []  # (timesteps, residual) of the last two full steps

    def start(self, img: mx.array, timesteps: mx.array) -> None:
        """Take the image's tokens (B, S, D) before the first block, and the noise levels (B,)."""
        self._timesteps, self._inputs = timesteps, img

    def predict(self, img: mx.array) -> mx.array | None:
        """Take the image's tokens (B, S, D) after the first block.

        Returns:
            a prediction of the stream after all blocks, or None where the other blocks must be computed.
        """
        residual, self._inputs = img - self._inputs, None
        self.is_used = self._is_near(residual) if self.leader is None else self.leader.is_used
        if self.is_used:
            return img + self._extrapolate()
        self._outputs, self._first_residual = img, residual
        del self._tail_residuals[:-1]
        return None

    def update(self, img: mx.array) -> mx.array:
        """Take the image's tokens (B, S, D) after all blocks; it comes back."""
        residual, self._outputs = img - self._outputs, None
        self._tail_residuals.append((self._timesteps, residual))
        # The stream waits for the residuals: left lazy, they would keep the graph of the whole step in memory.
        return mx.depends(img, [self._first_residual, residual])

    def _is_near(self, residual: mx.array) -> bool:
        if self._first_residual is None:
            return False
        # In float32, since in float16 the sum over an image overflows.
        difference, size = (
            mx.mean(mx.abs(part).astype(mx.float32), axis=(1, 2))
            for part in (residual - self._first_residual, self._first_residual)
        )
        shares = difference / size
        if self.group is not None:
            shares = all_gather(shares, self.group)
        return bool((shares < self.threshold).all().item())

    def _extrapolate(self) -> mx.array:
        """The tail's residual at this step's noise levels."""
        timesteps, residual = self._tail_residuals[-1]
        if len(self._tail_residuals) == 1:
            return residual
        earlier_timesteps, earlier = self._tail_residuals[0]
        ratio = (self._timesteps - timesteps) / (timesteps - earlier_timesteps)
        return residual + (residual - earlier) * ratio[:, None, None].astype(residual.dtype)
