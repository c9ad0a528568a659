"""How fast the machine is, what autotune chose of it, and how long its longest kernel takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checks import MAX_PIXELS
from ..device import on_gpu
from ..families import RELEASES
from ..models.attention import FLOP_AT_ONCE
from ..models.layers import Linear
from ..quantization.layers import QuantizedLinear, autotune
from ..quantization.spec import Quantization
from ..runtime.roofline import Speeds
from .findings import OK, SLOW, Finding

TERA = 1e12
OF_NUMPY = 0.5  # of the speed of NumPy's products, which use the CPU's BLAS; shared machines vary by less
OF_PRODUCTS = 1 / 8  # of the products' speed: fused attention and convolutions come to most of it

WATCHDOG_SECONDS = 5.0  # after which macOS ends a kernel on a GPU that also draws the screen
LARGEST_TOKENS = MAX_PIXELS // 256 + 512  # of the largest image and its text


def check_speed(speeds: Callable[[], Mapping[mx.Dtype, Speeds]], dtype: mx.Dtype) -> Finding:
    """Products, attention and convolutions beside each other and beside NumPy."""
    own, numpy = speeds()[dtype], numpy_speed()
    words = (
        f"products {_tera(own.matmul)} TFLOP/s (NumPy's {_tera(numpy)}), attention {_tera(own.attention)}, "
        f"convolutions {_tera(own.convolution)}, {own.copy / 1e9:.0f} GB/s"
    )
    if own.matmul < OF_NUMPY * numpy:
        advice = "close what else uses it, and turn off Low Power Mode" if on_gpu() else "LD_PRELOAD=libopenblas.so.0"
        return Finding(SLOW, f"{words}: products are slower than NumPy's", advice)
    names = [name for name in ("attention", "convolution") if getattr(own, name) < OF_PRODUCTS * own.matmul]
    if names:
        return Finding(SLOW, f"{words}: {' and '.join(names)} beside products", "update MLX and macOS, and report it")
    return Finding(OK, words)


def _tera(flops: float) -> str:
    return f"{flops / TERA:.2g}"


def numpy_speed(side: int = 2048) -> float:
    """FLOP a second of NumPy's products in float32, the better of two."""
    x, seconds = np.ones((side, side), np.float32), []
    for _ in range(2):
        start = time.perf_counter()
        _ = x @ x
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def check_autotune(dtype: mx.Dtype, outputs: int = 3072, inputs: int = 3072) -> Finding:
    """From how many rows on packed layers are unpacked, as it is measured or was on this machine."""
    module = nn.Module()
    chosen = {}
    for spec in (Quantization(4), Quantization(8)):
        module.layer = QuantizedLinear(Linear(inputs, outputs), spec)
        mx.eval(module.parameters())
        autotune(module, dtype)
        rows = module.layer.dense_rows
        chosen[spec.bits] = "never unpacked" if rows > LARGEST_TOKENS else f"unpacked from {rows} rows"
    return Finding(OK, ", ".join(f"{bits} bits {what}" for bits, what in chosen.items()))


def check_longest_kernel(speeds: Callable[[], Mapping[mx.Dtype, Speeds]], dtype: mx.Dtype) -> Finding:
    """The seconds of the largest kernels at 2048 x 2048, of klein-9b, as the measured speeds have it."""
    params = max((release.transformer for release in RELEASES), key=lambda params: params.hidden_size)
    own, hidden = speeds()[dtype], params.hidden_size
    attention = min(FLOP_AT_ONCE, 4 * LARGEST_TOKENS**2 * hidden)  # in parts of its queries
    to_out = 2 * LARGEST_TOKENS * (hidden + params.mlp_hidden) * hidden  # the largest product of a single block
    kernels = (attention / own.attention, "attention", attention), (to_out / own.matmul, "product", to_out)
    seconds, name, flops = max(kernels)
    words = f"{name} of klein-9b at 2048 x 2048, {flops / TERA:.1f} TFLOP, about {seconds:.1f} s"
    if not on_gpu() or seconds <= WATCHDOG_SECONDS / 2:
        return Finding(OK, words)
    advice = "macOS may end it: generate smaller images, or with the display asleep"
    return Finding(SLOW, f"{words} of {WATCHDOG_SECONDS:.0f}", advice)
