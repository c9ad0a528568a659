"""Step caching: in a step that differs little from an earlier one, most blocks are left out, and what they would change
is foreseen from what they changed before.

The first block is computed in every step, and what it adds tells how far the step is from the last that was computed:
the idea of ParaAttention's First Block Cache (https://github.com/chengzeyi/ParaAttention). What the others change goes
on in a straight line from the last two such steps: the idea of TaylorSeer (arXiv 2503.06923), to the first order.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class StepCache:
    """What a pass through the transformer leaves to those of later steps; a fresh one has the next step computed.

    Args:
        threshold: how much what the first block adds to the picture's tokens may differ from what it added in the last
            step that was computed: the mean absolute difference is less than this share of the mean absolute value,
            for each picture of the pass. With 0 every step is computed.
        tokens: of the picture; those of references, which follow them, are left out.
        group: processes that decide together, each with a pass of its own.
        leader: of a pass that comes before this one in every step, and decides for both.

    Attributes:
        is_used: whether blocks were left out in the last pass.
    """

    def __init__(
        self,
        threshold: float,
        tokens: int,
        *,
        group: mx.distributed.Group | None = None,
        leader: StepCache | None = None,
    ):
        self.threshold, self.tokens, self.group, self.leader = threshold, tokens, group, leader
        self.is_used = False
        self._now: Any = None  # (B,) the noise level
        self._before: Any = None  # the picture's tokens before the first block
        self._behind: Any = None  # and behind it
        self._first: Any = None  # what it added in the last step that was computed
        self._others: list[tuple[mx.array, mx.array]] = []  # noise level, what the others added; of the last two

    def begin(self, img: mx.array, timesteps: mx.array) -> None:
        """Take the noise levels (B,), and the image stream (B, S, D) before the first block."""
        self._now, self._before = timesteps, img[:, : self.tokens]

    def again(self, img: mx.array) -> mx.array | None:
        """Take the image stream (B, S, D) behind the first block.

        Returns:
            what is foreseen behind all blocks, or None where the others are to be computed.
        """
        behind = img[:, : self.tokens]
        first, self._before = behind - self._before, None
        self.is_used = self._is_near(first) if self.leader is None else self.leader.is_used
        if self.is_used:
            return mx.concatenate([behind + self._foreseen(), img[:, self.tokens :]], axis=1)
        self._behind, self._first = behind, first
        del self._others[:-1]
        return None

    def keep(self, img: mx.array) -> mx.array:
        """Take the image stream (B, S, D) behind all blocks; it comes back."""
        others, self._behind = img[:, : self.tokens] - self._behind, None
        self._others.append((self._now, others))
        return mx.depends(img, [self._first, others])  # or all that they are made of would be kept

    def _is_near(self, first: mx.array) -> bool:
        if self._first is None:
            return False
        # In float32: in float16 the sum over a picture overflows.
        difference, size = (
            mx.mean(mx.abs(part).astype(mx.float32), axis=(1, 2)) for part in (first - self._first, self._first)
        )
        shares = difference / size
        if self.group is not None:
            shares = mx.distributed.all_gather(shares, group=self.group)
        return bool((shares < self.threshold).all().item())

    def _foreseen(self) -> mx.array:
        level, others = self._others[-1]
        if len(self._others) == 1:
            return others
        earlier_level, earlier = self._others[0]
        ratio = (self._now - level) / (level - earlier_level)
        return others + (others - earlier) * ratio[:, None, None].astype(others.dtype)
