"""Does training take what the plan says, and how long is a step? python -m benchmarks.training [--against mflux]

The step of flux2-lora (training.Trainer: loss, gradients, clipping, AdamW), of klein's full width with few blocks in
random weights, within the memory that its own plan asks for. The whole klein-base-4b is scaled from two depths: what a
step takes beside weights, gradients and moments is a line over the number of blocks, since each of them keeps its
input, and the rest is taken by one block at a time (or, with --no-grad-checkpoint, by each); to where that line is at
25 blocks are added the weights, gradients and moments of the whole model, which are counted, not measured. Attention's
scores, which the CPU backend writes out in the backward pass and a fused kernel does not, are told apart, as many as
the plan has of them.

--against mflux also trains the smaller model with mflux's own loop, TrainingTrainer.train, one step a call: the same
weights, targets, rank, clipping and optimizer. They take turns, so that the ratio of their seconds means something on a
machine that others use; there this library has all of the machine's memory to compute ahead in, as flux2-lora has.
mflux packs all layers alike, this library a few of them finer. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.common import (
    FIGURES,
    TINY,
    loaded,
    pack,
    print_json,
    print_row,
    randomized,
    ratio,
    rope_of,
    take_turns,
    velocity,
)
from benchmarks.contenders import MLX_PEERS, TRAINERS, missing, peer_transformer
from flux2_mlx import AutoEncoder, FluxKlein, FluxKleinParams, Qwen3TextEncoder, image_ids, text_ids
from flux2_mlx.device import machine_memory, memory_limit, on_gpu
from flux2_mlx.options import DTYPES
from flux2_mlx.runtime.activations import training_bytes
from flux2_mlx.runtime.plan import Stage
from flux2_mlx.sampling.latents import PIXELS_PER_TOKEN
from flux2_mlx.training.dataset import Example, Size
from flux2_mlx.training.latent_cache import LatentCache
from flux2_mlx.training.options import DTYPES as TRAINED
from flux2_mlx.training.options import TrainingOptions
from flux2_mlx.training.run import plan_training
from flux2_mlx.training.trainer import Trainer

COLUMNS = ("planned GB", "measured GB", "ratio", "scores GB", "seconds")


class Drawn:
    """Random numbers in the place of training.latent_cache.LatentCache's files."""

    def __init__(self, params: FluxKleinParams, length: int, dtype: mx.Dtype):
        self.params, self.length = params, length
        self.txt = mx.random.normal((1, length, params.txt_embed_dim)).astype(dtype)

    def prompt_embeds(self, text: str) -> mx.array:
        return self.txt

    def latents(self, path: Path, size: Size) -> mx.array:
        tokens = size[0] * size[1] // PIXELS_PER_TOKEN**2
        return mx.random.normal((1, tokens, self.params.in_channels), key=mx.random.key(0))


def planned(model: FluxKlein, options: TrainingOptions, length: int) -> Stage:
    """Training, as flux2-lora plans it. The encoders' stages, which are others, may be of any size."""
    modules = Qwen3TextEncoder(TINY[1]), model, AutoEncoder(TINY[2])
    size = options.resolution, options.resolution
    return plan_training(modules, options, DTYPES[str(options.dtype)], length, [(size,)], 0).stages[-1]


def scores_bytes(params: FluxKleinParams, options: TrainingOptions, tokens: int) -> int:
    """What the plan has for attention's scores: all that it does not have for heads so wide that there are none."""
    if on_gpu():
        return 0
    none = SimpleNamespace(**{name: getattr(params, name) for name in ("hidden_size", "mlp_hidden")})
    none.depth, none.depth_single, none.num_heads = params.depth, params.depth_single, 0
    shapes = tokens, DTYPES[str(options.dtype)], options.batch_size
    given = partial(training_bytes, recompute=options.grad_checkpoint, packed=False)
    return given(params, *shapes) - given(cast(FluxKleinParams, none), *shapes)


def packed(model: FluxKlein, options: TrainingOptions) -> FluxKlein:
    return cast(FluxKlein, pack(model, str(options.quantize) if options.quantize else None))


def trainer_of(model: FluxKlein, options: TrainingOptions, encoded: Drawn) -> Trainer:
    """As flux2-lora makes it, all of it in memory. From how many rows a layer is unpacked is not measured: only the
    modulations have few.
    """
    loaded(model)
    size = options.resolution, options.resolution
    examples = [Example(Path(str(k)), "a red circle", (), size, ()) for k in range(options.batch_size)]
    trainer = Trainer(model, options, examples, cast(LatentCache, encoded))
    mx.eval(model.parameters(), trainer.optimizer.state, encoded.txt)
    mx.clear_cache()
    return trainer


# ------------------------------------------------------------------------------------------------------- memory


def memory(params: FluxKleinParams, options: TrainingOptions, length: int) -> tuple[dict[str, float], int]:
    """A step's figures, and its bytes beside the plan's weights, gradients and moments."""
    dtype, tokens = DTYPES[str(options.dtype)], length + (options.resolution // PIXELS_PER_TOKEN) ** 2
    before = mx.get_active_memory()
    model = packed(cast(FluxKlein, randomized(FluxKlein(params), dtype)), options)
    plan = planned(model, options, length)
    trainer = trainer_of(model, options, Drawn(params, length, dtype))
    with memory_limit(before + plan.weights + plan.activation_bytes, plan.activation_bytes):
        mx.reset_peak_memory()
        start = time.perf_counter()
        trainer.take_step()
        seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
    figures = figures_of(plan, peak - before, scores_bytes(params, options, tokens))
    return figures | {"seconds": seconds}, peak - before - plan.weights


def figures_of(plan: Stage, measured: float, scores: int) -> dict[str, float]:
    needed = plan.weights + plan.activation_bytes
    return {
        "planned_gb": needed / 1e9,
        "measured_gb": measured / 1e9,
        "ratio": measured / needed,
        "scores_gb": scores / 1e9,
    }


# -------------------------------------------------------------------------------------------------------- peers


def error_of(peer: nn.Module, model: FluxKlein, encoded: Drawn, side: int) -> float:
    """The relative error of a peer's velocity to this library's."""
    x, ids, txt = encoded.latents(Path(), (side, side)), image_ids(side, side), encoded.txt
    ours = velocity(model, x, txt, 0.7, rope_of(model.params, encoded.length, ids)).astype(mx.float32)
    theirs = peer(x.astype(txt.dtype), txt, mx.array(700.0), ids, text_ids(encoded.length)).astype(mx.float32)
    return float(np.array(mx.linalg.norm(ours - theirs) / mx.linalg.norm(ours)))


def against(name: str, params: FluxKleinParams, options: TrainingOptions, length: int, repeats: int) -> dict[str, Any]:
    """Seconds and peak memory of this library and a peer, which take turns."""
    dtype = DTYPES[str(options.dtype)]
    model, encoded = cast(FluxKlein, randomized(FluxKlein(params), dtype)), Drawn(params, length, dtype)
    peer = peer_transformer(name, model, dtype)
    error = error_of(peer, model, encoded, options.resolution)
    if error > (1e-4 if dtype == mx.float32 else 0.05):
        raise SystemExit(f"{name} computes another velocity from the same weights: relative error {error:.1e}")
    if options.quantize:
        nn.quantize(peer, bits=int(options.quantize))
    plan = planned(packed(model, options), options, length)
    trainer = trainer_of(model, options, encoded)

    def step() -> None:
        with memory_limit(machine_memory(), plan.activation_bytes):  # as flux2-lora does
            trainer.take_step()

    clean = encoded.latents(Path(), (options.resolution, options.resolution)).astype(dtype)
    runs = {"flux2_mlx": step, name: TRAINERS[name](peer, list(trainer.adapters), options, clean, encoded.txt)}
    del model, peer
    rows = take_turns(runs, repeats)
    print_row("", ("median s", "min s", "max s", "peak GB", "beside GB"))
    for row, figures in rows.items():
        print_row(row, (figures[key] for key in (*FIGURES, "beside_gb")))
    found = ratio(rows["flux2_mlx"], rows[name])
    found["beside_gb"] = rows["flux2_mlx"]["beside_gb"] / rows[name]["beside_gb"]
    print_row(f"flux2_mlx over {name}", (*(found.get(key) for key in FIGURES[:2]), "", "", found["beside_gb"]))
    return {**rows, "ratio": found, "error": error, name + " version": version(name)}


# --------------------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, TrainingOptions]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--depth", type=int, default=1, help="double blocks (%(default)s)")
    parser.add_argument("--depth-single", type=int, nargs=2, default=(2, 6), metavar=("FEW", "MORE"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quantize", type=int, default=4, metavar="BITS", help="0 for none (%(default)s)")
    parser.add_argument("--dtype", choices=TRAINED, default="float32")
    parser.add_argument("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--against", choices=tuple(MLX_PEERS))
    parser.add_argument("--repeats", type=int, default=3, help="with --against, after one that warms up (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args(argv)
    few, more = arguments.depth_single
    if not 0 < few < more:
        parser.error(f"--depth-single takes a number of blocks and a larger one, got {few} and {more}")
    if arguments.against and arguments.against not in TRAINERS:
        version = MLX_PEERS[arguments.against].version
        parser.error(f"{arguments.against} {version} cannot train FLUX.2; --against takes {', '.join(TRAINERS)} here")
    reason = missing(arguments.against) if arguments.against else None
    if reason:
        parser.exit(2, f"{reason}\n")
    options = TrainingOptions(
        data="",
        output="",
        quantize=arguments.quantize or None,
        dtype=arguments.dtype,
        resolution=arguments.size,
        batch_size=arguments.batch_size,
        rank=arguments.rank,
        grad_checkpoint=arguments.grad_checkpoint,
    )
    return arguments, options


def main(argv: Sequence[str] | None = None) -> None:
    arguments, options = parse(argv)
    few, more = arguments.depth_single
    length, full = arguments.text_length, FluxKleinParams.klein_4b()
    width = TINY[0] if arguments.tiny else full

    def at(depth: int, depth_single: int) -> FluxKleinParams:
        return replace(width, depth=depth, depth_single=depth_single)

    print_row("blocks", COLUMNS)
    depths, beside = {}, []
    for depth_single in (few, more):
        name = f"{arguments.depth} and {depth_single}"
        depths[name], bytes_beside = memory(at(arguments.depth, depth_single), options, length)
        beside.append(bytes_beside)
        print_row(name, depths[name].values())
    each = (beside[1] - beside[0]) / (more - few)
    whole = at(full.depth, full.depth_single)
    working = beside[0] + each * (full.depth + full.depth_single - arguments.depth - few)
    model = FluxKlein(whole)
    model.set_dtype(DTYPES[arguments.dtype])
    plan = planned(packed(model, options), options, length)
    tokens = length + (arguments.size // PIXELS_PER_TOKEN) ** 2
    scaled = figures_of(plan, plan.weights + working, scores_bytes(whole, options, tokens))
    print_row(f"{full.depth} and {full.depth_single}, scaled", scaled.values())
    fixed = beside[0] - each * (arguments.depth + few)
    print(
        f"scaled: {plan.weights / 1e9:.3f} GB of weights, gradients and moments, counted, {fixed / 1e9:.3f} GB beside "
        f"them and {each / 1e9:.4f} GB a block, measured"
    )
    report: dict[str, Any] = {"depths": depths, "whole": scaled}
    if arguments.against:
        shape = at(arguments.depth, few)
        report["against"] = against(arguments.against, shape, options, length, arguments.repeats)
    print_json("training", arguments, report)


if __name__ == "__main__":
    main()
