"""MLX under the library: its versions, float32 that is float32, and rotations without negative strides."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx import Flux2Pipeline, device
from flux2_mlx.models.rope import rotate


def test_the_least_mlx_has_no_known_fault():
    """Before 0.32.1 compiled kernels read negative strides out of bounds, packed products of more than 32,768 rows were
    wrong, and convolutions overflowed (ml-explore/mlx 3716, 3631, 4258); before 0.32.3 NaN in FP8 was read as 480.
    """
    needs = re.findall(r'"mlx(.*?);', (Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert needs == [">=0.32.3,<0.33", "[cpu]>=0.32.3,<0.33", "[cuda13]>=0.32.3,<0.33"]


@pytest.mark.parametrize(("given", "kept"), [(None, "0"), ("1", "1")])
def test_float32_is_no_tf32_unless_asked_for(given, kept):
    environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    environment |= {} if given is None else {"MLX_ENABLE_TF32": given}
    say = "import flux2_mlx, os; print(os.environ['MLX_ENABLE_TF32'])"
    run = subprocess.run([sys.executable, "-c", say], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == kept


def test_tf32_that_came_first_is_told(checkpoint, monkeypatch):
    def in_tf32(a: mx.array, b: mx.array) -> mx.array:
        """The product of factors that keep ten bits after the point, as tensor cores round them."""
        rounded = [mx.array((np.array(x).view(np.uint32) & 0xFFFFE000).view(np.float32)) for x in (a, b)]
        return rounded[0] @ rounded[1]

    monkeypatch.setattr(device, "on_gpu", lambda: True)
    device.warn_of_tf32()  # says nothing of exact products
    monkeypatch.setattr(mx, "matmul", in_tf32)
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    device.warn_of_tf32()  # nor where the user wants TF32
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    with pytest.warns(UserWarning, match="import flux2_mlx first, or set MLX_ENABLE_TF32=0"):
        Flux2Pipeline.from_pretrained(checkpoint)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rotations_are_those_of_complex_numbers(dtype):
    """RoFormer's definition: pair p of a token is multiplied with e^(i angle)."""
    rng = np.random.default_rng(0)
    x, angle = rng.normal(size=(2, 3, 5, 8)), rng.uniform(-500, 500, size=(1, 5, 4))
    x = np.array(mx.array(x).astype(dtype).astype(mx.float32), np.float64)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    want = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    cos, sin = (mx.array(table.astype(np.float32)) for table in (np.cos(angle), np.sin(angle)))
    # q as attention has it, which is strided
    strided = (
        mx.array(x).astype(dtype).transpose(0, 2, 1, 3).reshape(2, 5, 24).reshape(2, 5, 3, 8).transpose(0, 2, 1, 3)
    )
    got = rotate(strided, cos, sin)
    assert got.dtype == dtype
    eps = {mx.float32: 2**-22, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(np.array(got.astype(mx.float32)), want, rtol=eps, atol=eps)
