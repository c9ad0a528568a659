"""Operations beside the CPU's in float32: products, attention, convolutions, packed layers.

Errors are relative, root mean square. A result of 8 bits (bfloat16) that is rounded once has one of 0.42 times 2^-8,
which is what MLX's CPU backend gives too; bounds are multiples of such roundings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from ..models.layers import Linear
from ..quantization.layers import QuantizedLinear
from ..quantization.spec import Quantization
from .findings import OK, REPORT_IT, WRONG, Finding

# How far a number may be off by its dtype. Half a unit in the last place, but for float32, whose 2^-24 a GPU does not
# keep: its sines, exponentials and Winograd transforms are good for 2^-14. TF32, with 11 bits, would be off by 2^-11.
UNIT = {mx.float32: 2.0**-14, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}
# Units of an operation that sums in float32 and rounds what lies between, such as attention's weights, and its result:
# MLX's CPU backend has 0.42 for a product and 1.1 for attention.
ROUNDED = 3.0
# Metal's Winograd F(6, 3) in 16 bits is off by 0.003 to 0.06 by emulation.
WINOGRAD = 0.1
# What a weight loses as it is packed, of its largest: half a step of codes that are floating point numbers with so many
# bits after the leading one.
MANTISSA = {"mxfp4": 1, "nvfp4": 1, "mxfp8": 3}

Operation = tuple[Callable[..., mx.array], list[mx.array]]  # a function and its arrays in float32


@contextmanager
def reference() -> Iterator[None]:
    """Compute on the CPU while the body runs, without mx.compile: MLX's CPU backend compiles with the system's C++
    compiler, which a Mac need not have.
    """
    with mx.stream(mx.cpu):
        mx.disable_compile()
        try:
            yield
        finally:
            mx.enable_compile()


@contextmanager
def winograd(setting: str) -> Iterator[None]:
    """MLX_CONV_WINOGRAD while the body runs; Metal's convolutions read it each time, from MLX 0.32.4 on."""
    before = os.environ.get("MLX_CONV_WINOGRAD")
    os.environ["MLX_CONV_WINOGRAD"] = setting
    try:
        yield
    finally:
        del os.environ["MLX_CONV_WINOGRAD"]
        if before is not None:
            os.environ["MLX_CONV_WINOGRAD"] = before


def error_of(found: mx.array, expected: mx.array) -> float:
    """The relative error; nan or infinite where anything is not finite."""
    ours, theirs = numbers(found), numbers(expected)
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))


def numbers(array: mx.array) -> np.ndarray:
    with reference():
        return np.array(array.astype(mx.float32), np.float64)


def largest(errors: Sequence[float]) -> float:
    """The largest error; nan where there is one."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def judge(error: float, bound: float, more: str = "", advice: str = REPORT_IT) -> Finding:
    words = f"error {error:.2g} of {bound:.2g}{more}"
    return Finding(OK, words) if error <= bound else Finding(WRONG, words, advice)  # nan is no less than any bound


def noise(*shape: int) -> mx.array:
    """Normal noise, the same on each machine, from the CPU."""
    with reference():
        x = mx.random.normal(shape, key=mx.random.key(math.prod(shape)))
        mx.eval(x)
    return x


def product(rows: int = 1024, inputs: int = 2048, outputs: int = 2048) -> Operation:
    return mx.matmul, [noise(rows, inputs), noise(inputs, outputs)]


def attention(tokens: int = 1024, heads: int = 4, dims: int = 128, masked: bool = False) -> Operation:
    """Attention as the transformer's, or with a mask as the text encoder's."""
    mask = mx.tril(mx.ones((tokens, tokens), mx.bool_))[None, None] if masked else None

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=dims**-0.5, mask=mask)

    return attend, [noise(1, heads, tokens + extra, dims)[:, :, extra:] for extra in range(3)]


def convolution(side: int = 64, channels: int = 256) -> Operation:
    """A 3x3 convolution as the decoder's, whose size and channels Metal computes by Winograd."""
    return lambda x, weight: mx.conv2d(x, weight, padding=1), [
        noise(1, side, side, channels),
        noise(channels, 3, 3, channels),
    ]


def check_operation(make: Callable[[], Operation], dtype: mx.Dtype) -> Finding:
    function, arrays = make()
    return judge(error_of(*beside_cpu(function, arrays, dtype)), ROUNDED * UNIT[dtype])


def check_product(make: Callable[[], Operation], dtype: mx.Dtype) -> Finding:
    """A product, which a MLX that was not built for the chip gets wrong."""
    found = check_operation(make, dtype)
    advice = "images will be noise: install MLX's own wheel, for this macOS (pip install --force-reinstall mlx)"
    return Finding(found.verdict, found.measured, advice) if found.verdict == WRONG else found


def check_convolution(make: Callable[[], Operation], dtype: mx.Dtype) -> Finding:
    """A convolution as MLX does it, and without Winograd."""
    function, arrays = make()
    errors = []
    for setting in ("1", "0"):
        with winograd(setting):
            errors.append(error_of(*beside_cpu(function, arrays, dtype)))
    bound = ROUNDED * UNIT[dtype] if dtype == mx.float32 else WINOGRAD
    return judge(largest(errors), bound, f" ({errors[0]:.2g}, without Winograd {errors[1]:.2g})")


def beside_cpu(
    function: Callable[..., mx.array], arrays: Sequence[mx.array], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """What a function gives for arrays in a dtype, and on the CPU for the same numbers in float32."""
    given = [array.astype(dtype) for array in arrays]
    found = function(*given)
    mx.eval(given, found)
    with reference():
        expected = function(*(array.astype(mx.float32) for array in given))
        mx.eval(expected)
    return found, expected


def check_float32(side: int = 512, channels: int = 256) -> Finding:
    """Whether float32 keeps 1 + 2^-12, which TF32 rounds to 1, through every kind of product."""
    value = 1 + 2.0**-12
    square, one = mx.full((side, side), value), mx.eye(side)
    heads = mx.full((1, 1, side, 128), value)
    image, kernel = mx.full((1, side // 8, side // 8, channels), value), mx.zeros((channels, 3, 3, channels))
    kernel[:, 1, 1] = mx.eye(channels)
    packed = mx.quantize(one, group_size=64, bits=8)
    made = {
        "products": mx.matmul(square, one),
        "attention": mx.fast.scaled_dot_product_attention(mx.zeros_like(heads), heads, heads, scale=1.0),
        "convolutions": mx.conv2d(image, kernel, padding=1),
        "packed products": mx.quantized_matmul(square, *packed, transpose=True, group_size=64, bits=8),
    }
    errors = {name: float(abs(numbers(array) - value).max()) for name, array in made.items()}
    off = [name for name, error in errors.items() if not error <= UNIT[mx.float32]]
    words = f"1 + 2^-12 is off by {largest([*errors.values()]):.1g} at most"
    if off:
        return Finding(WRONG, f"{words}: {', '.join(off)} are in TF32", "set MLX_ENABLE_TF32=0")
    return Finding(OK, words)


def check_packed(spec: Quantization, dtype: mx.Dtype, outputs: int = 512, inputs: int = 1024) -> Finding:
    """A packed layer: what its weight lost, and its fused and its unpacked product beside the unpacked weight's."""
    layer = Linear(inputs, outputs)
    with reference():
        weight = mx.random.uniform(-1, 1, (outputs, inputs), key=mx.random.key(0))
        mx.eval(weight)
    layer.weight = weight.astype(dtype)
    packed = QuantizedLinear(layer, spec)
    mx.eval(packed.parameters())
    with reference():
        biases = None if "biases" not in packed else packed.biases.astype(mx.float32)
        scales = packed.scales if biases is None else packed.scales.astype(mx.float32)
        unpacked = mx.dequantize(packed.weight, scales, biases, spec.group_size, spec.bits, spec.mode, dtype=mx.float32)
        mx.eval(unpacked)
    lost, errors = error_of(unpacked, weight), []
    for rows in (1, 32, 512):
        x = noise(rows, inputs).astype(dtype)
        for multiply in (packed.fused, packed.dense):
            found = multiply(x)
            mx.eval(found)
            with reference():
                expected = x.astype(mx.float32) @ unpacked.T
                mx.eval(expected)
            errors.append(error_of(found, expected))
    # Of codes in even steps the error is a step's, and the weights go from -1 to 1; a fifth is left for scales.
    most = 2.0 ** -(MANTISSA[spec.mode] + 1) if spec.mode in MANTISSA else 1.2 / (2**spec.bits - 1) + UNIT[dtype]
    if not lost <= most:
        return Finding(WRONG, f"the packed weight's error is {lost:.2g} of {most:.2g}", REPORT_IT)
    return judge(largest(errors), (ROUNDED + 1) * UNIT[dtype])  # the unpacked weight is rounded as well
