"""The language model that the text encoder is the beginning of: all of Qwen3, which writes text token by token.

Features: those of qwen3, every layer, the final norm and the head, which may be the embedding's table. Keys and values
of the tokens so far are kept.

Reference: transformers' Qwen3ForCausalLM, whose checkpoint keys are the attribute names here; its ``generate``, whose
samplers (temperature, top-k, top-p, in this order) are those of ``sampling_probabilities``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .config import Qwen3Config
from .layers import Linear, random_state_kept
from .qwen3 import Qwen3Model, TokenCache

LAYERS = 36  # of Qwen3-4B and Qwen3-8B
TEMPERATURE, TOP_K, TOP_P = 0.7, 20, 0.8  # as Qwen3's model card has them for answers without thinking


class Qwen3LanguageModel(nn.Module):
    """Token ids to the logits of the next token.

    Args:
        config: the text encoder's.
        layers: all of them.
        is_tied: whether the head is the embedding's table.
    """

    @random_state_kept()
    def __init__(self, config: Qwen3Config, layers: int = LAYERS, *, is_tied: bool = True):
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config, layers)
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not is_tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def __call__(self, input_ids: mx.array, caches: Sequence[TokenCache]) -> mx.array:
        """Logits (1, vocab_size) behind the last token, in the weights' dtype.

        Args:
            input_ids: (1, L) tokens after those that the caches hold: of empty caches any number, else one.
            caches: one a layer; the tokens are added.
        """
        tokens = input_ids.shape[1]
        mask = None if tokens == 1 else mx.tril(mx.ones((tokens, tokens), dtype=mx.bool_))[None, None]
        dtype = self.model.norm.weight.dtype  # norms are never packed, the embedding may be
        x = self.model.embed_tokens(input_ids).astype(dtype)
        for layer, cache in zip(self.model.layers, caches, strict=True):
            x = layer(x, mask, cache)
        head = self.lm_head if "lm_head" in self else self.model.embed_tokens.as_linear
        logits: mx.array = head(self.model.norm(x[:, -1]))
        return logits


def generate(
    model: Qwen3LanguageModel,
    input_ids: Sequence[int],
    stop: Collection[int],
    most: int,
    choose: Callable[[mx.array], int],
) -> Iterator[int]:
    """The tokens that the model writes behind those that are given, one by one, up to the first of ``stop``, which is
    not among them, or to ``most``.

    Args:
        choose: gives the next token from its logits (vocab_size,); see most_likely and sampled.
    """
    caches = [TokenCache(len(input_ids) + most) for _ in model.model.layers]
    following = list(input_ids)
    for _ in range(most):
        token = choose(model(mx.array([following]), caches)[0])
        if token in stop:
            return
        yield token
        following = [token]


def most_likely(logits: mx.array) -> int:
    """The token of the highest logit (greedy decoding); of equal ones the first."""
    return cast("int", mx.argmax(logits).item())


def sampled(seed: int) -> Callable[[mx.array], int]:
    """A function that draws tokens by sampling_probabilities, in the order of a seed."""
    rng = np.random.default_rng(seed)

    def choose(logits: mx.array) -> int:
        tokens, probabilities = sampling_probabilities(np.array(logits.astype(mx.float32), np.float64))
        return int(rng.choice(tokens, p=probabilities))

    return choose


def sampling_probabilities(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that can be drawn, from the likeliest on, and their probabilities: those of the TOP_K highest logits
    at TEMPERATURE, and of these the fewest that have TOP_P of the probability together.

    Args:
        logits: (vocab_size,).
    """
    tokens = np.argpartition(-logits, TOP_K)[:TOP_K]
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
    weights = np.exp((logits[tokens] - logits[tokens[0]]) / TEMPERATURE)
    weights /= weights.sum()
    count = int(np.searchsorted(np.cumsum(weights), TOP_P)) + 1
    return tokens[:count], weights[:count] / weights[:count].sum()
