"""The kernels of MLX's Metal backend: their names in a wheel for macOS, and those that an operation needs.

    pip download mlx-metal==VERSION --platform macosx_14_0_arm64 --only-binary=:all: --no-deps
    python -m tests.kernels mlx_metal-VERSION-py3-none-macosx_14_0_arm64.whl    # writes tests/data/metal-kernels.txt.xz

The first line of the list names the wheel and its SHA-256; the others are the names of its functions, sorted. Source of
the rules here: ml-explore/mlx, mlx/backend/metal/*.cpp, which put these names together.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import struct
import sys
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LIST = Path(__file__).parent / "data" / "metal-kernels.txt.xz"

# ------------------------------------------------------------------------------------------------------------ the list


def names_in(wheel: Path) -> list[str]:
    """The names of the functions in a wheel's mlx.metallib, sorted. Each is a record of its own there: the tag NAME,
    two bytes of length, and the name, which ends in a zero.
    """
    library = zipfile.ZipFile(wheel).read("mlx/lib/mlx.metallib")
    found = re.finditer(rb"NAME(..)(\w+)\0", library, re.DOTALL)
    return sorted({match[2].decode() for match in found if struct.unpack("<H", match[1])[0] == len(match[2]) + 1})


def write_list(wheel: Path, path: Path = LIST) -> int:
    """Write a wheel's names, and give their number."""
    names = names_in(wheel)
    title = f"# {wheel.name} sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    path.write_bytes(lzma.compress("\n".join([title, *names, ""]).encode(), preset=9 | lzma.PRESET_EXTREME))
    return len(names)


def read_list(path: Path = LIST) -> tuple[str, list[str]]:
    """The list's first line, and the names."""
    title, *names = lzma.decompress(path.read_bytes()).decode().splitlines()
    return title, names


def missing_from(names: Sequence[str], needed: Sequence[str]) -> list[str]:
    """Those of the needed names that a sorted list does not have; one that ends in * needs any that begins so."""

    def is_there(name: str) -> bool:
        prefix = name.removesuffix("*")
        at = bisect_left(names, prefix)
        return at < len(names) and (names[at].startswith(prefix) if name.endswith("*") else names[at] == name)

    return [name for name in needed if not is_there(name)]


# ------------------------------------------------------------------------------------------------------------ the rules


@dataclass(frozen=True, order=True)
class Operation:
    """A primitive of MLX with what chooses its kernel.

    Attributes:
        name: the primitive, and what it does where one primitive does several things: "Reduce sum".
        inputs, outputs: dtypes, as "bfloat16"; of a concatenation each once, of views, which call no kernel, none.
        details: what else is in a kernel's name, as (mode, bits, group size) of quantization.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    details: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        head = " ".join([self.name, *self.details])
        return head if self.name in VIEWS else f"{head}: {' '.join(self.inputs) or '-'} > {' '.join(self.outputs)}"

    @classmethod
    def parse(cls, line: str) -> Operation:
        head, _, dtypes = line.partition(": ")
        inputs, _, outputs = (part.split() for part in dtypes.partition(" > "))
        words = head.split(" ")
        count = 2 if words[0] in SEVERAL else 1
        inputs = [dtype for dtype in inputs if dtype != "-"]
        return cls(" ".join(words[:count]), tuple(inputs), tuple(outputs), tuple(words[count:]))


SEVERAL = ("Reduce", "ArgReduce", "Bitwise")  # primitives whose operation is a second word
VIEWS = ("Broadcast", "Depends", "ExpandDims", "Slice", "Split", "Squeeze", "StopGradient", "Transpose")
REDUCTIONS = ("and", "or", "sum", "prod", "min", "max")
BITWISE = ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")

ELEMENT = {"bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2, "uint64": 8}
ELEMENT |= {"int64": 8, "complex64": 8}  # bytes, 4 of all others
TEMPLATE = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}  # as templates have the types
HEADS = (64, 72, 80, 96, 128, 192, 256)  # head dimensions of fused attention


def dtype_name(dtype: str) -> str:
    return "bool_" if dtype == "bool" else dtype


def layouts(dtype: str, plain: str, strided: str) -> list[str]:
    """Prefixes by how arrays lie in memory: of contiguous ones each also for several elements a thread ("n", not for
    8 bytes) and beyond 2^32 elements ("2"), of strided ones for 1 to 3 dimensions, more, and beyond 2^31 elements.
    """
    suffixes = ("", "2") if ELEMENT.get(dtype) == 8 else ("", "n", "2")
    return [word + suffix for word in plain.split() for suffix in suffixes] + strided.split()


STRIDED = "g1 g2 g3 gn2 g1large g2large g3large gn4large"


def unary(operation: Operation) -> list[str]:
    source, target = operation.inputs[0], operation.outputs[0]
    suffix = f"_{operation.name}{dtype_name(source)}{dtype_name(target)}"
    return [prefix + suffix for prefix in layouts(source, "v", "gn1 gn4large")]


def binary(operation: Operation) -> list[str]:
    name, dtype = operation.name.split(" ")[-1], operation.inputs[0]
    prefixes = ["ss", *layouts(dtype, "sv vs vv", STRIDED)]
    return [f"{prefix}_{name}{dtype_name(dtype)}" for prefix in prefixes]


def ternary(operation: Operation) -> list[str]:
    dtype = operation.inputs[1]
    return [f"{prefix}_{operation.name}{dtype_name(dtype)}" for prefix in layouts(dtype, "v sv vs", STRIDED)]


def copies(source: str, target: str) -> list[str]:
    """Into another dtype; into the same also from strides to strides."""
    suffix = f"_copy{dtype_name(source)}{dtype_name(target)}"
    between = "gg1 gg2 gg3 ggn2 gg1large gg2large gg3large ggn4large" if source == target else ""
    return [prefix + suffix for prefix in layouts(target, "s v", f"{STRIDED} {between}")]


def cast(operation: Operation) -> list[str]:
    return copies(operation.inputs[0], operation.outputs[0])


def moved(operation: Operation) -> list[str]:
    """A copy, where no view will do."""
    return [name for dtype in operation.inputs for name in copies(dtype, dtype)]


def none(_: Operation) -> list[str]:
    """None for a view; for others MLX writes one for the dtypes, and compiles it when it is needed."""
    return []


def reduction(operation: Operation) -> list[str]:
    kind, dtype = operation.name.split(" ")[1], operation.inputs[0]
    if kind in ("and", "or") and not dtype.startswith(("float", "bfloat")):
        dtype = {1: "bool", 2: "int16", 8: "int64"}.get(ELEMENT.get(dtype, 4), "int32")
    elif dtype == "bool" and kind in ("sum", "prod"):
        dtype = "int8"
    suffix = f"{kind}{dtype_name(dtype)}"
    names = [f"all_reduce_{suffix}", f"row_reduce_simple_{suffix}"]
    for size in ("", "large_"):
        for dims in (1, 2, 5):
            names += [f"row_reduce_{way}_{size}{dims}_reduce_{suffix}" for way in ("small", "looped")]
            names += [f"col_reduce_{way}_{size}{dims}_reduce_{suffix}" for way in ("small", "longcolumn")]
            names += [f"col_reduce_{way}_{size}{dims}_32_32_reduce_{suffix}" for way in ("looped", "2pass")]
    return names


def arg_reduction(operation: Operation) -> list[str]:
    return [f"{operation.name.split(' ')[1]}_{dtype_name(operation.inputs[0])}"]


def arange(operation: Operation) -> list[str]:
    return [f"arange{operation.outputs[0]}"]


def random_bits(_: Operation) -> list[str]:
    return ["rbits", "rbitsc"]


def softmax(operation: Operation) -> list[str]:
    precise = "precise_" if "precise" in operation.details and operation.inputs[0] != "float32" else ""
    return [f"{way}_softmax_{precise}{operation.inputs[0]}" for way in ("block", "looped")]


def product(operation: Operation) -> list[str]:
    dtype = operation.inputs[0]
    layouts = ("nn", "nt", "tn", "tt")
    names = [f"steel_gemm_fused_{layout}_{dtype}_{dtype}_bm64_bn64_*" for layout in layouts]
    names += [f"steel_gemm_splitk_{layout}_{dtype}_float32_bm32_bn32_*" for layout in layouts]
    names += [f"steel_gemm_splitk_accum_{dtype}_float32{suffix}" for suffix in ("", "_axbpy")]
    return [*names, f"gemv_{dtype}_bm*", f"gemv_t_{dtype}_bm*"]


def convolution(operation: Operation) -> list[str]:
    dtype = operation.inputs[0]
    ways = ("input_transform", "weight_transform", "output_transform")
    names = [f"winograd_conv_2d_{way}_{dtype}_{'bo' if way.startswith('out') else 'bc'}32" for way in ways]
    names += [f"implicit_gemm_conv_2d_{dtype}_*", f"implicit_gemm_conv_2d_general_{dtype}_*"]
    return [*names, f"naive_unfold_nd_{dtype}_2", *product(operation)]


def _packed(operation: Operation) -> tuple[str, str]:
    """The mode, and dtype, group size and bits as kernels' names have them."""
    mode, bits, group = operation.details
    dtypes = [dtype for dtype in (*operation.inputs, *operation.outputs) if dtype in TEMPLATE]
    return mode, f"{TEMPLATE.get(dtypes[0], dtypes[0])}_gs_{group}_b_{bits}"


def packing(operation: Operation) -> list[str]:
    mode, suffix = _packed(operation)
    return [f"{mode}_{operation.name.lower()}_{suffix}{'' if mode == 'affine' else '_hgs_false'}"]


def packed_product(operation: Operation) -> list[str]:
    mode, suffix = _packed(operation)
    names = [f"{mode}_qmm_t_{suffix}_alN_{aligned}_batch_{batch}" for aligned in ("true", "false") for batch in "01"]
    names += [f"{mode}_{way}_{suffix}_batch_{batch}" for way in ("qmm_n", "qvm") for batch in "01"]
    names += [f"{mode}_{way}_{suffix}_batch_{batch}*" for way in ("qmv", "qmv_fast") for batch in "01"]
    return [*names, f"{mode}_qmm_t_splitk_{suffix}_*", f"{mode}_qvm_split_k_{suffix}_*"]


def norm(operation: Operation) -> list[str]:
    name, dtype = {"RMSNorm": "rms", "LayerNorm": "layer_norm"}[operation.name], operation.inputs[0]
    return [f"{vjp}{name}{looped}{dtype}" for vjp in ("", "vjp_") for looped in ("", "_looped")]


def rope(operation: Operation) -> list[str]:
    return [f"rope_{way}{operation.inputs[0]}" for way in ("", "single_", "large_")]


def attention(operation: Operation) -> list[str]:
    """By head dimension and mask; without one that is the mask of the same dtype. Other dimensions are not fused: they
    are products and a softmax, which stand for themselves.
    """
    dtype, (dims, mask) = operation.inputs[0], operation.details
    if int(dims) not in HEADS:
        return []
    tile, columns = (16, 1) if int(dims) >= 128 else (32, 1)
    if int(dims) == 256:
        columns = 2
    mask = dtype_name(dtype if mask == "none" else mask)
    return [f"steel_attention_{dtype}_bq32_bk{tile}_bd{dims}_bv{dims}_wm4_wn{columns}_mask{mask}"]


# Primitives by the rule of their kernels' names; Gather's are compiled for its dtypes, any pair of them.
RULES: dict[Callable[[Operation], list[str]], str] = {
    unary: "Abs Cos ErfInv Exp FromFP8 Log LogicalNot Negative Round Rsqrt Sigmoid Sin Sqrt Square Tanh ToFP8",
    binary: "Add Bitwise Divide Equal Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr Maximum Minimum "
    "Multiply NotEqual Power Subtract",
    ternary: "Select",
    cast: "AsType Full",
    moved: "Concatenate Contiguous Flatten Pad Reshape SliceUpdate Unflatten View",
    none: " ".join(["Gather", *VIEWS]),
    reduction: "Reduce",
    arg_reduction: "ArgReduce",
    arange: "Arange",
    random_bits: "RandomBits",
    softmax: "Softmax",
    product: "Matmul AddMM",
    convolution: "Convolution",
    packing: "Quantize Dequantize",
    packed_product: "QuantizedMatmul",
    norm: "RMSNorm LayerNorm",
    rope: "RoPE",
    attention: "ScaledDotProductAttention",
}
KERNELS = {name: rule for rule, names in RULES.items() for name in names.split()}


def kernels_of(operation: Operation) -> list[str] | None:
    """The kernels that an operation may call on Metal; None for a primitive of which that is not known."""
    rule = KERNELS.get(operation.name.split(" ")[0])
    return None if rule is None else rule(operation)


if __name__ == "__main__":
    print(f"{LIST}: {write_list(Path(sys.argv[1]))} names")
