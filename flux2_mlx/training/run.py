"""A training run: its folder, its steps, the files that it writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..bars import progress_bar
from ..checkpoints.load import load_weights
from ..device import device_errors, memory_limit, weight_bytes, wired_limit
from ..errors import InputError
from ..models.autoencoder import AutoEncoder
from ..models.flux2 import FluxKlein
from ..models.qwen3 import Qwen3TextEncoder
from ..options import CheckpointOptions
from ..pipeline import Flux2Pipeline
from ..quantization.layers import autotune
from ..runtime.distributed import any_process, check_agreement, launched
from ..runtime.plan import TrainingPlan, make_training_plan
from ..writing import remove_partials
from .adapter import adapter_size
from .dataset import Example, PassSampler, Size, fingerprint, parse_data, read_captions, read_datasets
from .latent_cache import LatentCache, sized_images
from .log import Log, write_text
from .options import TrainingOptions, training_dtype
from .trainer import Trainer
from .validation import Validation

CONFIG, LORA, LOG, CURVE = "config.json", "lora.safetensors", "log.jsonl", "loss.png"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
STATE = f"{CHECKPOINTS}/state.safetensors"  # beside lora.safetensors it would make the folder one of two LoRAs


@dataclass(frozen=True)
class TrainingResult:
    """The end of a run.

    Attributes:
        step: the steps that are done.
        ended_by: the number of the signal (Ctrl-C, SIGTERM or SIGHUP) that ended it before its last step, or None.
        lora: the file of the LoRA; None in the processes that leave writing to the first one.
    """

    step: int
    ended_by: int | None
    lora: Path | None


@device_errors()
def train(
    options: TrainingOptions,
    *,
    resume: bool = False,
    allow_distilled: bool = False,
    limit: int | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Train a LoRA and write the run's folder. Ctrl-C, SIGTERM and SIGHUP end the run after the current step,
    with everything saved.

    Args:
        resume: continue the run in the folder ``options.output``.
        allow_distilled: train a distilled model too.
        limit: bytes of memory to keep to; see Flux2Pipeline.from_pretrained's memory_limit.
        progress: show progress bars.
        report: gets the summary of data set and memory plan before training begins.

    Raises:
        InputError: for options or files that cannot be used, a DataError for the data set.
        FloatingPointError: for a loss or gradients that are not finite.
        DeviceError: where the GPU was stopped, or memory was too little; what was saved before is kept.
    """
    group = launched()
    is_first = group is None or group.rank() == 0
    examples = read_datasets(options.data, options.resolution, options.trigger)
    preserved = read_captions(Path(options.preserve), examples) if options.preserve else []
    identity = fingerprint(examples, preserved)
    check_agreement(identity, group)
    pipe = open_pipeline(options, allow_distilled=allow_distilled or resume, limit=limit, progress=progress)
    modules = pipe.text_encoder, pipe.transformer, pipe.autoencoder
    length, shapes = pipe.tokenizer.default_length, sorted({example.shape for example in examples})
    plan = plan_training(modules, options, pipe.dtype, length, shapes, pipe.memory_limit)
    if report is not None and is_first:
        report(f"{describe_dataset(examples, options)}\n{plan.summary()}")
    validation = Validation.of(options, pipe)
    output = Path(options.output)
    (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with lock(output) if is_first else contextlib.nullcontext():
        cache = LatentCache(pipe, output / "cache")
        prompts = {"": None, **dict.fromkeys([*(example.caption for example in examples), *preserved])}
        images = [sized for example in examples for sized in sized_images(example)]
        if validation is not None:
            prompts[validation.prompt] = None
            images += validation.references
        shows_bars = progress and is_first
        with progress_bar("encoding", len(set(images)) + len(prompts), shown=shows_bars, leave=False) as bar:
            for count in cache.encode(prompts, images):
                bar.update(count)
        load_transformer(pipe, shows_bars)
        trainer = Trainer(pipe.transformer, options, examples, cache, preserved, group)
        log = Log(output / LOG)
        if resume:
            trainer.load(output / STATE, identity)
        if is_first:
            log.truncate(trainer.step)
            write_text(output / CONFIG, json.dumps(options.metadata(), indent=2) + "\n")
        activation_bytes = plan.stages[-1].activation_bytes
        with (
            wired_limit(pipe.memory_limit),
            memory_limit(pipe.memory_limit, activation_bytes),
            catch_interrupts() as interrupts,
        ):
            is_interrupted = _take_steps(trainer, log, identity, validation, interrupts, shows_bars, is_first)
    ended_by = (interrupts or [signal.SIGINT])[0] if is_interrupted else None
    return TrainingResult(trainer.step, ended_by, output / LORA if is_first else None)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a run's folder to this process, and remove what a killed one left half written. The lock ends with the
    process, however that ends; its file stays, since a process that waits for a removed one's would lock what nobody
    else sees.

    Raises:
        InputError: where another process trains there.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read(20).strip()
            raise InputError(
                f"{folder} is trained in by another process ({pid}); wait for it, or give another --output"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for part in (".", CHECKPOINTS, "cache", "samples"):
            remove_partials(folder / part)
        yield


def _take_steps(
    trainer: Trainer,
    log: Log,
    identity: str,
    validation: Validation | None,
    interrupts: list[int],
    shows_bars: bool,
    is_first: bool,
) -> bool:
    """Take the remaining steps; returns whether an interrupt left some of them out, or the last one's image."""
    options, output = trainer.options, Path(trainer.options.output)

    def save() -> None:
        trainer.save_lora(output / LORA)
        trainer.save(output / STATE, identity)
        log.plot(output / CURVE)

    is_stopped = lacks_image = False
    mx.reset_peak_memory()
    with progress_bar("training", options.steps, shown=shows_bars, initial=trainer.step, unit="step") as bar:
        if is_first and validation is not None and validation.is_due(trainer, again=trainer.step > 0):
            validation.generate(trainer)
        if is_first and trainer.step == options.steps:  # the last run may have been killed before it
            log.plot(output / CURVE)
        while trainer.step < options.steps and not is_stopped:
            started = time.perf_counter()
            try:
                step = trainer.take_step()
            except InputError:  # a file of the cache was removed, say: the steps before are kept
                if is_first and trainer.step > 0:
                    save()
                raise
            seconds = time.perf_counter() - started
            is_stopped = any_process(bool(interrupts), trainer.group)
            if not is_first:
                continue
            log.add(step, seconds)
            bar.set_postfix(log.postfix(), refresh=False)
            bar.update()
            is_last = trainer.step == options.steps
            if trainer.step % options.save_every == 0 and not is_last:
                trainer.save_lora(output / CHECKPOINTS / f"step-{trainer.step:06}.safetensors")
            if trainer.step % options.save_every == 0 or is_last or is_stopped:
                save()
            lacks_image = validation is not None and validation.is_due(trainer)
            if validation is not None and lacks_image and not is_stopped:
                validation.generate(trainer)
    return is_stopped and (trainer.step < options.steps or lacks_image)


def open_pipeline(
    options: TrainingOptions, *, allow_distilled: bool, limit: int | None, progress: bool = True
) -> Flux2Pipeline:
    """Open the model to train, without reading its weights.

    Raises:
        InputError: for a model that cannot be trained, or that is distilled without ``allow_distilled``.
    """
    pipe = Flux2Pipeline.from_pretrained(
        **options.select(CheckpointOptions) | {"dtype": training_dtype(options.dtype)},
        cache=False,
        memory_limit=limit,
        progress=progress,
    )
    if pipe.checkpoint.has_kv_cache:
        raise InputError(
            f"{options.model} caches its references' keys and values, which cannot be trained; train klein-base-9b"
        )
    if pipe.checkpoint.is_distilled and not allow_distilled:
        raise InputError(
            f"{options.model} is distilled, and training it undoes that: train the base model (klein-base-4b, "
            "klein-base-9b) and generate with the LoRA on either; --allow-distilled trains it all the same"
        )
    return pipe


def plan_training(
    modules: tuple[Qwen3TextEncoder, FluxKlein, AutoEncoder],
    options: TrainingOptions,
    dtype: mx.Dtype,
    length: int,
    shapes: Sequence[Sequence[Size]],
    limit: int,
) -> TrainingPlan:
    """The memory plan of training on captions of ``length`` tokens and on images and references of these shapes."""
    return make_training_plan(
        *modules,
        dtype=dtype,
        shapes=shapes,
        length=length,
        batch=options.batch_size,
        adapters=adapter_size(modules[1], options),
        averages=options.ema > 0,
        recompute=options.grad_checkpoint,
        validates=options.validation_prompt is not None,
        limit=limit,
    )


def load_transformer(pipe: Flux2Pipeline, shows_bars: bool) -> None:
    """Read the transformer's weights into memory."""
    total = weight_bytes(pipe.transformer)
    with progress_bar("loading transformer", total, shown=shows_bars, unit="B", unit_scale=True, leave=False) as bar:
        for count in load_weights(pipe.transformer):
            bar.update(count)
    autotune(pipe.transformer, pipe.dtype)
    mx.clear_cache()


def describe_dataset(examples: Sequence[Example], options: TrainingOptions) -> str:
    """A line for each data set: the number of images by size, and how often the run sees each."""
    sampler, folders = PassSampler(examples, options.batch_size, options.seed), parse_data(options.data)
    lines = []
    for place, members in enumerate(sampler.members):
        images, share = [examples[number] for number in members], sampler.share(place)
        counts = Counter(example.size for example in images)
        sizes = ", ".join(f"{count} of {width} x {height}" for (height, width), count in counts.most_common(5))
        rest = f", and {len(counts) - 5} more sizes" if len(counts) > 5 else ""
        epochs = options.steps * options.accumulate * share / sampler.batches[place].batches_per_epoch
        repeats = sorted(example.repeats for example in images)
        times = " to ".join(dict.fromkeys(f"{epochs * count:.3g}" for count in (repeats[0], repeats[-1])))
        name = f"{folders[images[0].dataset][0]}, {share:.3g} of the passes: " if len(sampler.members) > 1 else ""
        lines.append(f"{name}{len(images)} images ({sizes}{rest}), each is seen about {times} times")
    return "\n".join(lines)


@contextlib.contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Collect the numbers of signals that end a program (Ctrl-C, SIGTERM, SIGHUP) in a list instead of ending it; a
    second one does so at once.
    """
    interrupts: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    kept = {number: signal.getsignal(number) for number in signals}
    before = {number: handler for number, handler in kept.items() if handler not in (signal.SIG_IGN, None)}  # nohup

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        interrupts.append(number)
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield interrupts
    finally:
        restore()
