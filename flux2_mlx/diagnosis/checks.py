"""The checks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx

from ..device import default_dtype, on_gpu, stage_dtype
from ..quantization.spec import AFFINE_BITS, FLOAT_MODES, Quantization
from ..runtime import roofline
from . import arithmetic, full, machine, nano, speed
from .arithmetic import name_of
from .findings import Check, Finding


def quick_checks() -> list[Check]:
    """Those of every machine, with nano: under two minutes."""
    dtype = default_dtype()
    miniature, speeds = cache(nano.Nano), cache(partial(roofline.measure, dtype))
    checks: dict[str, Callable[[], Finding]] = {
        "machine": machine.describe_machine,
        "memory": machine.check_memory,
        "cache folder": machine.check_cache_folder,
        "the Hub": machine.check_hub,
        "models": machine.find_models,
        "float32 is float32": arithmetic.check_float32,
        "product, bfloat16": partial(arithmetic.check_product, arithmetic.product, mx.bfloat16),
    }
    masked = partial(arithmetic.attention, masked=True)
    for own in dict.fromkeys((mx.float32, dtype, stage_dtype("text_encoder", dtype))):
        checks |= {
            f"attention, {name_of(own)}": partial(arithmetic.check_operation, arithmetic.attention, own),
            f"attention with a mask, {name_of(own)}": partial(arithmetic.check_operation, masked, own),
        }
    for own in nano.HALF:
        checks[f"convolution, {name_of(own)}"] = partial(arithmetic.check_convolution, arithmetic.convolution, own)
    for spec in [*map(Quantization, AFFINE_BITS), *(Quantization(*FLOAT_MODES[mode], mode) for mode in FLOAT_MODES)]:
        name = f"{spec.bits} bits" if spec.mode == "affine" else spec.mode
        checks[f"packed in {name}, {name_of(dtype)}"] = partial(arithmetic.check_packed, spec, dtype)
    for stage, dtypes in nano.DTYPES.items():
        for own in dtypes:
            checks[f"nano's {stage}, {name_of(own)}"] = partial(nano.check_stage, miniature, stage, own)
    checks |= {
        "a call from a second thread": nano.check_thread,
        "memory beside the plan": nano.check_peak,
        **{
            f"speed, {name_of(own)}": partial(speed.check_speed, speeds, own)
            for own in dict.fromkeys((dtype, stage_dtype("autoencoder", dtype)))
        },
        "autotune": partial(speed.check_autotune, dtype),
        "the longest kernel": partial(speed.check_longest_kernel, speeds, dtype),
    }
    return as_checks(checks)


def full_checks() -> list[Check]:
    """klein-4b's true shapes: minutes on a GPU, and smaller images on a CPU."""
    dtype, side = default_dtype(), 1024 if on_gpu() else 128
    decoding = cache(partial(full.Decoding, side))
    checks: dict[str, Callable[[], Finding]] = {}
    for own in nano.HALF:
        for setting in ("1", "0"):
            name = f"klein-4b's decode, {side} x {side}, {name_of(own)}, MLX_CONV_WINOGRAD={setting}"
            checks[name] = partial(full.check_decode, decoding, own, setting)
    checks |= {
        "klein-4b's load with --quantize 4": partial(full.check_packing, dtype),
        f"klein-4b's attention, {name_of(dtype)}": partial(full.check_attention, dtype),
        f"klein-4b's step, {name_of(dtype)}": partial(full.check_step, dtype, side),
    }
    return as_checks({name: partial(full.skipping, check) for name, check in checks.items()})


def as_checks(checks: dict[str, Callable[[], Finding]]) -> list[Check]:
    return [Check(name, run) for name, run in checks.items()]
