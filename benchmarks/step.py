"""How long does a stage take, how much memory, and what does an option change? Text encoder, step and decode, each
loaded alone and given what the one before it made.

    python -m benchmarks.step --model klein-4b --size 1024
    python -m benchmarks.step --random 4b --size 256 --steps 4 --repeats 0 --limit 23.6      # does all of it fit here?
    python -m benchmarks.step --random 4b --depth 1 --depth-single 4 --size 512 --stages step --quantize 4 --lora 32
    python -m benchmarks.step --random 9b --depth 1 --depth-single 3 --stages step --size 512 --reference 512 --kv

Each option adds variants: the same weights packed (--quantize), with a LoRA on every layer of the blocks (--lora), with
a reference in the step (--reference), beside the reference's cached keys and values, and the pass that caches them
(--kv), and of several images at once (--batch). Variants take turns, and their seconds are told as ratios too. Ends
with a line of JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.common import (
    FIGURES,
    Case,
    Figures,
    add_case_options,
    arrays_of,
    dtype_of_stage,
    encode_kv,
    model_of,
    packed_copy,
    print_json,
    print_row,
    process_peak_gb,
    put_lora,
    random_lora,
    ratio,
    rope_of,
    take_turns,
    velocity,
)
from flux2_mlx import FluxKlein, image_ids, unpack_latents
from flux2_mlx.device import weight_bytes
from flux2_mlx.sampling.samplers import euler_step
from flux2_mlx.sampling.schedules import flux2_sigmas

STAGES = ("text_encoder", "step", "decode")
COLUMNS = (*FIGURES, "beside_gb", "weights_gb")
Runs = dict[str, Callable[[], Any]]


# ------------------------------------------------------------------------------------------------------- variants


def encode_runs(model: Any, case: Case) -> Runs:
    ids = mx.random.randint(0, model.config.vocab_size, (1, case.text_length))
    return {"text_encoder": lambda: model(ids, mx.ones_like(ids))}


def decode_runs(model: Any, case: Case, x: mx.array) -> Runs:
    return {"decode": lambda: model.decoder(unpack_latents(model.bn.denormalize(x), case.height, case.width))}


def step_runs(model: Any, case: Case, txt: mx.array, arguments: argparse.Namespace) -> Runs:
    """--steps steps of each way to take them."""
    params, dtype, sigmas = case.params, case.dtype, flux2_sigmas(arguments.steps, case.tokens)
    own = image_ids(case.height, case.width)

    def noise(count: int) -> mx.array:
        return mx.random.normal((count, case.tokens, params.in_channels)).astype(dtype)

    def steps(x: mx.array, predict: Callable[[mx.array, float], mx.array]) -> Callable[[], mx.array]:
        def run() -> mx.array:
            latents = x
            for sigma, sigma_next in pairwise(sigmas):
                latents = euler_step(latents, predict(latents, sigma), sigma, sigma_next)
                mx.eval(latents)
            return latents

        return run

    alone, one = rope_of(params, case.text_length, own), noise(1)
    inputs: list[Any] = [alone, one]
    runs: Runs = {"step": steps(one, lambda x, sigma: velocity(model, x, txt, sigma, alone))}
    if arguments.reference:
        ids = image_ids(arguments.reference, arguments.reference, reference=0)
        clean = mx.random.normal((1, ids.shape[1], params.in_channels)).astype(dtype)
        joined, of_reference = rope_of(params, case.text_length, own, ids), rope_of(params, 0, ids)

        def beside_reference(x: mx.array, sigma: float) -> mx.array:
            return velocity(model, mx.concatenate([x, clean], axis=1), txt, sigma, joined, tokens=case.tokens)

        runs["with reference"] = steps(one, beside_reference)
        inputs += [clean, joined, of_reference]
        if arguments.kv:
            kv = encode_kv(model, clean, of_reference)
            runs["reference KV"] = steps(one, lambda x, sigma: velocity(model, x, txt, sigma, alone, kv))
            runs["encode KV"] = lambda: encode_kv(model, clean, of_reference)
            inputs.append(kv)
    if arguments.batch > 1:
        many, texts = noise(arguments.batch), mx.repeat(txt, arguments.batch, axis=0)
        batch = steps(many, lambda x, sigma: velocity(model, x, texts, sigma, alone))
        runs[f"batch of {arguments.batch}"] = batch
        inputs += [many, texts]
    mx.eval(inputs)
    return runs


def variants(
    module: Any, case: Case, make_runs: Callable[[Any], Runs], arguments: argparse.Namespace
) -> tuple[Runs, dict[str, Any], dict[str, Any]]:
    """Of a stage every run, the model of each, and what packing told: dense and packed, without a LoRA and with it."""
    runs, told = make_runs(module), dict[str, Any]()
    models = dict.fromkeys(runs, module)
    if arguments.quantize and not hasattr(module, "decoder"):
        packed, told = packed_copy(module, arguments.quantize)
        own = {f"{name}, packed": run for name, run in make_runs(packed).items()}
        runs, models = runs | own, models | dict.fromkeys(own, packed)
    if arguments.lora and isinstance(module, FluxKlein):
        deltas = random_lora(module, arguments.lora, case.dtype)

        def run_with(run: Callable[[], Any], model: nn.Module, deltas: Mapping[str, Any]) -> Callable[[], Any]:
            def toggled() -> Any:
                put_lora(model, deltas)
                return run()

            return toggled

        plain = {name: run_with(run, models[name], {}) for name, run in runs.items()}
        own = {f"{name}, LoRA": run_with(run, models[name], deltas) for name, run in runs.items()}
        models |= {f"{name}, LoRA": model for name, model in models.items()}
        runs = plain | own
    return runs, models, told


# ------------------------------------------------------------------------------------------------------- measuring


def check_result(name: str, result: Any) -> None:
    """A stage makes numbers, and different ones."""
    for array in arrays_of(result):
        values = np.array(array.astype(mx.float32))
        if not np.isfinite(values).all() or values.std() == 0:
            raise SystemExit(f"{name}: the result is wrong: shape {values.shape}, std {values.std()}")


def over(figures: Figures) -> dict[str, dict[str, float]]:
    """Every variant's seconds over the plain stage's, and those with a LoRA over the same without."""
    base = next(iter(figures))
    ratios = {f"{name} / {base}": ratio(own, figures[base]) for name, own in figures.items() if name != base}
    for name, own in figures.items():
        plain = name.removesuffix(", LoRA")
        if plain not in (name, base):
            ratios[f"{name} / {plain}"] = ratio(own, figures[plain])
    return ratios


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=1, help="of the loop that the step's stage is (%(default)s)")
    parser.add_argument("--quantize", metavar="BITS", help="packed as well: as flux2-generate takes it")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="with a LoRA of that rank as well")
    parser.add_argument("--reference", type=int, metavar="SIDE", help="with a square reference as well")
    parser.add_argument("--kv", action="store_true", help="with the reference's keys and values cached as well")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="with so many images at once as well")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns after the first; 0 times the first alone")
    parser.add_argument("--limit", type=float, metavar="GB", help="fail where the process took more memory")
    arguments = parser.parse_args(argv)
    if arguments.kv and not arguments.reference:
        parser.error("--kv caches a reference's keys and values: give --reference SIDE")
    return parser, arguments


def measure_stage(stage: str, module: Any, case: Case, given: dict[str, mx.array], arguments: Any) -> dict[str, Any]:
    """Print and give a stage's figures; what it made goes into given, for the next one."""

    def make_runs(module: Any) -> Runs:
        if stage == "text_encoder":
            return encode_runs(module, case)
        if stage == "step":
            return step_runs(module, case, given["txt"], arguments)
        return decode_runs(module, case, given["x"])

    made: list[Any] = []

    def check(name: str, result: Any) -> None:
        check_result(name, result)
        made[:] = made or [result]

    runs, models, packed = variants(module, case, make_runs, arguments)
    figures = take_turns(runs, arguments.repeats, check=check)
    given |= {name: made[0] for name, own in (("txt", "text_encoder"), ("x", "step")) if own == stage}
    for name, own in figures.items():
        own["weights_gb"] = weight_bytes(models[name]) / 1e9
        print_row(name, (own[column] for column in COLUMNS))
    ratios = over(figures)
    for name, own in ratios.items():
        if own:
            print(f"  {name}: {own['median_s']:.3f}, of the shortest {own['min_s']:.3f}")
    for shape, fewest in packed.get("rows", {}).items():
        print(f"  {shape:28} unpacked from {fewest} rows")
    return {"stages": figures, "ratios": ratios, "packed": {stage: packed} if packed else {}}


def main(argv: Sequence[str] | None = None) -> None:
    parser, arguments = parse(argv)
    model, case = model_of(parser, arguments)
    given = {
        "txt": mx.random.normal((1, case.text_length, case.params.txt_embed_dim)),
        "x": mx.random.normal((1, case.tokens, case.params.in_channels)),
    }
    mx.eval(given)
    report: dict[str, Any] = {"stages": {}, "ratios": {}, "packed": {}, "made_s": {}}
    print_row("", (name.replace("_", " ") for name in COLUMNS))
    for stage in STAGES:
        if stage in arguments.stages:
            start = time.perf_counter()
            module = model.build[stage](dtype_of_stage(stage, case.dtype, case.vae_dtype))
            report["made_s"][stage] = time.perf_counter() - start
            for name, found in measure_stage(stage, module, case, given, arguments).items():
                report[name] |= found
            del module
            mx.clear_cache()
    peak = process_peak_gb()
    if arguments.limit and peak > arguments.limit:
        raise SystemExit(f"the process took {peak:.2f} GB, more than the {arguments.limit:.2f} of --limit")
    print_json("step", arguments, {"weights": model.name, **report})


if __name__ == "__main__":
    main()
