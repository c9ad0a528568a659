"""--full: klein-4b's true shapes in random weights. What does not fit into the free memory is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..device import machine_memory, memory_limit, on_gpu, weight_bytes, weights_of
from ..models.attention import FLOP_AT_ONCE, attend
from ..models.autoencoder import Decoder
from ..models.config import AutoEncoderConfig, FluxKleinParams
from ..models.flux2 import FluxKlein, SingleBlock
from ..models.layers import Linear
from ..quantization.layers import shortest_seconds
from ..quantization.packing import quantize_weight
from ..quantization.spec import Quantization
from ..runtime.activations import Pass, decoder_bytes, largest_tile, transformer_bytes
from ..runtime.released import released_modules
from ..sampling.latents import image_ids, text_ids
from .arithmetic import UNIT, WINOGRAD, error_of, judge, winograd
from .findings import OK, SKIPPED, SLOW, Finding
from .nano import ALLOWED, UNITS
from .speed import LARGEST_TOKENS, TERA, WATCHDOG_SECONDS

TEXT = 512  # tokens
LONG_START = 30.0  # seconds of packing at each start from which it is worth to keep what is packed


class TooLargeError(Exception):
    """What a check needs is not free."""


@contextmanager
def room(weights: int, activations: int) -> Iterator[None]:
    """Keep MLX to the free memory while the body runs.

    Raises:
        TooLargeError: where that is too little.
    """
    limit, needed = machine_memory(), weights + activations
    if needed > limit:
        raise TooLargeError(f"needs {needed / 1e9:.1f} GB of {limit / 1e9:.1f} free")
    with memory_limit(limit, activations):
        yield
    mx.clear_cache()


def skipping(check: Callable[[], Finding]) -> Finding:
    """What a check finds, or that it was skipped."""
    try:
        return check()
    except TooLargeError as error:
        return Finding(SKIPPED, str(error), "close other programs, and run it again")


def randomized(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """A module's random weights in memory, one by one, since a cast holds its source until it is done."""
    module.set_dtype(dtype)
    for array in weights_of(module).values():
        mx.eval(array)
    return module


def check_step(dtype: mx.Dtype, side: int, params: FluxKleinParams | None = None) -> Finding:
    """Seconds of a step."""
    params = params or FluxKleinParams.klein_4b()
    model, tokens = FluxKlein(params), side**2 // 256
    model.set_dtype(dtype)
    with room(weight_bytes(model), max(transformer_bytes(params, Pass(TEXT, tokens), dtype))):
        randomized(model, dtype)
        ids = text_ids(TEXT), image_ids(side, side)
        rope = FluxKlein.compute_rope(*ids, params.axes_dims_rope, params.rope_theta)
        img = mx.random.normal((1, tokens, params.in_channels))
        txt = mx.random.normal((1, TEXT, params.txt_embed_dim))
        mx.eval(rope, img, txt)
        seconds = shortest_seconds(model.forward_with_rope, img, txt, mx.array([0.9]), *rope)
    return Finding(OK, f"{side} x {side}: {seconds:.2f} s")


class Decoding:
    """A decoder's latents, and its image in float32 without Winograd."""

    def __init__(self, side: int, config: AutoEncoderConfig | None = None) -> None:
        self.side, self.config = side, config or AutoEncoderConfig.flux2()
        self.latents = mx.random.normal((1, side // 8, side // 8, self.config.latent_channels), key=mx.random.key(0))
        self._expected: mx.array | None = None

    def decode(self, dtype: mx.Dtype, setting: str) -> tuple[mx.array, float]:
        """The image by a setting of MLX_CONV_WINOGRAD, and its seconds."""
        mx.random.seed(0)  # the same weights in each dtype
        decoder = Decoder(self.config)
        decoder.set_dtype(dtype)
        needed = partial(decoder_bytes, self.config, self.side, self.side, dtype)
        tile_bytes = largest_tile(needed, machine_memory() - weight_bytes(decoder))
        with room(weight_bytes(decoder), needed(tile_bytes)), winograd(setting):
            randomized(decoder, dtype)
            mx.eval(decoder(self.latents, tile_bytes))  # a first call compiles kernels
            start = time.perf_counter()
            image = decoder(self.latents, tile_bytes)
            mx.eval(image)
            return image, time.perf_counter() - start

    @property
    def expected(self) -> mx.array:
        if self._expected is None:
            self._expected, _ = self.decode(mx.float32, "0")
        return self._expected


def check_decode(decoding: Callable[[], Decoding], dtype: mx.Dtype, setting: str) -> Finding:
    """Seconds of a decode by a setting of MLX_CONV_WINOGRAD, and its error beside float32 without Winograd."""
    image, seconds = decoding().decode(dtype, setting)
    bound = ALLOWED * UNITS["decoder"] * UNIT[dtype] if dtype == mx.float32 else 4 * WINOGRAD
    found = judge(error_of(image, decoding().expected), bound)
    return Finding(found.verdict, f"{seconds:.2f} s, {found.measured}", found.advice)


def check_packing(dtype: mx.Dtype, params: FluxKleinParams | None = None) -> Finding:
    """Seconds of packing at a start with --quantize 4, as of one block in true size."""
    block = SingleBlock(params or FluxKleinParams.klein_4b())
    layers = [layer for _, layer in block.named_modules() if isinstance(layer, Linear)]
    seconds, packed = 0.0, 0
    with room(2 * weight_bytes(block), 0):
        for layer in layers:
            weight = layer.weight.astype(dtype)
            mx.eval(weight)
            start = time.perf_counter()
            mx.eval(quantize_weight(weight, Quantization(4), dtype, now=True))
            seconds += time.perf_counter() - start
            packed += weight.size
    seconds *= packable() / packed
    words = f"about {seconds:.0f} s of packing at each start, as {packed / 1e6:.0f} M of its weights took"
    if seconds < LONG_START:
        return Finding(OK, words)
    return Finding(SLOW, words, "flux2-convert klein-4b FOLDER --quantize 4 packs once and for all")


def packable() -> int:
    """The weights of klein-4b that --quantize packs: the matrices of text encoder and transformer."""
    modules = released_modules("klein-4b", mx.bfloat16, {})
    return sum(array.size for module in modules[:2] for array in weights_of(module).values() if array.ndim == 2)


def check_attention(dtype: mx.Dtype, tokens: int = LARGEST_TOKENS) -> Finding:
    """Seconds of a block's attention at 2048 x 2048."""
    params = FluxKleinParams.klein_4b()
    shape = (1, params.num_heads, tokens, params.head_dim)
    activations = max(transformer_bytes(params, Pass(0, tokens), dtype))
    with room(0, activations):
        q, k, v = (mx.random.normal(shape).astype(dtype) for _ in range(3))
        cos, sin = (mx.ones((1, tokens, params.head_dim // 2)) for _ in range(2))
        mx.eval(q, k, v, cos, sin)
        seconds = shortest_seconds(attend, q, k, v, cos, sin)
    flops = 4 * tokens**2 * params.hidden_size
    words = f"{tokens} tokens: {seconds:.2f} s, {flops / seconds / TERA:.2g} TFLOP/s"
    if on_gpu() and seconds * min(1, FLOP_AT_ONCE / flops) > WATCHDOG_SECONDS / 2:
        return Finding(
            SLOW, words, f"macOS ends a kernel after about {WATCHDOG_SECONDS:.0f} s: generate smaller images"
        )
    return Finding(OK, words)
