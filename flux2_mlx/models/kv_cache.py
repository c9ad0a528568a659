"""Keys and values that outlive a pass: of references that were encoded once, and of tokens that are frozen after the
first step.

A block asks a BlockKV what its tokens attend to, as mlx-lm's models ask their cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

# Rotated keys, and values, of tokens in one block: each (B or 1, heads, tokens, head_dim).
KV = tuple[mx.array, mx.array]


class BlockKV(Protocol):
    """A block's access to KV: it takes the block's own keys and values and decides what the block attends to.

    Attributes:
        mask: attention's, over the keys that it gives: (1, 1, N or 1, keys), N being the block's tokens; None masks
            nothing.
    """

    mask: mx.array | None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KV:
        """Take the block's own rotated keys and values, (B, heads, N, head_dim), and give those to attend to."""
        ...


class MaskedKV:
    """A block's own KV, with a mask."""

    def __init__(self, mask: mx.array):
        self.mask: mx.array | None = mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KV:
        return keys, values


class KVReader:
    """Lets a block's tokens attend to other tokens' KV too, appended to their own."""

    def __init__(self, kv: KV, mask: mx.array | None = None):
        self.kv, self.mask = kv, mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KV:
        other_keys, other_values = (mx.broadcast_to(other, (len(keys), *other.shape[1:])) for other in self.kv)
        return mx.concatenate([keys, other_keys], axis=2), mx.concatenate([values, other_values], axis=2)


class KVRecorder:
    """Keeps the KV of some of a block's tokens, which attend as ever.

    Args:
        tokens: the slice of the block's tokens.

    Attributes:
        kv: the KV of these tokens, once the block was called.
    """

    def __init__(self, tokens: slice, mask: mx.array | None = None):
        self.tokens, self.mask = tokens, mask
        self.kv: KV

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KV:
        # Copies, since views would keep every token's keys and values in memory.
        self.kv = mx.contiguous(keys[:, :, self.tokens]), mx.contiguous(values[:, :, self.tokens])
        # Attention waits for the copies: made later, they would keep the whole keys and values until then.
        keys, values = mx.depends([keys, values], list(self.kv))
        return keys, values


class FrozenKV:
    """KV of the text or of the references, recorded in an image's first step and attended to in later steps, which
    leave these tokens out. diffusers' TextKVCacheConfig does the same for the text.

    Args:
        tokens: the tokens that are frozen, "text" or "references".
        image_tokens: how many the image has; the sequence is text, image, references.

    Attributes:
        kv: the KV of every block; empty until the first step, which records it.
    """

    def __init__(self, tokens: str, image_tokens: int):
        self.tokens, self.image_tokens = tokens, image_tokens
        self._recorders: list[KVRecorder] = []

    @property
    def kv(self) -> list[KV]:
        return [recorder.kv for recorder in self._recorders]

    def clear(self) -> None:
        """Give the KV back."""
        self._recorders = []

    def begin_step(
        self,
        img: mx.array,
        txt: mx.array,
        cos: mx.array,
        sin: mx.array,
        blocks: int,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None, mx.array, mx.array, Sequence[BlockKV]]:
        """What so many blocks are given in a step: in the first one all tokens, and what records the KV of some; later
        the others alone, beside that KV.

        Args:
            mask: of text, image and references; see BlockKV.

        Returns:
            (img, txt, cos, sin, kv), as FluxKlein.forward_with_rope takes them.
        """
        text = txt.shape[1]
        rest = slice(text, None) if self.tokens == "text" else slice(text + self.image_tokens)
        frozen = slice(text) if self.tokens == "text" else slice(text + self.image_tokens, None)
        if not self._recorders:
            self._recorders = [KVRecorder(frozen, mask) for _ in range(blocks)]
            return img, txt, cos, sin, self._recorders
        for recorder in self._recorders:
            recorder.mask = None  # the first step's, which need not stay in memory
        if mask is not None:  # readers append what is frozen
            mask = mask if mask.shape[2] == 1 else mask[:, :, rest]
            mask = mx.concatenate([mask[..., rest], mask[..., frozen]], axis=-1)
        cos, sin, readers = cos[:, rest], sin[:, rest], [KVReader(kv, mask) for kv in self.kv]
        if self.tokens == "text":
            return img, None, cos, sin, readers
        return img[:, : self.image_tokens], txt, cos, sin, readers
