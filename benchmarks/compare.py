"""How fast is this library beside its peers, computing the same from the same weights?

    python -m benchmarks.compare --model klein-4b --against mflux --against floor --output benchmarks/results
    python -m benchmarks.compare --random 4b --size 512 --depth 1 --depth-single 4 --stages step --against floor
    python -m benchmarks.compare --model klein-4b --size 512 --stages start --against cold --against known-prompt
    python -m benchmarks.compare --random small --size 256 --stages start --against mflux --against mlx-vlm
    python -m benchmarks.compare --random 4b --quantize 4 --against mflux --against mlx-vlm
    python -m benchmarks.compare --collect                    # the page that compares machines, from its files

Against (as often as wanted): mflux; mlx-vlm; torch, which is diffusers on MPS, CUDA or the CPU; floor, the bare matrix
products and attentions of the step; undivided, this library's decoder without strips; and ways of this library to
start: cold, its files dropped from the system's memory first (on a Mac run `sudo purge` before, with --repeats 1),
cold-unread, the same without reading the next stage's files ahead, and known-prompt, of a prompt that was drawn before.
Outputs are compared first; then all take turns, so that ratios mean something on a machine that others use. What a
stage is in each, and what differs: benchmarks/contenders.py.

Stages: text_encoder (half of its tokens are padding, or all but --prompt-tokens), step (one pass of the transformer),
decode, and loop (all of them: the text, --steps steps with Euler updates, the image). They run on modules, without a
tokenizer and without the limits on memory that pipelines set. start, for a --model in diffusers' layout, or random
weights that are written into such a folder, in bfloat16: each library's own pipeline in processes of their own, "cold
start" from the start of the process to its first image, and "next image"; left out with --quantize.

Peak memory is what the library's arrays take, weights of all that is loaded included; unknown of torch but on CUDA.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.common import (
    FIGURES,
    PART,
    Case,
    Figures,
    Model,
    Run,
    add_case_options,
    child,
    compute,
    dtype_of_stage,
    figures_of,
    machine,
    model_of,
    print_json,
    print_row,
    random_parts,
    ratio,
    take_turns,
    write_checkpoint,
)
from benchmarks.contenders import (
    CONTENDERS,
    INSTALL,
    MLX_PEERS,
    PACKAGES,
    STARTS,
    as_numpy,
    as_torch,
    forget_files,
    meter_of,
    missing,
    refusal,
    text_encoder_shape,
    torch_device,
    transformer_shape,
)
from flux2_mlx import RELEASED
from flux2_mlx.sampling.latents import initial_noise
from flux2_mlx.sampling.schedules import flux2_sigmas

RESULTS = Path(__file__).with_name("results")
OURS = "flux2_mlx"
STAGES = (*PART, "loop", "start")
# Relative errors that a peer's output may have. Of 16 bits, sums in another order alone reach percents.
TOLERANCE = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.05}


# ------------------------------------------------------------------------------------------------------- stages


class Comparison:
    """The stages of all contenders, of the same weights and inputs.

    Attributes:
        figures: of each stage and contender.
        errors: of each stage the peers' outputs', relative to this library's; of packed ones, and then this library's
            among them, relative to its output with the dense weights.
    """

    def __init__(self, model: Model, case: Case, arguments: argparse.Namespace):
        self.model, self.case, self.arguments = model, case, arguments
        self.contenders = [OURS, *(name for name in arguments.against if name in CONTENDERS)]
        self.figures: dict[str, Figures] = {}
        self.errors: dict[str, dict[str, float]] = {}
        length = case.text_length
        mask = (mx.arange(length) < arguments.prompt_tokens).astype(mx.int32)[None]
        noise = initial_noise(0, case.height, case.width, case.params.in_channels)
        inputs: dict[str, tuple[Any, ...]] = {
            "text_encoder": (mx.random.randint(0, 1000, (1, length)), mask),
            "step": (noise, mx.random.normal((1, length, case.params.txt_embed_dim)), 0.7),
            "decode": (noise,),
        }
        compute(list(inputs.values()))
        self.inputs = dict.fromkeys(self.contenders, inputs)
        if "torch" in self.contenders:
            self.inputs["torch"] = {stage: tuple(map(as_torch, arrays)) for stage, arrays in inputs.items()}

    def measure(self) -> None:
        """Every stage that was asked for; modules stay only where a loop needs all of them."""
        wanted = self.arguments.stages
        runs: dict[str, dict[str, Run]] = {name: {} for name in self.contenders}
        for stage in PART:
            if stage not in wanted and "loop" not in wanted:
                continue
            module = self.model.build[stage](dtype_of_stage(stage, self.case.dtype, self.case.vae_dtype))
            for name in self.contenders:
                if stage in CONTENDERS[name]:
                    runs[name][stage] = CONTENDERS[name][stage](module, self.case)
            if stage in wanted:
                ready = {
                    name: partial(own[stage], *self.inputs[name][stage]) for name, own in runs.items() if stage in own
                }
                dense = CONTENDERS[OURS][stage](module, replace(self.case, bits=0)) if self.case.bits else None
                self.take_turns(stage, ready, [as_numpy(dense(*self.inputs[OURS][stage]))] if dense else [])
                del ready, dense
            del module
            if "loop" not in wanted:
                runs = {name: {} for name in self.contenders}
                mx.clear_cache()
        if "loop" in wanted:
            sigmas = flux2_sigmas(self.arguments.steps, self.case.tokens)
            whole = {name: own for name, own in runs.items() if len(own) == len(PART)}
            self.take_turns(
                "loop", {name: partial(loop, own, self.inputs[name], sigmas) for name, own in whole.items()}, []
            )

    def take_turns(self, stage: str, runs: Mapping[str, Callable[[], Any]], exact: list[np.ndarray]) -> None:
        """Measure a stage; errors are relative to ``exact``, or where that is empty to this library's output."""
        errors = self.errors[stage] = {}
        tolerance = self.arguments.tolerance or (math.inf if self.case.bits else TOLERANCE[self.arguments.dtype])

        def compare(name: str, result: Any) -> None:
            if name == OURS and not exact:
                exact.append(as_numpy(result))
            elif name != "floor":
                errors[name] = float(np.linalg.norm(as_numpy(result) - exact[0]) / np.linalg.norm(exact[0]))
                if stage != "loop" and errors[name] > tolerance:  # in a loop errors add up
                    raise SystemExit(f"{stage}: {name}'s relative error is {errors[name]:.1e}, allowed is {tolerance}")

        self.figures[stage] = take_turns(runs, self.arguments.repeats, check=compare, meter=meter_of)
        print_stage(stage, self.figures[stage])


def loop(runs: dict[str, Run], inputs: dict[str, tuple[Any, ...]], sigmas: Sequence[float]) -> Any:
    """All stages: the text, the steps, the image."""
    txt = compute(runs["text_encoder"](*inputs["text_encoder"]))
    (x,) = inputs["decode"]
    for sigma, sigma_next in pairwise(sigmas):
        x = compute(x + (sigma_next - sigma) * runs["step"](x, txt, sigma))
    return runs["decode"](x)


def starts(model: Model, case: Case, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Whole images by each library's pipeline, of random weights from a folder that is written for them: the first of a
    process, and the next one. The first turn warms up: it downloads what is not there yet and has files read and
    prompts cached.
    """
    names = [name for name in (OURS, *arguments.against) if name in STARTS]
    options = {
        "width": case.width,
        "height": case.height,
        "text_length": case.text_length,
        "steps": arguments.steps,
        "dtype": arguments.dtype,
        "vae_dtype": arguments.vae_dtype,
        "transformer": transformer_shape(model.params),
        "text_encoder": text_encoder_shape(model.text_encoder),
    }
    first: dict[str, list[float]] = {name: [] for name in names}
    second: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[tuple[int | None, int | None]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as made:
        if arguments.random:
            write_checkpoint(Path(made), random_parts(model))
        source = made if arguments.random else arguments.model
        options |= {"model": source, "repo": RELEASED.get(source, source)}
        for _ in range(arguments.repeats + 1):
            for name in names:
                library, forgets, special = STARTS[name]
                if forgets:
                    forget_files(source)
                start, words = time.time(), json.dumps(options | special)
                report = child("benchmarks.cold", library, words, environment={"FLUX2_MLX_CACHE": cache})
                first[name].append(report["first_at"] - start)
                second[name].append(report["second_s"])
                peaks[name].append((report["peak"], None))
    return {
        "cold start": {name: figures_of(first[name], peaks[name]) for name in names},
        "next image": {name: figures_of(second[name], peaks[name]) for name in names},
    }


def ratios(stage: Figures) -> dict[str, dict[str, float]]:
    """This library's seconds over each other's."""
    return {name: ratio(stage[OURS], other) for name, other in stage.items() if name != OURS}


# ------------------------------------------------------------------------------------------------------ reports


def print_stage(stage: str, contenders: Figures) -> None:
    for name, own in contenders.items():
        row = [*(own[key] for key in FIGURES), *ratios(contenders).get(name, {}).values()]
        print_row(f"{stage:14}{name}", row)


def file_name(report: dict[str, Any]) -> str:
    """By chip, model, size, dtype, and what is not usual."""
    width, height = report["size"]
    size, bits = width if width == height else f"{width} {height}", report["quantize"]
    tokens = report["prompt_tokens"]
    words = [report["chip"], report["model"], size, report["dtype"], *([f"q{bits}"] if bits else [])]
    words += [f"prompt {tokens}"] if tokens != half(report["text_length"]) else []
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, words)).lower()).strip("-") + ".json"


def half(tokens: int) -> int:
    return (tokens + 1) // 2


def cells(*values: object) -> str:
    words = ("–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
    return f"| {' | '.join(words)} |"


def kind_of(report: dict[str, Any]) -> str:
    size = " x ".join(map(str, report["size"]))
    packed = f", {report['quantize']} bits" if report.get("quantize") else ""
    text = f"{report['text_length']} text tokens ({report['prompt_tokens']} of the prompt)"
    return f"{report['model']}, {size}, {text}, {report['dtype']}{packed}"


def machine_of(report: dict[str, Any]) -> str:
    gpu = f", {report['gpu_cores']} GPU cores" if report.get("gpu_cores") else ""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"{report['chip']}, {report['cores']} cores{gpu}, {report['memory_gb']} GB, {report['os']}, on "
        f"{report['device']}, {versions}; {report['steps']} steps in a loop or an image, {report['repeats']} turns"
    )


def rows_of(report: dict[str, Any]) -> list[str]:
    """A report's table."""
    heads = ("Stage", "", "Median, s", "Shortest, s", "Longest, s", "Peak, GB", "Ratio", "of the shortest", "Error")
    rows = [cells(*heads), f"|{'---|' * len(heads)}"]
    for stage, contenders in report["stages"].items():
        for name, own in contenders.items():
            over = report["ratios"][stage].get(name, {})
            error = report["errors"].get(stage, {}).get(name)
            figures = [*(own[key] for key in FIGURES), *(over.get(key) for key in FIGURES[:2])]
            rows.append(cells(stage, name, *figures, error and f"{error:.1e}"))
    return rows


def collected(folder: Path) -> str:
    """The page that compares machines, from the reports in a folder."""
    reports = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [
        "# flux2_mlx beside its peers, by machine",
        "",
        "Made by `python -m benchmarks.compare --collect` from the JSON files beside it; do not edit it. Turns follow",
        "one that warms up. A ratio is this library's seconds over the other's: below 1 is faster. `floor` is the bare",
        "matrix products and attentions of the step. Errors are those of the outputs, relative to this library's.",
        "",
        "To add a Mac, in a clone, plugged in and with nothing else at work:",
        "",
        "```text",
        "pip install -e .",
        *(INSTALL[name] for name in MLX_PEERS),
        "python -m benchmarks.compare --model klein-4b --size 1024 \\",
        "    --against mflux --against mlx-vlm --against floor --output benchmarks/results",
        "python -m benchmarks.compare --collect",
        "```",
        "",
        "Commit the new file and this page. `--random 4b` in the place of `--model klein-4b` needs no download;",
        f"`--against torch` is diffusers, which `{INSTALL['torch']}` brings.",
    ]
    for kind in sorted(set(map(kind_of, reports.values()))):
        lines += ["", f"## {kind}"]
        for path, report in reports.items():
            if kind_of(report) == kind:
                lines += ["", f"[{machine_of(report)}]({path.name}):", "", *rows_of(report)]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--collect", action="store_true", help="write the page of the results in --output and stop")
    add_case_options(parser, source)
    against = tuple(dict.fromkeys([*CONTENDERS, *STARTS]))[1:]
    parser.add_argument("--against", action="append", choices=against, help="default: mflux")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--prompt-tokens", type=int, help="of the text encoder's that are no padding (default: half)")
    parser.add_argument("--steps", type=int, default=4, help="of a loop or an image (%(default)s)")
    parser.add_argument("--quantize", type=int, choices=(2, 3, 4, 5, 6, 8), default=0, help="bits to pack all in")
    parser.add_argument(
        "--tolerance", type=float, help="relative error allowed; default 1e-5 in float32, else 0.05, packed any"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed, after one that warms up (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder to write the report into, as JSON")
    arguments = parser.parse_args(argv)
    arguments.against = list(dict.fromkeys(arguments.against or ["mflux"]))
    arguments.prompt_tokens = arguments.prompt_tokens or half(arguments.text_length)
    if not 0 < arguments.prompt_tokens <= arguments.text_length:
        parser.error(f"--prompt-tokens must be 1 to --text-length {arguments.text_length}")
    absent = [] if arguments.collect else [line for line in map(missing, arguments.against) if line]
    if absent:
        parser.exit(2, "\n".join(absent) + "\n")
    return parser, arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser, arguments = parse(argv)
    if arguments.collect:
        folder = arguments.output or RESULTS
        (folder / "README.md").write_text(collected(folder))
        print_json("compare", None, {"collected": len(list(folder.glob("*.json")))})
        return
    model, case = model_of(parser, arguments)
    case = replace(case, bits=arguments.quantize)
    starting = "start" in arguments.stages and not case.bits
    if starting and arguments.depth_text:
        parser.error("--depth-text leaves pipelines without layers that they read: give --stages without start")
    refused = [line for line in (refusal(name, model, case) for name in arguments.against) if starting and line]
    if refused:
        parser.error("; ".join(refused))
    print_row("", [*(name.replace("_", " ") for name in FIGURES), "ratio", "of min"])
    comparison = Comparison(model, case, arguments)
    comparison.measure()
    stages = comparison.figures
    if starting:
        for stage, figures in starts(model, case, arguments).items():
            stages[stage] = figures
            print_stage(stage, figures)
    here = machine()
    report = {
        "model": model.name,
        "size": [case.width, case.height],
        "text_length": case.text_length,
        "prompt_tokens": arguments.prompt_tokens,
        "steps": arguments.steps,
        "dtype": arguments.dtype,
        "quantize": case.bits,
        "repeats": arguments.repeats,
        "stages": stages,
        "ratios": {stage: ratios(figures) for stage, figures in stages.items()},
        "errors": comparison.errors,
        "torch_device": str(torch_device()) if "torch" in arguments.against else None,
        "versions": {name: here[name] for name in ("flux2_mlx", "mlx")}
        | {package: version(package) for peer in arguments.against for package in PACKAGES.get(peer, ())},
    }
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / file_name({**report, **here})
        path.write_text(json.dumps({"benchmark": "compare", **report, **here}, indent=1) + "\n")
        print(f"written: {path}")
    print_json("compare", None, report)


if __name__ == "__main__":
    main()
