"""--plan and --measure: what generating needs, and how long it takes."""

from __future__ import annotations

from ..checkpoints.checkpoint import check_kv_support
from ..device import machine_memory
from ..families import MAX_SEQUENCE_LENGTH
from ..models.config import AutoEncoderConfig
from ..options import dtype_of, vae_dtype_of
from ..request import resolve_sampling
from ..runtime.activations import Workload
from ..runtime.plan import Plan, format_range, make_plan
from ..runtime.released import download_bytes, released_modules
from ..runtime.roofline import measure
from .arguments import Task
from .runner import open_pipeline, plan_of, use_loras


def print_plan(task: Task, measures: bool) -> None:
    """Print what generating needs: of a released model from its known shapes, else from the files."""
    model, options, release = task.model, task.options, task.model.release
    dtype, vae_dtype = dtype_of(model.dtype), vae_dtype_of(model.vae_dtype)
    if measures:
        measure(dtype, vae_dtype)
    if release is None or model.lora:
        pipe = open_pipeline(task)
        use_loras(pipe, task)
        plan, checkpoint = plan_of(pipe, task), pipe.checkpoint
        print(f"{plan}\n{duration(plan, task, checkpoint.autoencoder.sample_size, checkpoint.is_distilled)}")
        return
    if model.kv_cache:
        check_kv_support(release.name)
    side = AutoEncoderConfig.sample_size
    (height, width), references = task.sizes(side)
    workload = Workload(
        height,
        width,
        options.max_sequence_length or MAX_SEQUENCE_LENGTH,
        references,
        release.has_kv_cache if model.kv_cache is None else model.kv_cache,
        caches_steps=options.step_cache is not None,
        frozen=options.reuse,
    )
    plan = make_plan(
        *released_modules(release.name, dtype, model.quantization(), vae_dtype),
        workload,
        dtype=dtype,
        limit=int(task.runtime.memory_limit or machine_memory()),
        memory=task.runtime.memory,
    )
    distilled = release.is_distilled if model.distilled is None else model.distilled
    print(f"{plan}\n{duration(plan, task, side, distilled)}")
    print(f"download: up to {download_bytes(release.name) / 1e9:.1f} GB")


def duration(plan: Plan, task: Task, side: int, distilled: bool) -> str:
    """One line: how long an image takes, where this machine was measured."""
    size, _ = task.sizes(side)
    has_init, inpaints = task.inputs.init_image is not None, task.inpaint is not None
    sampling = resolve_sampling(task.options, distilled, size, has_init=has_init, inpaints=inpaints)
    passes = sum(step.passes for step in sampling.steps)
    seconds = plan.seconds(2 if sampling.guidance > 1 else 1, passes)
    if seconds is None:
        return "time: not known; --measure measures this machine, once and in a few seconds"
    return f"time: about {format_range(*seconds)} s an image, {passes} passes of the transformer, without loading it"
