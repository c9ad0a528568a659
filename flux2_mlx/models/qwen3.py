"""The text encoder: Qwen3 up to the last layer that FLUX.2 [klein] reads.

Features: grouped-query attention with RMSNorm on q and k, half-rotation RoPE, SwiGLU, no biases. The result is the
outputs of three inner layers side by side, without the final norm; later layers are never built. A smaller Qwen3 has
an adapter behind its own inner layers, which makes the same of them: text_adapter.

Reference: transformers' Qwen3ForCausalLM, whose checkpoint keys are the attribute names here.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from .attention import attention
from .config import Qwen3Config
from .layers import BlockRunner, Linear, random_state_kept, run_block
from .text_adapter import TextAdapter


class TokenCache:
    """Keys and values of a layer's tokens so far, with room for all that are to come."""

    def __init__(self, room: int):
        self.room, self.length = room, 0

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Keep k and v (B, KV heads, N, head_dim) of the next N tokens; those of all tokens so far."""
        if not self.length:
            self.k, self.v = (mx.zeros((*own.shape[:2], self.room, own.shape[3]), own.dtype) for own in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Attention(nn.Module):
    """Grouped-query attention: (B, L, hidden) to (B, L, hidden).

    The mask (B or 1, 1, L, keys) is true where a token attends to one of the first ``keys`` tokens; None means to all.
    Of the others, which nothing attends to, no keys and values are made. With a cache the tokens come after those that
    it holds, and attend to these, too.
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        dims, eps = config.hidden_size, config.rms_norm_eps
        self.q_proj = Linear(dims, self.heads * self.head_dim)
        self.k_proj = Linear(dims, self.kv_heads * self.head_dim)
        self.v_proj = Linear(dims, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, dims)
        self.q_norm = nn.RMSNorm(self.head_dim, eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps)
        self.rope = nn.RoPE(self.head_dim, traditional=False, base=config.rope_theta)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: TokenCache | None = None) -> mx.array:
        batch, tokens, _ = x.shape
        start, keys = 0 if cache is None else cache.length, tokens if mask is None else mask.shape[-1]
        attended = x[:, :keys]
        q = self.q_proj(x).reshape(batch, tokens, self.heads, self.head_dim)
        k = self.k_proj(attended).reshape(batch, keys, self.kv_heads, self.head_dim)
        v = self.v_proj(attended).reshape(batch, keys, self.kv_heads, self.head_dim)
        q = self.rope(self.q_norm(q).transpose(0, 2, 1, 3), offset=start)
        k = self.rope(self.k_norm(k).transpose(0, 2, 1, 3), offset=start)
        v = v.transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return self.o_proj(attention(q, k, v, mask))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        dims, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(dims, hidden)
        self.up_proj = Linear(dims, hidden)
        self.down_proj = Linear(hidden, dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: TokenCache | None = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nn.Module):
    def __init__(self, config: Qwen3Config, layers: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config) for _ in range(layers)]


class Qwen3TextEncoder(nn.Module):
    """Token ids to prompt embeddings.

    Attributes:
        block_runner: calls the layers; streaming replaces it.
    """

    @random_state_kept()
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config, config.num_layers)
        if config.adapter is not None:
            self.adapter = TextAdapter(config.adapter)
        self.block_runner: BlockRunner = run_block

    def __call__(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """Encode padded prompts.

        Args:
            input_ids: (B, L) token ids, padded on the right.
            attention_mask: (B, L), 1 for the prompt's tokens and 0 for padding; None means no padding. A padding row
                attends to the prompt's tokens alone, and its output is used: the transformer reads every row.

        Returns:
            (B, L, 3 * hidden): the outputs of the tapped layers side by side, in the weights' dtype. Of a smaller Qwen3
            (B, L - dropped_tokens, output_size): what its adapter makes of them.
        """
        tokens = keys = input_ids.shape[1]
        if attention_mask is not None:  # the longest prompt's; of no prompt at all, every token's
            keys = cast("int", (attention_mask * mx.arange(1, tokens + 1)).max().item()) or tokens
        mask = mx.tril(mx.ones((tokens, keys), dtype=mx.bool_))[None, None]  # (1, 1, L, keys)
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :keys].astype(mx.bool_)  # (B, 1, L, keys)
        dtype = self.model.layers[0].input_layernorm.weight.dtype  # norms are never packed, the embedding may be
        x = self.model.embed_tokens(input_ids).astype(dtype)
        taps = []
        for i, layer in enumerate(self.model.layers):
            x = self.block_runner(layer, x, mask)
            if i in self.config.tapped_layers:
                taps.append(x)
        embeds = mx.concatenate(taps, axis=-1)
        if self.config.adapter is None:
            return embeds
        return self.adapter(embeds)[:, self.config.dropped_tokens :].astype(dtype)
