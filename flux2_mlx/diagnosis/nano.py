"""nano, the miniature in this package: its stages beside the CPU's, a call from a second thread, memory and plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.load import load_all, load_autoencoder, load_text_encoder, load_transformer
from ..conditioning.tokenizer import Qwen3Tokenizer
from ..device import on_gpu
from ..families import NANO
from ..models.flux2 import FluxKlein
from ..pipeline import Flux2Pipeline
from ..sampling.latents import image_ids, text_ids
from .arithmetic import UNIT, error_of, judge, noise, numbers, reference
from .findings import OK, REPORT_IT, WRONG, Finding

PROMPT = "a large red circle on the left, white background"
SIDE = 128  # pixels, as nano was trained
# The dtypes that a stage is computed in, and its error in UNIT of a dtype, as MLX's CPU backend has it in bfloat16:
# 0.0088, 0.014 to 0.016, 0.0060 and 0.0049. The transformer in float16 has 2.6 units.
HALF = (mx.float32, mx.bfloat16)
DTYPES = {"text encoder": HALF, "transformer": (*HALF, mx.float16), "encoder": HALF, "decoder": HALF}
UNITS = {"text encoder": 2.3, "transformer": 4.1, "encoder": 1.5, "decoder": 1.3}
ALLOWED = 4  # times the CPU's error: a GPU adds in another order, and fuses and rounds elsewhere

# Bytes at the most over those planned. Tests hold 1.1 on a CPU; a GPU frees what a command buffer used at its end.
OVER_PLAN = 1.25


class Nano:
    """nano's stages, each given what the one before it gives in float32 on the CPU."""

    def __init__(self, side: int = SIDE) -> None:
        self.side = side
        self.checkpoint = open_checkpoint(NANO)
        self._expected: dict[str, mx.array] = {}

    def inputs(self, stage: str) -> list[mx.array]:
        """What a stage is given."""
        if stage == "text encoder":
            return list(Qwen3Tokenizer(self.checkpoint.tokenizer)([PROMPT]))
        if stage == "encoder":
            return [drawing(self.side)]
        if stage == "decoder":
            return [self.expected("encoder")]
        txt, params = self.expected("text encoder"), self.checkpoint.transformer
        ids = text_ids(txt.shape[1]), image_ids(self.side, self.side)
        rope = FluxKlein.compute_rope(*ids, params.axes_dims_rope, params.rope_theta)
        return [noise(1, self.side**2 // 256, params.in_channels), txt, mx.array([0.9]), *rope]

    def expected(self, stage: str) -> mx.array:
        """What a stage gives in float32 on the CPU."""
        if stage not in self._expected:
            inputs = self.inputs(stage)
            with reference():
                self._expected[stage] = self.compute(stage, mx.float32, inputs)
        return self._expected[stage]

    def compute(self, stage: str, dtype: mx.Dtype, inputs: Sequence[mx.array]) -> mx.array:
        """What a stage gives for these inputs in a dtype on the default device."""
        if stage == "text encoder":
            out = load_all(load_text_encoder(self.checkpoint, dtype))(*inputs)
        elif stage == "transformer":
            out = load_all(load_transformer(self.checkpoint, dtype)).forward_with_rope(*inputs)
        else:
            out = load_all(load_autoencoder(self.checkpoint, dtype))[stage](*inputs)
        mx.eval(out)
        return out


def drawing(side: int) -> mx.array:
    """(1, side, side, 3): a square with an edge on two ramps."""
    down, across = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    square = np.where((abs(down) < 0.5) & (abs(across) < 0.5), 0.8, -0.8)
    return mx.array(np.stack([down, across, square], axis=-1)[None].astype(np.float32))


def check_stage(nano: Callable[[], Nano], stage: str, dtype: mx.Dtype) -> Finding:
    """A stage in a dtype on the default device beside float32 on the CPU."""
    expected, found = nano().expected(stage), nano().compute(stage, dtype, nano().inputs(stage))
    more = ""
    if stage == "decoder":
        more = f", {abs(numbers(found) - numbers(expected)).max() * 127.5:.2g} levels of 255 at most"
    return judge(error_of(found, expected), ALLOWED * UNITS[stage] * UNIT[dtype], more)


def check_thread(side: int = SIDE) -> Finding:
    """An image from a second thread, whose stages this one opened, beside the one from here."""
    pipe = Flux2Pipeline.from_pretrained(NANO, cache=False)

    def generate() -> np.ndarray:
        return np.asarray(pipe(PROMPT, seed=0, height=side, width=side).images[0], np.float32)

    here = generate()
    pipe.unload()
    with ThreadPoolExecutor(1) as pool:
        off = float(abs(pool.submit(generate).result() - here).max())
    words = f"its image is {off:.0f} levels of 255 off at most"
    return Finding(OK, words) if off <= 1 else Finding(WRONG, words, REPORT_IT)


def check_peak(side: int | None = None) -> Finding:
    """The most memory of an image beside the plan. A GPU frees memory once a command buffer, of which a large image's
    operations each fill one.
    """
    side = side or (1024 if on_gpu() else 256)
    pipe = Flux2Pipeline.from_pretrained(NANO, cache=False)
    mx.clear_cache()
    before, plan = mx.get_active_memory(), pipe.plan(side, side)
    pipe.memory_limit = plan.peak
    peak = max(pipe(PROMPT, seed=0, height=side, width=side).peak_bytes.values()) - before
    words = f"{side} x {side} took {peak / 1e6:.0f} MB of {plan.peak / 1e6:.0f} planned"
    if peak <= OVER_PLAN * plan.peak:
        return Finding(OK, words)
    return Finding(WRONG, words, f"give --memory-limit less of the memory, and {REPORT_IT}")
