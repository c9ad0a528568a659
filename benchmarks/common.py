"""What the benchmarks share: the machine, random weights, and how a stage is timed."""

from __future__ import annotations

import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from flux2_mlx import AutoEncoderConfig, FluxKleinParams, Qwen3Config, __version__
from flux2_mlx.device import weights_of

# Shapes for a few seconds on any machine: they show that a script runs, nothing about speed.
TINY = (
    FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=192, depth=1, depth_single=1),
    Qwen3Config(1000, 64, 128, 2, 1, 32),
    AutoEncoderConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4),
)


def machine() -> dict[str, Any]:
    """Chip, memory, system and versions, for the JSON line."""
    info = mx.device_info()
    return {
        "chip": info.get("device_name") or platform.processor(),
        "cores": os.cpu_count(),
        "gpu_cores": gpu_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": str(mx.default_device()),
        "os": platform.platform(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "flux2_mlx": __version__,
    }


def gpu_cores() -> int | None:
    """Of a Mac."""
    if sys.platform != "darwin":
        return None
    tree = subprocess.run(["ioreg", "-l"], capture_output=True, text=True, errors="replace").stdout
    found = re.search(r'"gpu-core-count" = (\d+)', tree)
    return int(found[1]) if found else None


def randomized(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """A module with its random initial weights in dtype, in memory; tensor by tensor, so that casts do not add up."""
    module.update(tree_map(lambda array: array.astype(dtype), module.parameters()))
    return loaded(module)


def loaded(module: nn.Module) -> nn.Module:
    """A module with its lazy weights in memory."""
    for array in weights_of(module).values():
        mx.eval(array)
    return module


def measure(name: str, function: Callable[[], mx.array], repeats: int) -> dict[str, Any]:
    """Time a stage and print a row: seconds of each repeat (the first, which warms up, apart) and peak MLX memory."""
    mx.reset_peak_memory()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mx.eval(function())
        seconds.append(time.perf_counter() - start)
    first, *rest = seconds
    figures = {
        "first_s": first,
        "median_s": statistics.median(rest or seconds),
        "min_s": min(rest or seconds),
        "max_s": max(rest or seconds),
        "peak_gb": mx.get_peak_memory() / 1e9,
    }
    print(f"{name:14}" + "".join(f"{value:12.3f}" for value in figures.values()), flush=True)
    return figures


def header() -> None:
    """Column names of the rows that measure prints."""
    columns = ("first s", "median s", "min s", "max s", "peak GB")
    print(f"{'':14}" + "".join(f"{c:>12}" for c in columns))


def process_peak_gb() -> float:
    """The largest memory that this process had, as the system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
