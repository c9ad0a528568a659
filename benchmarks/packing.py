"""What packing costs in quality: python -m benchmarks.packing [--layers]

Of each way to pack the transformer's matrices: bits a weight, the relative error of the weights, and the relative error
of the velocities at the four steps of captions that training never saw. With --layers also the error that each layer
alone makes at 4 bits. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from benchmarks.common import machine, process_peak_gb
from benchmarks.nano_score import unseen_tasks
from benchmarks.nano_world import HOME
from flux2_mlx import Flux2Pipeline, FluxKlein, Quantization, image_ids, text_ids
from flux2_mlx.config import NANO
from flux2_mlx.memory import weights_of
from flux2_mlx.quantize import FLOAT_MODES, dense_layers, mixed, pack, pack_plainly, unpack
from flux2_mlx.sampler import flux2_sigmas
from flux2_mlx.weights import materialize

STEPS = 4
BASELINE = "4 bits in 64, uniform, ends of the range"
# Packed arrays (weight, scales, biases) of a layer with a path and a dense weight, and the way it was packed in.
Pack = Callable[[str, nn.Module], tuple[tuple[mx.array, ...], Quantization]]


def ends_of_the_range(how: Quantization) -> Pack:
    """mlx.core.quantize for every layer."""
    return lambda path, layer: (pack_plainly(layer.weight, how), how)


def fitted(how: Quantization) -> Pack:
    return lambda path, layer: (pack(layer.weight, how), how)


def library(model: nn.Module, how: Quantization) -> Pack:
    """As --quantize packs."""
    recipe = mixed(model, how)

    def packed(path: str, layer: nn.Module) -> tuple[tuple[mx.array, ...], Quantization]:
        own = recipe(path, layer)
        assert own is not None
        return pack(layer.weight, own), own

    return packed


class Judge:
    """The velocities of a dense model, to hold those of packed ones against."""

    def __init__(self, pipe: Flux2Pipeline, captions: int):
        for stage in (pipe.text_encoder, pipe.transformer):
            for _ in materialize(stage):
                pass
        params = pipe.checkpoint.transformer
        self.model = pipe.transformer
        self.rope = FluxKlein.compute_rope(
            text_ids(pipe.tokenizer.default_length), image_ids(*HOME), params.axes_dims_rope, params.rope_theta
        )
        ids, mask = pipe.tokenizer([task.caption for task in unseen_tasks(captions)])
        self.text = pipe.text_encoder(ids, mask)
        self.dense = dict(weights_of(self.model))
        tokens = HOME[0] * HOME[1] // 256
        mx.random.seed(0)
        x = mx.random.normal((captions, tokens, params.in_channels))
        self.steps = []
        for sigma, following in pairwise(flux2_sigmas(STEPS, tokens)):
            velocity = self.velocity(x, sigma)
            self.steps.append((x, sigma, velocity))
            x = x + (following - sigma) * velocity

    def velocity(self, x: mx.array, sigma: float) -> mx.array:
        velocity = self.model.forward_with_rope(x, self.text, mx.full((len(x),), sigma), *self.rope)
        mx.eval(velocity)
        return velocity

    def error(self, weights: dict[str, mx.array]) -> float:
        """Relative error of the velocities where these weights stand for the dense ones."""
        self.model.load_weights(list((self.dense | weights).items()))
        pairs = [(self.velocity(x, sigma), velocity) for x, sigma, velocity in self.steps]
        self.model.load_weights(list(self.dense.items()))
        return relative([a for a, _ in pairs], [b for _, b in pairs])


def relative(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> float:
    """||a - b|| / ||b|| over all arrays together."""

    def energy(arrays: Iterable[mx.array]) -> float:
        return float(mx.sum(mx.stack([mx.square(array).sum() for array in arrays])))

    return math.sqrt(energy(a - b for a, b in zip(ours, theirs, strict=True)) / energy(theirs))


def restored(packed: tuple[mx.array, ...], how: Quantization) -> mx.array:
    weight, scales, *biases = packed
    return unpack(weight, scales, biases[0] if biases else None, how).astype(mx.float32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=NANO)
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--layers", action="store_true", help="also what each layer alone makes wrong")
    arguments = parser.parse_args(argv)
    pipe = Flux2Pipeline.from_pretrained(arguments.model, dtype="float32")
    judge = Judge(pipe, arguments.captions)
    layers = dict(dense_layers(pipe.transformer))
    four = Quantization(4, 64)
    ways: dict[str, Pack] = {
        BASELINE: ends_of_the_range(four),
        "4 bits in 64, uniform, fitted": fitted(four),
        "4 bits in 32, uniform, ends of the range": ends_of_the_range(Quantization(4, 32)),
        "4 bits in 32, uniform, fitted": fitted(Quantization(4, 32)),
        "5 bits in 64, uniform, ends of the range": ends_of_the_range(Quantization(5, 64)),
        **{f"{bits} bits in 64": library(pipe.transformer, Quantization(bits, 64)) for bits in (3, 4, 6, 8)},
        **{mode: library(pipe.transformer, Quantization.parse(mode) or four) for mode in FLOAT_MODES},
    }
    report = {}
    print(f"{'':42}{'bits':>6}{'weights':>9}{'velocity':>9}")
    for name, way in ways.items():
        packed = {path: way(path, layer) for path, layer in layers.items()}
        nbytes = sum(array.nbytes for arrays, _ in packed.values() for array in arrays)
        # Scales are in float32 here, and in 16 bits in a model.
        nbytes -= sum(a.nbytes // 2 for arrays, _ in packed.values() for a in arrays if a.dtype == mx.float32)
        weights = {f"{path}.weight": restored(*made) for path, made in packed.items()}
        bits = 8 * nbytes / sum(layer.weight.size for layer in layers.values())
        error = relative(list(weights.values()), [judge.dense[path] for path in weights])
        report[name] = {"bits": bits, "weights": error, "velocity": judge.error(weights)}
        print(f"{name:42}{bits:6.2f}{error:9.4f}{report[name]['velocity']:9.4f}")
    alone = {}
    if arguments.layers:
        for path, layer in layers.items():
            alone[path] = judge.error({f"{path}.weight": restored(pack(layer.weight, four), four)})
        for path in sorted(alone, key=lambda path: alone[path] ** 2 / layers[path].weight.size, reverse=True):
            print(f"{path:52}{layers[path].weight.size:9}{alone[path]:9.4f}")
    print(
        json.dumps(
            {"benchmark": "packing", "ways": report, "layers": alone, "process_peak_gb": process_peak_gb(), **machine()}
        )
    )


if __name__ == "__main__":
    main()
