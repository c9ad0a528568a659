"""How fast is this library beside its peers, computing the same from the same weights?

    python -m benchmarks.peers --model klein-4b --size 1024 --against mflux --against floor --output benchmarks/results
    python -m benchmarks.peers --random 4b --size 512 --depth 1 --depth-single 4 --stages step --against floor
    python -m benchmarks.peers --collect                      # the page that compares machines, from its files

Peers (--against, as often as wanted): mflux; torch, which is diffusers on MPS, CUDA or the CPU; floor, the bare matrix
products and attentions of the step; undivided, this library's decoder without strips. Their outputs are compared first;
then they take turns, so that ratios mean something on a machine that others use. What a stage is in each, and what
differs: benchmarks/contenders.py.

Stages: text_encoder (half of its tokens are padding), step (one pass of the transformer), decode, and loop (all of
them: the text, --steps steps with Euler updates, the picture). They run on modules, without a tokenizer and without the
limits on memory that pipelines set. With --model, a folder in diffusers' layout or a released name, each library's own
pipeline draws besides, of 512 text tokens, in processes of their own: "cold start" is from the start of the process to
its first picture, the files read before, and "whole picture" the next one. Random weights have no folder to start from,
so there these two are left out.

Peak memory is what the library's arrays take, weights of all that is loaded included; unknown of torch but on CUDA.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from benchmarks.common import loaded, machine, process_peak_gb, randomized
from benchmarks.contenders import (
    CONTENDERS,
    INSTALL,
    Case,
    Run,
    as_numpy,
    as_torch,
    finished,
    mflux_text_encoder,
    mflux_transformer,
    missing,
    peak_of,
    torch_device,
)
from benchmarks.stages import RANDOM
from flux2_mlx import RELEASED, AutoEncoder, FluxKlein, FluxKleinParams, Qwen3TextEncoder, open_checkpoint
from flux2_mlx.checkpoints.checkpoint import Checkpoint
from flux2_mlx.checkpoints.load import load_autoencoder, load_text_encoder, load_transformer
from flux2_mlx.device import default_dtype, stage_dtype
from flux2_mlx.options import DTYPES
from flux2_mlx.sampling.latents import initial_noise
from flux2_mlx.sampling.schedules import flux2_sigmas

RESULTS = Path(__file__).with_name("results")
OURS = "flux2_mlx"
STAGES = ("text_encoder", "step", "decode", "loop")
# Relative errors that a peer's output may have. Of 16 bits, sums in another order alone reach percents.
TOLERANCE = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.05}
FIGURES = ("median_s", "min_s", "max_s", "peak_gb")

PART = {"text_encoder": "text_encoder", "step": "transformer", "decode": "autoencoder"}  # whose dtype a stage has
Build = Callable[[mx.Dtype], nn.Module]
Figures = dict[str, dict[str, Any]]  # by contender
Errors = dict[str, dict[str, float]]  # by stage and peer


def random_model(arguments: argparse.Namespace) -> tuple[FluxKleinParams, dict[str, Build]]:
    """The transformer's shape, and how to make the modules of the stages, in random weights."""
    params, text_config, image_config = RANDOM[arguments.random]
    width = arguments.hidden_size or params.hidden_size
    params = replace(
        params,
        depth=arguments.depth or params.depth,
        depth_single=arguments.depth_single or params.depth_single,
        hidden_size=width,
        num_heads=width // params.head_dim,
    )

    def made(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
        """Norms and biases begin at ones and zeros, which would hide one that is skipped or swapped."""
        noise = lambda x: x + 0.1 * mx.random.uniform(-1, 1, x.shape) if x.ndim == 1 else x  # noqa: E731
        module.update(tree_map(noise, module.parameters()))
        return randomized(module, dtype)

    return params, {
        "text_encoder": lambda dtype: made(Qwen3TextEncoder(text_config), dtype),
        "step": lambda dtype: made(FluxKlein(params), dtype),
        "decode": lambda dtype: made(AutoEncoder(image_config), dtype),
    }


def modules_of(checkpoint: Checkpoint) -> dict[str, Build]:
    return {
        "text_encoder": lambda dtype: loaded(load_text_encoder(checkpoint, dtype)),
        "step": lambda dtype: loaded(load_transformer(checkpoint, dtype)),
        "decode": lambda dtype: loaded(load_autoencoder(checkpoint, dtype)),
    }


def compared(results: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of each peer the relative error of its output to this library's."""
    ours = results[OURS]
    peers = {name: own for name, own in results.items() if name not in (OURS, "floor")}
    return {name: float(np.linalg.norm(own - ours) / np.linalg.norm(ours)) for name, own in peers.items()}


def in_turn(runs: Mapping[str, Callable[[], Any]], repeats: int) -> Figures:
    """Seconds and peak memory of each, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[float | None]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            peak = peak_of(name)
            start = time.perf_counter()
            finished(run())
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(peak())
    return {name: figures(seconds[name], peaks[name]) for name in runs}


def figures(seconds: Sequence[float], peaks: Sequence[float | None]) -> dict[str, Any]:
    known = [peak for peak in peaks if peak is not None]
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "peak_gb": max(known) / 1e9 if known else None,
    }


def ratios(stage: Figures) -> dict[str, dict[str, float]]:
    """This library's seconds over each other's, in medians and in the shortest."""
    return {
        name: {key: stage[OURS][key] / other[key] for key in FIGURES[:2]}
        for name, other in stage.items()
        if name != OURS
    }


def in_a_loop(runs: dict[str, Run], inputs: dict[str, tuple[Any, ...]], sigmas: Sequence[float]) -> Any:
    """All stages: the text, the steps, the picture."""
    txt = finished(runs["text_encoder"](*inputs["text_encoder"]))
    (x,) = inputs["decode"]
    for sigma, sigma_next in pairwise(sigmas):
        x = finished(x + (sigma_next - sigma) * runs["step"](x, txt, sigma))
    return runs["decode"](x)


def drawn(libraries: Sequence[str], options: dict[str, Any], repeats: int) -> dict[str, Figures]:
    """Whole pictures by each library's pipeline: the first of a process, and the next one."""
    first: dict[str, list[float]] = {name: [] for name in libraries}
    second: dict[str, list[float]] = {name: [] for name in libraries}
    peaks: dict[str, list[float | None]] = {name: [] for name in libraries}
    for repeat in range(repeats + 1):
        for name in libraries:
            command = [sys.executable, "-m", "benchmarks.drawing", name, json.dumps(options)]
            start = time.time()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            if repeat == 0:  # which downloads what is not there yet, and has the files read
                continue
            report = json.loads(done.stdout.splitlines()[-1])
            first[name].append(report["first_at"] - start)
            second[name].append(report["second_s"])
            peaks[name].append(report["peak_gb"] and report["peak_gb"] * 1e9)
    return {
        "cold start": {name: figures(first[name], peaks[name]) for name in libraries},
        "whole picture": {name: figures(second[name], peaks[name]) for name in libraries},
    }


# ------------------------------------------------------------------------------------------------------ reports


def tell(stage: str, contenders: Figures) -> None:
    """Print the rows of a stage."""
    for name, own in contenders.items():
        row = [*(own[key] for key in FIGURES), *ratios(contenders).get(name, {}).values()]
        print(f"{stage:14}{name:12}" + "".join(f"{'–' if v is None else f'{v:.3f}':>12}" for v in row), flush=True)


def write(report: dict[str, Any], folder: Path) -> None:
    """Into a folder, as JSON and Markdown, named by chip, model, size and dtype."""
    width, height = report["size"]
    stem = slug(report["chip"], report["model"], width if width == height else f"{width} {height}", report["dtype"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(page(report))
    print(f"written: {folder / stem}.json and .md")


def slug(*words: object) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, words)).lower()).strip("-")


def cells(*values: object) -> str:
    return (
        "| " + " | ".join("–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values) + " |"
    )


def header(*names: str) -> str:
    return f"{cells(*names)}\n|{'---|' * len(names)}"


def size_of(report: dict[str, Any]) -> str:
    return " x ".join(map(str, report["size"]))


def machine_of(report: dict[str, Any]) -> str:
    gpu = f", {report['gpu_cores']} GPU cores" if report.get("gpu_cores") else ""
    return f"{report['chip']}, {report['cores']} cores{gpu}, {report['memory_gb']} GB"


def page(report: dict[str, Any]) -> str:
    """One report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"# {report['chip']}: {report['model']}, {size_of(report)}, {report['dtype']}",
        "",
        f"{machine_of(report)}; {report['os']}; computed on {report['device']}; {versions}.",
        "",
        f"{report['text_length']} text tokens, {report['steps']} steps in a loop or a picture, {report['repeats']} "
        "repeats in turn, after a first that warms up. Ratios are this library's seconds over the other's; errors are "
        "those of the peers' outputs, relative to this library's.",
        "",
        header("Stage", "", "Median, s", "Shortest, s", "Longest, s", "Peak, GB", "Ratio", "of the shortest", "Error"),
    ]
    for stage, contenders in report["stages"].items():
        for name, own in contenders.items():
            ratio = report["ratios"][stage].get(name, {})
            error = report["errors"].get(stage, {}).get(name)
            lines.append(
                cells(
                    stage,
                    name,
                    *(own[key] for key in FIGURES),
                    *(ratio.get(key) for key in FIGURES[:2]),
                    error and f"{error:.1e}",
                )
            )
    return "\n".join(lines) + "\n"


def collected(folder: Path) -> str:
    """The page that compares machines, from the reports in a folder."""
    reports = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [
        "# flux2_mlx beside its peers, by machine",
        "",
        "Made by `python -m benchmarks.peers --collect` from the JSON files beside it; do not edit it. A ratio is this",
        "library's seconds over the other's, of medians: below 1 is faster. `floor` is the bare matrix products and",
        "attentions of the step.",
        "",
        "To add a Mac, in a clone, plugged in and with nothing else at work:",
        "",
        "```text",
        "pip install -e .",
        INSTALL["mflux"],
        "python -m benchmarks.peers --model klein-4b --size 1024 --against mflux --against floor \\",
        "    --output benchmarks/results",
        "python -m benchmarks.peers --collect",
        "```",
        "",
        "Commit the two new files and this page. `--random 4b` in the place of `--model klein-4b` needs no download.",
    ]
    kinds = sorted({(r["model"], size_of(r), r["text_length"], r["dtype"]) for r in reports.values()})
    for kind in kinds:
        model, size, length, dtype = kind
        lines += ["", f"## {model}, {size}, {length} text tokens, {dtype}", ""]
        lines.append(header("Machine", "Stage", "Seconds", "over mflux", "over torch", "over floor"))
        for path, report in reports.items():
            if (report["model"], size_of(report), report["text_length"], report["dtype"]) != kind:
                continue
            for stage, contenders in report["stages"].items():
                over = {name: ratio["median_s"] for name, ratio in report["ratios"][stage].items()}
                lines.append(
                    cells(
                        f"[{machine_of(report)}]({path.with_suffix('.md').name})",
                        stage,
                        contenders[OURS]["median_s"],
                        *(over.get(name) for name in ("mflux", "torch", "floor")),
                    )
                )
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a released name, or a folder in diffusers' layout")
    source.add_argument("--random", choices=tuple(RANDOM), help="random weights in the shapes of this model")
    source.add_argument("--collect", action="store_true", help="write the page of the results in --output and stop")
    parser.add_argument("--against", action="append", choices=tuple(CONTENDERS)[1:], help="default: mflux")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--size", type=int, help="width and height")
    parser.add_argument("--text-length", type=int, default=512, help="tokens of the stages (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of a loop or a picture (%(default)s)")
    parser.add_argument("--depth", type=int, help="double blocks, of random weights")
    parser.add_argument("--depth-single", type=int, help="single blocks, of random weights")
    parser.add_argument("--hidden-size", type=int, help="the transformer's width, of random weights, in heads of 128")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: what this library takes on this machine")
    parser.add_argument("--tolerance", type=float, help="relative error allowed; default 1e-5 in float32, else 0.05")
    parser.add_argument("--repeats", type=int, default=5, help="timed, after one that warms up (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder to write a table and JSON into")
    arguments = parser.parse_args(argv)
    if arguments.model and (arguments.depth or arguments.depth_single or arguments.hidden_size):
        parser.error("--depth, --depth-single and --hidden-size are for --random: a checkpoint has its own")
    arguments.against = list(dict.fromkeys(arguments.against or ["mflux"]))
    arguments.width, arguments.height = arguments.size or arguments.width, arguments.size or arguments.height
    arguments.dtype = arguments.dtype or str(default_dtype()).removeprefix("mlx.core.")
    absent = [] if arguments.collect else [line for line in map(missing, arguments.against) if line]
    if absent:
        parser.exit(2, "\n".join(absent) + "\n")
    return arguments


def measure(builders: dict[str, Build], case: Case, arguments: argparse.Namespace) -> tuple[dict[str, Figures], Errors]:
    """Figures of each stage, and errors of the peers' outputs."""
    length, dtype = case.text_length, case.dtype
    mask = (mx.arange(length) < (length + 1) // 2).astype(mx.int32)[None]
    noise = initial_noise(0, case.height, case.width, case.params.in_channels)
    inputs: dict[str, tuple[Any, ...]] = {
        "text_encoder": (mx.random.randint(0, 1000, (1, length)), mask),
        "step": (noise, mx.random.normal((1, length, case.params.txt_embed_dim)), 0.7),
        "decode": (noise,),
    }
    mx.eval(inputs)
    contenders = [OURS, *arguments.against]
    given = dict.fromkeys(contenders, inputs)
    if "torch" in contenders:
        given["torch"] = {stage: tuple(map(as_torch, arrays)) for stage, arrays in inputs.items()}
    figures: dict[str, Figures] = {}
    errors: Errors = {}

    def take_turns(stage: str, runs: Mapping[str, Callable[[], Any]]) -> None:
        errors[stage] = compared({name: as_numpy(finished(run())) for name, run in runs.items()})
        tolerance = arguments.tolerance or TOLERANCE[arguments.dtype]
        if stage != "loop" and max(errors[stage].values(), default=0) > tolerance:  # in a loop errors add up
            raise SystemExit(f"{stage}: relative error to this library {errors[stage]}, allowed is {tolerance}")
        figures[stage] = in_turn(runs, arguments.repeats)
        tell(stage, figures[stage])

    runs: dict[str, dict[str, Run]] = {name: {} for name in contenders}
    for stage, build in builders.items():
        if stage not in arguments.stages and "loop" not in arguments.stages:
            continue
        module = build(stage_dtype(PART[stage], dtype))
        for name in contenders:
            if stage in CONTENDERS[name]:
                runs[name][stage] = CONTENDERS[name][stage](module, case)
        if stage in arguments.stages:
            ready = {name: partial(own[stage], *given[name][stage]) for name, own in runs.items() if stage in own}
            take_turns(stage, ready)
            del ready
        if "loop" not in arguments.stages:  # which needs all of them
            del module
            runs = {name: {} for name in contenders}
            mx.clear_cache()
    if "loop" in arguments.stages:
        sigmas = flux2_sigmas(arguments.steps, case.tokens)
        whole = {name: own for name, own in runs.items() if len(own) == len(PART)}
        take_turns("loop", {name: partial(in_a_loop, own, given[name], sigmas) for name, own in whole.items()})
    return figures, errors


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.collect:
        folder = arguments.output or RESULTS
        (folder / "README.md").write_text(collected(folder))
        print(json.dumps({"benchmark": "peers", "collected": len(list(folder.glob("*.json")))}))
        return
    checkpoint = None if arguments.random else open_checkpoint(arguments.model)
    if checkpoint is None:
        params, builders = random_model(arguments)
        shape = f", {params.hidden_size} wide, {params.depth} and {params.depth_single} blocks"
        name = f"random {arguments.random}" + (shape if params != RANDOM[arguments.random][0] else "")
    else:
        params, builders, name = checkpoint.transformer, modules_of(checkpoint), Path(arguments.model).name
    case = Case(arguments.width, arguments.height, arguments.text_length, params, DTYPES[arguments.dtype])
    print(f"{'':14}{'':12}" + "".join(f"{c:>12}" for c in ("median s", "min s", "max s", "peak GB", "ratio", "of min")))
    stages, errors = measure(builders, case, arguments)
    if checkpoint is not None:
        options = {
            "model": arguments.model,
            "repo": RELEASED.get(arguments.model, arguments.model),
            "width": case.width,
            "height": case.height,
            "steps": arguments.steps,
            "dtype": arguments.dtype,
            "transformer": mflux_transformer(params),
            "text_encoder": mflux_text_encoder(checkpoint.text_encoder),
        }
        libraries = [name for name in (OURS, *arguments.against) if len(CONTENDERS[name]) == len(PART)]
        for stage, of_all in drawn(libraries, options, arguments.repeats).items():
            stages[stage] = of_all
            tell(stage, of_all)

    packages = {"mflux": ("mflux",), "torch": ("torch", "diffusers", "transformers")}
    here = machine()
    report = {
        "benchmark": "peers",
        "model": name,
        "size": [case.width, case.height],
        "text_length": case.text_length,
        "steps": arguments.steps,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "stages": stages,
        "ratios": {stage: ratios(of_all) for stage, of_all in stages.items()},
        "errors": errors,
        "process_peak_gb": process_peak_gb(),
        **here,
        "torch_device": str(torch_device()) if "torch" in arguments.against else None,
        "versions": {name: here[name] for name in ("flux2_mlx", "mlx")}
        | {package: version(package) for peer in arguments.against for package in packages.get(peer, ())},
    }
    if arguments.output:
        write(report, arguments.output)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
