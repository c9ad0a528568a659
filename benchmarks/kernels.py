"""How many kernels does a step launch on a GPU, and how many bytes do they move? No GPU needed, and no weights.

    python -m benchmarks.kernels --model klein-4b --size 1024
    python -m benchmarks.kernels --model klein-4b --size 512 --references 4
    python -m benchmarks.kernels --model klein-4b --size 1024 --against mflux mlx-vlm      # where they are installed

Below the steps stand klein's decoder and encoder at that size, and the kernels of packing a part of a weight and of
decoding a stored one.

Counted is the graph that MLX is given, of packing after mx.compile has fused what it fuses. An operation of mx.fast
and a compiled function of the library are one kernel, an activation of mlx.nn is its parts, a concatenation is one for
each part, a view is none. mflux compiles its whole step; that is counted as if MLX fused all that it may: elementwise
operations with what alone reads them. mlx-vlm's step is not compiled. Copies that a backend makes by itself are not in
it, nor are weights among the bytes. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.common import TINY, print_json
from benchmarks.contenders import MLX_PEERS, missing, peer_class, transformer_shape
from flux2_mlx import FluxKleinParams, image_ids, text_ids
from flux2_mlx.checkpoints.formats.decode import FORMATS
from flux2_mlx.checkpoints.formats.int8 import INT8_MARK
from flux2_mlx.checkpoints.formats.marks import StoredLayer
from flux2_mlx.checkpoints.formats.mxfp8 import MXFP8_MARK
from flux2_mlx.checkpoints.formats.nvfp4 import COMFYUI_MARK
from flux2_mlx.options import DTYPES
from flux2_mlx.quantization.packing import FITTED_BITS, fit_groups
from flux2_mlx.quantization.spec import AFFINE_BITS

MODELS = {"klein-4b": FluxKleinParams.klein_4b(), "klein-9b": FluxKleinParams.klein_9b(), "tiny": TINY[0]}
FAST = ("layer_norm", "rms_norm", "scaled_dot_product_attention")
VIEWS = {"Broadcast", "Reshape", "Transpose", "Split", "Slice", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Full"}
# Of the primitives that a step has, those that mx.compile joins.
ELEMENTWISE = {"Add", "Subtract", "Multiply", "Divide", "Maximum", "Sigmoid", "AsType", "Select", "Exp", "Sin", "Cos"}
ELEMENTWISE |= {"Negative", "LessEqual", "Arange"}
LIBRARIES = {"flux2_mlx", "mflux", "mlx_vlm"}  # packages that record what they compile
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
        """mx.fast, and what a library compiles, as one operation each: in modules that are imported here, for the first
        time as it seems to them, and are gone afterwards.
        """

        def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
            return self.one(function, function.__name__)

        fast, usual_compile = {name: getattr(mx.fast, name) for name in FAST}, mx.compile
        modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES}
        try:
            for name, function in fast.items():
                setattr(mx.fast, name, self.one(function, name))
            mx.compile, mx.depends = compile, lambda arrays, _: arrays  # type: ignore[assignment]
            for name in modules:
                del sys.modules[name]
            yield
        finally:
            for name, function in fast.items():
                setattr(mx.fast, name, function)
            mx.compile, mx.depends = usual_compile, self._depends
            for name in [name for name in sys.modules if name.split(".")[0] in LIBRARIES]:
                del sys.modules[name]
            sys.modules.update(modules)


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


def own_step(
    recorder: Recorder,
    params: FluxKleinParams,
    dtype: mx.Dtype,
    side: int,
    length: int,
    references: int = 0,
    biased: bool = False,
) -> Graph:
    """This library's step, as the sampler runs it, with so many references of the image's size, ``biased`` by strengths
    other than 1.
    """
    with recorder.recording():
        from flux2_mlx import FluxKlein
        from flux2_mlx.models import attention
        from flux2_mlx.models.kv_cache import MaskedKV

        attention.writes_scores = lambda _: False  # type: ignore[assignment]  # a GPU's kernels are counted
        tables = FluxKlein.compute_rope(
            text_ids(length), ids_of(side, references), params.axes_dims_rope, params.rope_theta
        )
        model: Any = hollow(FluxKlein(params), dtype)

        def step(*arrays: mx.array, bias: mx.array | None = None) -> mx.array:
            kv = None if bias is None else [MaskedKV(bias.astype(dtype))] * params.blocks
            v: mx.array = model.forward_with_rope(*arrays, image_tokens=(side // 16) ** 2, kv=kv)
            return v

        given = *inputs(params, dtype, side, length, references), mx.zeros((1,)), *tables
        if not biased:
            return Graph(recorder, step, *given)
        return Graph(
            recorder, lambda bias, *rest: step(*rest, bias=bias), mx.zeros((1, 1, 1, tables[0].shape[1])), *given
        )


def ids_of(side: int, references: int) -> mx.array:
    """Positions of an image's tokens, and of its references'."""
    own = [image_ids(side, side), *(image_ids(side, side, reference=k) for k in range(references))]
    return mx.concatenate(own, axis=1)


def inputs(
    params: FluxKleinParams, dtype: mx.Dtype, side: int, length: int, references: int
) -> tuple[mx.array, mx.array]:
    """Image tokens, with those of references, and prompt embeddings."""
    tokens = (1 + references) * (side // 16) ** 2
    return mx.zeros((1, tokens, params.in_channels), dtype), mx.zeros((1, length, params.txt_embed_dim), dtype)


def peer_step(
    name: str, recorder: Recorder, params: FluxKleinParams, dtype: mx.Dtype, side: int, length: int, references: int
) -> Graph:
    """The step of an MLX peer."""
    ids = ids_of(side, references), text_ids(length)
    with recorder.recording():
        peer_class(name, "config").precision = dtype
        model = hollow(peer_class(name, "transformer")(**transformer_shape(params)), dtype)
        return Graph(recorder, model, *inputs(params, dtype, side, length, references), mx.zeros((1,)), *ids)


def own_half(recorder: Recorder, part: str, dtype: mx.Dtype, side: int) -> Graph:
    """The autoencoder's "Encoder" or "Decoder", in tiles as on a CPU."""
    shape = (1, side // 8, side // 8, 32) if part == "Decoder" else (1, side, side, 3)
    with recorder.recording(), patch.multiple(mx, eval=lambda *_: None, async_eval=lambda *_: None):
        from flux2_mlx import AutoEncoderConfig
        from flux2_mlx.models import autoencoder

        half: Any = hollow(getattr(autoencoder, part)(AutoEncoderConfig.flux2()), dtype)
        return Graph(recorder, half, mx.zeros(shape, dtype))


def count_kernels(arrays: Sequence[mx.array]) -> int:
    """Kernels of what is still to be computed for these arrays, which mx.compile may have fused; views are none."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    names = re.findall(r'label ="(\w+)[^"]*", shape=rectangle', text.getvalue())
    return sum(name not in VIEWS | {"View", "Load"} for name in names)


def packing_kernels(bits: int, group_size: int, dtype: mx.Dtype) -> int:
    """Kernels of fitting and packing a part of a weight on a GPU."""
    return count_kernels(mx.compile(fit_groups)(mx.zeros((32, 1024), dtype), bits, group_size))


def decoding_kernels() -> dict[str, int]:
    """Kernels of decoding a weight of each storage format into bfloat16, in ComfyUI's layouts."""
    codes, scale = mx.zeros((256, 512), mx.uint8), mx.ones(())
    floats = mx.from_fp8(codes, mx.bfloat16)
    layers = {
        "FP8": StoredLayer("x", floats, {"weight_scale": scale}, "float8_e4m3fn"),
        "INT8": StoredLayer("x", codes.view(mx.int8), {"weight_scale": mx.ones((256, 1))}, INT8_MARK),
        "MXFP8": StoredLayer("x", floats, {"weight_scale": mx.ones((256, 16), mx.uint8)}, MXFP8_MARK),
        "NVFP4": StoredLayer("x", codes, {"weight_scale": mx.ones((256, 64)), "weight_scale_2": scale}, COMFYUI_MARK),
    }
    mx.eval(codes, [layer.scales for layer in layers.values()])
    return {name: count_kernels([_decoded(layer)]) for name, layer in layers.items()}


def _decoded(layer: StoredLayer) -> mx.array:
    decoded: mx.array = next(format for format in FORMATS if format.matches(layer)).decode(layer)
    return decoded.astype(mx.bfloat16)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="klein-4b")
    parser.add_argument("--size", type=int, default=1024, help="width and height (%(default)s)")
    parser.add_argument("--references", type=int, default=0, help="of the same size (%(default)s)")
    parser.add_argument(
        "--reference-strength", action="store_true", help="a second step, whose references have strengths other than 1"
    )
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--against", nargs="+", choices=tuple(MLX_PEERS), default=(), help="beside them")
    arguments = parser.parse_args(argv)
    absent = [line for line in map(missing, arguments.against) if line]
    if absent:
        parser.exit(2, "\n".join(absent) + "\n")
    recorder = Recorder()
    size = arguments.size, arguments.text_length, arguments.references
    shapes = MODELS[arguments.model], DTYPES[arguments.dtype], *size
    steps = {"flux2_mlx": own_step(recorder, *shapes).kernels(fuse=False)}
    if arguments.reference_strength:
        steps["strengths"] = own_step(recorder, *shapes, biased=True).kernels(fuse=False)
    for part in ("Decoder", "Encoder"):
        steps[part] = own_half(recorder, part, *shapes[1:3]).kernels(fuse=False)
    for name in arguments.against:
        steps[name] = peer_step(name, recorder, *shapes).kernels(fuse=name == "mflux")
    report = {}
    for name, (kinds, moved) in steps.items():
        report[name] = {"kernels": sum(kinds.values()), "gigabytes": moved / 1e9, "kinds": dict(kinds.most_common())}
        print(f"{name:12}{sum(kinds.values()):6} kernels{moved / 1e9:10.3f} GB beside weights")
        for kind, count in kinds.most_common():
            print(f"  {kind:32}{count:6}")
    packing = {bits: packing_kernels(bits, 64, mx.bfloat16) for bits in AFFINE_BITS if bits <= FITTED_BITS}
    decoding = decoding_kernels()
    print("packing a part:", ", ".join(f"{bits} bits {count}" for bits, count in packing.items()))
    print("decoding a weight:", ", ".join(f"{name} {count}" for name, count in decoding.items()))
    print_json("kernels", arguments, {"steps": report, "packing": packing, "decoding": decoding})


if __name__ == "__main__":
    main()
