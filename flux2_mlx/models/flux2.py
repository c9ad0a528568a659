"""The FLUX.2 [klein] transformer.

Features, in reading order:
- one modulation of each kind (image, text, single) a step, shared by all blocks;
- double blocks: image and text have their own weights and attend jointly, text tokens first;
- single blocks: one fused projection to q, k, v, gate and up; attention and feed-forward in parallel;
- RMSNorm on q and k, rotary positions of four axes, SwiGLU, LayerNorm without weights, no biases anywhere;
- in klein-9b-kv references see neither text nor picture nor noise level: what is seen of them is kept;
- elsewhere what is seen of text or of references in a first step can stand for them in later ones.

Reference: diffusers' Flux2Transformer2DModel, whose checkpoint keys are the attribute names here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .config import FluxKleinParams
from .first_block_cache import StepCache
from .kv_cache import Kept, Reuse
from .layers import Linear, outputs, run_block
from .rope import four_axes, rope_table, rotate

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


# Compiled functions are one kernel each, or what lies between would be written out.


@partial(mx.compile, shapeless=True)
def scaled_and_shifted(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    return ((1 + scale) * x + shift).astype(shift.dtype)


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """(1 + scale) * LayerNorm(x) + shift, in the dtype of these; x (B, N, D), shift and scale (B or 1, 1, D)."""
    if len(shift) == 1:  # the norm's own weight and bias, in one kernel
        return mx.fast.layer_norm(x, 1 + scale[0, 0], shift[0, 0], eps).astype(shift.dtype)
    return scaled_and_shifted(mx.fast.layer_norm(x, None, None, eps), shift, scale)


@partial(mx.compile, shapeless=True)
def add_gated(x: mx.array, gate: mx.array, change: mx.array) -> mx.array:
    """x + gate * change in the dtype of x; what overflowed float16 in the change is its largest number."""
    if change.dtype == mx.float16:
        change = mx.clip(change, -FLOAT16_MAX, FLOAT16_MAX)
    return x + gate.astype(x.dtype) * change.astype(x.dtype)


@partial(mx.compile, shapeless=True)
def gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def swiglu(layer: nn.Module, x: mx.array, start: int, hidden: int) -> mx.array:
    """silu(gate) * up, both by a linear layer whose outputs they are from ``start`` on: (..., in) to (..., hidden)."""
    gate = outputs(layer, x, start, start + hidden)
    x = mx.depends(x, gate)  # of a packed layer, one part is unpacked at a time
    return gated(gate, outputs(layer, x, start + hidden, start + 2 * hidden))


def split_heads(x: mx.array, heads: int, norm: Callable[[mx.array], mx.array] = lambda x: x) -> mx.array:
    """(B, N, heads * D) to (B, heads, N, D), a view, of what the norm of each head gives."""
    batch, tokens, _ = x.shape
    return norm(x.reshape(batch, tokens, heads, -1)).transpose(0, 2, 1, 3)  # of a view, a norm on Metal makes a copy


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    references: Kept | None = None,
    rows: slice | None = None,
) -> tuple[mx.array, Kept]:
    """Rotate q and k, attend over all tokens and kept ones, join the heads.

    Args:
        q, k, v: (B, heads, N, D).
        cos, sin: of the N tokens.
        references: of tokens that are not among the N.
        rows: those of the N tokens whose keys and values are to be kept.

    Returns:
        (B, N, heads * D), and rotated keys and values: of the rows, without what they are views of, else of all.
    """
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    own = k, v
    kept = own if rows is None else (mx.contiguous(k[:, :, rows]), mx.contiguous(v[:, :, rows]))
    if rows is not None:
        q = mx.depends(q, kept)  # or the whole of them would stay until somebody asks for the rows
    if references is not None:
        k, v = (
            mx.concatenate([ours, mx.broadcast_to(theirs, (len(ours), *theirs.shape[1:]))], axis=2)
            for ours, theirs in zip(own, references, strict=True)
        )
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    batch, _, tokens, _ = out.shape
    return out.transpose(0, 2, 1, 3).reshape(batch, tokens, -1), kept


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

    img (B, S, D) and txt (B, L, D) to their attention outputs, of the same shapes, and keys and values; see attend.
    """

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        dims, head_dim, eps = params.hidden_size, params.head_dim, params.eps
        self.heads = params.num_heads
        self.to_q = Linear(dims, dims)
        self.to_k = Linear(dims, dims)
        self.to_v = Linear(dims, dims)
        self.norm_q = nn.RMSNorm(head_dim, eps)
        self.norm_k = nn.RMSNorm(head_dim, eps)
        self.to_out = [Linear(dims, dims)]
        self.add_q_proj = Linear(dims, dims)
        self.add_k_proj = Linear(dims, dims)
        self.add_v_proj = Linear(dims, dims)
        self.norm_added_q = nn.RMSNorm(head_dim, eps)
        self.norm_added_k = nn.RMSNorm(head_dim, eps)
        self.to_add_out = Linear(dims, dims)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        cos: mx.array,
        sin: mx.array,
        references: Kept | None = None,
        rows: slice | None = None,
    ) -> tuple[mx.array, mx.array, Kept]:
        heads, tokens = self.heads, txt.shape[1]
        txt_q = split_heads(self.add_q_proj(txt), heads, self.norm_added_q)
        txt_k = split_heads(self.add_k_proj(txt), heads, self.norm_added_k)
        txt_v = split_heads(self.add_v_proj(txt), heads)
        img_q, img_k, img_v = self.heads_of(img)
        q = mx.concatenate([txt_q, img_q], axis=2)  # (B, heads, L + S, head_dim), text first
        k = mx.concatenate([txt_k, img_k], axis=2)
        v = mx.concatenate([txt_v, img_v], axis=2)
        out, kept = attend(q, k, v, cos, sin, references, rows)
        return self.to_out[0](out[:, tokens:]), self.to_add_out(out[:, :tokens]), kept

    def alone(
        self, img: mx.array, cos: mx.array, sin: mx.array, references: Kept | None, rows: slice | None
    ) -> tuple[mx.array, Kept]:
        """The image stream without text, and its keys and values."""
        out, kept = attend(*self.heads_of(img), cos, sin, references, rows)
        return self.to_out[0](out), kept

    def heads_of(self, img: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q, k and v of image tokens, each (B, heads, S, head_dim)."""
        q = split_heads(self.to_q(img), self.heads, self.norm_q)
        k = split_heads(self.to_k(img), self.heads, self.norm_k)
        return q, k, split_heads(self.to_v(img), self.heads)


class DoubleBlock(nn.Module):
    """Attention and feed-forward of both streams: img (B, S, D), txt (B, L, D), and six modulation vectors of each."""

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        self.eps = params.eps
        self.attn = DoubleAttention(params)
        self.ff = FeedForward(params.hidden_size, params.mlp_hidden)
        self.ff_context = FeedForward(params.hidden_size, params.mlp_hidden)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        img_mod: list[mx.array],
        txt_mod: list[mx.array],
        cos: mx.array,
        sin: mx.array,
        references: Kept | None = None,
    ) -> tuple[mx.array, mx.array]:
        img, txt, _ = self.keeping(img, txt, img_mod, txt_mod, cos, sin, references, None)
        return img, txt

    def keeping(
        self,
        img: mx.array,
        txt: mx.array,
        img_mod: list[mx.array],
        txt_mod: list[mx.array],
        cos: mx.array,
        sin: mx.array,
        references: Kept | None,
        rows: slice | None,
    ) -> tuple[mx.array, mx.array, Kept]:
        """The same, and keys and values; see attend."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod
        eps = self.eps
        img_attn, txt_attn, kept = self.attn(
            modulate(img, img_shift1, img_scale1, eps),
            modulate(txt, txt_shift1, txt_scale1, eps),
            cos,
            sin,
            references,
            rows,
        )
        img = add_gated(img, img_gate1, img_attn)
        txt = add_gated(txt, txt_gate1, txt_attn)
        img = add_gated(img, img_gate2, self.ff(modulate(img, img_shift2, img_scale2, eps)))
        txt = add_gated(txt, txt_gate2, self.ff_context(modulate(txt, txt_shift2, txt_scale2, eps)))
        return img, txt, kept

    def alone(
        self,
        img: mx.array,
        mod: list[mx.array],
        cos: mx.array,
        sin: mx.array,
        references: Kept | None = None,
        rows: slice | None = None,
    ) -> tuple[mx.array, Kept]:
        """The image stream without text, and its keys and values; see attend."""
        shift1, scale1, gate1, shift2, scale2, gate2 = mod
        attn, kept = self.attn.alone(modulate(img, shift1, scale1, self.eps), cos, sin, references, rows)
        img = add_gated(img, gate1, attn)
        return add_gated(img, gate2, self.ff(modulate(img, shift2, scale2, self.eps))), kept


class SingleAttention(nn.Module):
    """Attention and feed-forward side by side, from one projection in and one out: (B, N, D) to (B, N, D), and keys
    and values; see attend.
    """

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        dims, hidden = params.hidden_size, params.mlp_hidden
        self.heads, self.dims, self.hidden = params.num_heads, dims, hidden
        self.to_qkv_mlp_proj = Linear(dims, 3 * dims + 2 * hidden)
        self.norm_q = nn.RMSNorm(params.head_dim, params.eps)
        self.norm_k = nn.RMSNorm(params.head_dim, params.eps)
        self.to_out = Linear(dims + hidden, dims)

    def __call__(
        self, x: mx.array, cos: mx.array, sin: mx.array, references: Kept | None = None, rows: slice | None = None
    ) -> tuple[mx.array, Kept]:
        dims, proj = self.dims, self.to_qkv_mlp_proj
        q, k, v = (outputs(proj, x, part * dims, (part + 1) * dims) for part in range(3))
        q, k = split_heads(q, self.heads, self.norm_q), split_heads(k, self.heads, self.norm_k)
        out, kept = attend(q, k, split_heads(v, self.heads), cos, sin, references, rows)
        x = mx.depends(x, out)  # or gate and up are made before attention has done with q, k and v
        return self.to_out(mx.concatenate([out, swiglu(proj, x, 3 * dims, self.hidden)], axis=-1)), kept


class SingleBlock(nn.Module):
    """One stream of text and image tokens (B, L + S, D), and its three modulation vectors."""

    def __init__(self, params: FluxKleinParams):
        super().__init__()
        self.eps = params.eps
        self.attn = SingleAttention(params)

    def __call__(
        self, x: mx.array, mod: list[mx.array], cos: mx.array, sin: mx.array, references: Kept | None = None
    ) -> mx.array:
        return self.alone(x, mod, cos, sin, references)[0]

    def alone(
        self,
        x: mx.array,
        mod: list[mx.array],
        cos: mx.array,
        sin: mx.array,
        references: Kept | None = None,
        rows: slice | None = None,
    ) -> tuple[mx.array, Kept]:
        """The same, and keys and values; see attend."""
        shift, scale, gate = mod
        attn, kept = self.attn(modulate(x, shift, scale, self.eps), cos, sin, references, rows)
        return add_gated(x, gate, attn), kept


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
    """

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
        self._run = run_block

    @staticmethod
    def compute_rope(
        txt_ids: mx.array,
        img_ids: mx.array,
        axes_dims: tuple[int, ...] = FluxKleinParams.axes_dims_rope,
        theta: float = FluxKleinParams.rope_theta,
    ) -> tuple[mx.array, mx.array]:
        """Rotation tables of one picture's tokens, text first; constant over its steps.

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
        txt: mx.array,
        timesteps: mx.array,
        rope_cos: mx.array,
        rope_sin: mx.array,
        references: Sequence[Kept] | None = None,
        cache: StepCache | None = None,
        reuse: Reuse | None = None,
    ) -> mx.array:
        """The same with tables that were made once for the picture.

        Args:
            img, txt, timesteps: as above.
            rope_cos, rope_sin: (B or 1, L + S, head_dim / 2) from compute_rope.
            references: from keep_references, of tokens that are then not in img.
            cache: of this pass in earlier steps, by which all blocks but the first may be left out. What comes back for
                reference tokens in img then means nothing.
            reuse: of this pass in earlier steps, in place of text or references; those are given all the same, and what
                comes back in a later step is without these references.

        Returns:
            (B, S, in_channels), in the weights' dtype.
        """
        dtype, text = self._dtype, txt.shape[1]
        rows, is_alone = None, False
        if reuse is not None and not reuse.kept:
            rows, _ = reuse.rows(text)
        elif reuse is not None:
            references, is_alone = reuse.kept, reuse.what == "text"
            img = img if is_alone else img[:, : reuse.tokens]
            rope_cos, rope_sin = (table[:, reuse.rows(text)[1]] for table in (rope_cos, rope_sin))
        temb = self.time_guidance_embed(timesteps, dtype)
        img_mod = self.double_stream_modulation_img(temb)
        txt_mod = self.double_stream_modulation_txt(temb)
        single_mod = self.single_stream_modulation(temb)

        x = self._residual(self.x_embedder(img.astype(dtype)))
        c = self._residual(self.context_embedder(txt.astype(dtype)))  # not computed where nothing asks for it
        blocks = len(self.transformer_blocks)
        kept = [None] * (blocks + len(self.single_transformer_blocks)) if references is None else references
        if cache is not None:
            cache.begin(x, timesteps)
        for k, (double, seen) in enumerate(zip(self.transformer_blocks, kept[:blocks], strict=True)):
            decides = k == 0 and cache is not None
            if reuse is not None and rows is not None:
                x, c, own = self._run(double, x, c, img_mod, txt_mod, rope_cos, rope_sin, seen, rows, method="keeping")
                reuse.kept.append(own)
            elif is_alone:
                x, _ = self._run(double, x, img_mod, rope_cos, rope_sin, seen, method="alone")
            else:
                x, c = self._run(double, x, c, img_mod, txt_mod, rope_cos, rope_sin, seen, may_end=decides)
            if cache is not None and decides and (again := cache.again(x)) is not None:
                return self.proj_out(self.norm_out(again, temb))
        z = x if is_alone else mx.concatenate([c, x], axis=1)
        for single, seen in zip(self.single_transformer_blocks, kept[blocks:], strict=True):
            if reuse is not None and rows is not None:
                z, own = self._run(single, z, single_mod, rope_cos, rope_sin, seen, rows, method="alone")
                reuse.kept.append(own)
            else:
                z = self._run(single, z, single_mod, rope_cos, rope_sin, seen)
        x = z if is_alone else z[:, text:]
        if cache is not None:
            x = cache.keep(x)
        return self.proj_out(self.norm_out(x, temb))

    def keep_references(self, references: mx.array, rope_cos: mx.array, rope_sin: mx.array) -> list[Kept]:
        """What text and picture see of reference tokens that see neither of them nor the noise level, as klein-9b-kv is
        trained for: it serves every prompt, step and size.

        Reference: diffusers' Flux2KleinKVPipeline, which gets the same in its first step.

        Args:
            references: (1, R, in_channels) clean tokens.
            rope_cos, rope_sin: (1, R, head_dim / 2) from compute_rope, with no text.

        Returns:
            of every block the rotated keys and the values, each (1, heads, R, head_dim).
        """
        dtype = self._dtype
        temb = self.time_guidance_embed(mx.zeros((1,)), dtype)
        img_mod, single_mod = self.double_stream_modulation_img(temb), self.single_stream_modulation(temb)
        x = self._residual(self.x_embedder(references.astype(dtype)))
        kept = []
        blocks = [(block, img_mod) for block in self.transformer_blocks]
        for block, mod in [*blocks, *((block, single_mod) for block in self.single_transformer_blocks)]:
            x, seen = self._run(block, x, mod, rope_cos, rope_sin, None, slice(None), method="alone")
            kept.append(seen)
        return kept

    @staticmethod
    def _residual(x: mx.array) -> mx.array:
        """The stream that blocks add to: of float16, whose range it leaves, in float32."""
        return x.astype(mx.float32) if x.dtype == mx.float16 else x

    @property
    def _dtype(self) -> mx.Dtype:
        """Of the activations: that of the norms, which are never packed, as matrices may be."""
        dtype: mx.Dtype = self.single_transformer_blocks[0].attn.norm_q.weight.dtype
        return dtype
