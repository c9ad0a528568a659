"""Opening pipelines, generating, saving and reporting, for single prompts, jobs and sessions."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from PIL import Image

from ..adapters.lora import parse_lora
from ..bars import print_past
from ..errors import printable
from ..imaging.files import save_image, save_preview
from ..imaging.terminal import PROTOCOLS, detect_protocol, encode
from ..options import CheckpointOptions, GenerationOptions
from ..pipeline import Flux2Pipeline
from ..request import Settings, Size
from ..results import Step
from ..runtime.plan import Plan
from ..writing import remove_partials
from .arguments import Task


def use_loras(pipe: Flux2Pipeline, task: Task) -> None:
    """Load the LoRAs that are asked for and are not loaded yet, and unload the others."""
    model = task.model
    wanted = dict(map(parse_lora, model.lora))
    for name, lora in list(pipe.loras.items()):
        if name not in wanted or (lora.merge, lora.partial) != (model.lora_merge, model.lora_partial):
            pipe.unload_lora(name)
    for name, scale in wanted.items():
        if name not in pipe.loras:
            lora = pipe.load_lora(name, scale=scale, merge=model.lora_merge, partial=model.lora_partial)
            if not task.quiet:
                print(f"{lora}: {lora.summary}", file=sys.stderr)
        elif pipe.loras[name].scale != scale:
            pipe.set_lora(name, scale)


def start(task: Task, pipe: Flux2Pipeline) -> Iterator[Step]:
    """Load the LoRAs, print the memory plan and begin to generate: the steps of the images."""
    use_loras(pipe, task)
    remove_unfinished(task)
    if not task.quiet:
        print(plan_of(pipe, task, task.options).summary(), file=sys.stderr)
    return pipe.stream(**vars(task.inputs), **vars(task.options), **vars(task.batch))


def remove_unfinished(task: Task) -> None:
    """Remove what killed programs left half written where the images and the preview go."""
    written = [*task.outputs, *task.masks, *([] if task.preview is None else [task.preview])]
    for folder in {path.parent for path in written}:
        remove_partials(folder)


def open_pipeline(task: Task, group: mx.distributed.Group | None = None) -> Flux2Pipeline:
    options = task.model.select(CheckpointOptions)
    return Flux2Pipeline.from_pretrained(options.pop("model"), group=group, **options, **vars(task.runtime))


def identity(task: Task) -> dict[str, Any]:
    """The options that need another pipeline when they change; LoRAs do not, which an open pipeline loads."""
    return task.model.select(CheckpointOptions) | vars(task.runtime)


def plan_of(pipe: Flux2Pipeline, task: Task, options: GenerationOptions, size: Size | None = None) -> Plan:
    """The plan of a task's image with options, or of one of another size (height, width)."""
    own, references = task.sizes(pipe.checkpoint.autoencoder.sample_size)
    height, width = size or own
    own_size = {"height": height, "width": width}
    return pipe.plan(references=references, enhance=task.batch.enhance, **{**options.planned, **own_size})


@contextlib.contextmanager
def interrupts_say_the_rest(task: Task, saved: Sequence[int]) -> Iterator[None]:
    """Have an interrupt between several images say which are done, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        count, done = task.batch.num_images, len(saved)
        if not done or done == count:
            raise
        raise KeyboardInterrupt(
            f"{done} of {count} images are done; "
            f"--seed {task.seed + done} --num-images {count - done} generates the rest"
        ) from None


def generate(
    steps: Iterator[Step],
    task: Task,
    started: float,
    *,
    first_index: int = 0,
    saves: bool = True,
    on_saved: Callable[[Image.Image, Settings], object] | None = None,
) -> None:
    """Generate, save each image when it is done, and report.

    Args:
        started: time.perf_counter() when the work began.
        first_index: index of the first image, for its file name.
        saves: whether this process saves the images; of several processes one does.
        on_saved: called with each image and its settings once the image is saved.
    """
    protocol = task.show
    if task.show == "auto":
        protocol = detect_protocol(os.environ) if sys.stdout.isatty() else None
    if task.show and protocol is None:
        warnings.warn(
            f"nothing is known to show images here; try one of --show {', --show '.join(PROTOCOLS)}",
            stacklevel=2,
        )
    saved: list[int] = []
    is_told = task.quiet
    with interrupts_say_the_rest(task, saved):
        for step in steps:
            if not is_told and step.settings.original_prompt is not None:
                print_past(f"prompt: {printable(step.settings.prompt)}", file=sys.stderr)
            is_told = True  # all images of a task have one prompt
            if task.preview is not None and saves:
                save_preview(step.preview(), task.preview)
            if step.is_last and saves:
                (image, mask), settings = step.picture_and_mask(), step.settings
                path = task.output_path(settings.seed, first_index + step.image)
                texts = (settings.metadata(), settings.parameters()) if task.write_metadata else ()
                written = save_image(image, path, *texts)
                mask_path = task.mask_path(settings.seed, first_index + step.image)
                if mask is not None and mask_path is not None:
                    save_image(mask, mask_path)
                saved.append(settings.seed)
                if on_saved is not None:
                    on_saved(image, settings)
                print_past(f"seed {settings.seed}  {written}")
                if protocol is not None:
                    print_past(encode(image, protocol), end="")
                sys.stdout.flush()
    stats = step.stats
    if not task.quiet:
        seconds = "  ".join(f"{part} {value:.1f} s" for part, value in stats.seconds.items())
        total, peak = time.perf_counter() - started, max(stats.peak_bytes.values())
        counted = f", {stats.steps['computed']} of {sum(stats.steps.values())} steps computed"
        cached = counted if task.options.step_cache is not None else ""
        print(f"{total:.1f} s in all ({seconds}){cached}, peak memory {peak / 1e9:.2f} GB", file=sys.stderr)
    if task.stats:
        figures = {"seconds": stats.seconds, "peak_bytes": stats.peak_bytes, "steps": stats.steps}
        print(json.dumps({"model": step.settings.model, **figures}))
