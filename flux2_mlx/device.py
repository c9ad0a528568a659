"""The machine: GPU or CPU, default dtypes, how much memory it has, and limits on what MLX takes of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import current_thread, local, main_thread
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


def machine_name() -> str:
    """Chip, device and MLX's version, as a measurement names its machine."""
    return f"{mx.device_info()['device_name']}, {mx.default_device()}, MLX {version('mlx')}"


def system_name() -> str:
    """The operating system and its version, of which kernels and their speed depend as on MLX's version."""
    return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"


def recommended_memory() -> int:
    """Bytes that MLX may take: Metal's recommended working set, elsewhere three quarters of the memory."""
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size") or 0
    if recommended:
        return int(recommended)
    total = info.get("total_memory", 0) if on_gpu() else 0
    return int(int(total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) * 0.75)


def machine_memory() -> int:
    """Bytes that the stages may take together: recommended_memory, or what other programs leave of it."""
    free = free_memory()
    own = mx.get_active_memory() + mx.get_cache_memory()
    return recommended_memory() if free is None else min(recommended_memory(), free + own)


def free_memory() -> int | None:
    """Bytes of the memory shared by CPU and GPU that are free or reclaimable; None where the system does not tell, or
    the GPU has a memory of its own.
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
    """Available bytes by the text of Linux's /proc/meminfo; None without that line."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def free_in_vm_stat(text: str) -> int | None:
    """Available bytes by the output of macOS's vm_stat: free, speculative and inactive pages, as psutil counts them."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", text, re.MULTILINE)
    return int(page[1]) * sum(map(int, pages)) if page and pages else None


@contextmanager
def memory_limit(limit: int, activation_bytes: int) -> Iterator[None]:
    """Keep MLX's memory within ``limit`` bytes while the body runs.

    MLX schedules operations ahead, which takes twice the activations of computing in order and more. It waits when an
    operation would pass MLX's own limit, which is therefore set lower by ``activation_bytes``, those of computing in
    order. Buffers that MLX has freed and caches count towards its limit too.
    """
    before = mx.set_memory_limit(max(1, limit - activation_bytes))
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@contextmanager
def wired_limit(limit: int) -> Iterator[None]:
    """On a GPU, keep up to ``limit`` bytes of MLX's memory from being paged out while the body runs."""
    if not on_gpu():
        yield
        return
    before = mx.set_wired_limit(min(limit, recommended_memory()))
    try:
        yield
    finally:
        mx.set_wired_limit(before)


def default_dtype() -> mx.Dtype:
    """float32 on the CPU backend, float16 on M1 and M2, which emulate bfloat16, bfloat16 on every other GPU."""
    if not on_gpu():
        return mx.float32
    # Apple's GPU generations: g13 is M1, g14 is M2.
    apple = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return mx.float16 if apple and int(apple[1]) <= 14 else mx.bfloat16


def stage_dtype(stage: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a stage in a pipeline of ``dtype``. In float16 the text encoder and the autoencoder
    stay in bfloat16, since their activations leave float16's range.
    """
    return mx.bfloat16 if dtype == mx.float16 and stage != "transformer" else dtype


def weights_of(module: nn.Module) -> dict[str, mx.array]:
    """A module's weights by name, without evaluating them."""
    return cast("dict[str, mx.array]", tree_flatten(module.parameters(), destination={}))


def weight_bytes(module: nn.Module) -> int:
    """Bytes that a module's weights take when they are loaded."""
    return sum(array.nbytes for array in weights_of(module).values())


class _Streams:
    """MLX's streams of a thread, which end with it."""

    def __del__(self) -> None:
        mx.clear_streams()


_thread = local()


def clear_streams_at_end_of_thread() -> None:
    """Have MLX's streams of this thread end with it, unless it is the main one. To be called before MLX computes in it.

    A thread that ends with streams makes MLX abort the process at its exit (ml-explore/mlx 3281 and 3405). Python
    deletes what is local to a thread in that thread, as it ends.
    """
    has_own_streams = hasattr(mx, "clear_streams")  # before MLX 0.31.2 all threads share them
    if has_own_streams and current_thread() is not main_thread() and not hasattr(_thread, "streams"):
        _thread.streams = _Streams()
