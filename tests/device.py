"""The device of the tests: the CPU, or the GPU with FLUX2_MLX_TEST_DEVICE=gpu, there too in float32.

python -m tests.device flux2_mlx.generate ...      # a command, on that device: a process has MLX's default otherwise
"""

import os
import runpy
import sys

import mlx.core as mx

from flux2_mlx import options
from flux2_mlx.training import options as training_options


def choose() -> None:
    # The bounds of the tests are those of float32. On a GPU it is no TF32 either: see flux2_mlx.device.
    if os.environ.get("FLUX2_MLX_TEST_DEVICE") == "gpu":
        mx.set_default_device(mx.gpu)
        options.default_dtype = training_options.default_dtype = lambda: mx.float32
    else:
        mx.set_default_device(mx.cpu)


if __name__ == "__main__":
    choose()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
