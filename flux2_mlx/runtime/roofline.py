"""The roofline: what a stage computes and moves, and how long that takes on a machine whose speed was measured.

modules, workload -> image_work -> Work of each stage -> seconds at Speeds

FLOP (two for each multiplication with its addition) are exact; bytes of intermediates are an estimate, of what the
operations in models/ read and write, one after another, each operand from memory.
Reference for the FLOP: torch's FlopCounterMode on the modules of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from ..device import machine_name, on_metal, stage_dtype, weight_bytes
from ..disk_cache import read_table, write_table
from ..models.autoencoder import PARTS, AutoEncoder
from ..models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config, TextAdapterConfig
from ..models.flux2 import FluxKlein
from ..models.qwen3 import Qwen3TextEncoder
from ..quantization.layers import shortest_seconds
from ..quantization.recipes import dense_bytes
from .activations import Pass, Workload

TABLE = "speeds"  # the table's name in the cache folder

# Elements that a block of either kind reads and writes, in units of an activation as wide as the model, as
# benchmarks/kernels.py counts them.
BLOCK = 53
KV_BLOCK = 12  # of these for the keys and values

# Metal computes a 3x3 convolution of stride 1 as Winograd's F(6x6, 3x3), 64 products for 36 pixels, from so many pixels
# and channels (in and out together) on, both multiples of 32, whatever the dtype; not where its scratch passes three
# quarters of the working set, but tiles are far smaller. Source: ml-explore/mlx at 846d176, mlx/backend/metal/conv.cpp,
# dispatch_conv_2D_gpu and winograd_batch_step.
WINOGRAD_PIXELS, WINOGRAD_CHANNELS, WINOGRAD_MULTIPLE = 4096, 256, 32
WINOGRAD = 64 / 36

# A measurement is made larger, by fours, until it takes so long, or as large as it may be.
LONG_ENOUGH = 0.1  # seconds
SCALES = (1, 4, 16, 64)
# Shapes that are measured: width and heads of klein-4b, channels of the decoder's last half.
WIDTH, HEADS, CHANNELS = 3072, 24, 256


@dataclass(frozen=True)
class Speeds:
    """A machine's speeds: FLOP a second of three kinds, and bytes a second that are read or written."""

    matmul: float
    attention: float
    convolution: float
    copy: float


@dataclass(frozen=True)
class Work:
    """The work of running a stage once.

    Attributes:
        matmul, attention, convolution: FLOP; those of attention are its two products, Winograd's products are matmul.
        weights, intermediates: bytes that are read, and read or written.
    """

    matmul: int = 0
    attention: int = 0
    convolution: int = 0
    weights: int = 0
    intermediates: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(times * part for part in astuple(self)))

    @property
    def flops(self) -> int:
        return self.matmul + self.attention + self.convolution

    @property
    def bytes(self) -> int:
        return self.weights + self.intermediates

    def computing(self, speeds: Speeds) -> float:
        """Seconds of arithmetic."""
        return self.matmul / speeds.matmul + self.attention / speeds.attention + self.convolution / speeds.convolution

    def moving(self, speeds: Speeds) -> float:
        """Seconds of reading and writing."""
        return self.bytes / speeds.copy

    def seconds(self, speeds: Speeds) -> tuple[float, float]:
        """(least, most): arithmetic and memory traffic wholly overlapped, and not at all."""
        computing, moving = self.computing(speeds), self.moving(speeds)
        return max(computing, moving), computing + moving


# ---------------------------------------------------------------------------------------------------- stages


def text_encoder_work(config: Qwen3Config, length: int, prompt: int, dtype: mx.Dtype) -> Work:
    """A prompt of so many tokens, padded to a length, without the weights; masked scores are computed and count."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows, keys = config.num_layers * length, config.num_layers * prompt
    work = Work(
        matmul=2 * (rows * (2 * hidden * q + 3 * hidden * inner) + keys * 2 * hidden * kv),
        attention=4 * rows * prompt * q,
        intermediates=(rows * (17 * hidden + 10 * q + 8 * inner) + keys * 8 * kv) * dtype.size,
    )
    return work if config.adapter is None else work + _adapter_work(config.adapter, length)


def _adapter_work(config: TextAdapterConfig, length: int) -> Work:
    """A text encoder's adapter, in float32: its feed-forward part, and its blocks of attention among all tokens."""
    ends, wide, dims = config.input_size + config.output_size, config.hidden_size, config.attn_dim
    blocks = config.attn_blocks
    return Work(
        matmul=2 * length * (ends * (wide + dims) + wide**2 + 12 * blocks * dims**2),
        attention=4 * length**2 * dims * blocks,
        intermediates=length * (8 * ends + 6 * wide + 38 * blocks * dims) * mx.float32.size,
    )


def transformer_work(params: FluxKleinParams, one: Pass, dtype: mx.Dtype) -> Work:
    """A row of a pass, without the weights."""
    dims, keys = params.hidden_size, one.tokens + one.kv
    # Of the modulations, and of the last norm, in units of a square matrix.
    temb = params.timestep_channels * dims + (1 + 6 + 6 + 3 + 2) * dims**2
    ends = params.in_channels * dims * (2 * one.image + one.references) + params.txt_embed_dim * dims * one.text
    return _blocks(params, one.tokens, keys, one.image, dtype) + Work(matmul=2 * (temb + ends))


def reference_kv_work(params: FluxKleinParams, tokens: int, dtype: mx.Dtype) -> Work:
    """The pass that makes the keys and values of so many reference tokens."""
    dims = params.hidden_size
    temb = params.timestep_channels * dims + (1 + 6 + 3) * dims**2
    return _blocks(params, tokens, tokens, 1, dtype) + Work(matmul=2 * (temb + params.in_channels * dims * tokens))


def _blocks(params: FluxKleinParams, tokens: int, keys: int, asked: int, dtype: mx.Dtype) -> Work:
    """All blocks over tokens, so many of which are asked for behind the last block."""
    whole, last = (_block(params, tokens, keys, queries, dtype) for queries in (tokens, asked))
    return whole * (params.blocks - 1) + last


def _block(params: FluxKleinParams, tokens: int, keys: int, queries: int, dtype: mx.Dtype) -> Work:
    """A block of either kind: for a token that is a query it has 4 d^2 + 3 d m weights, for another the 2 d^2 of keys
    and values.
    """
    dims = params.hidden_size
    return Work(
        matmul=2 * (tokens * 2 * dims**2 + queries * (2 * dims**2 + 3 * dims * params.mlp_hidden)),
        attention=4 * queries * keys * dims,
        intermediates=(tokens * KV_BLOCK + queries * (BLOCK - KV_BLOCK)) * dims * dtype.size,
    )


def decoder_work(config: AutoEncoderConfig, height: int, width: int, dtype: mx.Dtype) -> Work:
    """Decoding an image, without the weights."""
    channels, latent = config.decoder_channels[::-1], config.latent_channels
    pixels = height * width // 64
    work = _conv(pixels, latent, latent, dtype, kernel=1) + _conv(pixels, latent, channels[0], dtype)
    work += _biases(pixels, latent + channels[0], dtype) + _middle(pixels, channels[0], dtype)
    for k, (before, own) in enumerate(pairwise([channels[0], *channels])):
        work += _resnets(pixels, before, own, config.layers_per_block + 1, dtype)
        if k < len(channels) - 1:
            pixels *= 4
            work += _conv(pixels, own, own, dtype) + _biases(pixels, own, dtype)
    last = _conv(pixels, channels[-1], config.out_channels, dtype) + _biases(pixels, config.out_channels, dtype)
    return work + _norm(pixels, channels[-1], dtype) + last


def encoder_work(config: AutoEncoderConfig, height: int, width: int, dtype: mx.Dtype) -> Work:
    """Encoding an image, without the weights."""
    channels, moments = config.block_out_channels, 2 * config.latent_channels
    pixels = height * width
    work = _conv(pixels, config.in_channels, channels[0], dtype) + _biases(pixels, channels[0], dtype)
    for k, (before, own) in enumerate(pairwise([channels[0], *channels])):
        work += _resnets(pixels, before, own, config.layers_per_block, dtype)
        if k < len(channels) - 1:
            work += Work(intermediates=4 * pixels * own * dtype.size)  # with a halo, and padded
            pixels //= 4
            work += _conv(pixels, own, own, dtype, stride=2) + _biases(pixels, own, dtype)
    work += _middle(pixels, channels[-1], dtype) + _norm(pixels, channels[-1], dtype)
    work += _conv(pixels, channels[-1], moments, dtype) + _conv(pixels, moments, moments, dtype, kernel=1)
    return work + _biases(pixels, 2 * moments, dtype)


def _conv(pixels: int, inputs: int, outputs: int, dtype: mx.Dtype, kernel: int = 3, stride: int = 1) -> Work:
    """A convolution with so many pixels of output, without its bias; of a 3x3 one of stride 1 also joining its
    input and the halo.
    """
    unit, direct = pixels * dtype.size, 2 * kernel**2 * inputs * outputs * pixels
    moved = (inputs * stride**2 + outputs) * unit
    if (kernel, stride) != (3, 1):
        return Work(convolution=direct, intermediates=moved)
    moved += 2 * inputs * unit
    if not (on_metal() and is_winograd(pixels, inputs, outputs)):
        return Work(convolution=direct, intermediates=moved)
    # Besides input and output: zeros and the input written into the padded copy and read from it, what both transforms
    # write and read, and the kernels', written and read.
    scratch = int((2 * inputs + 2 * WINOGRAD * (inputs + outputs)) * unit) + 2 * 64 * inputs * outputs * dtype.size
    return Work(matmul=int(2 * WINOGRAD * inputs * outputs * pixels), intermediates=moved + scratch)


def is_winograd(pixels: int, inputs: int, outputs: int) -> bool:
    """Whether Metal computes a 3x3 convolution of stride 1 by Winograd's F(6x6, 3x3)."""
    multiples = inputs % WINOGRAD_MULTIPLE == outputs % WINOGRAD_MULTIPLE == 0
    return multiples and pixels >= WINOGRAD_PIXELS and inputs + outputs >= WINOGRAD_CHANNELS


def _biases(pixels: int, channels: int, dtype: mx.Dtype) -> Work:
    """Adding biases to so many channels in a kernel of its own."""
    return Work(intermediates=2 * pixels * channels * dtype.size)


def _norm(pixels: int, channels: int, dtype: mx.Dtype) -> Work:
    """A GroupNorm with its SiLU: read for the mean, the variance and itself, and written; sums of parts in float32."""
    return Work(intermediates=4 * pixels * channels * dtype.size + 4 * pixels * channels * mx.float32.size // PARTS)


def _resnets(pixels: int, inputs: int, channels: int, count: int, dtype: mx.Dtype) -> Work:
    work = Work()
    for before in [inputs, *[channels] * (count - 1)]:
        work += _norm(pixels, before, dtype) + _conv(pixels, before, channels, dtype)
        work += _norm(pixels, channels, dtype) + _conv(pixels, channels, channels, dtype)
        work += Work(intermediates=3 * pixels * channels * dtype.size)  # the sum of both ways, with the biases
        if before != channels:
            work += _conv(pixels, before, channels, dtype, kernel=1)
    return work


def _middle(pixels: int, channels: int, dtype: mx.Dtype) -> Work:
    attention = Work(
        matmul=8 * pixels * channels**2,
        attention=4 * pixels**2 * channels,
        intermediates=17 * pixels * channels * dtype.size,
    )
    return _resnets(pixels, channels, channels, 2, dtype) + _norm(pixels, channels, dtype) + attention


def image_work(
    text_encoder: Qwen3TextEncoder,
    transformer: FluxKlein,
    autoencoder: AutoEncoder,
    workload: Workload,
    dtype: mx.Dtype,
) -> dict[str, Work]:
    """The work of each stage of an image, by the plan's names: for one prompt, as long as may be, all references, one
    step of the transformer (the first; of all tiles), one image. Weights of modules are not read.
    """
    text_dtype, image_dtype = stage_dtype("text_encoder", dtype), autoencoder.dtype
    params, config, one = transformer.params, autoencoder.config, workload.denoising()
    embedding = weight_bytes(text_encoder.model.embed_tokens)  # a few of its rows are read
    encoding = text_encoder_work(text_encoder.config, workload.text, workload.text, text_dtype)
    work = {"text encoder": encoding + _reading(text_encoder, text_dtype, but=embedding)}
    weights = _reading(transformer, dtype)
    if workload.reference_sizes:
        encoder = _reading(autoencoder.encoder, image_dtype)
        encoded = [encoder_work(config, *size, image_dtype) + encoder for size in workload.reference_sizes]
        work["references"] = sum(encoded, Work())
        if workload.kv:
            work["references"] += reference_kv_work(params, workload.kv, dtype) + weights
    work["transformer"] = (transformer_work(params, one, dtype) + weights) * workload.tiles
    decoding = decoder_work(config, workload.height, workload.width, image_dtype)
    work["decoder"] = decoding + _reading(autoencoder.decoder, image_dtype)
    return work


def work_after_first(transformer: FluxKlein, workload: Workload, dtype: mx.Dtype) -> Work | None:
    """A pass of the transformer once keys and values are frozen; None where none are."""
    if not workload.denoising().frozen_tokens:
        return None
    work = transformer_work(transformer.params, workload.denoising().after_first, dtype)
    return work + _reading(transformer, dtype)


def _reading(module: nn.Module, dtype: mx.Dtype, but: int = 0) -> Work:
    """Reading a module's weights, but for so many bytes of them; packed ones are unpacked."""
    return Work(weights=weight_bytes(module) - but, intermediates=2 * dense_bytes(module, dtype))


# ---------------------------------------------------------------------------------------------------- speeds


def known_speeds(dtype: mx.Dtype) -> Speeds | None:
    """The measured speeds of this machine in a dtype; None where it was not measured."""
    entry = read_table(TABLE).get(_key(dtype))
    names = [field.name for field in fields(Speeds)]
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), float) and entry[name] > 0 for name in names):
        return None
    return Speeds(**{name: entry[name] for name in names})


def measure(dtype: mx.Dtype, vae_dtype: mx.Dtype | None = None) -> dict[mx.Dtype, Speeds]:
    """Measure this machine's speeds in the dtypes of an image's stages, and write them to the cache folder."""
    dtypes = {stage_dtype(stage, dtype, vae_dtype) for stage in ("text_encoder", "transformer", "autoencoder")}
    speeds = {own: measure_speeds(own) for own in dtypes}
    entries = {_key(own): dict(vars(measured)) for own, measured in speeds.items()}
    write_table(TABLE, read_table(TABLE) | entries)
    return speeds


def measure_speeds(dtype: mx.Dtype) -> Speeds:
    """This machine's speeds at shapes of the models."""

    def matmul(scale: int) -> tuple[int, Callable[..., mx.array], list[mx.array]]:
        rows = 64 * scale
        arrays = [mx.ones((rows, WIDTH), dtype), mx.ones((WIDTH, WIDTH), dtype)]
        return 2 * rows * WIDTH**2, lambda x, weight: x @ weight.T, arrays

    def attention(scale: int) -> tuple[int, Callable[..., mx.array], list[mx.array]]:
        rows, dims = 64 * scale, WIDTH // HEADS
        arrays = [mx.ones((1, HEADS, rows, dims), dtype)] * 3
        attend = mx.fast.scaled_dot_product_attention
        return 4 * rows**2 * WIDTH, lambda q, k, v: attend(q, k, v, scale=dims**-0.5), arrays

    def convolution(scale: int) -> tuple[int, Callable[..., mx.array], list[mx.array]]:
        rows = 16 * scale  # a stride of 2 is computed directly everywhere
        x, weight = mx.ones((1, rows, CHANNELS, CHANNELS), dtype), mx.ones((CHANNELS, 3, 3, CHANNELS), dtype)
        return 18 * rows * CHANNELS**3 // 4, lambda x, weight: mx.conv2d(x, weight, 2, 1), [x, weight]

    def copy(scale: int) -> tuple[int, Callable[..., mx.array], list[mx.array]]:
        x = mx.ones((2**21 * scale // dtype.size,), dtype)
        return 2 * x.nbytes, mx.negative, [x]

    return Speeds(*(_speed(kind) for kind in (matmul, attention, convolution, copy)))


def _speed(kind: Callable[[int], tuple[int, Callable[..., mx.array], list[mx.array]]]) -> float:
    """Amount of work per second; ``kind`` gives the amount, the function and its arrays at a scale."""
    for scale in SCALES:
        amount, function, arrays = kind(scale)
        mx.eval(arrays)
        seconds = shortest_seconds(function, *arrays)
        if seconds >= LONG_ENOUGH:
            break
    return amount / seconds


def _key(dtype: mx.Dtype) -> str:
    return f"{machine_name()}: {dtype}"
