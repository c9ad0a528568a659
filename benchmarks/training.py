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
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.common import TINY, loaded, machine, process_peak_gb, randomized
from flux2_mlx import AutoEncoder, FluxKlein, FluxKleinParams, Quantization, Qwen3TextEncoder, image_ids, text_ids
from flux2_mlx.device import machine_memory, on_gpu, weights_of, within
from flux2_mlx.options import DTYPES
from flux2_mlx.quantization.layers import quantize
from flux2_mlx.quantization.recipes import mixed_precision
from flux2_mlx.runtime.activations import training_bytes
from flux2_mlx.runtime.plan import Stage
from flux2_mlx.sampling.latents import PIXELS_PER_TOKEN
from flux2_mlx.training.dataset import Example, Size
from flux2_mlx.training.latent_cache import Encoded
from flux2_mlx.training.options import DTYPES as TRAINED
from flux2_mlx.training.options import TrainingOptions
from flux2_mlx.training.run import plan_of
from flux2_mlx.training.trainer import Trainer

MFLUX = "0.24.0"
INSTALL = f"pip install --no-deps mflux=={MFLUX} && pip install matplotlib opencv-python piexif platformdirs regex "
INSTALL += "requests toml torch tqdm transformers"
COLUMNS = ("planned GB", "measured GB", "ratio", "scores GB", "seconds")


class Drawn:
    """Random numbers in the place of training.Encoded's files."""

    def __init__(self, params: FluxKleinParams, length: int, dtype: mx.Dtype):
        self.params, self.length = params, length
        self.txt = mx.random.normal((1, length, params.txt_embed_dim)).astype(dtype)

    def prompt(self, text: str) -> mx.array:
        return self.txt

    def picture(self, path: Path, size: Size) -> mx.array:
        tokens = size[0] * size[1] // PIXELS_PER_TOKEN**2
        return mx.random.normal((1, tokens, self.params.in_channels), key=mx.random.key(0))


def planned(model: FluxKlein, options: TrainingOptions, length: int) -> Stage:
    """Training, as flux2-lora plans it. The encoders' stages, which are others, may be of any size."""
    modules = Qwen3TextEncoder(TINY[1]), model, AutoEncoder(TINY[2])
    size = options.resolution, options.resolution
    return plan_of(modules, options, DTYPES[str(options.dtype)], length, [(size,)], 0).stages[-1]


def scores_bytes(params: FluxKleinParams, options: TrainingOptions, tokens: int) -> int:
    """What the plan has for attention's scores: all that it does not have for heads so wide that there are none."""
    if on_gpu():
        return 0
    none = SimpleNamespace(**{name: getattr(params, name) for name in ("hidden_size", "mlp_hidden")})
    none.depth, none.depth_single, none.num_heads = params.depth, params.depth_single, 0
    shapes = tokens, DTYPES[str(options.dtype)], options.batch_size
    given = partial(training_bytes, again=options.grad_checkpoint, packed=False)
    return given(params, *shapes) - given(cast(FluxKleinParams, none), *shapes)


def packed(model: FluxKlein, options: TrainingOptions) -> FluxKlein:
    how = Quantization.parse(options.quantize) if options.quantize else None
    if how is not None:
        quantize(model, mixed_precision(model, how))
    return model


def trainer_of(model: FluxKlein, options: TrainingOptions, encoded: Drawn) -> Trainer:
    """As flux2-lora makes it, all of it in memory. From how many rows a layer is unpacked is not measured: only the
    modulations have few.
    """
    loaded(model)
    size = options.resolution, options.resolution
    examples = [Example(Path(str(k)), "a red circle", (), size, ()) for k in range(options.batch_size)]
    trainer = Trainer(model, options, examples, cast(Encoded, encoded))
    mx.eval(model.parameters(), trainer.optimizer.state, encoded.txt)
    mx.clear_cache()
    return trainer


def timed(step: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and the most bytes in memory."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start, mx.get_peak_memory()


# ------------------------------------------------------------------------------------------------------- memory


def memory(params: FluxKleinParams, options: TrainingOptions, length: int) -> tuple[dict[str, float], int]:
    """A step's figures, and its bytes beside the plan's weights, gradients and moments."""
    dtype, tokens = DTYPES[str(options.dtype)], length + (options.resolution // PIXELS_PER_TOKEN) ** 2
    before = mx.get_active_memory()
    model = packed(cast(FluxKlein, randomized(FluxKlein(params), dtype)), options)
    plan = planned(model, options, length)
    trainer = trainer_of(model, options, Drawn(params, length, dtype))
    with within(before + plan.weights + plan.working, plan.working):
        seconds, peak = timed(trainer.take_step)
    figures = figures_of(plan, peak - before, scores_bytes(params, options, tokens))
    return figures | {"seconds": seconds}, peak - before - plan.weights


def figures_of(plan: Stage, measured: float, scores: int) -> dict[str, float]:
    needed = plan.weights + plan.working
    return {
        "planned_gb": needed / 1e9,
        "measured_gb": measured / 1e9,
        "ratio": measured / needed,
        "scores_gb": scores / 1e9,
    }


def tell(name: str, figures: dict[str, float]) -> None:
    print(f"{name:24}" + "".join(f"{value:13.3f}" for value in figures.values()), flush=True)


# -------------------------------------------------------------------------------------------------------- mflux


def missing() -> str | None:
    """Why mflux cannot be measured here, and what to install; None where it can."""
    try:
        from mflux.models.common.training.trainer import TrainingTrainer  # noqa: F401

        if version("mflux") != MFLUX:
            raise ImportError(f"this is mflux {version('mflux')}")
    except ImportError as error:
        return f"--against mflux: {error}; install it: {INSTALL}"
    return None


def mflux_transformer(model: FluxKlein, dtype: mx.Dtype) -> nn.Module:
    """mflux's transformer, with the very arrays of this library's weights."""
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer

    ModelConfig.precision, params = dtype, model.params
    peer = Flux2Transformer(
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single,
        attention_head_dim=params.head_dim,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.txt_embed_dim,
        timestep_guidance_channels=params.timestep_channels,
        mlp_ratio=params.mlp_ratio,
        axes_dims_rope=params.axes_dims_rope,
        rope_theta=params.rope_theta,
    )
    peer.load_weights([(mflux_name(name), array) for name, array in weights_of(model).items()])
    for path, layer in peer.named_modules():
        if re.search(r"norm_(added_)?[qk]$", path):
            layer.eps = params.eps  # the checkpoint's; its own is 1e-5
    return cast(nn.Module, peer)


def mflux_name(name: str) -> str:
    return re.sub(r"(?<=attn\.to_out)\.0|timestep_embedder\.", "", name)


def mflux_step(peer: nn.Module, paths: Sequence[str], options: TrainingOptions, encoded: Drawn) -> Callable[[], None]:
    """A step of mflux's training."""
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.training.dataset.batch import Batch, DataItem
    from mflux.models.common.training.lora.target_injector import inject_lora_targets
    from mflux.models.common.training.optimization.optimizer import Optimizer
    from mflux.models.common.training.state.training_spec import (
        LoraLayersSpec,
        LoraTargetSpec,
        OptimizerSpec,
        TrainingLoopSpec,
        TrainingSpec,
    )
    from mflux.models.common.training.trainer import TrainingTrainer
    from mflux.models.flux2.training_adapter.flux2_base_training_adapter import Flux2BaseTrainingAdapter
    from mflux.models.flux2.training_adapter.flux2_training_adapter import Flux2TrainingAdapter

    targets = [LoraTargetSpec(mflux_name(path), options.rank) for path in paths]
    side, rate = options.resolution, options.learning_rate
    spec = TrainingSpec(
        model="flux2-klein-base-4b",
        model_path=None,
        seed=options.seed,
        steps=40,
        guidance=1.0,
        quantize=options.quantize,
        training_loop=TrainingLoopSpec(num_epochs=1, batch_size=options.batch_size),
        optimizer=OptimizerSpec("AdamW", rate, max_grad_norm=options.clip),
        checkpoint=None,
        monitoring=None,
        lora_layers=LoraLayersSpec(targets),
        statistics=None,
        data=[],
        gradient_checkpointing=options.grad_checkpoint,
    )
    inject_lora_targets(peer, targets)
    whole = nn.Module()
    whole.transformer, whole.vae, whole.text_encoder = peer, nn.Module(), nn.Module()
    adapter = Flux2TrainingAdapter.__new__(Flux2TrainingAdapter)  # its own __init__ reads a checkpoint
    config = ModelConfig.flux2_klein_base_4b()
    Flux2BaseTrainingAdapter.__init__(adapter, model_config=config, quantize=None, model_factory=lambda *_: whole)
    places = {"text_ids": text_ids(encoded.length), "img_ids": image_ids(side, side)}
    clean, given = encoded.picture(Path(), (side, side)).astype(encoded.txt.dtype), {"prompt_embeds": encoded.txt}
    items = [DataItem(k, "", "", clean, given | places, side, side) for k in range(options.batch_size)]
    optimizer, rng = Optimizer.from_spec(spec), random.Random(options.seed)
    loaded(peer)
    mx.eval(clean, given, places)

    class Once(list[Any]):
        """Its iterator over batches, of which there is one."""

        num_iterations = 1

        def total_number_of_steps(self) -> int:
            return 1

    state = SimpleNamespace(
        iterator=Once([Batch(items, rng)]),
        optimizer=optimizer,
        should_generate_image=lambda _: False,
        should_save=lambda _: False,
        save=lambda *_: None,
    )
    return lambda: TrainingTrainer.train(adapter=adapter, training_spec=spec, training_state=state)


def compared(model: FluxKlein, peer: nn.Module, encoded: Drawn, side: int) -> float:
    """The relative error of mflux's velocity to this library's."""
    x, places = encoded.picture(Path(), (side, side)), (text_ids(encoded.length), image_ids(side, side))
    rope = FluxKlein.compute_rope(*places, model.params.axes_dims_rope, model.params.rope_theta)
    ours = model.forward_with_rope(x, encoded.txt, mx.array([0.7]), *rope).astype(mx.float32)
    theirs = peer(x.astype(encoded.txt.dtype), encoded.txt, mx.array(700.0), places[1], places[0]).astype(mx.float32)
    return float(np.array(mx.linalg.norm(ours - theirs) / mx.linalg.norm(ours)))


def against(params: FluxKleinParams, options: TrainingOptions, length: int, repeats: int) -> dict[str, Any]:
    """Seconds and peak memory of both, which take turns."""
    dtype = DTYPES[str(options.dtype)]
    model, encoded = cast(FluxKlein, randomized(FluxKlein(params), dtype)), Drawn(params, length, dtype)
    peer = mflux_transformer(model, dtype)
    error = compared(model, peer, encoded, options.resolution)
    if error > (1e-4 if dtype == mx.float32 else 0.05):
        raise SystemExit(f"mflux computes another velocity from the same weights: relative error {error:.1e}")
    if options.quantize:
        nn.quantize(peer, bits=int(options.quantize))
    plan = planned(packed(model, options), options, length)
    trainer = trainer_of(model, options, encoded)

    def step() -> None:
        with within(machine_memory(), plan.working):  # as flux2-lora does
            trainer.take_step()

    steps = {"flux2_mlx": step, "mflux": mflux_step(peer, list(trainer.adapters), options, encoded)}
    del model, peer
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    beside = dict.fromkeys(steps, 0)
    for _ in range(repeats + 1):
        for name, own in steps.items():
            before = mx.get_active_memory()
            duration, peak = timed(own)
            seconds[name].append(duration)
            beside[name] = max(beside[name], peak - before)
    rows = {
        name: {
            "median_s": statistics.median(seconds[name][1:]),
            "min_s": min(seconds[name][1:]),
            "steps_per_s": 1 / statistics.median(seconds[name][1:]),
            "beside_weights_gb": beside[name] / 1e9,
        }
        for name in steps
    }
    print(f"\n{'':24}{'median s':>13}{'min s':>13}{'steps a s':>13}{'beside GB':>13}")
    for name, figures in rows.items():
        tell(name, figures)
    ratio = {key: rows["flux2_mlx"][key] / rows["mflux"][key] for key in rows["mflux"]}
    tell("flux2_mlx over mflux", ratio)
    return {**rows, "ratio": ratio, "error": error, "mflux": version("mflux")}


# --------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
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
    parser.add_argument("--against", choices=("mflux",))
    parser.add_argument("--repeats", type=int, default=3, help="with --against, after one that warms up (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args(argv)
    few, more = arguments.depth_single
    if not 0 < few < more:
        parser.error(f"--depth-single takes a number of blocks and a larger one, got {few} and {more}")
    reason = missing() if arguments.against else None
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
    length, full = arguments.text_length, FluxKleinParams.klein_4b()
    width = TINY[0] if arguments.tiny else full

    def at(depth: int, depth_single: int) -> FluxKleinParams:
        return replace(width, depth=depth, depth_single=depth_single)

    print(f"{'blocks':24}" + "".join(f"{column:>13}" for column in COLUMNS))
    depths, beside = {}, []
    for depth_single in (few, more):
        name = f"{arguments.depth} and {depth_single}"
        depths[name], bytes_beside = memory(at(arguments.depth, depth_single), options, length)
        beside.append(bytes_beside)
        tell(name, depths[name])
    each = (beside[1] - beside[0]) / (more - few)
    whole = at(full.depth, full.depth_single)
    working = beside[0] + each * (full.depth + full.depth_single - arguments.depth - few)
    model = FluxKlein(whole)
    model.set_dtype(DTYPES[arguments.dtype])
    plan = planned(packed(model, options), options, length)
    tokens = length + (arguments.size // PIXELS_PER_TOKEN) ** 2
    scaled = figures_of(plan, plan.weights + working, scores_bytes(whole, options, tokens))
    name = f"{full.depth} and {full.depth_single}, scaled"
    tell(name, scaled)
    fixed = beside[0] - each * (arguments.depth + few)
    print(
        f"scaled: {plan.weights / 1e9:.3f} GB of weights, gradients and moments, counted, {fixed / 1e9:.3f} GB beside "
        f"them and {each / 1e9:.4f} GB a block, measured"
    )
    report = {"benchmark": "training", "variant": vars(arguments), "depths": depths, "whole": scaled}
    if arguments.against:
        report["against"] = against(at(arguments.depth, few), options, length, arguments.repeats)
    print(json.dumps({**report, "process_peak_gb": process_peak_gb(), **machine()}))


if __name__ == "__main__":
    main()
