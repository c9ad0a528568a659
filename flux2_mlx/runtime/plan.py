"""The memory plan: what each stage of an image needs, and so which of them can stay loaded.

modules with lazy weights, workload -> make_plan -> Plan -> mode, peak bytes, a table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..device import stage_dtype, weight_bytes
from ..models.autoencoder import AutoEncoder
from ..models.flux2 import FluxKlein
from ..models.qwen3 import Qwen3TextEncoder
from ..quantization.recipes import largest_dense_bytes
from .activations import (
    Pass,
    Workload,
    decoder_bytes,
    encoder_bytes,
    kv_bytes,
    text_encoder_bytes,
    training_bytes,
    transformer_bytes,
)
from .roofline import image_work, known_speeds, later_work
from .streaming import streamed_bytes

# Resident: all stages stay loaded. Staged: one at a time. Streamed: one at a time, of text encoder and transformer one
# block at a time, read again in every pass. Auto: resident if that fits, else staged, and streamed what does not fit
# alone.
MODES = ("auto", "resident", "staged", "streamed")


@dataclass(frozen=True)
class Stage:
    """What a stage needs, in bytes.

    Attributes:
        weights: of all of it.
        streamed: weights in memory together when its blocks are streamed; equal where it has none.
        working: activations, one packed matrix unpacked among them.
        seconds: the least and the most that it takes once, its weights loaded, on a machine whose speed was measured.
        later_seconds: per pass once keys and values are frozen; None if every pass costs the same.
    """

    name: str
    weights: int
    streamed: int
    working: int
    seconds: tuple[float, float] | None = None
    later_seconds: tuple[float, float] | None = None

    def is_streamed(self, memory: str, limit: int) -> bool:
        """Whether its blocks are read from disk in this mode (of MODES), where there are so many bytes."""
        too_large = memory == "auto" and self.weights + self.working > limit
        return self.streamed < self.weights and (memory == "streamed" or too_large)


@dataclass(frozen=True)
class Plan:
    """What an image needs.

    Attributes:
        stages: in the order in which they work.
        limit: bytes that there are.
        memory: the mode asked for, one of MODES.
    """

    stages: tuple[Stage, ...]
    limit: int
    memory: str = "auto"

    def needed(self, stage: Stage) -> int:
        """Bytes of a stage in memory alone."""
        streamed = stage.is_streamed(self.memory, self.limit)
        return (stage.streamed if streamed else stage.weights) + stage.working

    @property
    def resident(self) -> int:
        """Bytes where all stages stay loaded."""
        return sum(stage.weights for stage in self.stages) + max(stage.working for stage in self.stages)

    @property
    def mode(self) -> str:
        """What "auto" comes to; else the mode asked for."""
        if self.memory != "auto":
            return self.memory
        if self.resident <= self.limit:
            return "resident"
        return "streamed" if any(stage.is_streamed("auto", self.limit) for stage in self.stages) else "staged"

    @property
    def peak(self) -> int:
        """Bytes in memory at the most."""
        return self.resident if self.mode == "resident" else max(map(self.needed, self.stages))

    def seconds(self, prompts: int = 1, passes: int = 1) -> tuple[float, float] | None:
        """The least and the most that a picture takes with so many prompts (the negative one is another) and passes
        through the transformer, all weights loaded; None where the machine's speed is not known.
        """
        times = {"text encoder": prompts, "transformer": passes}
        least = most = 0.0
        for stage in self.stages:
            if stage.seconds is None:
                return None
            again, later = times.get(stage.name, 1) - 1, stage.later_seconds or stage.seconds
            least += stage.seconds[0] + again * later[0]
            most += stage.seconds[1] + again * later[1]
        return least, most

    def __str__(self) -> str:
        """A table, in GB of 10^9 bytes, and what will be done."""
        return "\n".join([*self.table(), f"all together {self.resident / 1e9:.2f} GB", self.summary()])

    def table(self) -> list[str]:
        """Lines: a head, and one for each stage, with what it takes once where the machine's speed is known."""
        rows = [["stage", "weights", "work", "alone", "streamed"]]
        if self.seconds() is not None:
            rows[0].append("seconds")
        for stage in self.stages:
            alone, streamed = stage.weights + stage.working, stage.streamed + stage.working
            sizes = [f"{size / 1e9:.2f}" for size in (stage.weights, stage.working, alone, streamed)]
            rows.append([stage.name, *sizes, *([] if stage.seconds is None else [between(*stage.seconds)])])
        return [f"{row[0]:16}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]

    def summary(self) -> str:
        """One line: the mode, what it needs, and what there is."""
        streamed = [stage.name for stage in self.stages if stage.is_streamed(self.memory, self.limit)]
        what = f" ({', '.join(streamed)})" if self.mode == "streamed" else ""
        line = f"memory: {self.mode}{what}, about {self.peak / 1e9:.2f} of {self.limit / 1e9:.2f} GB"
        if self.peak <= self.limit:
            return line
        return f"{line}, which is too much; a smaller picture, fewer bits (--quantize) or another --memory needs less"


def between(least: float, most: float) -> str:
    """Two durations as one word: "2.6-2.9"."""
    ends = [f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f}" for value in (least, most)]
    return "-".join(dict.fromkeys(ends))


class TrainingPlan(Plan):
    """What training takes: prompts and pictures are encoded first, and nothing of that stays."""

    def __str__(self) -> str:
        return "\n".join([*self.table(), self.summary()])

    @property
    def peak(self) -> int:
        return max(map(self.needed, self.stages))

    def summary(self) -> str:
        line = f"memory: about {self.peak / 1e9:.2f} of {self.limit / 1e9:.2f} GB"
        if self.peak <= self.limit:
            return line
        return f"{line}, which is too much; fewer bits (quantize), a lower resolution or smaller batches need less"


def stage_of(name: str, module: nn.Module, dtype: mx.Dtype, activations: int, attention: int = 0) -> Stage:
    """What a module needs that computes in ``dtype``; its weights are not read.

    Args:
        activations: bytes, beside the largest unpacked matrix.
        attention: bytes during attention, when no matrix is unpacked, if those are more.
    """
    working = max(activations + largest_dense_bytes(module, dtype), attention)
    return Stage(name, weight_bytes(module), streamed_bytes(module), working)


def make_plan(
    text_encoder: Qwen3TextEncoder,
    transformer: FluxKlein,
    autoencoder: AutoEncoder,
    workload: Workload,
    *,
    dtype: mx.Dtype,
    limit: int,
    memory: str = "auto",
) -> Plan:
    """Plan one image; the modules' weights are not read.

    Args:
        dtype: of the transformer's activations; see device.stage_dtype for the others'.
        limit: bytes that there are.
        memory: of MODES.
    """
    params, config = transformer.params, autoencoder.config
    text_dtype, image_dtype = stage_dtype("text_encoder", dtype), stage_dtype("autoencoder", dtype)
    height, width, sizes = workload.height, workload.width, workload.reference_sizes
    encoding = text_encoder_bytes(text_encoder.config, workload.text, text_dtype)
    stages = [stage_of("text encoder", text_encoder, text_dtype, encoding)]
    if sizes:
        most = max(encoder_bytes(config, *size, image_dtype) for size in sizes)
        stages.append(stage_of("references", autoencoder.encoder, image_dtype, most))
    passes = [transformer_bytes(params, workload.denoising(caches=2 if workload.caches_steps else 0), dtype)]
    if workload.kv:
        passes.append(transformer_bytes(params, Pass(0, 0, workload.kv), dtype))
    pinned = kv_bytes(params, workload.kv, dtype)
    activations, attention = (max(parts) + pinned for parts in zip(*passes, strict=True))
    stages.append(stage_of("transformer", transformer, dtype, activations, attention))
    decoding = decoder_bytes(config, height, width, image_dtype) + pinned
    stages.append(stage_of("decoder", autoencoder.decoder, image_dtype, decoding))
    work = image_work(text_encoder, transformer, autoencoder, workload, dtype)
    later = later_work(transformer, workload, dtype)
    for k, stage in enumerate(stages):
        speeds = known_speeds(dtype if stage.name == "transformer" else image_dtype)
        if speeds is not None:
            after = later.seconds(speeds) if later is not None and stage.name == "transformer" else None
            stages[k] = replace(stage, seconds=work[stage.name].seconds(speeds), later_seconds=after)
    return Plan(tuple(stages), limit, memory)


def make_training_plan(
    text_encoder: Qwen3TextEncoder,
    transformer: FluxKlein,
    autoencoder: AutoEncoder,
    *,
    dtype: mx.Dtype,
    shapes: Sequence[Sequence[tuple[int, int]]],
    length: int,
    batch: int,
    adapters: int,
    averages: bool,
    recompute: bool,
    draws: bool,
    limit: int,
) -> TrainingPlan:
    """Plan the training of a LoRA; the modules' weights are not read.

    Args:
        dtype: of the transformer's activations.
        shapes: (height, width) of each picture and of its references, as they are trained on.
        length: tokens of a caption.
        batch: pictures in a pass.
        adapters: numbers in the LoRA.
        averages: whether it has a moving average.
        recompute: see activations.training_bytes.
        draws: whether pictures are drawn in between.
        limit: bytes that there are.
    """
    pictures, config, params = stage_dtype("autoencoder", dtype), autoencoder.config, transformer.params
    text_dtype = stage_dtype("text_encoder", dtype)
    stages = [
        stage_of("text encoder", text_encoder, text_dtype, text_encoder_bytes(text_encoder.config, length, text_dtype))
    ]
    working = max(encoder_bytes(config, *size, pictures) for shape in shapes for size in shape)
    stages.append(stage_of("pictures", autoencoder.encoder, pictures, working))
    tokens = length + max(sum(h * w for h, w in shape) for shape in shapes) // 256
    unpacked = largest_dense_bytes(transformer, dtype)
    working = unpacked + training_bytes(params, tokens, dtype, batch, recompute=recompute, packed=unpacked > 0)
    if draws:
        height, width = max((shape[0] for shape in shapes), key=lambda size: size[0] * size[1])
        working = max(working, weight_bytes(autoencoder.decoder) + decoder_bytes(config, height, width, pictures))
    # In float32: the weights, their gradients twice (of a pass and of the step), the optimizer's two moments.
    weights = weight_bytes(transformer) + (6 if averages else 5) * adapters * mx.float32.size
    stages.append(Stage("training", weights, weights, working))
    return TrainingPlan(tuple(stages), limit)
