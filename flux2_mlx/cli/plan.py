"""--plan and --measure: what generating needs, and how long it takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.checkpoint import check_kv_support
from ..device import machine_memory
from ..families import MAX_SEQUENCE_LENGTH, find_release
from ..models.config import AutoEncoderConfig
from ..options import dtype_of
from ..quantization.spec import parse_options
from ..request import first_step, noise_levels, usual_guidance, usual_strength
from ..runtime.activations import Workload
from ..runtime.plan import Plan, between, make_plan
from ..runtime.released import download_bytes, released_modules
from ..runtime.roofline import measure
from ..sampling.latents import PIXELS_PER_TOKEN
from .arguments import sizes_of
from .common import PART_OPTIONS
from .runner import open_pipeline, plan_of, use_loras


def print_plan(arguments: argparse.Namespace) -> None:
    """Print what drawing needs: of a released model from its known shapes, else from the files."""
    release = find_release(arguments.model)
    others = [getattr(arguments, part) for part in PART_OPTIONS if part not in ("distilled", "kv_cache")]
    dtype = dtype_of(arguments.dtype)
    if arguments.plan == "measure":
        measure(dtype)
    if release is None or any(others) or arguments.lora or Path(arguments.model).exists():
        pipe = open_pipeline(arguments)
        use_loras(pipe, arguments)
        plan, checkpoint = plan_of(pipe, arguments), pipe.checkpoint
        print(f"{plan}\n{duration(plan, arguments, checkpoint.autoencoder.sample_size, checkpoint.is_distilled)}")
        return
    if arguments.kv_cache:
        check_kv_support(release.name)
    packed = parse_options(arguments.quantize, arguments.quantize_text_encoder, arguments.group_size)
    side = AutoEncoderConfig.sample_size
    height, width, references = sizes_of(arguments, side)
    workload = Workload(
        height,
        width,
        arguments.max_sequence_length or MAX_SEQUENCE_LENGTH,
        references,
        release.has_kv_cache if arguments.kv_cache is None else arguments.kv_cache,
        caches_steps=arguments.step_cache is not None,
        frozen=arguments.reuse,
    )
    plan = make_plan(
        *released_modules(release.name, dtype, packed),
        workload,
        dtype=dtype,
        limit=arguments.memory_limit or machine_memory(),
        memory=arguments.memory,
    )
    distilled = release.is_distilled if arguments.distilled is None else arguments.distilled
    print(f"{plan}\n{duration(plan, arguments, side, distilled)}")
    print(f"download: up to {download_bytes(release.name) / 1e9:.1f} GB")


def duration(plan: Plan, arguments: argparse.Namespace, side: int, distilled: bool) -> str:
    """One line: how long a picture takes, where this machine was measured."""
    height, width, _ = sizes_of(arguments, side)
    tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
    levels = noise_levels(distilled, tokens, arguments.num_steps, arguments.schedule, arguments.sigmas)[:-1]
    if arguments.init_image is not None:
        usual = usual_strength(len(levels), repaints=arguments.repainting is not None)
        strength = usual if arguments.strength is None else arguments.strength
        levels = levels[first_step(strength, len(levels)) :]
    guidance = usual_guidance(distilled) if arguments.guidance is None else arguments.guidance
    guided = guidance > 1 and (not distilled or arguments.force_guidance)
    low, high = arguments.guidance_interval or (0, 1)
    passes = sum(2 if guided and low <= sigma <= high else 1 for sigma in levels)
    seconds = plan.seconds(2 if guided else 1, passes)
    if seconds is None:
        return "time: not known; --measure measures this machine, once and in a few seconds"
    return f"time: about {between(*seconds)} s a picture, {passes} passes of the transformer, without loading it"
