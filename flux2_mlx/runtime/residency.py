"""Residency: which stages are in memory. Stages alone loads, unloads, streams, reads ahead and adapts them.

A stage is a model of a checkpoint. It is built with lazy weights, brought into memory when it is first used, and goes
back to the checkpoint's files where another stage needs the room. Whoever needs a stage borrows it with ``use`` and
does not keep it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, RLock, Thread, current_thread
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..adapters.lora import Lora, check_scale, is_adapter, open_lora, set_adapters, with_fused
from ..bars import progress_bar
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import read_through
from ..checkpoints.load import (
    load_all,
    load_autoencoder,
    load_language_model,
    load_text_encoder,
    load_transformer,
    load_weights,
    needs_conversion,
)
from ..device import (
    clear_streams_at_end_of_thread,
    device_errors,
    memory_limit,
    stage_dtype,
    warn_of_tf32,
    weight_bytes,
)
from ..errors import DeviceError, InputError
from ..models.autoencoder import AutoEncoder, LatentStatistics
from ..models.flux2 import FluxKlein
from ..models.qwen3 import Qwen3TextEncoder
from ..quantization.layers import autotune
from ..quantization.spec import Quantization
from .activations import Pass, kv_bytes, largest_tile, transformer_bytes
from .plan import Stage, stage_of
from .stats import Stats
from .streaming import is_streamed, stream

LARGE = 10**9  # bytes of a stage from which quantizing it at every start is worth a warning
STATISTICS = "bn."  # the beginning of names of the latents' statistics
STAGES = ("text_encoder", "transformer", "autoencoder")
LANGUAGE_MODEL = "language_model"  # a stage that is opened once it is asked for; conditioning.enhance alone uses it


@dataclass(frozen=True)
class Need:
    """The bytes that a use of a stage takes beside its weights.

    Attributes:
        activations, attention: stage_of's, activations of the use and those during attention.
        pinned: what is in memory already and stays there, as keys and values of references.
    """

    activations: int
    attention: int = 0
    pinned: int = 0


class Stages:
    """The stages of a checkpoint and their residency.

    Attributes:
        checkpoint: the checkpoint of the weights; replaced when LoRAs are fused into it.
        dtype, vae_dtype: the transformer's dtype and the autoencoder's; see device.stage_dtype.
        quantize: how each stage is packed that the checkpoint holds dense.
        memory: what stays loaded, one of plan.MODES.
        memory_limit: bytes that loaded stages and their activations may take together.
        loras: adapters of the transformer by name.
        evict: called where memory is short though all other stages are unloaded, and when the transformer's weights
            change: its owner gives back what the transformer computed for calls to come.

    State of its own: ``_modules``, the stages by name, their weights lazy or loaded; ``_loaded``, of each stage the ids
    of the modules that are in memory (the whole stage, or encoder and decoder of the autoencoder); ``_thread``, of each
    stage the thread that opened it, since MLX evaluates lazy weights only in the thread that made them; ``_lock``, held
    by the thread whose turn it is; ``_bar`` and ``_shown``, the progress bar that is shown and what it says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: mx.Dtype,
        vae_dtype: mx.Dtype | None,
        quantize: Mapping[str, Quantization],
        memory: str,
        memory_limit: int,
        progress: bool,
    ):
        self.checkpoint = checkpoint
        self.dtype, self.vae_dtype = dtype, stage_dtype("autoencoder", dtype, vae_dtype)
        self.quantize = dict(quantize)
        self.memory = memory
        self.memory_limit = memory_limit
        self.progress = progress
        self.loras: dict[str, Lora] = {}
        self._lock = RLock()
        self._bar: Any = None
        self._shown = ""
        self.evict: Callable[[], None] = lambda: None
        self._modules: dict[str, nn.Module] = {}
        self._loaded: dict[str, set[int]] = {name: set() for name in (*STAGES, LANGUAGE_MODEL)}
        self._thread: dict[str, Thread] = {}
        with self.turn():
            warn_of_tf32()
            for name in STAGES:
                self._open(name)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The turn of one thread, in which others wait; MLX's streams end with the thread.

        Raises:
            DeviceError: where the GPU was stopped, or memory was too little. No stage is loaded then: what the GPU
                has left may be anything, and what comes next may need the room.
        """
        clear_streams_at_end_of_thread()
        with self._lock:
            try:
                with device_errors():
                    yield
            except DeviceError:
                if self.loaded():
                    self.unload()
                raise

    @property
    def text_encoder(self) -> Qwen3TextEncoder:
        return cast(Qwen3TextEncoder, self._modules["text_encoder"])

    @property
    def transformer(self) -> FluxKlein:
        return cast(FluxKlein, self._modules["transformer"])

    @property
    def autoencoder(self) -> AutoEncoder:
        return cast(AutoEncoder, self._modules["autoencoder"])

    # ------------------------------------------------------------------------------------------------ use

    @contextmanager
    def use(self, name: str, need: Need, stats: Stats, *, what: str, part: str = "") -> Iterator[Any]:
        """Lend a stage, loaded, and keep MLX to the memory limit meanwhile.

        Args:
            name: one of STAGES.
            need: the bytes of the use beside its weights.
            stats: counts the time and the peak under ``what``, and loading under "load".
            part: "encoder" or "decoder" of the autoencoder.

        Yields:
            the module.
        """
        with self.turn():
            activation_bytes = self.prepare(name, need, stats, part=part)
            with memory_limit(self.memory_limit, activation_bytes), stats.measure(what):
                yield self._module(name, part)

    @contextmanager
    def tiles(self, needed: Callable[[int], int]) -> Iterator[int]:
        """Within ``use`` of the autoencoder: the bytes of the largest tile that there is room for, and MLX kept to the
        memory limit with it.

        Args:
            needed: the activations' bytes with tiles of so many.
        """
        tile_bytes = largest_tile(needed, self.memory_limit - mx.get_active_memory())
        with memory_limit(self.memory_limit, needed(tile_bytes)):
            yield tile_bytes

    def prepare(self, name: str, need: Need, stats: Stats, *, part: str = "") -> int:
        """Bring a stage, or a part of one, into memory; other stages out of it as far as mode and limit say.

        What is too large even alone is streamed, if it has blocks, or else loaded with a UserWarning.

        Returns:
            the bytes of its activations, the largest unpacked matrix among them.
        """
        if not self.is_loaded(name, part):
            self.claim(name)
        dtype, module = self._dtype(name), self._module(name, part)
        stage = stage_of(name.replace("_", " "), module, dtype, need.activations, need.attention)
        streams = stage.is_streamed(self.memory, self.memory_limit - need.pinned)
        if self._loaded[name] and streams != is_streamed(module):  # an image of another size needs another mode
            self._open(name)
            module = self._module(name, part)
        weights, is_loaded = stage.streamed if streams else stage.weights, self.is_loaded(name, part)
        self._make_room(name, stage.activation_bytes + (weights if streams or not is_loaded else 0), need.pinned)
        if is_loaded:
            return stage.activation_bytes
        self._warn(name, stage, weights, need.pinned, streams=streams)
        self._load(name, part, stage, weights, stats, streams=streams)
        return stage.activation_bytes

    def claim(self, name: str) -> None:
        """Open a stage anew where another thread opened it, so that this one can evaluate its lazy weights."""
        if self._thread.get(name) is not current_thread():
            self._open(name)

    def latent_statistics(self) -> LatentStatistics:
        """The autoencoder's statistics of the latents, loaded."""
        if not self._loaded["autoencoder"]:
            self.claim("autoencoder")
        return load_all(self.autoencoder, lambda weight: weight.startswith(STATISTICS)).bn

    def _load(self, name: str, part: str, stage: Stage, weights: int, stats: Stats, *, streams: bool) -> None:
        """Read the weights of a stage or a part, or of a streamed stage those outside of its blocks. With a part of the
        autoencoder go the statistics of the latents, which encoder and decoder share.
        """
        dtype, module = self._dtype(name), self._module(name, part)
        wanted = (f"{part}.", STATISTICS) if part else ("",)
        loading = (
            stream(module, partial(self._built, name), dtype)
            if streams
            else load_weights(self._modules[name], lambda weight: weight.startswith(wanted))
        )
        with (
            self.bar(f"loading {stage.name}", weights, unit="B", unit_scale=True) as bar,
            memory_limit(self.memory_limit, 0),
            stats.measure("load"),
        ):
            try:
                for count in loading:
                    bar.update(count)
                if not streams:
                    autotune(module, dtype)
            except BaseException:
                self._open(name)  # so that no layer stays half converted
                raise
        mx.clear_cache()  # frees the buffers that weights were converted from
        self._loaded[name].add(id(module))

    def _warn(self, name: str, stage: Stage, weights: int, pinned: int, *, streams: bool) -> None:
        """Warn of what will be slow: too little memory, or weights that are converted in every pass or at every start.
        The last says the same of all stages, so that Python shows it once.
        """
        needed = weights + stage.activation_bytes + (mx.get_active_memory() if self.memory == "resident" else pinned)
        if needed > self.memory_limit:
            warnings.warn(
                f"the {stage.name} needs about {needed / 1e9:.1f} GB and this machine gives "
                f"{self.memory_limit / 1e9:.1f} GB; it will be slow, or fail, for want of memory",
                stacklevel=2,
            )
        is_converted = needs_conversion(self._modules[name])
        if streams and is_converted:
            warnings.warn(
                f"the {stage.name} is streamed and its weights are converted in every pass over them; "
                "python -m flux2_mlx.convert does it once",
                stacklevel=2,
            )
        elif is_converted and name in self.quantize and weights >= LARGE:
            warnings.warn(
                "weights are quantized as they are read, at every start; python -m flux2_mlx.convert with --quantize "
                "does it once",
                stacklevel=2,
            )

    def _make_room(self, name: str, wanted: int, pinned: int) -> None:
        """Unload other stages, as far as the mode and ``wanted`` bytes ask; then evict, if that is too little."""
        room = {"resident": math.inf, "auto": self.memory_limit}.get(self.memory, 0)
        for other in STAGES:
            if mx.get_active_memory() + wanted <= room:
                break
            if other != name and self._loaded[other]:
                self._open(other)
                mx.clear_cache()
        if not pinned and mx.get_active_memory() + wanted > self.memory_limit:
            self.evict()

    @contextmanager
    def reading_ahead(self, name: str) -> Iterator[None]:
        """Meanwhile read the files of a stage that is wanted next, unless it is loaded or they leave no room."""
        stop = Event()
        if not self._loaded[name]:
            files = self.checkpoint.sources[name].all_files
            room = self.memory_limit - mx.get_active_memory()
            Thread(target=read_through, args=(files, room, stop), daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    def unload(self, name: str | None = None) -> None:
        """Give a stage's memory back, or that of all; its weights are read again when it is next used."""
        with self.turn():
            for stage in STAGES if name is None else (name,):
                self._open(stage)
                if stage == "transformer":
                    self.evict()
            mx.clear_cache()

    def loaded(self) -> set[str]:
        """Which stages are in memory, whole or in part."""
        return {name for name in STAGES if self._loaded[name]}

    def is_loaded(self, name: str, part: str = "") -> bool:
        """Whether a stage, or a part of one, is in memory."""
        return id(self._module(name, part)) in self._loaded[name]

    @contextmanager
    def bar(self, what: str, total: int, **options: Any) -> Iterator[Any]:
        """A progress bar on standard error, unless ``progress`` is off. Within another one, as where the autoencoder is
        loaded for a first image of several, none is shown: the other one says ``what`` meanwhile.
        """
        outer = self._bar
        with progress_bar(what, total, shown=self.progress and outer is None, leave=False, **options) as bar:
            if outer is None:
                self._bar, self._shown = bar, what
            else:
                outer.set_description(what)
            try:
                yield bar
            finally:
                if outer is None:
                    self._bar = None
                else:
                    outer.set_description(self._shown)

    # ------------------------------------------------------------------------------------------------ room

    def transformer_stage(self, one: Pass) -> Stage:
        """The transformer as the stage of a pass."""
        return stage_of("transformer", self.transformer, self.dtype, *self.transformer_need(one))

    def transformer_need(self, one: Pass) -> tuple[int, int]:
        """Bytes of a pass: activations, and those of attention."""
        return transformer_bytes(self.checkpoint.transformer, one, self.dtype)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens in every block of the transformer."""
        return kv_bytes(self.checkpoint.transformer, tokens, self.dtype)

    def streams_transformer(self, one: Pass) -> bool:
        """Whether the transformer is streamed for such a pass."""
        return self.transformer_stage(one).is_streamed(self.memory, self.memory_limit)

    def fits(self, one: Pass) -> bool:
        """Whether a pass of several rows fits without unloading or streaming what a pass of one row leaves loaded."""
        limit = self.memory_limit - self.kv_bytes(one.kv)
        stage = self.transformer_stage(replace(one, rows=1))
        weights = stage.streamed if stage.is_streamed(self.memory, limit) else stage.weights
        others = self.loaded() - {"transformer"}
        others_bytes = sum(weight_bytes(self._modules[name]) for name in others)
        needed = others_bytes + weights + stage.activation_bytes
        if self.memory in ("staged", "streamed") or (self.memory == "auto" and needed > limit):
            others_bytes = 0
        return others_bytes + weights + self.transformer_stage(one).activation_bytes <= limit

    # ------------------------------------------------------------------------------------------------ adapters

    def set_loras(self, loras: Mapping[str, Lora]) -> None:
        """Generate with these LoRAs and no others: fused into the weights, which are then read again, or beside them.

        Raises:
            CheckpointError: for fusing into weights that the checkpoint holds packed; nothing changes then.
        """
        with self.turn():
            fused = tuple(lora for lora in loras.values() if lora.merge)
            if fused != self.checkpoint.sources["transformer"].changes:
                checkpoint = with_fused(self.checkpoint, fused)
                checkpoint.sources["transformer"].weights()  # refuses packed weights now, before anything is unloaded
                self.checkpoint, self.loras = checkpoint, dict(loras)
                self.unload("transformer")
                return
            self.loras = dict(loras)
            self.evict()
            if self._loaded["transformer"] and not is_streamed(self.transformer):
                set_adapters(self.transformer, self._unfused())
                load_all(self.transformer, is_adapter)
            else:
                self._open("transformer")

    def load_lora(self, source: str, name: str, scale: float, *, merge: bool, partial: bool) -> Lora:
        """Open a LoRA and generate with it too; see Flux2Pipeline.load_lora.

        Raises:
            CheckpointError: for a file that does not fit, or fusing into packed weights.
            InputError: for a name that is taken, or a scale that is none.
        """
        if name in self.loras:
            raise InputError(f"a LoRA {name!r} is loaded; set_lora changes its scale, and name= names another")
        weights = self.checkpoint.sources["transformer"].weights
        model = FluxKlein(self.checkpoint.transformer)
        lora = open_lora(source, model, weights, scale=scale, merge=merge, partial=partial)
        self.set_loras({**self.loras, name: lora})
        return lora

    def scale_lora(self, name: str, scale: float) -> None:
        """Change the scale (strength) of a LoRA.

        Raises:
            InputError: for a name that is not loaded, or a scale that is none.
        """
        check_scale(scale)
        self.set_loras({**self.loras, name: replace(self._lora(name), scale=float(scale))})

    def unload_lora(self, name: str | None = None) -> None:
        """Generate without a LoRA again, or without any.

        Raises:
            InputError: for a name that is not loaded.
        """
        if name is not None:
            self._lora(name)
        self.set_loras({} if name is None else {other: lora for other, lora in self.loras.items() if other != name})

    def _lora(self, name: str) -> Lora:
        if name not in self.loras:
            raise InputError(f"no LoRA {name!r} is loaded, only {', '.join(self.loras) or 'none'}")
        return self.loras[name]

    def _unfused(self) -> list[Lora]:
        return [lora for lora in self.loras.values() if not lora.merge]

    # ------------------------------------------------------------------------------------------------ modules

    def _module(self, name: str, part: str) -> nn.Module:
        parts: dict[str, nn.Module] = {"encoder": self.autoencoder.encoder, "decoder": self.autoencoder.decoder}
        return parts[part] if part else self._modules[name]

    def _dtype(self, name: str) -> mx.Dtype:
        return stage_dtype(name, self.dtype, self.vae_dtype)

    def _open(self, name: str) -> None:
        """Build a stage with lazy weights; the weights of an earlier build are freed."""
        self._modules[name] = self._built(name)
        self._loaded[name] = set()
        self._thread[name] = current_thread()

    def _built(self, name: str) -> Any:
        """A stage's module with lazy weights."""
        dtype, spec = self._dtype(name), self.quantize.get(name)
        if name == "autoencoder":
            return load_autoencoder(self.checkpoint, dtype)
        if name == "text_encoder":
            return load_text_encoder(self.checkpoint, dtype, spec)
        if name == LANGUAGE_MODEL:
            return load_language_model(self.checkpoint, dtype, self.quantize.get("text_encoder"))
        transformer = load_transformer(self.checkpoint, dtype, spec)
        set_adapters(transformer, self._unfused())
        return transformer
