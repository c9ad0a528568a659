"""What is planned, and what is taken? Of every stage the FLOP, bytes and seconds against a chip's speed, or the peak of
its memory.

    python -m benchmarks.plan --model klein-4b --size 1024 --references 1 --quantize 4     # this machine, measured
    python -m benchmarks.plan --model klein-9b --chip "M4 Max"                             # published peaks
    python -m benchmarks.plan FOLDER --model klein-4b --size 1024 --memory streamed        # an image is drawn

Without --chip this machine is measured, and that is kept for --plan, as flux2-generate --measure does. Seconds are a
range: all reading and writing done beside the arithmetic, or none of it; nothing is loaded. Published peaks are not
measured here, and no machine reaches them, so what they give is the least that a stage can take.

With FOLDER a checkpoint of the true shapes is written there, packed, in random weights (unless one is there), and one
step of an image drawn with it, each stage within the limit that its own plan asks for; the peak of every stage is held
against that, and its seconds stand beside those foreseen, where the machine has been measured. On the CPU backend the
peak includes attention's scores, which a GPU does not write out; they are told apart. The text encoder's seconds
include loading it. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from benchmarks.common import STEMS, TINY, name_of, print_json, print_row, write_checkpoint
from flux2_mlx import RELEASED, AutoEncoder, Flux2Pipeline, FluxKlein, Plan, Quantization, Qwen3TextEncoder
from flux2_mlx.checks import check_size
from flux2_mlx.device import on_gpu, on_metal, stage_dtype
from flux2_mlx.dtypes import DTYPES, dtype_of
from flux2_mlx.quantization.layers import quantize
from flux2_mlx.quantization.packing import quantize_rtn
from flux2_mlx.quantization.recipes import mixed_precision
from flux2_mlx.quantization.spec import parse_options
from flux2_mlx.runtime.activations import Workload
from flux2_mlx.runtime.plan import MODES, format_range
from flux2_mlx.runtime.released import released_modules
from flux2_mlx.runtime.roofline import Speeds, Work, image_work, measure

PARTS = {
    "text encoder": "text_encoder",
    "transformer": "transformer",
}  # whose dtype a stage has, if not the autoencoder's

# Published, not measured: TFLOP/s of the whole GPU in float32, which float16 does not exceed on these, and GB/s of the
# memory. The first from huggingface.js (packages/tasks/src/hardware.ts, August 2026), the second from Apple's technical
# specifications, each of the largest GPU that the chip comes with. M3 and M3 Pro are left out, of which sources differ
# by 15 %, and M5, whose matrix units these figures do not count.
CHIPS = {
    "M1": (2.6, 68.25),
    "M1 Pro": (5.2, 200),
    "M1 Max": (10.4, 400),
    "M1 Ultra": (21, 800),
    "M2": (3.6, 100),
    "M2 Pro": (6.8, 200),
    "M2 Max": (13.49, 400),
    "M2 Ultra": (27.2, 800),
    "M3 Max": (14.2, 400),
    "M3 Ultra": (28.4, 819),
    "M4": (4.6, 120),
    "M4 Pro": (9.2, 273),
    "M4 Max": (18.4, 546),
}
HEADS = ("TFLOP", "weights GB", "others GB", "FLOP/byte", "bound", "seconds", "share")
PROMPT = "a red circle"
COLUMNS = ("planned GB", "measured GB", "ratio", "w/o scores GB", "foreseen s", "seconds")
# Parts of a run, and their stages in the plan.
STAGE_OF = {"text_encoder": "text encoder", "denoise": "transformer", "decode": "decoder"}


# ---------------------------------------------------------------------------------------------- FLOP, bytes, seconds


def foresee(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print and give what every stage computes and moves, and how long that takes."""
    steps = arguments.steps or (50 if "base" in arguments.model else 4)
    guided = 2 if "base" in arguments.model else 1
    check_size(arguments.size, arguments.size)
    seen = min(arguments.size, 1024)  # more than a megapixel is scaled down
    dtype = dtype_of(arguments.dtype or ("bfloat16" if arguments.chip else None))
    workload = Workload(
        arguments.size,
        arguments.size,
        arguments.text_length,
        [(seen, seen)] * arguments.references,
        arguments.model == "klein-9b-kv",
    )
    modules = released_modules(arguments.model, dtype, parse_options(arguments.quantize, None, None))
    with patch("flux2_mlx.runtime.roofline.on_metal", lambda: on_metal() or arguments.chip is not None):
        work = image_work(*modules, workload, dtype)
    speeds = speeds_of(arguments.chip, dtype)
    at = {name: speeds[stage_dtype(PARTS.get(name, "autoencoder"), dtype)] for name in work}
    times = {"text encoder": guided, "transformer": guided * steps}
    whole = {name: own * times.get(name, 1) for name, own in work.items()}
    seconds = {name: own.seconds(at[name]) for name, own in whole.items()}
    if arguments.chip:
        seconds = {name: (least, least) for name, (least, _) in seconds.items()}
    least, most = (sum(ends) for ends in zip(*seconds.values(), strict=True))
    rows: dict[str, Any] = {}
    print_row("", HEADS, first=16)
    for name, own in whole.items():
        passes = times.get(name, 1)
        if name == "transformer":
            once = (seconds[name][0] / passes, seconds[name][1] / passes)
            rows["one pass"] = stage_row("one pass", work[name], at[name], once, least + most)
        label = f"all {passes} passes" if name == "transformer" else name
        rows[label] = stage_row(label, own, at[name], seconds[name], least + most)
    tflop = sum(own.flops for own in whole.values()) / 1e12
    print_row("an image", [tflop, *[""] * 4, format_range(least, most)], first=16)
    return {
        "dtype": name_of(dtype),
        "steps": steps,
        "published": arguments.chip is not None,
        "speeds": {name_of(kind): vars(found) for kind, found in speeds.items()},
        "stages": rows,
        "tflop": tflop,
        "least_s": least,
        "most_s": most,
    }


def speeds_of(chip: str | None, dtype: mx.Dtype) -> Mapping[mx.Dtype, Speeds]:
    """Print and give published peaks, or this machine's speed."""
    if chip:
        peak, bandwidth = CHIPS[chip]
        published = Speeds(peak * 1e12, peak * 1e12, peak * 1e12, bandwidth * 1e9)
        speeds = {stage_dtype(part, dtype): published for part in (*PARTS.values(), "autoencoder")}
    else:
        speeds = measure(dtype)
    print(f"{chip} at published peaks, not measured" if chip else "this machine, measured")
    for kind, found in speeds.items():
        products, attention, convolutions = (f"{flops / 1e12:.3g}" for flops in astuple(found)[:3])
        what = f"products {products}, attention {attention}, convolutions {convolutions}"
        print(f"{name_of(kind)}: TFLOP/s of {what}; GB/s {found.copy / 1e9:.3g}")
    return speeds


def stage_row(name: str, work: Work, speeds: Speeds, seconds: tuple[float, float], all_ends: float) -> dict[str, Any]:
    """Print and give the figures of a stage; all_ends is the sum of both ends of a whole image's seconds."""
    figures = {
        "tflop": work.flops / 1e12,
        "weights_gb": work.weights / 1e9,
        "intermediates_gb": work.intermediates / 1e9,
        "flop_per_byte": work.flops / work.bytes,
        "bound": "compute" if work.computing(speeds) > work.moving(speeds) else "bandwidth",
        "least_s": seconds[0],
        "most_s": seconds[1],
        "share": sum(seconds) / all_ends,
    }
    sizes = (f"{figures[key]:.2f}" for key in ("weights_gb", "intermediates_gb"))
    ends = f"{figures['flop_per_byte']:.0f}", figures["bound"], format_range(*seconds), f"{figures['share']:.1%}"
    print_row(name, [figures["tflop"], *sizes, *ends], first=16)
    return figures


# -------------------------------------------------------------------------------------- memory, in random weights


def ready_checkpoint(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """FOLDER with a checkpoint as the options ask for it: the one that is there, or a new one."""
    made = {name: str(getattr(arguments, name)) for name in ("model", "quantize", "tiny")}
    note = arguments.folder / "made.json"
    if note.exists():
        if json.loads(note.read_text()) != made:
            parser.error(f"{arguments.folder} has another checkpoint: {note.read_text()}")
        return
    modules: Sequence[Any] = [Qwen3TextEncoder(TINY[1]), FluxKlein(TINY[0]), AutoEncoder(TINY[2])]
    if not arguments.tiny:
        modules = released_modules(arguments.model, mx.bfloat16, {})
    spec = Quantization.parse(arguments.quantize)
    if spec is not None:
        for module in modules[:2]:
            quantize(module, mixed_precision(module, spec), quantize_rtn)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(arguments.folder, dict(zip(STEMS, modules, strict=True)))
    note.write_text(json.dumps(made))  # last: the folder is whole


def draw(arguments: argparse.Namespace) -> tuple[Flux2Pipeline, Plan, dict[str, int], dict[str, float]]:
    """Draw one step; the plan, and by part of the run the peak in bytes and the seconds."""
    options = {"dtype": arguments.dtype, "memory": arguments.memory, "cache": False, "quantize": arguments.pack}
    size, length = {"height": arguments.size, "width": arguments.size}, arguments.text_length
    plan = Flux2Pipeline.from_pretrained(arguments.folder, **options).plan(**size, max_sequence_length=length)
    print(plan)
    pipe = Flux2Pipeline.from_pretrained(arguments.folder, progress=True, **options)
    stages = {stage.name: stage for stage in plan.stages}

    def allow(name: str) -> None:
        """What the stage's plan asks for, and no more: MLX uses what it may."""
        pipe.memory_limit = plan.peak if arguments.memory == "resident" else plan.needed(stages[name])

    allow("text encoder")
    start = time.perf_counter()
    pipe.encode([PROMPT], length)
    encoding, encoder_peak = time.perf_counter() - start, mx.get_peak_memory()
    allow("transformer")
    step = next(pipe.stream(PROMPT, **size, num_steps=1, seed=0, max_sequence_length=length))
    allow("decoder")
    step.array()
    peaks = {"text_encoder": encoder_peak, **step.stats.peak_bytes}
    return pipe, plan, peaks, {"text_encoder": encoding, **step.stats.seconds}


def hold_against_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print and give what every stage took beside what was planned."""
    pipe, plan, peaks, seconds = draw(arguments)
    tokens = arguments.text_length + (arguments.size // 16) ** 2
    scores = 0 if on_gpu() else pipe.checkpoint.transformer.num_heads * tokens**2 * pipe.dtype.size
    stages = {stage.name: stage for stage in plan.stages}
    rows = {}
    print_row("", COLUMNS, width=15, first=16)
    for part, name in STAGE_OF.items():
        stage = stages[name]
        if arguments.memory == "resident":
            planned = sum(other.weights for other in plan.stages) + stage.activation_bytes
        else:
            planned = plan.needed(stage)
        figures = {
            "planned_gb": planned / 1e9,
            "measured_gb": peaks[part] / 1e9,
            "ratio": peaks[part] / planned,
            "without_scores_gb": (peaks[part] - (scores if part == "denoise" else 0)) / 1e9,
            "foreseen_s": stage.seconds,
            "seconds": seconds[part],
        }
        rows[name] = figures
        foreseen = format_range(*stage.seconds) if stage.seconds else None
        print_row(name, (figures | {"foreseen_s": foreseen}).values(), width=15, first=16)
    loading = peaks["load"] / plan.needed(replace(stages["transformer"], activation_bytes=0))
    print(f"loading the transformer took {loading:.3f} of what stays of it in memory")
    return {"stages": rows, "loading": loading}


# --------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="draw with a checkpoint of random weights, kept there")
    parser.add_argument("--model", choices=tuple(RELEASED), default="klein-4b")
    parser.add_argument("--size", type=int, default=1024, help="of the square image (%(default)s)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--quantize", metavar="BITS", help="as flux2-generate takes it; of FOLDER's files (4)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="(bfloat16 with --chip)")
    counted = parser.add_argument_group("without FOLDER")
    counted.add_argument("--references", type=int, default=0, metavar="N", help="as large as the image")
    counted.add_argument("--steps", type=int, help="4, base models 50")
    counted.add_argument("--chip", choices=tuple(CHIPS), help="published peaks in place of this machine's speed")
    drawn = parser.add_argument_group("with FOLDER")
    drawn.add_argument("--memory", choices=MODES[1:], default="staged")
    drawn.add_argument("--pack", metavar="BITS", help="pack a dense checkpoint (--quantize none) on loading")
    drawn.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.folder is None:
        found = foresee(arguments)
    else:
        arguments.quantize = arguments.quantize or "4"
        ready_checkpoint(parser, arguments)
        found = hold_against_plan(arguments)
    print_json("plan", arguments, found)


if __name__ == "__main__":
    main()
