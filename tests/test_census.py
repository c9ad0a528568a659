"""All that MLX is asked to do has kernels on Metal: the census of operations beside the names in a wheel for macOS."""

import struct
import zipfile

import mlx.core as mx
import pytest

from tests.census import ACCEPTED, Census, take
from tests.kernels import Operation, kernels_of, missing_from, read_list, write_list

TITLE, NAMES = read_list()


@pytest.fixture(scope="module")
def accepted() -> set[Operation]:
    return set(map(Operation.parse, ACCEPTED.read_text().splitlines()))


def faults(census: Census, accepted: set[Operation]) -> list[str]:
    """What is new in a census, with its place and the kernels that it needs and Metal lacks; and what is gone."""
    lines = []
    for operation in sorted(census.places.keys() - accepted):
        kernels = kernels_of(operation)
        told = "of which tests/kernels.py knows no kernels"
        if kernels is not None:
            lacking = missing_from(NAMES, kernels)
            told = (
                f"{len(lacking)} of {len(kernels)} kernels are missing: {', '.join(lacking[:3])}" if lacking else "new"
            )
        lines.append(f"{operation} ({census.places[operation]}): {told}")
    return lines + [f"{operation}: gone" for operation in sorted(accepted - census.places.keys())]


def test_what_is_computed_was_accepted(accepted):
    found = faults(take(), accepted)
    assert not found, "\n".join([*found, "accept what Metal has kernels for: python -m tests.census"])


def test_all_that_was_accepted_has_kernels(accepted):
    needed = {operation: kernels_of(operation) for operation in accepted}
    assert not [operation for operation, kernels in needed.items() if kernels is None]
    assert not {
        str(operation): lacking for operation, kernels in needed.items() if (lacking := missing_from(NAMES, kernels))
    }
    assert len(set().union(*needed.values())) > 2000


def test_the_census_is_that_of_a_gpu(accepted):
    """Its branches, which the CPU does not take, and every way to pack, to read and to train."""
    names = {str(operation) for operation in accepted}
    assert "Dequantize affine 3 64: uint32 bfloat16 bfloat16 > bfloat16" in names
    assert "QuantizedMatmul nvfp4 4 16: float16 uint32 uint8 > float16" in names
    assert "ScaledDotProductAttention 128 bool: bfloat16 bfloat16 bfloat16 > bfloat16" in names
    assert {"Add: uint64 uint64 > uint64", "FromFP8: uint8 > bfloat16", "RandomBits: uint32 > uint32"} <= names


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            lambda x: x.astype(mx.float64) + 1,
            "Add: float64 float64 > float64 (it): 18 of 18 kernels are missing: ss_Add",
        ),
        (lambda x: x.astype(mx.int16), "AsType: float32 > int16 (it): new"),
        (lambda x: mx.sort(x), "Sort: float32 > float32 (it): of which tests/kernels.py knows no kernels"),
        (lambda x: mx.from_fp8(x.astype(mx.uint8), mx.float32), "FromFP8: uint8 > float32 (it): new"),
        (lambda x: mx.eval(x.astype(mx.int8)) or x, "AsType: float32 > int8 (it): new"),
        (lambda x: (x > 0).astype(mx.int64).sum().item(), "Reduce sum: int64 > int64 (it): new"),
    ],
    ids=["a dtype without kernels", "a dtype", "a primitive", "an operation by hand", "what is evaluated", "an item"],
)
def test_what_is_new_is_told(function, told, accepted):
    census = Census()
    census.trace("it", function, mx.zeros((4, 64)), answers=[True])
    assert any(line.startswith(told) for line in faults(census, accepted)), faults(census, accepted)


def test_the_list_is_read_from_a_wheel(tmp_path):
    def record(name: bytes) -> bytes:
        return b"NAME" + struct.pack("<H", len(name) + 1) + name + b"\0TYPE\1\0\2"

    wheel, path = tmp_path / "mlx_metal-9-py3-none-macosx_14_0_arm64.whl", tmp_path / "names.txt.xz"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("mlx/lib/mlx.metallib", b"MTLB" + record(b"vv_Addfloat32") + record(b"rbits") + b"NAME\1\0no\0")
    assert write_list(wheel, path) == 2
    title, names = read_list(path)
    assert title.startswith(f"# {wheel.name} sha256:")
    assert names == ["rbits", "vv_Addfloat32"]
    assert missing_from(names, ["rbits", "rbitsc", "vv_*", "vn_*"]) == ["rbitsc", "vn_*"]


def test_the_list_says_its_wheel():
    assert TITLE.startswith("# mlx_metal-0.32.4-py3-none-macosx_14_0_arm64.whl sha256:")
    assert len(NAMES) > 17_000
    assert sorted(NAMES) == NAMES
