"""Prompt embeddings: prompts to what the transformer reads, each encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from .._version import __version__
from ..checkpoints.checkpoint import Checkpoint
from ..device import stage_dtype, synchronize, weights_of
from ..disk_cache import read_prompt, write_prompt
from ..errors import CheckpointError
from ..runtime.activations import text_encoder_bytes
from ..runtime.residency import Need, Stages
from ..runtime.stats import Stats
from .tokenizer import Qwen3Tokenizer

Key = tuple[str, int]  # a prompt and its number of tokens


def check_tokens(largest: int, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer whose largest token of a text the text encoder does not know.

    Raises:
        CheckpointError: naming both.
    """
    if largest >= checkpoint.text_encoder.vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer}: the tokenizer gives token {largest}, but the text encoder knows "
            f"{checkpoint.text_encoder.vocab_size}; they do not belong together"
        )


class PromptEncoder:
    """Encodes prompts, and owns the three caches of their embeddings (1, L, D).

    Caches:
        _recent: embeddings of the last call, by prompt and length; each call replaces them.
        _ahead: embeddings of the last encode_ahead, by prompt and length; the next one replaces them.
        on disk, while ``uses_disk``: by all that the embeddings depend on, see _disk_key; disk_cache drops the oldest.
    """

    def __init__(self, stages: Stages, tokenizer: Qwen3Tokenizer, *, uses_disk: bool):
        self.stages, self.tokenizer, self.uses_disk = stages, tokenizer, uses_disk
        self._recent: dict[Key, mx.array] = {}
        self._ahead: dict[Key, mx.array] = {}

    def encode(self, prompts: Sequence[str], length: int, stats: Stats) -> dict[str, mx.array]:
        """Embeddings (1, L, D) of each distinct prompt, cut or padded to so many tokens.

        Raises:
            CheckpointError: where tokenizer and text encoder do not belong together.
        """
        known = self._recent | self._ahead
        embeddings = {text: known[text, length] for text in prompts if (text, length) in known}
        new = [text for text in dict.fromkeys(prompts) if text not in embeddings]
        if new:
            embeddings |= self._encode_new(new, length, stats)
        if prompts:
            self._recent = {(text, length): embeds for text, embeds in embeddings.items()}
        return embeddings

    def encode_ahead(self, prompts: Sequence[str], length: int) -> list[mx.array]:
        """Embeddings (1, L, D) of prompts of calls to come, kept for these."""
        with self.stages.turn():
            embeddings = self.encode(prompts, length, Stats())
        self._ahead = {(text, length): embeds for text, embeds in embeddings.items()}
        return [embeddings[text] for text in prompts]

    def _encode_new(self, prompts: Sequence[str], length: int, stats: Stats) -> dict[str, mx.array]:
        """Embeddings of prompts that no call has kept: from disk, else by the text encoder."""
        config = self.stages.checkpoint.text_encoder
        ids, mask = self.tokenizer(prompts, length)
        check_tokens(int(np.array(ids).max()), self.stages.checkpoint)
        rows = {text: (ids[row : row + 1], mask[row : row + 1]) for row, text in enumerate(prompts)}
        keys = {text: self._disk_key(*row) for text, row in rows.items()} if self.uses_disk else {}
        embeddings = {}
        for text, key in keys.items():
            embeds = read_prompt(*key)
            if embeds is not None:
                embeddings[text] = embeds
                del rows[text]
        if not rows:
            return embeddings
        need = Need(text_encoder_bytes(config, length, stage_dtype("text_encoder", self.stages.dtype)))
        with (
            self.stages.use("text_encoder", need, stats, what="text_encoder") as text_encoder,
            self.stages.reading_ahead("transformer"),
        ):
            for text, row in rows.items():
                embeddings[text] = text_encoder(*row)
                mx.eval(embeddings[text])
                synchronize()  # nothing that a GPU failed to compute goes to disk
                if self.uses_disk:
                    write_prompt(*keys[text], embeddings[text])
        return embeddings

    def _disk_key(self, ids: mx.array, mask: mx.array) -> tuple[Sequence[Path], object]:
        """All that the embeddings of these tokens depend on: files of weights, and the rest."""
        source = self.stages.checkpoint.sources["text_encoder"]
        module = {name: (array.shape, array.dtype) for name, array in weights_of(self.stages.text_encoder).items()}
        tokens = np.array(ids).tobytes(), np.array(mask).tobytes()
        return source.all_files, (__version__, mx.default_device(), source.config, module, tokens)
