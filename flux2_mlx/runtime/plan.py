"""The memory plan: what each stage of an image needs, and so which of them can stay loaded.

modules with lazy weights, workload -> make_plan -> Plan -> mode, peak bytes, a table
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..device import stage_dtype, weight_bytes
from ..models.autoencoder import TILE_BYTES, AutoEncoder
from ..models.flux2 import FluxKlein
from ..models.language_model import Qwen3LanguageModel
from ..models.qwen3 import Qwen3TextEncoder
from ..quantization.recipes import largest_dense_bytes
from .activations import (
    Pass,
    Workload,
    decoder_bytes,
    encoder_bytes,
    kv_bytes,
    language_model_bytes,
    largest_tile,
    text_encoder_bytes,
    training_bytes,
    transformer_bytes,
)
from .roofline import image_work, known_speeds, work_after_first
from .streaming import streamed_bytes

# Resident: all stages stay loaded. Staged: one stage is loaded at a time. Streamed: one stage at a time, text encoder
# and transformer one block at a time, read again in every pass. Auto: resident if that fits, else staged, with the
# stages streamed that do not fit alone.
MODES = ("auto", "resident", "staged", "streamed")
# The stage that writes prompts out, loaded in the place of the text encoder, whose layers it has, and never streamed.
LANGUAGE_MODEL = "language model"
WRITTEN_TOKENS = 512  # of which it is given some and writes the rest


@dataclass(frozen=True)
class Stage:
    """The memory and time of a stage.

    Attributes:
        weights: bytes of all of its weights.
        streamed: bytes of the weights that are in memory together when its blocks are streamed; the same as ``weights``
            for a stage without blocks.
        activation_bytes: activations, the largest unpacked matrix among them.
        seconds: (least, most) of running it once, its weights loaded; None on a machine whose speed was not measured.
        seconds_after_first: seconds per pass once keys and values are frozen; None if every pass costs the same.
    """

    name: str
    weights: int
    streamed: int
    activation_bytes: int
    seconds: tuple[float, float] | None = None
    seconds_after_first: tuple[float, float] | None = None

    def seconds_of(self, times: int) -> tuple[float, float] | None:
        """(least, most) of running it so often; None where ``seconds`` is."""
        if self.seconds is None:
            return None
        least, most = self.seconds_after_first or self.seconds
        return self.seconds[0] + (times - 1) * least, self.seconds[1] + (times - 1) * most

    def is_streamed(self, memory: str, limit: int) -> bool:
        """Whether its blocks are read from disk in a mode of MODES and a memory limit in bytes."""
        too_large = memory == "auto" and self.weights + self.activation_bytes > limit
        return self.streamed < self.weights and (memory == "streamed" or too_large)


@dataclass(frozen=True)
class Plan:
    """The memory plan of an image.

    Attributes:
        stages: the stages, in the order in which they run.
        limit: the bytes of memory that they may take.
        memory: the mode asked for, one of MODES.
    """

    stages: tuple[Stage, ...]
    limit: int
    memory: str = "auto"

    def needed(self, stage: Stage) -> int:
        """Bytes that a stage takes while no other one is loaded."""
        streamed = stage.is_streamed(self.memory, self.limit)
        return (stage.streamed if streamed else stage.weights) + stage.activation_bytes

    @property
    def resident(self) -> int:
        """Bytes where all stages stay loaded, but for the language model, which is there before the text encoder."""
        own = {stage.name: stage.weights for stage in self.stages}
        replaced = own["text encoder"] if LANGUAGE_MODEL in own else 0
        most = max(stage.activation_bytes for stage in self.stages)
        return sum(stage.weights for stage in self.stages) - replaced + most

    @property
    def mode(self) -> str:
        """The mode: the one that "auto" chooses, else the one asked for."""
        if self.memory != "auto":
            return self.memory
        if self.resident <= self.limit:
            return "resident"
        return "streamed" if any(stage.is_streamed("auto", self.limit) for stage in self.stages) else "staged"

    @property
    def peak(self) -> int:
        """The most bytes that are in memory at one time."""
        return self.resident if self.mode == "resident" else max(map(self.needed, self.stages))

    def seconds(self, prompts: int = 1, passes: int = 1) -> tuple[float, float] | None:
        """(least, most) seconds of an image with so many prompts, the negative one among them, and passes through the
        transformer, all weights loaded; None where the machine's speed is not known. Those of the language model, which
        depend on how much it writes, are not among them.
        """
        times = {"text encoder": prompts, "transformer": passes}
        least = most = 0.0
        for stage in (own for own in self.stages if own.name != LANGUAGE_MODEL):
            seconds = stage.seconds_of(times.get(stage.name, 1))
            if seconds is None:
                return None
            least, most = least + seconds[0], most + seconds[1]
        return least, most

    def denoising_seconds(self, passes: int) -> tuple[float, float] | None:
        """The same of the passes through the transformer alone."""
        return next(stage for stage in self.stages if stage.name == "transformer").seconds_of(passes)

    def __str__(self) -> str:
        """A table, in GB of 10^9 bytes, and what will be done."""
        return "\n".join([*self.table(), f"all together {self.resident / 1e9:.2f} GB", self.summary()])

    def table(self) -> list[str]:
        """Lines: a head, and one for each stage, with what it takes once where the machine's speed is known."""
        rows = [["stage", "weights", "activations", "alone", "streamed"]]
        if self.seconds() is not None:
            rows[0].append("seconds")
        for stage in self.stages:
            alone, streamed = stage.weights + stage.activation_bytes, stage.streamed + stage.activation_bytes
            sizes = [f"{size / 1e9:.2f}" for size in (stage.weights, stage.activation_bytes, alone, streamed)]
            rows.append([stage.name, *sizes, *([] if stage.seconds is None else [format_range(*stage.seconds)])])
        return [f"{row[0]:16}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]

    def summary(self) -> str:
        """One line: the mode, what it needs, and what there is."""
        streamed = [stage.name for stage in self.stages if stage.is_streamed(self.memory, self.limit)]
        what = f" ({', '.join(streamed)})" if self.mode == "streamed" else ""
        line = f"memory: {self.mode}{what}, about {self.peak / 1e9:.2f} of {self.limit / 1e9:.2f} GB"
        if self.peak <= self.limit:
            return line
        if self.mode == "streamed":
            return f"{line}, which is too much; a smaller image or fewer bits (--quantize) needs less"
        return f"{line}, which is too much; a smaller image, fewer bits (--quantize) or --memory streamed needs less"


def format_range(least: float, most: float) -> str:
    """Two durations as a range: "2.6-2.9"."""
    ends = [f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f}" for value in (least, most)]
    return "-".join(dict.fromkeys(ends))


class TrainingPlan(Plan):
    """The memory plan of training. Prompts and images are encoded before, and the encoders are unloaded then."""

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
    """The stage of a module that computes in ``dtype``; its weights are not read.

    Args:
        activations: bytes of activations beside the largest unpacked matrix.
        attention: bytes of activations during attention, when no matrix is unpacked; the larger of both counts.
    """
    activation_bytes = max(activations + largest_dense_bytes(module, dtype), attention)
    return Stage(name, weight_bytes(module), streamed_bytes(module), activation_bytes)


def make_plan(
    text_encoder: Qwen3TextEncoder,
    transformer: FluxKlein,
    autoencoder: AutoEncoder,
    workload: Workload,
    language_model: Qwen3LanguageModel | None = None,
    *,
    dtype: mx.Dtype,
    limit: int,
    memory: str = "auto",
) -> Plan:
    """Plan one image; the modules' weights are not read.

    Args:
        language_model: writes the prompt out before, if it is given.
        dtype: the dtype of the transformer's activations; see device.stage_dtype for the text encoder's, and the
            autoencoder's is that of its weights.
        limit: the bytes of memory that the stages may take.
        memory: one of MODES.
    """
    params, config = transformer.params, autoencoder.config
    text_dtype, image_dtype = stage_dtype("text_encoder", dtype), autoencoder.dtype
    height, width, sizes = workload.height, workload.width, workload.reference_sizes
    encoding = text_encoder_bytes(text_encoder.config, workload.text, text_dtype)
    stages = [stage_of("text encoder", text_encoder, text_dtype, encoding)]
    if language_model is not None:
        writing = language_model_bytes(
            language_model.config, len(language_model.model.layers), WRITTEN_TOKENS, text_dtype
        )
        stages.insert(0, stage_of(LANGUAGE_MODEL, language_model, text_dtype, writing))
    tiled: dict[str, Callable[[int], int]] = {}  # activations with tiles of so many bytes
    if sizes:
        most = max(sizes, key=math.prod)
        tiled["references"] = partial(encoder_bytes, config, *most, image_dtype)
        stages.append(stage_of("references", autoencoder.encoder, image_dtype, tiled["references"](TILE_BYTES)))
    caches = 2 if workload.caches_steps else 0
    passes = [transformer_bytes(params, one, dtype) for one in workload.passes(caches)]
    if workload.kv:
        passes.append(transformer_bytes(params, Pass(0, 0, workload.kv), dtype))
    pinned = kv_bytes(params, workload.kv, dtype)
    activations, attention = (max(parts) + pinned for parts in zip(*passes, strict=True))
    stages.append(stage_of("transformer", transformer, dtype, activations, attention))
    tiled["decoder"] = lambda tile_bytes: decoder_bytes(config, height, width, image_dtype, tile_bytes) + pinned
    stages.append(stage_of("decoder", autoencoder.decoder, image_dtype, tiled["decoder"](TILE_BYTES)))
    stages = _with_largest_tiles(Plan(tuple(stages), limit, memory), tiled)
    known = {own: known_speeds(own) for own in {text_dtype, dtype, image_dtype}}
    if any(known.values()):
        work = image_work(text_encoder, transformer, autoencoder, workload, dtype)
        later = work_after_first(transformer, workload, dtype)
        own_dtypes = {"text encoder": text_dtype, "transformer": dtype}
        for k, stage in enumerate(stages):
            speeds = known[own_dtypes.get(stage.name, image_dtype)]
            if speeds is not None and stage.name != LANGUAGE_MODEL:
                after = later.seconds(speeds) if later is not None and stage.name == "transformer" else None
                stages[k] = replace(stage, seconds=work[stage.name].seconds(speeds), seconds_after_first=after)
    return Plan(tuple(stages), limit, memory)


def _with_largest_tiles(plan: Plan, tiled: Mapping[str, Callable[[int], int]]) -> list[Stage]:
    """The stages of a plan with the smallest tiles, in tiles as large as fit beside the weights that are loaded."""

    def enlarged(stage: Stage) -> Stage:
        weights = sum(own.weights for own in plan.stages) if plan.mode == "resident" else stage.weights
        needed = tiled[stage.name]
        return replace(stage, activation_bytes=needed(largest_tile(needed, plan.limit - weights)))

    return [enlarged(stage) if stage.name in tiled else stage for stage in plan.stages]


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
    validates: bool,
    limit: int,
) -> TrainingPlan:
    """Plan the training of a LoRA; the modules' weights are not read.

    Args:
        dtype: the dtype of the transformer's activations.
        shapes: (height, width) of each image and of its references, as they are trained on.
        length: tokens of a caption.
        batch: images in a pass.
        adapters: parameters of the LoRA.
        averages: whether the LoRA has a moving average (EMA).
        recompute: whether blocks are computed again in the backward pass (gradient checkpointing).
        validates: whether validation images are generated in between.
        limit: the bytes of memory that training may take.
    """
    image_dtype, config, params = autoencoder.dtype, autoencoder.config, transformer.params
    text_dtype = stage_dtype("text_encoder", dtype)
    stages = [
        stage_of("text encoder", text_encoder, text_dtype, text_encoder_bytes(text_encoder.config, length, text_dtype))
    ]
    encoding = max(encoder_bytes(config, *size, image_dtype) for shape in shapes for size in shape)
    stages.append(stage_of("images", autoencoder.encoder, image_dtype, encoding))
    tokens = length + max(sum(h * w for h, w in shape) for shape in shapes) // 256
    unpacked = largest_dense_bytes(transformer, dtype)
    activation_bytes = unpacked + training_bytes(params, tokens, dtype, batch, recompute=recompute, packed=unpacked > 0)
    if validates:
        height, width = max((shape[0] for shape in shapes), key=lambda size: size[0] * size[1])
        decoding = weight_bytes(autoencoder.decoder) + decoder_bytes(config, height, width, image_dtype)
        activation_bytes = max(activation_bytes, decoding)
    # In float32: the weights, their gradients twice (of a pass and of the step), the optimizer's two moments.
    weights = weight_bytes(transformer) + (6 if averages else 5) * adapters * mx.float32.size
    stages.append(Stage("training", weights, weights, activation_bytes))
    return TrainingPlan(tuple(stages), limit)
