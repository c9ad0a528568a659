"""A packed step beside the dense one: python -m benchmarks.packed_step [--tokens 1536] [--quantize 4] [--lora 32]

Full-width klein-4b with a fifth of its blocks (1 double, 4 single: its own proportion) in random weights. The dense and
the packed step take turns, so that the ratio of their seconds means something on a machine that others use; with a LoRA
of that rank on every layer of the blocks, each also takes one with it. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.common import TINY, loaded, machine, process_peak_gb, randomized
from flux2_mlx import FluxKlein, FluxKleinParams, Quantization, image_ids, text_ids
from flux2_mlx.adapters.deltas import LoRADelta
from flux2_mlx.device import weight_bytes
from flux2_mlx.models.layers import Linear
from flux2_mlx.options import DTYPES
from flux2_mlx.quantization.layers import QuantizedLinear, autotune, quantize
from flux2_mlx.quantization.recipes import mixed_precision

TEXT_LENGTH = 512


def lora(model: nn.Module, rank: int, dtype: mx.Dtype) -> dict[str, LoRADelta]:
    """A random LoRA of every layer of the blocks, by its path."""
    deltas = {}
    for path, layer in model.named_modules():
        if rank and "_blocks." in path and isinstance(layer, Linear):
            rows, columns = layer.weight.shape
            down, up = mx.random.normal((rank, columns)), mx.random.normal((rows, rank))
            deltas[path] = LoRADelta(down.astype(dtype), (1e-3 * up).astype(dtype), mx.ones((rank,), dtype))
            mx.eval(deltas[path].parameters())
    return deltas


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1536, help="of text (512) and image together (%(default)s)")
    parser.add_argument("--quantize", default="4", metavar="BITS", help="as flux2-generate takes it (%(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="a LoRA of that rank as well")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args(argv)
    params = TINY[0] if arguments.tiny else replace(FluxKleinParams.klein_4b(), depth=1, depth_single=4)
    dtype, how = DTYPES[arguments.dtype], Quantization.parse(arguments.quantize)
    if how is None:
        parser.error("--quantize none packs nothing")
    dense = randomized(FluxKlein(params), dtype)
    packed = FluxKlein(params)
    packed.update(tree_map(lambda array: array, dense.parameters()))
    quantize(packed, mixed_precision(packed, how))
    loaded(packed)
    start = time.perf_counter()
    autotune(packed, dtype)
    tuning = time.perf_counter() - start

    side = 16 * round((arguments.tokens - TEXT_LENGTH) ** 0.5)
    tokens = (side // 16) ** 2
    rope = FluxKlein.compute_rope(text_ids(TEXT_LENGTH), image_ids(side, side), params.axes_dims_rope)
    x = mx.random.normal((1, tokens, params.in_channels)).astype(dtype)
    text = mx.random.normal((1, TEXT_LENGTH, params.txt_embed_dim)).astype(dtype)
    mx.eval(x, text, *rope)
    models = {"dense": dense, "packed": packed}
    if arguments.lora:
        models |= {f"{name}, LoRA": model for name, model in models.items()}
    deltas = lora(dense, arguments.lora, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    working = {}
    for _ in range(arguments.repeats + 1):
        for name, model in models.items():
            for path, layer in model.named_modules():
                if path in deltas:
                    layer.deltas = [deltas[path]] if name.endswith("LoRA") else []
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(model.forward_with_rope(x, text, mx.array([0.5]), *rope))
            seconds[name].append(time.perf_counter() - start)
            working[name] = mx.get_peak_memory() - before
    report = {
        name: {
            "median_s": statistics.median(seconds[name][1:]),
            "min_s": min(seconds[name][1:]),
            "weights_gb": weight_bytes(model) / 1e9,
            "working_gb": working[name] / 1e9,
        }
        for name, model in models.items()
    }
    print(f"{'':14}{'median s':>10}{'min s':>10}{'weights GB':>12}{'beside them GB':>16}")
    for name, figures in report.items():
        print(f"{name:14}{figures['median_s']:10.3f}{figures['min_s']:10.3f}", end="")
        print(f"{figures['weights_gb']:12.3f}{figures['working_gb']:16.3f}")
    ratios: dict[str, float] = {}
    for name, other in (("packed", "dense"), ("dense, LoRA", "dense"), ("packed, LoRA", "packed")):
        if name in report:
            own = {key: report[name][key] / report[other][key] for key in ("median_s", "min_s")}
            print(f"{name} over {other}: {own['median_s']:.3f}, of the shortest {own['min_s']:.3f}")
            ratios |= {f"{name}, {key}": ratio for key, ratio in own.items()}
    print(f"measuring the rows took {tuning:.1f} s")
    rows = {
        f"{layer.weight.shape[0]} x {layer.weight.shape[1] * 32 // layer.spec.bits}, {layer.spec.bits} bits": (
            layer.dense_rows
        )
        for _, layer in packed.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    for shape, fewest in rows.items():
        print(f"  {shape:28} unpacked from {fewest} rows")
    variant = vars(arguments) | {"tokens": tokens + TEXT_LENGTH}
    ends = {"benchmark": "packed_step", "variant": variant, **report, "ratio": ratios, "tuning_s": tuning, "rows": rows}
    print(json.dumps({**ends, "process_peak_gb": process_peak_gb(), **machine()}))


if __name__ == "__main__":
    main()
