"""What is the limit, where does the time go, what would a size or a model cost? FLOP and bytes of every stage against a
chip's speed.

    python -m benchmarks.roofline --model klein-4b --size 1024 --references 1 --quantize 4    # this machine, measured
    python -m benchmarks.roofline --model klein-9b --chip "M4 Max"                            # published peaks

Without --chip this machine is measured, and that kept for --plan, as flux2-generate --measure does. Seconds are a
range: all reading and writing done beside the arithmetic, or none of it; nothing is loaded. Published peaks are not
measured here, and no machine reaches them, so what they give is the least that a stage can take. Ends with a line of
JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import astuple

from benchmarks.common import machine, process_peak_gb
from flux2_mlx.device import stage_dtype
from flux2_mlx.families import RELEASED
from flux2_mlx.options import DTYPES, check_size, dtype_of
from flux2_mlx.quantization.spec import parse_options
from flux2_mlx.runtime.plan import between
from flux2_mlx.runtime.released import released_modules
from flux2_mlx.runtime.roofline import Speeds, Work, measure, picture_work

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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(RELEASED), default="klein-4b")
    parser.add_argument("--size", type=int, default=1024, help="of the square picture (%(default)s)")
    parser.add_argument("--references", type=int, default=0, metavar="N", help="as large as the picture")
    parser.add_argument("--steps", type=int, help="4, base models 50")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--quantize", metavar="BITS", help="as flux2-generate takes it")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="(bfloat16 with --chip)")
    parser.add_argument("--chip", choices=tuple(CHIPS), help="published peaks in place of this machine's speed")
    arguments = parser.parse_args(argv)
    is_base = "base" in arguments.model
    steps, guided = arguments.steps or (50 if is_base else 4), 2 if is_base else 1
    check_size(arguments.size, arguments.size)
    seen = min(arguments.size, 1024)  # more than a megapixel is scaled down
    dtype = dtype_of(arguments.dtype or ("bfloat16" if arguments.chip else None))
    modules = released_modules(arguments.model, dtype, parse_options(arguments.quantize, None, None))
    work = picture_work(
        *modules,
        dtype=dtype,
        height=arguments.size,
        width=arguments.size,
        length=arguments.text_length,
        references=[(seen, seen)] * arguments.references,
        keeps_references=arguments.model == "klein-9b-kv",
    )
    if arguments.chip:
        peak, bandwidth = CHIPS[arguments.chip]
        published = Speeds(peak * 1e12, peak * 1e12, peak * 1e12, bandwidth * 1e9)
        speeds = dict.fromkeys((dtype, stage_dtype("autoencoder", dtype)), published)
    else:
        speeds = measure(dtype)
    print(f"{arguments.chip} at published peaks, not measured" if arguments.chip else "this machine, measured")
    named = {str(kind).removeprefix("mlx.core."): found for kind, found in speeds.items()}
    for kind, found in named.items():
        products, attention, convolutions = (f"{flops / 1e12:.3g}" for flops in astuple(found)[:3])
        print(f"{kind}: TFLOP/s of products {products}, attention {attention}, convolutions {convolutions}", end="")
        print(f"; GB/s {found.copy / 1e9:.3g}")
    at = {name: speeds[dtype if name == "transformer" else stage_dtype("autoencoder", dtype)] for name in work}

    times = {"text encoder": guided, "transformer": guided * steps}
    whole = {name: own * times.get(name, 1) for name, own in work.items()}
    seconds = {name: own.seconds(at[name]) for name, own in whole.items()}
    if arguments.chip:
        seconds = {name: (least, least) for name, (least, _) in seconds.items()}
    least, most = (sum(ends) for ends in zip(*seconds.values(), strict=True))
    rows = {}

    def row(name: str, own: Work, stage: str, parts: int = 1) -> None:
        """Of a stage, or of one of so many equal parts."""
        computing, moving = own.computing(at[stage]), own.moving(at[stage])
        ends = [end / parts for end in seconds[stage]]
        figures = {
            "tflop": own.flops / 1e12,
            "weights_gb": own.weights / 1e9,
            "intermediates_gb": own.intermediates / 1e9,
            "flop_per_byte": own.flops / own.bytes,
            "bound": "compute" if computing > moving else "bandwidth",
            "least_s": ends[0],
            "most_s": ends[1],
            "share": sum(ends) / (least + most),
        }
        rows[name] = figures
        print(f"{name:16}{own.flops / 1e12:12.3f}{own.weights / 1e9:12.2f}{own.intermediates / 1e9:12.2f}", end="")
        print(f"{figures['flop_per_byte']:12.0f}{figures['bound']:>12}{between(*ends):>12}{figures['share']:12.1%}")

    print(f"{'':16}" + "".join(f"{head:>12}" for head in HEADS))
    for name, own in whole.items():
        if name == "transformer":
            row("one pass", work[name], name, times[name])
            row(f"all {times[name]} passes", own, name)
        else:
            row(name, own, name)
    tflop = sum(own.flops for own in whole.values()) / 1e12
    print(f"{'a picture':16}{tflop:12.3f}{between(least, most):>60}")
    variant = vars(arguments) | {"dtype": str(dtype).removeprefix("mlx.core."), "steps": steps}
    report = {
        "benchmark": "roofline",
        "variant": variant,
        "published": arguments.chip is not None,
        "speeds": {kind: vars(found) for kind, found in named.items()},
        "stages": rows,
        "tflop": tflop,
        "least_s": least,
        "most_s": most,
    }
    print(json.dumps({**report, "process_peak_gb": process_peak_gb(), **machine()}))


if __name__ == "__main__":
    main()
