"""Keys and values of tokens that several passes attend to."""

from __future__ import annotations

import mlx.core as mx

# Rotated keys and values (B or 1, heads, R, D) of tokens in one block.
Kept = tuple[mx.array, mx.array]


class Reuse:
    """What is seen of the text or of the references in a picture's first step, for those after it, which then leave
    these tokens out; a fresh one has the next step computed.

    Args:
        what: "text" or "references".
        tokens: of the picture, which come between them.

    Attributes:
        kept: of every block, what is seen of them; empty until there was a step.
    """

    def __init__(self, what: str, tokens: int):
        self.what, self.tokens = what, tokens
        self.kept: list[Kept] = []

    def rows(self, text: int) -> tuple[slice, slice]:
        """Which are kept, and the others, of so many text tokens and the image tokens behind them."""
        if self.what == "text":
            return slice(text), slice(text, None)
        return slice(text + self.tokens, None), slice(text + self.tokens)
