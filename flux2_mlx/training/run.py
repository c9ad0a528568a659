"""A training run: its folder, its steps, what it saves."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm.auto import tqdm

from ..checkpoints.load import materialize
from ..device import weight_bytes, wired, within
from ..errors import InputError
from ..models.autoencoder import AutoEncoder
from ..models.flux2 import FluxKlein
from ..models.qwen3 import Qwen3TextEncoder
from ..options import CheckpointOptions
from ..pipeline import Flux2Pipeline
from ..quantization.layers import tune
from ..runtime.distributed import any_process, check_agreement, launched
from ..runtime.plan import TrainingPlan, make_training_plan
from .adapter import adapter_size
from .dataset import Batches, Example, Size, fingerprint, read_captions, read_dataset
from .latent_cache import Encoded, pictures_of
from .log import Log, write_text
from .options import TrainingOptions, training_dtype
from .trainer import Trainer
from .validation import Validation

CONFIG, LORA, LOG, CURVE = "config.json", "lora.safetensors", "log.jsonl", "loss.png"
CHECKPOINTS = "checkpoints"
STATE = f"{CHECKPOINTS}/state.safetensors"  # beside lora.safetensors it would make the folder one of two LoRAs


def train(options: TrainingOptions, run: argparse.Namespace) -> bool:
    """Train, and write what comes of it.

    Returns:
        Whether it was interrupted by Ctrl-C, after the step that it was at.

    Raises:
        InputError: for what cannot be used, a DataError for the data set.
        FloatingPointError: where the numbers stop being finite.
    """
    group = launched()
    is_first = group is None or group.rank() == 0
    quiet = bool(run.quiet) or not is_first
    examples = read_dataset(Path(options.data), options.resolution, options.trigger)
    preserved = read_captions(Path(options.preserve), examples) if options.preserve else []
    identity = fingerprint(examples, preserved)
    check_agreement(identity, group)
    pipe = open_pipeline(options, run)
    modules = pipe.text_encoder, pipe.transformer, pipe.autoencoder
    length, shapes = pipe.tokenizer.default_length, sorted({example.shape for example in examples})
    plan = plan_of(modules, options, pipe.dtype, length, shapes, pipe.memory_limit)
    if not quiet:
        print(f"{summary(examples, options)}\n{plan.summary()}", file=sys.stderr)
    validation = Validation.of(options, pipe)
    output = Path(options.output)
    (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    encoded = Encoded(pipe, output / "cache")
    prompts = {"": None, **dict.fromkeys([*(example.caption for example in examples), *preserved])}
    pictures = [sized for example in examples for sized in pictures_of(example)]
    if validation is not None:
        prompts[validation.prompt] = None
        pictures += validation.references
    with tqdm(desc="encoding", total=len(set(pictures)) + len(prompts), leave=False, disable=quiet) as bar:
        for count in encoded.encode(prompts, pictures):
            bar.update(count)
    load(pipe, quiet)
    trainer = Trainer(pipe.transformer, options, examples, encoded, preserved, group)
    log = Log(output / LOG)
    if run.resume is not None:
        trainer.load(output / STATE, identity)
    if is_first:
        log.cut(trainer.step)
        write_text(output / CONFIG, json.dumps(options.metadata(), indent=2) + "\n")
    working = plan.stages[-1].working
    with wired(pipe.memory_limit), within(pipe.memory_limit, working), _interrupts() as interrupted:
        is_stopped = _steps(trainer, log, identity, validation, interrupted, quiet, is_first)
    if is_stopped and is_first:
        print(f"interrupted after step {trainer.step}; flux2-lora --resume {output} goes on", file=sys.stderr)
    elif is_first:
        print(output / LORA)
    return is_stopped


def _steps(
    trainer: Trainer,
    log: Log,
    identity: str,
    validation: Validation | None,
    interrupted: list[bool],
    quiet: bool,
    is_first: bool,
) -> bool:
    """Take the steps that are left; whether they were interrupted."""
    options, output = trainer.options, Path(trainer.options.output)

    def save() -> None:
        trainer.save_lora(output / LORA)
        trainer.save(output / STATE, identity)
        log.draw(output / CURVE)

    is_stopped = False
    mx.reset_peak_memory()
    with tqdm(desc="training", total=options.steps, initial=trainer.step, disable=quiet, unit="step") as bar:
        if is_first and validation is not None and trainer.step == 0:
            validation.draw(trainer)
        while trainer.step < options.steps and not is_stopped:
            started = time.perf_counter()
            progress = trainer.take_step()
            seconds = time.perf_counter() - started
            is_stopped = any_process(bool(interrupted), trainer.group)
            if not is_first:
                continue
            log.add(progress, seconds)
            bar.set_postfix(log.postfix(), refresh=False)
            bar.update()
            is_last = trainer.step == options.steps
            if trainer.step % options.save_every == 0 and not is_last:
                trainer.save_lora(output / CHECKPOINTS / f"step-{trainer.step:06}.safetensors")
            if trainer.step % options.save_every == 0 or is_last or is_stopped:
                save()
            if validation is not None and not is_stopped and (trainer.step % options.validate_every == 0 or is_last):
                validation.draw(trainer)
    return is_stopped and trainer.step < options.steps


def open_pipeline(options: TrainingOptions, run: argparse.Namespace) -> Flux2Pipeline:
    """The model, none of its weights read.

    Raises:
        InputError: for one that is not to be trained.
    """
    pipe = Flux2Pipeline.from_pretrained(
        **options.select(CheckpointOptions) | {"dtype": training_dtype(options.dtype)},
        cache=False,
        memory_limit=run.memory_limit,
        progress=not run.quiet,
    )
    if pipe.checkpoint.has_kv_cache:
        raise InputError(
            f"{options.model} keeps its references, which is not trained here; klein-base-9b can be trained"
        )
    if pipe.checkpoint.is_distilled and not run.allow_distilled and run.resume is None:
        raise InputError(
            f"{options.model} is distilled, and training it undoes that: train the base model (klein-base-4b, "
            "klein-base-9b) and draw with the LoRA on either; --allow-distilled trains it all the same"
        )
    return pipe


def plan_of(
    modules: tuple[Qwen3TextEncoder, FluxKlein, AutoEncoder],
    options: TrainingOptions,
    dtype: mx.Dtype,
    length: int,
    shapes: Sequence[Sequence[Size]],
    limit: int,
) -> TrainingPlan:
    """What training needs, on pictures and references of these shapes."""
    return make_training_plan(
        *modules,
        dtype=dtype,
        shapes=shapes,
        length=length,
        batch=options.batch_size,
        adapters=adapter_size(modules[1], options),
        averages=options.ema > 0,
        again=options.grad_checkpoint,
        draws=options.validation_prompt is not None,
        limit=limit,
    )


def load(pipe: Flux2Pipeline, quiet: bool) -> None:
    """Bring the transformer into memory."""
    total = weight_bytes(pipe.transformer)
    with tqdm(desc="loading transformer", total=total, unit="B", unit_scale=True, leave=False, disable=quiet) as bar:
        for count in materialize(pipe.transformer):
            bar.update(count)
    tune(pipe.transformer, pipe.dtype)
    mx.clear_cache()


def summary(examples: Sequence[Example], options: TrainingOptions) -> str:
    """How many pictures there are of which sizes, and how often each is seen."""
    counts = Counter(example.size for example in examples)
    sizes = ", ".join(f"{count} of {width} x {height}" for (height, width), count in counts.most_common(5))
    rest = f", and {len(counts) - 5} more sizes" if len(counts) > 5 else ""
    passes = Batches(examples, options.batch_size, options.seed).per_epoch
    times = options.steps * options.accumulate / passes
    return f"{len(examples)} pictures ({sizes}{rest}), each is seen about {times:.3g} times"


@contextlib.contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C; a second one interrupts at once."""
    pressed: list[bool] = []

    def handle(*_: Any) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
