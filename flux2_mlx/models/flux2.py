"""The FLUX.2 [klein] transformer.

Features, in reading order:
- one modulation of each kind (image, text, single) a step, shared by all blocks;
- double blocks: image and text have their own weights and attend jointly, text tokens first;
- single blocks: one fused projection to q, k, v, gate and up; attention and feed-forward in parallel;
- RMSNorm on q and k, rotary positions of four axes, SwiGLU, LayerNorm without weights, no biases anywhere;
- behind the last block only the image's tokens are read, so of the others it makes keys and values alone;
- in klein-9b-kv references attend to themselves alone, at noise level 0, so that their KV is computed once;
- elsewhere KV of the text or of the references in the first step can be frozen for the later ones.

Reference: diffusers' Flux2Transformer2DModel, whose checkpoint keys are the attribute names here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .attention import ALL, attend
from .config import FluxKleinParams
from .first_block_cache import FirstBlockCache
from .kv_cache import KV, BlockKV, KVRecorder
from .layers import BlockRunner, Linear, RMSNorm, outputs, random_state_kept, run_block
from .rope import four_axes, rope_table

FLOAT16_MAX = 65504.0


def timestep_embedding(timesteps: mx.array, channels: int) -> mx.array:
    """Sinusoid of 1000 t: cosines, then sines, of channels / 2 frequencies 10000^(-2j / channels).

    Args:
        timesteps: (B,), 0..1.

    Returns:
        (B, channels) in float32.
    """
    half = channels // 2
    frequencies = mx.exp(-math.log(10000.0) / half * mx.arange(half, dtype=mx.float32))
    angle = 1000.0 * timesteps.astype(mx.float32)[:, None] * frequencies
    return mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1)


def cast_input(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """x in a dtype, within the range of float16, beyond which it would be infinite and end in NaN."""
    if dtype == mx.float16:  # in float32, since the bound of float16 is rounded up in bfloat16
        x = mx.clip(x.astype(mx.float32), -FLOAT16_MAX, FLOAT16_MAX)
    return x.astype(dtype)


# Each of the compiled functions is one kernel; uncompiled, its intermediates would be written to memory.


@partial(mx.compile, shapeless=True)
def scale_shift(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """(1 + scale) * x + shift in the dtype of shift."""
    return ((1 + scale) * x + shift).astype(shift.dtype)


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """(1 + scale) * LayerNorm(x) + shift in the dtype of shift; x (B, N, D), shift and scale (B or 1, 1, D)."""
    if len(shift) == 1:  # scale and shift serve as the norm's weight and bias, which makes it one kernel
        return mx.fast.layer_norm(x, 1 + scale[0, 0], shift[0, 0], eps).astype(shift.dtype)
    return scale_shift(mx.fast.layer_norm(x, None, None, eps), shift, scale)


@partial(mx.compile, shapeless=True)
def add_gated(x: mx.array, gate: mx.array, change: mx.array) -> mx.array:
    """x + gate * change in the dtype of x; a change in float16 is clipped to its range first, as diffusers does."""
    if change.dtype == mx.float16:
        change = mx.clip(change, -FLOAT16_MAX, FLOAT16_MAX)
    return x + gate.astype(x.dtype) * change.astype(x.dtype)


@partial(mx.compile, shapeless=True)
def silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, in float16 within its range: the next product would make NaN of infinite values."""
    out = gate * mx.sigmoid(gate) * up
    return mx.clip(out, -FLOAT16_MAX, FLOAT16_MAX) if out.dtype == mx.float16 else out


def swiglu(layer: nn.Module, x: mx.array, start: int, hidden: int) -> mx.array:
    """silu(gate) * up, (..., in) to (..., hidden); gate and up are outputs of one linear layer, from ``start`` on."""
    gate = outputs(layer, x, start, start + hidden)
    x = mx.depends(x, gate)  # up waits for gate, so that of a packed layer one part is unpacked at a time
    return silu_mul(gate, outputs(layer, x, start + hidden, start + 2 * hidden))


def split_heads(x: mx.array, heads: int, norm: Callable[[mx.array], mx.array] = lambda x: x) -> mx.array:
    """(B, N, heads * D) to (B, heads, N, D), with the norm applied to each head."""
    batch, tokens, _ = x.shape
    # The norm comes before the transposition: on Metal a norm of a transposed view copies it first.
    return norm(x.reshape(batch, tokens, heads, -1)).transpose(0, 2, 1, 3)


class TimestepEmbedder(nn.Module):
    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.linear_1 = Linear(channels, dims)
        self.linear_2 = Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.silu(self.linear_1(x)))


class TimeEmbed(nn.Module):
    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.channels = channels
        self.timestep_embedder = TimestepEmbedder(channels, dims)

    def __call__(self, timesteps: mx.array, dtype: mx.Dtype) -> mx.array:
        return self.timestep_embedder(timestep_embedding(timesteps, self.channels).astype(dtype))


class Modulation(nn.Module):
    """silu(temb) through one linear, as ``parts`` vectors (B, 1, dims)."""

    def __init__(self, dims: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = Linear(dims, parts * dims)

    def __call__(self, temb: mx.array) -> list[mx.array]:
        return list(mx.split(self.linear(nn.silu(temb))[:, None], self.parts, axis=-1))


class FeedForward(nn.Module):
    def __init__(self, dims: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.linear_in = Linear(dims, 2 * hidden)
        self.linear_out = Linear(hidden, dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_out(swiglu(self.linear_in, x, 0, self.hidden))


class DoubleAttention(nn.Module):
    """Joint attention of the text and the image stream, each with its own projections.

    img (B, S, D) and txt (B, L, D) to their attention outputs, of the same shapes. Where txt is None, the image stream
    attends alone, and None comes back for the text.
    """

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        dims, head_dim, eps = params.hidden_size, params.head_dim, params.eps
        self.heads = params.num_heads
        self.to_q = Linear(dims, dims)
        self.to_k = Linear(dims, dims)
        self.to_v = Linear(dims, dims)
        self.norm_q = RMSNorm(head_dim, eps)
        self.norm_k = RMSNorm(head_dim, eps)
        self.to_out = [Linear(dims, dims)]
        self.add_q_proj = Linear(dims, dims)
        self.add_k_proj = Linear(dims, dims)
        self.add_v_proj = Linear(dims, dims)
        self.norm_added_q = RMSNorm(head_dim, eps)
        self.norm_added_k = RMSNorm(head_dim, eps)
        self.to_add_out = Linear(dims, dims)

    def __call__(
        self, img: mx.array, txt: mx.array | None, cos: mx.array, sin: mx.array, kv: BlockKV | None = None
    ) -> tuple[mx.array, mx.array | None]:
        qkv = self.image_qkv(img)
        if txt is None:
            return self.to_out[0](attend(*qkv, cos, sin, kv)), None
        q, k, v = (mx.concatenate([*pair], axis=2) for pair in zip(self.text_qkv(txt), qkv, strict=True))
        out, tokens = attend(q, k, v, cos, sin, kv), txt.shape[1]  # (B, L + S, D), text first
        return self.to_out[0](out[:, tokens:]), self.to_add_out(out[:, :tokens])

    def image_qkv(self, img: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q, k and v of image tokens, each (B, heads, S, head_dim)."""
        q = split_heads(self.to_q(img), self.heads, self.norm_q)
        k = split_heads(self.to_k(img), self.heads, self.norm_k)
        return q, k, split_heads(self.to_v(img), self.heads)

    def text_qkv(self, txt: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q, k and v of text tokens, each (B, heads, L, head_dim)."""
        q = split_heads(self.add_q_proj(txt), self.heads, self.norm_added_q)
        k = split_heads(self.add_k_proj(txt), self.heads, self.norm_added_k)
        return q, k, split_heads(self.add_v_proj(txt), self.heads)


class DoubleBlock(nn.Module):
    """Attention and feed-forward of both streams: img (B, S, D) and txt (B, L, D) to the same shapes.

    Each stream has six modulation vectors, (B, 1, D). Where txt is None, its modulation is not looked at, the image
    stream runs alone, and None comes back for the text.
    """

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        self.eps = params.eps
        self.attn = DoubleAttention(params)
        self.ff = FeedForward(params.hidden_size, params.mlp_hidden)
        self.ff_context = FeedForward(params.hidden_size, params.mlp_hidden)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array | None,
        img_mod: Sequence[mx.array],
        txt_mod: Sequence[mx.array],
        cos: mx.array,
        sin: mx.array,
        kv: BlockKV | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        eps = self.eps
        shift1, scale1, gate1, shift2, scale2, gate2 = img_mod
        img_in = modulate(img, shift1, scale1, eps)
        txt_in = None if txt is None else modulate(txt, txt_mod[0], txt_mod[1], eps)
        img_attn, txt_attn = self.attn(img_in, txt_in, cos, sin, kv)
        img = add_gated(img, gate1, img_attn)
        img = add_gated(img, gate2, self.ff(modulate(img, shift2, scale2, eps)))
        if txt is not None and txt_attn is not None:
            _, _, gate1, shift2, scale2, gate2 = txt_mod
            txt = add_gated(txt, gate1, txt_attn)
            txt = add_gated(txt, gate2, self.ff_context(modulate(txt, shift2, scale2, eps)))
        return img, txt


class SingleAttention(nn.Module):
    """Attention and feed-forward side by side, from one projection in and one out: x (B, N, D) to (B, queries, D).

    Of tokens that are no queries there are keys and values alone.
    """

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        dims, hidden = params.hidden_size, params.mlp_hidden
        self.heads, self.dims, self.hidden = params.num_heads, dims, hidden
        self.to_qkv_mlp_proj = Linear(dims, 3 * dims + 2 * hidden)
        self.norm_q = RMSNorm(params.head_dim, params.eps)
        self.norm_k = RMSNorm(params.head_dim, params.eps)
        self.to_out = Linear(dims + hidden, dims)

    def __call__(
        self, x: mx.array, cos: mx.array, sin: mx.array, kv: BlockKV | None = None, queries: slice = ALL
    ) -> mx.array:
        dims, proj = self.dims, self.to_qkv_mlp_proj
        k, v = (outputs(proj, x, part * dims, (part + 1) * dims) for part in (1, 2))
        x = x[:, queries]
        q = split_heads(outputs(proj, x, 0, dims), self.heads, self.norm_q)
        k, v = split_heads(k, self.heads, self.norm_k), split_heads(v, self.heads)
        out = attend(q, k, v, cos, sin, kv, queries)
        # Gate and up wait for attention: made beside it, they would be in memory together with q, k and v.
        x = mx.depends(x, out)
        return self.to_out(mx.concatenate([out, swiglu(proj, x, 3 * dims, self.hidden)], axis=-1))


class SingleBlock(nn.Module):
    """One stream of text and image tokens: x (B, L + S, D) to its queries (B, queries, D), by default all of them.

    The three modulation vectors are (B, 1, D).
    """

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        self.eps = params.eps
        self.attn = SingleAttention(params)

    def __call__(
        self,
        x: mx.array,
        mod: Sequence[mx.array],
        cos: mx.array,
        sin: mx.array,
        kv: BlockKV | None = None,
        queries: slice = ALL,
    ) -> mx.array:
        shift, scale, gate = mod
        return add_gated(x[:, queries], gate, self.attn(modulate(x, shift, scale, self.eps), cos, sin, kv, queries))


class FinalNorm(nn.Module):
    """LayerNorm modulated by temb; diffusers' order is scale first, then shift."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.eps = eps
        self.linear = Linear(dims, 2 * dims)

    def __call__(self, x: mx.array, temb: mx.array) -> mx.array:
        scale, shift = mx.split(self.linear(nn.silu(temb))[:, None], 2, axis=-1)
        return modulate(x, shift, scale, self.eps)


class FluxKlein(nn.Module):
    """The velocity network: noisy image tokens, prompt embeddings and noise level to velocity.

    Weights are random until loaded, and lazy: constructing the 4B or 9B model allocates nothing.

    Attributes:
        block_runner: calls the blocks; streaming and training replace it.
    """

    @random_state_kept()
    def __init__(self, params: FluxKleinParams):
        super().__init__()
        self.params = params
        dims = params.hidden_size
        self.x_embedder = Linear(params.in_channels, dims)
        self.context_embedder = Linear(params.txt_embed_dim, dims)
        self.time_guidance_embed = TimeEmbed(params.timestep_channels, dims)
        self.double_stream_modulation_img = Modulation(dims, 6)
        self.double_stream_modulation_txt = Modulation(dims, 6)
        self.single_stream_modulation = Modulation(dims, 3)
        self.transformer_blocks = [DoubleBlock(params) for _ in range(params.depth)]
        self.single_transformer_blocks = [SingleBlock(params) for _ in range(params.depth_single)]
        self.norm_out = FinalNorm(dims, params.eps)
        self.proj_out = Linear(dims, params.in_channels)
        self.block_runner: BlockRunner = run_block

    @staticmethod
    def compute_rope(
        txt_ids: mx.array,
        img_ids: mx.array,
        axes_dims: tuple[int, ...] = FluxKleinParams.axes_dims_rope,
        theta: float = FluxKleinParams.rope_theta,
    ) -> tuple[mx.array, mx.array]:
        """Rotation tables of one image's tokens, text first; the same in all of its steps.

        Args:
            txt_ids: (L, 4) or (B, L, 4) positions (T, H, W, L); to three columns L = 0, 1, 2, ... is added.
            img_ids: (S, 4) or (B, S, 4) likewise; to three columns L = 0 is added.
            axes_dims, theta: the checkpoint's; the defaults are klein's.

        Returns:
            (cos, sin), each (B, L + S, head_dim / 2) in float32.

        Raises:
            InputError: for ids of another shape.
        """
        txt_ids, img_ids = four_axes(txt_ids, text=True), four_axes(img_ids, text=False)
        batch = max(txt_ids.shape[0], img_ids.shape[0])
        ids = [mx.broadcast_to(ids, (batch, *ids.shape[1:])) for ids in (txt_ids, img_ids)]
        return rope_table(mx.concatenate(ids, axis=1), axes_dims, theta)

    def __call__(
        self, img: mx.array, txt: mx.array, timesteps: mx.array, img_ids: mx.array, txt_ids: mx.array
    ) -> mx.array:
        """Velocity of the image tokens.

        Args:
            img: (B, S, in_channels) image tokens; reference tokens, if any, follow the noisy ones.
            txt: (B, L, txt_embed_dim) prompt embeddings.
            timesteps: (B,) noise levels, 0..1.
            img_ids: (B, S, 4) positions; see compute_rope.
            txt_ids: (B, L, 4) positions.

        Returns:
            (B, S, in_channels), in the weights' dtype.
        """
        cos, sin = self.compute_rope(txt_ids, img_ids, self.params.axes_dims_rope, self.params.rope_theta)
        return self.forward_with_rope(img, txt, timesteps, cos, sin)

    def forward_with_rope(
        self,
        img: mx.array,
        txt: mx.array | None,
        timesteps: mx.array,
        rope_cos: mx.array,
        rope_sin: mx.array,
        *,
        image_tokens: int | None = None,
        kv: Sequence[BlockKV | None] | None = None,
        cache: FirstBlockCache | None = None,
    ) -> mx.array:
        """Velocity of the image tokens, with rotation tables that were made once for all steps.

        Args:
            img, txt, timesteps: the model's inputs; see __call__. txt may be None where kv has the text's.
            rope_cos, rope_sin: (B or 1, L + S, head_dim / 2) from compute_rope.
            image_tokens: how many tokens of img, from the first, are asked for; the references' follow them and are
                attended to. None asks for all.
            kv: of each block, double blocks first, what records its KV or gives it others'.
            cache: First Block Cache of this pass, which may leave out all blocks but the first.

        Returns:
            (B, image_tokens, in_channels), in the weights' dtype.
        """
        kv = [None] * self.params.blocks if kv is None else kv
        own = slice(img.shape[1] if image_tokens is None else image_tokens)
        temb = self.time_guidance_embed(timesteps, self.dtype)
        img_mod = self.double_stream_modulation_img(temb)
        txt_mod = self.double_stream_modulation_txt(temb)
        single_mod = self.single_stream_modulation(temb)

        x = self._residual(self.x_embedder(cast_input(img, self.dtype)))
        c = None if txt is None else self._residual(self.context_embedder(cast_input(txt, self.dtype)))
        if cache is not None:
            cache.start(x[:, own], timesteps)
        for k, double in enumerate(self.transformer_blocks):
            may_end = k == 0 and cache is not None
            x, c = self.block_runner(double, x, c, img_mod, txt_mod, rope_cos, rope_sin, kv[k], may_end=may_end)
            if k == 0 and cache is not None and (predicted := cache.predict(x[:, own])) is not None:
                return self.proj_out(self.norm_out(predicted, temb))
        if c is not None:
            x, own = mx.concatenate([c, x], axis=1), slice(c.shape[1], c.shape[1] + own.stop)
        *singles, last = self.single_transformer_blocks
        for k, single in enumerate(singles, self.params.depth):
            x = self.block_runner(single, x, single_mod, rope_cos, rope_sin, kv[k])
        x = self.block_runner(last, x, single_mod, rope_cos, rope_sin, kv[-1], own, may_end=True)
        if cache is not None:
            x = cache.update(x)
        return self.proj_out(self.norm_out(x, temb))

    def encode_reference_kv(self, references: mx.array, rope_cos: mx.array, rope_sin: mx.array) -> list[KV]:
        """KV of reference tokens that attend to themselves alone, at noise level 0, as klein-9b-kv is trained for: the
        same for every prompt, step and size of the image. diffusers' Flux2KleinKVPipeline makes it in its first step.

        Args:
            references: (1, R, in_channels) clean tokens.
            rope_cos, rope_sin: (1, R, head_dim / 2) from compute_rope, with no text.

        Returns:
            (keys, values) of every block, each (1, heads, R, head_dim), keys rotated.
        """
        temb = self.time_guidance_embed(mx.zeros((1,)), self.dtype)
        img_mod, single_mod = self.double_stream_modulation_img(temb), self.single_stream_modulation(temb)
        x = self._residual(self.x_embedder(cast_input(references, self.dtype)))
        kv = [KVRecorder(ALL) for _ in range(self.params.blocks)]
        for k, double in enumerate(self.transformer_blocks):
            x, _ = self.block_runner(double, x, None, img_mod, (), rope_cos, rope_sin, kv[k])
        *singles, last = self.single_transformer_blocks
        for k, single in enumerate(singles, self.params.depth):
            x = self.block_runner(single, x, single_mod, rope_cos, rope_sin, kv[k])
        self.block_runner(last, x, single_mod, rope_cos, rope_sin, kv[-1], slice(1))  # nobody reads what it gives
        return [recorder.kv for recorder in kv]

    @staticmethod
    def _residual(x: mx.array) -> mx.array:
        """The stream that blocks add to, in float32 for activations in float16, whose range it leaves."""
        return mx.clip(x, -FLOAT16_MAX, FLOAT16_MAX).astype(mx.float32) if x.dtype == mx.float16 else x

    @property
    def dtype(self) -> mx.Dtype:
        """The activations' dtype: that of the norms, which unlike matrices are never packed."""
        dtype: mx.Dtype = self.single_transformer_blocks[0].attn.norm_q.weight.dtype
        return dtype
