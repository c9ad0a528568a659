"""What references and batches cost in a step: python -m benchmarks.passes [--size 512] [--reference 512] [--batch 4]

Full-width klein-9b, or klein-4b, with an eighth (fifth) of its blocks in random weights: a step alone, with a reference
in it, beside a reference that is kept, and of several pictures at once; and the pass that keeps the reference. They
take turns, so that the ratios of their seconds mean something on a machine that others use. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from benchmarks.common import TINY, machine, process_peak_gb, randomized
from flux2_mlx import FluxKlein, FluxKleinParams, image_ids, text_ids
from flux2_mlx.options import DTYPES
from flux2_mlx.runtime.activations import kept_bytes

TEXT_LENGTH = 512
MODELS = {
    "klein-4b": replace(FluxKleinParams.klein_4b(), depth=1, depth_single=4),
    "klein-9b": replace(FluxKleinParams.klein_9b(), depth=1, depth_single=3),
    "tiny": TINY[0],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="klein-9b", help="whose width (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="of the square picture (%(default)s)")
    parser.add_argument("--reference", type=int, default=512, help="of the square reference (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="pictures at once (%(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    params, dtype = MODELS[arguments.model], DTYPES[arguments.dtype]
    model = randomized(FluxKlein(params), dtype)
    tokens, seen = (arguments.size // 16) ** 2, (arguments.reference // 16) ** 2

    def rope(length: int, *ids: mx.array) -> tuple[mx.array, mx.array]:
        return FluxKlein.compute_rope(text_ids(length), mx.concatenate(list(ids), axis=1), params.axes_dims_rope)

    def inputs(count: int, tokens: int) -> tuple[mx.array, mx.array, mx.array]:
        x = mx.random.normal((count, tokens, params.in_channels)).astype(dtype)
        text = mx.random.normal((count, TEXT_LENGTH, params.txt_embed_dim)).astype(dtype)
        return x, text, mx.full((count,), 0.5)

    picture = image_ids(arguments.size, arguments.size)
    reference = image_ids(arguments.reference, arguments.reference, reference=0)
    alone, joined, own = rope(TEXT_LENGTH, picture), rope(TEXT_LENGTH, picture, reference), rope(0, reference)
    clean = mx.random.normal((1, seen, params.in_channels)).astype(dtype)
    one, both, several = inputs(1, tokens), inputs(1, tokens + seen), inputs(arguments.batch, tokens)
    kept = model.encode_reference_kv(clean, *own)
    mx.eval(alone, joined, own, clean, one, both, several, kept)
    ways: dict[str, Callable[[], object]] = {
        "step": lambda: model.forward_with_rope(*one, *alone),
        "with reference": lambda: model.forward_with_rope(*both, *joined),
        "reference kept": lambda: model.forward_with_rope(*one, *alone, reference_kv=kept),
        "keeping": lambda: model.encode_reference_kv(clean, *own),
        "batch": lambda: model.forward_with_rope(*several, *alone),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            mx.eval(way())
            seconds[name].append(time.perf_counter() - start)
    figures = {}
    print(f"{'':16}{'median s':>10}{'min s':>10}{'steps':>8}")
    for name, (_, *rest) in seconds.items():
        median = statistics.median(rest)
        figures[name] = {
            "median_s": median,
            "min_s": min(rest),
            "steps": median / statistics.median(seconds["step"][1:]),
        }
        print(f"{name:16}{median:10.3f}{min(rest):10.3f}{figures[name]['steps']:8.3f}")
    variant = vars(arguments) | {"tokens": tokens + TEXT_LENGTH, "reference_tokens": seen}
    report = {
        "benchmark": "passes",
        "variant": variant,
        "passes": figures,
        "kept_gb": kept_bytes(params, seen, dtype) / 1e9,
    }
    print(json.dumps({**report, "process_peak_gb": process_peak_gb(), **machine()}))


if __name__ == "__main__":
    main()
