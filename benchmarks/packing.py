"""What packing and 16-bit arithmetic cost in quality: python -m benchmarks.packing [--layers]

Of each way to pack the transformer's matrices, and of all of it in 16 bits: bits a weight, the relative error of the
weights, and the relative error of the velocities at the four steps of captions that training never saw; of the text
encoder's the same, with the error of the embeddings. With --layers also the error that each layer of the transformer
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
from flux2_mlx.checkpoints.load import load_weights
from flux2_mlx.device import weights_of
from flux2_mlx.families import NANO
from flux2_mlx.quantization.layers import Recipe, dense_layers
from flux2_mlx.quantization.packing import Packing, dequantize, quantize_rtn, quantize_weight
from flux2_mlx.quantization.recipes import mixed_precision
from flux2_mlx.quantization.spec import FLOAT_MODES
from flux2_mlx.sampling.schedules import flux2_sigmas

STEPS = 4
BASELINE = "4 bits in 64, uniform, ends of the range"
LOW_RANK_ROUNDS = 5
# What a layer with a path and a dense weight has for a weight once it is packed, and the bits that it is kept in.
Way = Callable[[str, nn.Module], tuple[mx.array, int]]


def restored(weight: mx.array, how: Quantization, packing: Packing = quantize_weight) -> tuple[mx.array, int]:
    """A weight packed and unpacked, and its bits; scales are in float32 here, and in 16 bits in a model."""
    words, *others = packing(weight, how)
    bits = 8 * words.nbytes + sum(min(8 * array.itemsize, 16) * array.size for array in others)
    scales, *biases = others
    return dequantize(words, scales, biases[0] if biases else None, how).astype(mx.float32), bits


def ends_of_the_range(how: Quantization) -> Way:
    """mlx.core.quantize for every layer."""
    return lambda path, layer: restored(layer.weight, how, quantize_rtn)


def by_recipe(recipe: Recipe) -> Way:
    def way(path: str, layer: nn.Module) -> tuple[mx.array, int]:
        how = recipe(path, layer)
        assert how is not None
        return restored(layer.weight, how)

    return way


def uniform(how: Quantization) -> Way:
    return by_recipe(lambda path, layer: how)


def by_bits(module: nn.Module) -> dict[str, Way]:
    """As --quantize packs it."""
    return {
        f"--quantize {bits}": by_recipe(mixed_precision(module, Quantization(bits, 64))) for bits in (3, 4, 5, 6, 8)
    }


def with_low_rank(how: Quantization, rank: int) -> Way:
    """Besides, what packing loses, as far as two thin 16-bit matrices hold it: by turns the best such matrices for what
    is lost, and the packing of what they leave (Li et al., LoftQ, arXiv 2310.08659).
    """

    def way(path: str, layer: nn.Module) -> tuple[mx.array, int]:
        weight, beside = layer.weight, mx.zeros_like(layer.weight)
        for _ in range(LOW_RANK_ROUNDS):
            left, values, right = mx.linalg.svd(weight - restored(weight - beside, how)[0], stream=mx.cpu)
            beside = (left[:, :rank] * values[:rank]) @ right[:rank]
        rest, bits = restored(weight - beside, how)
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

    def told(self, name: str, way: Way) -> dict[str, float]:
        """Print and give the figures of a way to pack."""
        packed = {path: way(path, layer) for path, layer in self.layers.items()}
        bits = sum(own for _, own in packed.values()) / sum(layer.weight.size for layer in self.layers.values())
        return self._told(name, bits, {f"{path}.weight": weight for path, (weight, _) in packed.items()})

    def told_in(self, name: str, dtype: mx.Dtype) -> dict[str, float]:
        """The same of all weights and activations in a dtype of 16 bits."""
        return self._told(name, 16.0, {path: array.astype(dtype) for path, array in self.dense.items()})

    def _told(self, name: str, bits: float, weights: dict[str, mx.array]) -> dict[str, float]:
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
    rope = FluxKlein.compute_rope(text_ids(text.shape[1]), image_ids(*HOME), params.axes_dims_rope, params.rope_theta)

    def velocity(x: mx.array, sigma: float) -> mx.array:
        found = model.forward_with_rope(x, text, mx.array([sigma]), *rope).astype(mx.float32)
        mx.eval(found)
        return found

    mx.random.seed(0)
    x, steps = mx.random.normal((len(text), tokens, params.in_channels)), []
    for sigma, following in pairwise(flux2_sigmas(STEPS, tokens)):
        steps.append((x, sigma))
        x = x + (following - sigma) * velocity(x, sigma)
    return Judge(model, lambda: [velocity(x, sigma) for x, sigma in steps])


def relative(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> float:
    """||a - b|| / ||b|| over all arrays together."""

    def energy(arrays: Iterable[mx.array]) -> float:
        return float(mx.sum(mx.stack([mx.square(array).sum() for array in arrays])))

    return math.sqrt(energy(a - b for a, b in zip(ours, theirs, strict=True)) / energy(theirs))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=NANO)
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--ranks", type=int, nargs="*", default=(1, 2, 4), help="of matrices beside 4 bits (1 2 4)")
    parser.add_argument("--layers", action="store_true", help="also what each layer alone makes wrong")
    arguments = parser.parse_args(argv)
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
    report = {name: judge.told(name, way) for name, way in ways.items()}
    halves = {"bfloat16": mx.bfloat16, "float16": mx.float16}
    report |= {name: judge.told_in(name, dtype) for name, dtype in halves.items()}
    print(f"\n{'text encoder':42}{'bits':>6}{'weights':>9}{'prompts':>9}")
    of_text = {
        BASELINE: ends_of_the_range(four),
        "4 bits in 64, uniform, fitted": uniform(four),
        **by_bits(texts.model),
    }
    text_report = {name: texts.told(name, way) for name, way in of_text.items()}
    alone = {}
    if arguments.layers:
        layers = judge.layers
        for path, layer in layers.items():
            alone[path] = judge.error({f"{path}.weight": restored(layer.weight, four)[0]})
        for path in sorted(alone, key=lambda path: alone[path] ** 2 / layers[path].weight.size, reverse=True):
            print(f"{path:52}{layers[path].weight.size:9}{alone[path]:9.4f}")
    found = {"ways": report, "text_encoder": text_report, "layers": alone}
    print(json.dumps({"benchmark": "packing", **found, "process_peak_gb": process_peak_gb(), **machine()}))


if __name__ == "__main__":
    main()
