"""Opening pipelines, generating, saving and reporting, for single prompts, jobs and sessions."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from PIL import Image
from tqdm.auto import tqdm

from ..adapters.lora import parse_lora
from ..errors import InputError
from ..imaging.files import save_image, save_preview
from ..imaging.terminal import PROTOCOLS, detect_protocol, encode
from ..pipeline import Flux2Pipeline
from ..request import Settings
from ..results import Step
from ..runtime.plan import Plan
from .arguments import drawing_options, output_path, sizes_of
from .common import MODEL_OPTIONS

JOB_FAULTS = (
    InputError,
    FloatingPointError,
    OSError,
    RuntimeError,
)  # the last is what MLX raises, as for want of memory


def use_loras(pipe: Flux2Pipeline, arguments: argparse.Namespace) -> None:
    """Load the LoRAs that are asked for and are not loaded yet, and unload the others."""
    wanted = dict(map(parse_lora, arguments.lora))
    how = {"merge": arguments.lora_merge, "partial": arguments.lora_partial}
    for name, lora in list(pipe.loras.items()):
        if name not in wanted or (lora.merge, lora.partial) != tuple(how.values()):
            pipe.unload_lora(name)
    for name, scale in wanted.items():
        if name not in pipe.loras:
            lora = pipe.load_lora(name, scale=scale, **how)
            if not arguments.quiet:
                print(f"{lora}: {lora.summary}", file=sys.stderr)
        elif pipe.loras[name].scale != scale:
            pipe.set_lora(name, scale)


def start(arguments: argparse.Namespace, pipe: Flux2Pipeline) -> Iterator[Step]:
    """The steps to draw."""
    use_loras(pipe, arguments)
    if not arguments.quiet:
        print(plan_of(pipe, arguments).summary(), file=sys.stderr)
    return pipe.stream(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        image=arguments.image or None,
        init_image=arguments.init_image,
        mask=arguments.mask,
        force_guidance=arguments.force_guidance,
        **drawing_options(arguments),
    )


def open_pipeline(arguments: argparse.Namespace, group: mx.distributed.Group | None = None) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        cache=arguments.cache,
        memory=arguments.memory,
        memory_limit=arguments.memory_limit,
        group=group,
        preview_decoder=arguments.preview_decoder,
        progress=not arguments.quiet,
        **{name: getattr(arguments, name) for name in MODEL_OPTIONS},
    )


def plan_of(pipe: Flux2Pipeline, arguments: argparse.Namespace) -> Plan:
    height, width, references = sizes_of(arguments, pipe.checkpoint.autoencoder.sample_size)
    more = {name: getattr(arguments, name) for name in ("step_cache", "reuse")}
    return pipe.plan(height, width, arguments.max_sequence_length, references, **more)


def draw(
    steps: Iterator[Step],
    arguments: argparse.Namespace,
    started: float,
    *,
    first: int = 0,
    saves: bool = True,
    saved: Callable[[Image.Image, Settings], object] | None = None,
) -> None:
    """Draw, save each picture when it is done, and report.

    Args:
        started: time.perf_counter() when the work began.
        first: index of the first picture.
        saves: whether it is this process that saves them.
        saved: is told of each picture once it is.
    """
    protocol = detect_protocol(os.environ) if arguments.show == "auto" else arguments.show
    if arguments.show and protocol is None:
        warnings.warn(
            f"this terminal is not known to show pictures; --show {', --show '.join(PROTOCOLS)} try one way",
            stacklevel=2,
        )
    for step in steps:
        if arguments.preview is not None and saves:
            save_preview(step.preview(), arguments.preview)
        if step.is_last and saves:
            picture, settings = step.picture(), step.settings
            path = output_path(arguments.output, settings.seed, first + step.image)
            written = save_image(picture, path, settings.metadata(), settings.parameters())
            if saved is not None:
                saved(picture, settings)
            tqdm.write(f"seed {settings.seed}  {written}")  # past the bars
            if protocol is not None:
                tqdm.write(encode(picture, protocol), end="")
            sys.stdout.flush()
    stats = step.stats
    if not arguments.quiet:
        seconds = "  ".join(f"{part} {value:.1f} s" for part, value in stats.seconds.items())
        total, peak = time.perf_counter() - started, max(stats.peak_bytes.values())
        counted = f", {stats.steps['computed']} of {sum(stats.steps.values())} steps computed"
        cached = "" if arguments.step_cache is None else counted
        print(f"{total:.1f} s in all ({seconds}){cached}, peak memory {peak / 1e9:.2f} GB", file=sys.stderr)
    if arguments.stats:
        figures = {"seconds": stats.seconds, "peak_bytes": stats.peak_bytes, "steps": stats.steps}
        print(json.dumps({"model": step.settings.model, **figures}))


def pipeline_options(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """What decides which pipeline is open."""
    names = ("model", "revision", *MODEL_OPTIONS, "dtype", "cache", "memory", "memory_limit", "preview_decoder")
    return tuple(getattr(arguments, name) for name in names)
