"""How many kernels does a step launch on a GPU, and how many bytes do they move? No GPU needed, and no weights.

python -m benchmarks.kernels --model klein-4b --size 1024
python -m benchmarks.kernels --model klein-4b --size 1024 --mflux        # beside mflux, where it is installed

Counted is the graph that MLX is given. An operation of mx.fast and a compiled function are one kernel, a concatenation
is one for each part, a view is none. mflux compiles its whole step; that is counted as if MLX fused all that it may:
elementwise operations with what alone reads them. Copies that a backend makes by itself are not in it, nor are weights
among the bytes. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.common import TINY, machine, process_peak_gb
from flux2_mlx import FluxKlein, FluxKleinParams, image_ids, text_ids
from flux2_mlx.models import flux2 as transformer
from flux2_mlx.models import rope
from flux2_mlx.options import DTYPES

MODELS = {"klein-4b": FluxKleinParams.klein_4b(), "klein-9b": FluxKleinParams.klein_9b(), "tiny": TINY[0]}
FAST = ("layer_norm", "rms_norm", "scaled_dot_product_attention")
VIEWS = {"Broadcast", "Reshape", "Transpose", "Split", "Slice", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Full"}
# Of the primitives that a step has, those that mx.compile joins.
ELEMENTWISE = {"Add", "Subtract", "Multiply", "Divide", "Maximum", "Sigmoid", "AsType", "Select", "Exp", "Sin", "Cos"}
ELEMENTWISE |= {"Negative", "LessEqual", "Arange"}
Operation = dict[str, Any]  # as mx.export_function tells it


class Recorder:
    """Whole functions as one operation each in what is traced."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._depends = mx.depends

    def one(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function that gives arrays of the same shapes, made of the number of its name, after its arguments."""
        if name not in self.names:
            self.names.append(name)
        number = self.names.index(name)

        def call(*arguments: Any, **options: Any) -> Any:
            made = function(*arguments, **options)
            likes = [made] if isinstance(made, mx.array) else list(made)
            stand_ins = [mx.broadcast_to(mx.array(number, like.dtype), like.shape) for like in likes]
            given = [value for value in (*arguments, *options.values()) if isinstance(value, mx.array)]
            after = self._depends(stand_ins, given)
            return after[0] if isinstance(made, mx.array) else after

        return call

    @contextmanager
    def recording(self) -> Iterator[None]:
        """mx.fast, and what this library compiles, as one operation each."""

        def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
            return self.one(function, function.__name__)

        kept = {name: getattr(mx.fast, name) for name in FAST}, mx.compile
        try:
            for name, function in kept[0].items():
                setattr(mx.fast, name, self.one(function, name))
            mx.compile, mx.depends = compile, lambda arrays, _: arrays  # type: ignore[assignment]
            importlib.reload(rope)
            importlib.reload(transformer)
            yield
        finally:
            for name, function in kept[0].items():
                setattr(mx.fast, name, function)
            mx.compile, mx.depends = kept[1], self._depends
            importlib.reload(rope)
            importlib.reload(transformer)


class Graph:
    """What a function gives MLX to do for arrays of these shapes."""

    def __init__(self, recorder: Recorder, function: Callable[..., mx.array], *arrays: mx.array):
        self.recorder = recorder
        self.operations: list[Operation] = []
        self.size: dict[str, int] = {}  # bytes of every array
        self.root: dict[str, str] = {}  # of a view, the array that was computed; of others, itself
        self.constants: dict[str, mx.array] = {}
        self.results: set[str] = set()
        mx.export_function(self._tell, function, *arrays)
        self.readers: dict[str, set[int]] = {}
        for k, operation in enumerate(self.operations):
            for name, *_ in operation["inputs"]:
                self.readers.setdefault(self.root[name], set()).add(k)

    def _tell(self, told: Operation) -> None:
        self.constants |= dict(told.get("constants", ()))
        if told["type"] == "outputs":
            self.results = {name for name, *_ in told["outputs"]}
        if told["type"] in ("inputs", "primitive"):
            for name, shape, dtype in (*told["inputs"], *told.get("outputs", ())):
                self.size[name] = math.prod(shape) * dtype.size
                self.root.setdefault(name, name)
        if told["type"] == "primitive":
            view = told["name"] in VIEWS
            for name, *_ in told["outputs"]:
                self.root[name] = self.root[told["inputs"][0][0]] if view else name
            if not view:
                self.operations.append(told)

    def kernels(self, fuse: bool) -> tuple[Counter[str], int]:
        """Kernels by kind, and the bytes that they read and write besides weights.

        Args:
            fuse: join elementwise operations with what alone reads them.
        """
        group = list(range(len(self.operations)))
        for k in reversed(group if fuse else ()):
            if self.operations[k]["name"] in ELEMENTWISE:
                (output,) = self.operations[k]["outputs"]
                readers = {group[j] for j in self.readers.get(output[0], ())}
                if len(readers) == 1 and self.operations[max(readers)]["name"] in ELEMENTWISE:
                    group[k] = readers.pop()
        kinds: Counter[str] = Counter()
        moved = 0
        for k, operation in enumerate(self.operations):
            if group[k] == k:
                members = [self.operations[j] for j in range(k + 1) if group[j] == k]
                parts = operation["inputs"] if operation["name"] == "Concatenate" else operation["outputs"]
                kinds[self._kind(operation)] += len(parts)
                moved += self._moved(members) + sum(self.size[name] for name, *_ in operation["outputs"])
        return kinds, moved

    def _kind(self, operation: Operation) -> str:
        name: str = operation["name"]
        if name == "Depends":
            number = self.constants[self.root[operation["inputs"][0][0]]]
            name = self.recorder.names[int(number)]
        return {"Matmul": "products", "AddMM": "products", "scaled_dot_product_attention": "attention"}.get(name, name)

    def _moved(self, members: Sequence[Operation]) -> int:
        """Bytes that a kernel of these operations reads: of arrays that it does not make, each once."""
        made = {name for operation in members for name, *_ in operation["outputs"]}
        read: dict[str, dict[str, int]] = {}
        for operation in members:
            for name, *_ in operation["inputs"]:
                root = self.root[name]
                if root not in made and root not in self.constants:
                    read.setdefault(root, {})[name] = self.size[name]
        return sum(min(self.size[root], sum(views.values())) for root, views in read.items())


def hollow(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """A module whose weights are one number each."""
    zero = mx.array(0, dtype)
    mx.eval(zero)
    module.update(tree_map(lambda array: mx.broadcast_to(zero, array.shape), module.parameters()))
    return module


def own_step(recorder: Recorder, params: FluxKleinParams, dtype: mx.Dtype, side: int, length: int) -> Graph:
    """This library's step, as the sampler runs it."""
    tables = FluxKlein.compute_rope(text_ids(length), image_ids(side, side), params.axes_dims_rope, params.rope_theta)
    with recorder.recording():
        model = hollow(transformer.FluxKlein(params), dtype)
        return Graph(recorder, model.forward_with_rope, *inputs(params, dtype, side, length), mx.zeros((1,)), *tables)


def inputs(params: FluxKleinParams, dtype: mx.Dtype, side: int, length: int) -> tuple[mx.array, mx.array]:
    """Image tokens and prompt embeddings."""
    tokens = (side // 16) ** 2
    return mx.zeros((1, tokens, params.in_channels), dtype), mx.zeros((1, length, params.txt_embed_dim), dtype)


def mflux_step(recorder: Recorder, params: FluxKleinParams, dtype: mx.Dtype, side: int, length: int) -> Graph:
    """mflux's step."""
    ids = image_ids(side, side), text_ids(length)
    with recorder.recording():
        from mflux.models.flux2.model.flux2_transformer.transformer import (
            Flux2Transformer,
        )  # it keeps mx.fast's by name

        model = hollow(
            Flux2Transformer(
                num_layers=params.depth,
                num_single_layers=params.depth_single,
                num_attention_heads=params.num_heads,
                joint_attention_dim=params.txt_embed_dim,
            ),
            dtype,
        )
        return Graph(recorder, model, *inputs(params, dtype, side, length), mx.zeros((1,)), *ids)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="klein-4b")
    parser.add_argument("--size", type=int, default=1024, help="width and height (%(default)s)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--mflux", action="store_true", help="beside it; needs pip install mflux")
    arguments = parser.parse_args(argv)
    recorder = Recorder()
    shapes = MODELS[arguments.model], DTYPES[arguments.dtype], arguments.size, arguments.text_length
    steps = {"flux2_mlx": own_step(recorder, *shapes).kernels(fuse=False)}
    if arguments.mflux:
        steps["mflux"] = mflux_step(recorder, *shapes).kernels(fuse=True)
    report = {}
    for name, (kinds, moved) in steps.items():
        report[name] = {"kernels": sum(kinds.values()), "gigabytes": moved / 1e9, "kinds": dict(kinds.most_common())}
        print(f"{name:12}{sum(kinds.values()):6} kernels{moved / 1e9:10.3f} GB beside weights")
        for kind, count in kinds.most_common():
            print(f"  {kind:32}{count:6}")
    variant = vars(arguments)
    print(
        json.dumps(
            {
                "benchmark": "kernels",
                "variant": variant,
                "steps": report,
                "process_peak_gb": process_peak_gb(),
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
