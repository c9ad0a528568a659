"""The machine: GPU or CPU, dtypes, how much memory there is, and keeping to it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


def machine_name() -> str:
    """What a measurement depends on: chip, device and MLX's version."""
    return f"{mx.device_info()['device_name']}, {mx.default_device()}, MLX {version('mlx')}"


def recommended_memory() -> int:
    """Bytes that MLX may hold: Metal's recommended working set, or three quarters of the memory."""
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size") or 0
    if recommended:
        return int(recommended)
    total = info.get("total_memory", 0) if on_gpu() else 0
    return int(int(total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) * 0.75)


def machine_memory() -> int:
    """Bytes that the stages may hold together: what MLX may, as far as other programs leave it."""
    free = free_memory()
    own = mx.get_active_memory() + mx.get_cache_memory()
    return recommended_memory() if free is None else min(recommended_memory(), free + own)


def free_memory() -> int | None:
    """Bytes of the memory that CPU and GPU share which no program needs now: free, or soon to be had; None where the
    system does not say it, or the GPU has a memory of its own.
    """
    try:
        if sys.platform == "darwin":
            return free_in_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout)
        if on_gpu():
            return None
        return free_in_meminfo(Path("/proc/meminfo").read_text())
    except (OSError, subprocess.SubprocessError):
        return None


def free_in_meminfo(text: str) -> int | None:
    """Bytes, from Linux's /proc/meminfo."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def free_in_vm_stat(text: str) -> int | None:
    """Bytes, from what macOS's vm_stat prints: free pages, and inactive ones, which psutil counts as available too."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", text, re.MULTILINE)
    return int(page[1]) * sum(map(int, pages)) if page and pages else None


@contextmanager
def within(limit: int, working: int) -> Iterator[None]:
    """Let MLX keep to so many bytes meanwhile.

    MLX computes ahead, which takes twice the intermediates and more. It waits once its own limit is passed, by what the
    next operation needs: so that limit leaves room for the intermediates (``working``) of computing in order. Within
    it MLX also keeps freed buffers.
    """
    before = mx.set_memory_limit(max(1, limit - working))
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@contextmanager
def wired(limit: int) -> Iterator[None]:
    """On a GPU, keep what MLX holds from being paged out meanwhile, up to so many bytes."""
    if not on_gpu():
        yield
        return
    before = mx.set_wired_limit(min(limit, recommended_memory()))
    try:
        yield
    finally:
        mx.set_wired_limit(before)


def default_dtype() -> mx.Dtype:
    """bfloat16 on a GPU that has it, float16 on M1 and M2, which emulate bfloat16, float32 on the CPU backend."""
    if not on_gpu():
        return mx.float32
    # Apple's GPU generations: g13 is M1, g14 is M2.
    apple = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return mx.float16 if apple and int(apple[1]) <= 14 else mx.bfloat16


def stage_dtype(stage: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a stage where the transformer has ``dtype``: in float16 the text encoder and the autoencoder stay
    in bfloat16, whose range their activations need.
    """
    return mx.bfloat16 if dtype == mx.float16 and stage != "transformer" else dtype


def weights_of(module: nn.Module) -> dict[str, mx.array]:
    """A module's weights by name, as they are: loaded or still lazy."""
    return cast("dict[str, mx.array]", tree_flatten(module.parameters(), destination={}))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights once they are loaded."""
    return sum(array.nbytes for array in weights_of(module).values())
