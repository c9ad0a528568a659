"""--plan and --measure: what generating needs, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..checkpoints.checkpoint import check_kv_support
from ..conditioning.tokenizer import check_length
from ..device import machine_memory
from ..dtypes import dtype_of, vae_dtype_of
from ..families import MAX_SEQUENCE_LENGTH
from ..inputs import Size
from ..models.config import AutoEncoderConfig
from ..options import GenerationOptions
from ..runtime.plan import Plan, format_range, make_plan
from ..runtime.released import download_bytes, released_language_model, released_modules
from ..runtime.roofline import measure
from ..samplings import resolve_samplings, workload_of
from .arguments import Task
from .runner import open_pipeline, plan_of, use_loras


def print_plan(task: Task, measures: bool) -> None:
    """Print what generating needs: of a released model from its known shapes, else from the files."""
    model, release = task.model, task.model.release
    dtype, vae_dtype = dtype_of(model.dtype), vae_dtype_of(model.vae_dtype)
    if measures:
        measure(dtype, vae_dtype)
    if release is None or model.lora:
        pipe = open_pipeline(task)
        use_loras(pipe, task)
        checkpoint = pipe.checkpoint
        print_plans(partial(plan_of, pipe, task), task, checkpoint.autoencoder.sample_size, checkpoint.is_distilled)
        return
    if model.kv_cache:
        check_kv_support(release.name)
    side = AutoEncoderConfig.sample_size
    modules = released_modules(release, dtype, model.quantization(), vae_dtype)
    writer = released_language_model(release, dtype, model.quantization()) if task.batch.enhance else None
    most = release.text_encoder.max_tokens
    length = task.options.max_sequence_length or most or MAX_SEQUENCE_LENGTH
    check_length(length, most)
    limit = int(task.runtime.memory_limit or machine_memory())

    def plan_at(options: GenerationOptions, size: Size) -> Plan:
        has_kv = release.has_kv_cache if model.kv_cache is None else model.kv_cache
        workload = workload_of(options, size, length, task.sizes(side)[1], side, has_kv_cache=has_kv)
        return make_plan(*modules, workload, writer, dtype=dtype, limit=limit, memory=task.runtime.memory)

    print_plans(plan_at, task, side, release.is_distilled if model.distilled is None else model.distilled)
    print(f"download: up to {download_bytes(release) / 1e9:.1f} GB")


def print_plans(plan_at: Callable[[GenerationOptions, Size], Plan], task: Task, side: int, distilled: bool) -> None:
    """Print the plan of the image, and how long it takes, where this machine was measured: the small image that hires
    begins with counts by its steps.

    Args:
        plan_at: the plan with options, at a size (height, width).
    """
    size, has_init = task.sizes(side)[0], task.inputs.has_init
    *smaller, sampling = resolve_samplings(
        task.options, distilled, size, side, has_init=has_init, inpaints=task.inpaint is not None
    )
    plan = plan_at(task.options, size)
    print(plan)
    prompts = len(task.options.region) + (2 if sampling.guidance > 1 else 1)
    parts = [plan.seconds(prompts, sampling.passes)]
    undivided = replace(task.options, hires=None, hires_strength=None, hires_tile=None, width=None, height=None)
    parts += [plan_at(undivided, small.size).denoising_seconds(small.passes) for small in smaller]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        print("time: not known; --measure measures this machine, once and in a few seconds")
        return
    seconds = format_range(*map(sum, zip(*known, strict=True)))
    shown = " and ".join(str(own.passes) for own in (*smaller, sampling))
    print(f"time: about {seconds} s an image, {shown} passes of the transformer, without loading it")
