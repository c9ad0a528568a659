"""Seconds and peak bytes of each part of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx


@dataclass
class Stats:
    """Seconds, and peak bytes of MLX arrays (weights included), of each part of a run.

    Parts: "load" (weights into memory), "enhance" (prompts written out), "text_encoder", "references", "denoise",
    "decode", and "preview", where a preview decoder decodes.

    Attributes:
        steps: how many of the images' steps were "computed", and how many "reused" earlier ones (First Block Cache).
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=lambda: {"computed": 0, "reused": 0})

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        mx.reset_peak_memory()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            self.peak_bytes[part] = max(self.peak_bytes.get(part, 0), mx.get_peak_memory())


def not_finite(place: str, dtype: str) -> str:
    """The message for values that are not finite at a place of the computation, with a wider dtype as the way out."""
    wider = {"float16": "try bfloat16", "bfloat16": "try float32"}.get(dtype)
    way_out = f"{wider} (--dtype, dtype=), and if that fails too, check" if wider else "check"
    return f"{place}: values are not finite in {dtype}; {way_out} the checkpoint's files"
