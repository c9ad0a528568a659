"""How well does a model draw the world of nano, and what do options and packing cost of that?

    python -m benchmarks.quality [--quantize 4] [reuse=text ...]
    python -m benchmarks.quality num_steps=50 guidance=1.5 --beside step_cache=0.1 --beside num_steps=25
    python -m benchmarks.quality --ways [--layers]

Captions of scenes that training never saw are drawn and held against the rendered truth, and so are edits of rendered
images; --sheet FILE writes a contact sheet. NAME=VALUE is an option of Flux2Pipeline's call. Every --beside is another
way to draw the same, with further options: the ways take turns, image by image, and the table says of each the steps
computed, its share of the first way's seconds, how far its images are from the first's (levels of 255), and the
captions and edits that are right.

--ways tells what packing and 16-bit arithmetic cost. Of each way to pack the transformer's matrices, and of all of it
in 16 bits: bits a weight, the relative error of the weights, and the relative error of the velocities at the four steps
of captions that training never saw; of the text encoder's the same, with the error of the embeddings. With --layers
also the error that each layer of the transformer alone makes at 4 bits. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from benchmarks.common import print_json, print_row, rope_of, velocity
from examples.nano_score import (
    BOUNDS,
    EDIT_KINDS,
    Drawn,
    autoencoder_psnr,
    contact_sheet,
    draw,
    draw_task,
    rates,
    unseen_edits,
    unseen_tasks,
)
from examples.nano_world import HOME
from flux2_mlx import Flux2Pipeline, Quantization, image_ids
from flux2_mlx.checkpoints.load import load_weights
from flux2_mlx.cli.common import Parser, given_options
from flux2_mlx.device import weights_of
from flux2_mlx.families import NANO
from flux2_mlx.options import CheckpointOptions
from flux2_mlx.quantization.layers import Recipe, dense_layers
from flux2_mlx.quantization.packing import Packing, dequantize, quantize_rtn, quantize_weight
from flux2_mlx.quantization.recipes import mixed_precision
from flux2_mlx.quantization.spec import FLOAT_MODES
from flux2_mlx.sampling.schedules import flux2_sigmas

SHEET_CAPTIONS, SHEET_EDITS = 24, 8
STEPS = 4
BASELINE = "4 bits in 64, uniform, ends of the range"
LOW_RANK_ROUNDS = 5


# ---------------------------------------------------------------------------------------------------------- ways


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE of the command line, a value as JSON has it or as it stands."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise SystemExit(f"{word!r} is no option: give NAME=VALUE, as step_cache=0.1")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def open_variant(arguments: argparse.Namespace) -> Flux2Pipeline:
    """The model as the command line asks for it."""
    options = CheckpointOptions.collect(given_options(arguments))
    return Flux2Pipeline.from_pretrained(**vars(options), cache=False)


def score(pipe: Flux2Pipeline, options: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Print and give what is right of captions and edits."""
    size = arguments.height, arguments.width
    captions = draw(pipe, unseen_tasks(arguments.captions), size, progress=True, **options)
    edits = draw(pipe, unseen_edits(arguments.edits), size, progress=True, **options)
    figures = rates(captions)
    if edits:
        figures["edits"] = rates(edits)["whole"]
    figures["psnr"] = autoencoder_psnr(pipe, unseen_tasks(min(64, arguments.captions)), size)
    each = {kind: edits[k :: len(EDIT_KINDS)] for k, kind in enumerate(EDIT_KINDS)}
    by_kind = {kind: rates(drawn)["whole"] for kind, drawn in each.items() if drawn}
    print_row("", ("figure", "bound"), width=8, first=12)
    for name, value in figures.items():
        print_row(name, (f"{value:.1f}", BOUNDS.get(name, "")), width=8, first=12)
    for kind, value in by_kind.items():
        print_row(f"  {kind}", (f"{value:.1f}",), width=8, first=12)
    if arguments.sheet is not None:
        contact_sheet([*captions[:SHEET_CAPTIONS], *edits[:SHEET_EDITS]]).save(arguments.sheet)
    return {"figures": figures, "edits": by_kind}


def hold_beside(pipe: Flux2Pipeline, ways: Mapping[str, dict[str, Any]], arguments: argparse.Namespace) -> Any:
    """Print and give what each way costs and saves beside the first."""
    size = arguments.height, arguments.width
    tasks = unseen_tasks(arguments.captions) + unseen_edits(arguments.edits)
    plain = next(iter(ways))
    draw_task(pipe, tasks[0], 0, size, **{**ways[plain], "num_steps": 2, "step_cache": None})  # warms up
    found: dict[str, list[tuple[Drawn, float, int]]] = {name: [] for name in ways}
    for seed, task in enumerate(tqdm(tasks, leave=False)):
        for name, options in ways.items():  # in turn, so that other work on the machine slows all of them
            found[name].append(draw_task(pipe, task, seed, size, **options))
    columns = ("steps", "seconds", "error", "worst", "captions", "edits")
    first = 2 + max(map(len, ways))
    print_row("", columns, width=10, first=first)
    figures = {}
    for name, own in found.items():
        errors = [
            np.abs(np.asarray(one.picture, float) - np.asarray(other.picture)).mean()
            for (one, *_), (other, *_) in zip(own, found[plain], strict=True)
        ]
        drawn = [one for one, *_ in own]
        parts = {"captions": drawn[: arguments.captions], "edits": drawn[arguments.captions :]}
        shares = [seconds / whole for (_, seconds, _), (_, whole, _) in zip(own, found[plain], strict=True)]
        figures[name] = {
            "steps": sum(computed for *_, computed in own) / len(tasks),
            "seconds": statistics.median(shares),
            "error": float(np.mean(errors)),
            "worst": float(max(errors)),
            **{part: rates(those)["whole"] for part, those in parts.items() if those},
        }
        print_row(name, (figures[name].get(column) for column in columns), width=10, first=first)
    return {"figures": figures, "plain_s": sum(seconds for _, seconds, _ in found[plain])}


# ------------------------------------------------------------------------------------------------------- packing


# Gives what a layer with a path and a dense weight has for a weight once it is packed, and the bits it is kept in.
Way = Callable[[str, nn.Module], tuple[mx.array, int]]


def restored(weight: mx.array, spec: Quantization, packing: Packing = quantize_weight) -> tuple[mx.array, int]:
    """A weight packed and unpacked, and its bits; scales are in float32 here, and in 16 bits in a model."""
    words, *others = packing(weight, spec)
    bits = 8 * words.nbytes + sum(min(8 * array.itemsize, 16) * array.size for array in others)
    scales, *biases = others
    return dequantize(words, scales, biases[0] if biases else None, spec).astype(mx.float32), bits


def ends_of_the_range(spec: Quantization) -> Way:
    """mlx.core.quantize for every layer."""
    return lambda path, layer: restored(layer.weight, spec, quantize_rtn)


def by_recipe(recipe: Recipe) -> Way:
    def way(path: str, layer: nn.Module) -> tuple[mx.array, int]:
        spec = recipe(path, layer)
        assert spec is not None
        return restored(layer.weight, spec)

    return way


def uniform(spec: Quantization) -> Way:
    return by_recipe(lambda path, layer: spec)


def by_bits(module: nn.Module) -> dict[str, Way]:
    """As --quantize packs it."""
    return {
        f"--quantize {bits}": by_recipe(mixed_precision(module, Quantization(bits, 64))) for bits in (3, 4, 5, 6, 8)
    }


def with_low_rank(spec: Quantization, rank: int) -> Way:
    """Besides, what packing loses, as far as two thin 16-bit matrices hold it: by turns the best such matrices for what
    is lost, and the packing of what they leave (Li et al., LoftQ, arXiv 2310.08659).
    """

    def way(path: str, layer: nn.Module) -> tuple[mx.array, int]:
        weight, beside = layer.weight, mx.zeros_like(layer.weight)
        for _ in range(LOW_RANK_ROUNDS):
            left, values, right = mx.linalg.svd(weight - restored(weight - beside, spec)[0], stream=mx.cpu)
            beside = (left[:, :rank] * values[:rank]) @ right[:rank]
        rest, bits = restored(weight - beside, spec)
        return rest + beside, bits + 16 * rank * sum(weight.shape)

    return way


class Judge:
    """What a dense model gives, to hold what it gives packed against.

    Args:
        outputs: computes with the model, of the same inputs every time.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[], list[mx.array]]):
        self.model, self.outputs = model, outputs
        self.layers, self.dense = dict(dense_layers(model)), dict(weights_of(model))
        self.truth = outputs()

    def error(self, weights: dict[str, mx.array]) -> float:
        """Relative error of the outputs where these weights stand for the dense ones."""
        self.model.load_weights(list((self.dense | weights).items()))
        found = self.outputs()
        self.model.load_weights(list(self.dense.items()))
        return relative(found, self.truth)

    def by_way(self, name: str, way: Way) -> dict[str, float]:
        """Print and give the figures of a way to pack."""
        packed = {path: way(path, layer) for path, layer in self.layers.items()}
        bits = sum(own for _, own in packed.values()) / sum(layer.weight.size for layer in self.layers.values())
        return self._figures(name, bits, {f"{path}.weight": weight for path, (weight, _) in packed.items()})

    def in_dtype(self, name: str, dtype: mx.Dtype) -> dict[str, float]:
        """The same of all weights and activations in a dtype of 16 bits."""
        return self._figures(name, 16.0, {path: array.astype(dtype) for path, array in self.dense.items()})

    def _figures(self, name: str, bits: float, weights: dict[str, mx.array]) -> dict[str, float]:
        error = relative(list(weights.values()), [self.dense[path] for path in weights])
        figures = {"bits": bits, "weights": error, "outputs": self.error(weights)}
        print(f"{name:42}{bits:6.2f}{error:9.4f}{figures['outputs']:9.4f}")
        return figures


def text_judge(pipe: Flux2Pipeline, captions: int) -> Judge:
    """Of the text encoder, by the embeddings of captions."""
    given = pipe.tokenizer([task.caption for task in unseen_tasks(captions)])
    encoder = pipe.text_encoder

    def outputs() -> list[mx.array]:
        found = encoder(*given).astype(mx.float32)
        mx.eval(found)
        return [found]

    return Judge(encoder, outputs)


def velocity_judge(pipe: Flux2Pipeline, text: mx.array) -> Judge:
    """Of the transformer, by the velocities at the steps of prompt embeddings (B, L, D)."""
    model, params, tokens = pipe.transformer, pipe.checkpoint.transformer, HOME[0] * HOME[1] // 256
    rope = rope_of(params, text.shape[1], image_ids(*HOME))

    def predict(x: mx.array, sigma: float) -> mx.array:
        found = velocity(model, x, text, sigma, rope).astype(mx.float32)
        mx.eval(found)
        return found

    mx.random.seed(0)
    x, steps = mx.random.normal((len(text), tokens, params.in_channels)), []
    for sigma, following in pairwise(flux2_sigmas(STEPS, tokens)):
        steps.append((x, sigma))
        x = x + (following - sigma) * predict(x, sigma)
    return Judge(model, lambda: [predict(x, sigma) for x, sigma in steps])


def relative(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> float:
    """||a - b|| / ||b|| over all arrays together."""

    def energy(arrays: Iterable[mx.array]) -> float:
        return float(mx.sum(mx.stack([mx.square(array).sum() for array in arrays])))

    return math.sqrt(energy(a - b for a, b in zip(ours, theirs, strict=True)) / energy(theirs))


def pack_in_all_ways(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print and give what each way to pack costs."""
    pipe = Flux2Pipeline.from_pretrained(arguments.model, dtype="float32")
    for stage in (pipe.text_encoder, pipe.transformer):
        for _ in load_weights(stage):
            pass
    texts = text_judge(pipe, arguments.captions)
    (text,) = texts.truth
    judge = velocity_judge(pipe, text)
    four = Quantization(4, 64)
    ways: dict[str, Way] = {
        BASELINE: ends_of_the_range(four),
        "4 bits in 64, uniform, fitted": uniform(four),
        **{f"4 bits in 64, uniform, rank {rank} beside": with_low_rank(four, rank) for rank in arguments.ranks},
        "4 bits in 32, uniform, ends of the range": ends_of_the_range(Quantization(4, 32)),
        "4 bits in 32, uniform, fitted": uniform(Quantization(4, 32)),
        "5 bits in 64, uniform, ends of the range": ends_of_the_range(Quantization(5, 64)),
        **by_bits(judge.model),
        **{mode: uniform(Quantization.parse(mode) or four) for mode in FLOAT_MODES},
    }
    print(f"{'':42}{'bits':>6}{'weights':>9}{'velocity':>9}")
    report = {name: judge.by_way(name, way) for name, way in ways.items()}
    halves = {"bfloat16": mx.bfloat16, "float16": mx.float16}
    report |= {name: judge.in_dtype(name, dtype) for name, dtype in halves.items()}
    print(f"\n{'text encoder':42}{'bits':>6}{'weights':>9}{'prompts':>9}")
    of_text = {
        BASELINE: ends_of_the_range(four),
        "4 bits in 64, uniform, fitted": uniform(four),
        **by_bits(texts.model),
    }
    text_report = {name: texts.by_way(name, way) for name, way in of_text.items()}
    alone = {}
    if arguments.layers:
        layers = judge.layers
        for path, layer in layers.items():
            alone[path] = judge.error({f"{path}.weight": restored(layer.weight, four)[0]})
        for path in sorted(alone, key=lambda path: alone[path] ** 2 / layers[path].weight.size, reverse=True):
            print(f"{path:52}{layers[path].weight.size:9}{alone[path]:9.4f}")
    return {"ways": report, "text_encoder": text_report, "layers": alone}


# --------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="of Flux2Pipeline's call, as reuse=text")
    parser.add_argument("--beside", nargs="+", action="append", metavar="NAME=VALUE", help="another way, in turn")
    parser.add_argument(
        "--model", default=NANO, help="one of this world, as examples/train_nano.py makes (%(default)s)"
    )
    parser.add_options(CheckpointOptions, skip=["model"])
    parser.add_argument("--height", type=int, default=HOME[0])
    parser.add_argument("--width", type=int, default=HOME[1])
    parser.add_argument("--captions", type=int, help="(500; 32 with --beside, 24 with --ways)")
    parser.add_argument("--edits", type=int, help="(200; 16 with --beside)")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this file")
    parser.add_argument("--ways", action="store_true", help="what each way to pack costs")
    parser.add_argument("--ranks", type=int, nargs="*", default=(1, 2, 4), help="of matrices beside 4 bits (1 2 4)")
    parser.add_argument("--layers", action="store_true", help="with --ways: also what each layer alone makes wrong")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.ways and (arguments.beside or arguments.options):
        parser.error("--ways packs by itself and draws nothing: leave NAME=VALUE and --beside out")
    captions, edits = (24, 0) if arguments.ways else (32, 16) if arguments.beside else (500, 200)
    arguments.captions = captions if arguments.captions is None else arguments.captions
    arguments.edits = edits if arguments.edits is None else arguments.edits
    if arguments.ways:
        print_json("quality", arguments, pack_in_all_ways(arguments))
        return
    given = parsed(arguments.options)
    options = {"num_steps": STEPS, "force_guidance": True, **given}
    pipe = open_variant(arguments)
    if arguments.beside:
        ways = {" ".join(arguments.options) or "as it is": options}
        ways |= {" ".join(words): {**options, **parsed(words)} for words in arguments.beside}
        found = hold_beside(pipe, ways, arguments)
    else:
        found = score(pipe, options, arguments)
    print_json("quality", arguments, found)


if __name__ == "__main__":
    main()
