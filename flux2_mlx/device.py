"""The machine: GPU or CPU, default dtypes, how much memory it has, and limits on what MLX takes of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, local, main_thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import DeviceError


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


def on_metal() -> bool:
    """Whether MLX computes on a Mac's GPU."""
    return on_gpu() and mx.metal.is_available()


def writes_scores(dtype: mx.Dtype) -> bool:
    """Whether attention writes its scores (heads x queries x keys) to memory: MLX has fused kernels for Metal, and for
    CUDA in 16 bits. Where it is differentiated it writes them everywhere.
    """
    return not on_gpu() or (dtype == mx.float32 and mx.cuda.is_available())


def machine_name() -> str:
    """Chip, device and MLX's version, as a measurement names its machine."""
    version = mx.__version__  # type: ignore[attr-defined]  # the stubs lack it; importlib.metadata takes 20 ms
    return f"{mx.device_info()['device_name']}, {mx.default_device()}, MLX {version}"


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
    if sys.platform == "darwin":
        free = free_in_sysctl(_output("sysctl", "hw.memsize", "kern.memorystatus_level"))
        return free_in_vm_stat(_output("vm_stat")) if free is None else free
    if on_gpu():
        return None
    try:
        return free_in_meminfo(Path("/proc/meminfo").read_text())
    except OSError:
        return None


def _output(*words: str) -> str:
    """What a command writes; nothing where it fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def free_in_meminfo(text: str) -> int | None:
    """Available bytes by the text of Linux's /proc/meminfo; None without that line."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def free_in_sysctl(text: str) -> int | None:
    """Available bytes by the output of macOS's sysctl: kern.memorystatus_level is the percentage of hw.memsize that it
    gives before it is short of any, as its memory_pressure says. None for other text.
    """
    memory = re.search(r"^hw\.memsize: ([1-9]\d*)$", text, re.MULTILINE)
    level = re.search(r"^kern\.memorystatus_level: (\d{1,3})$", text, re.MULTILINE)
    if memory is None or level is None or int(level[1]) > 100:
        return None
    return int(memory[1]) * int(level[1]) // 100


def free_in_vm_stat(text: str) -> int | None:
    """Available bytes by the output of macOS's vm_stat: free, speculative and inactive pages, as psutil counts them.
    That is too few, since active pages of files and what can be compressed are not counted.
    """
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
    """On a GPU, keep up to ``limit`` bytes of MLX's memory from being paged out while the body runs, and until the GPU
    has done with it.
    """
    if not on_gpu():
        yield
        return
    before = mx.set_wired_limit(min(limit, recommended_memory()))
    try:
        yield
    finally:
        clear_streams_at_end_of_thread()  # whatever thread ends a generator waits for the GPU in it
        try:
            synchronize()
        finally:
            mx.set_wired_limit(before)


# Words of MLX's errors: of a Metal command buffer that macOS ended (IOGPU's names), and of too little memory on Metal,
# on CUDA and on the CPU.
STOPPED = ("Impacting Interactivity", "Caused GPU Timeout Error", "Caused GPU Hang Error", "prior/excessive GPU errors")
TOO_LITTLE_MEMORY = (
    "Insufficient Memory",
    "Unable to allocate",
    "maximum allowed buffer size",
    "[metal::malloc] Resource limit",
    "failed: out of memory",
    "std::bad_alloc",
)


def explain(error: BaseException) -> str | None:
    """What an error of MLX's means and the way out, on one line; None where it is another kind of error."""
    for words in STOPPED:
        if words in str(error):
            return (
                f"the GPU was stopped because its work took too long ({words}): generate a smaller image, close what "
                "else uses the GPU, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment to have macOS wait"
            )
    for words in TOO_LITTLE_MEMORY:
        if words in str(error):
            return (
                f"memory is too little ({words}): a smaller image, fewer bits (--quantize 4, quantize=4) or one block "
                'at a time (--memory streamed, memory="streamed") needs less, and other programs can be closed'
            )
    return None


@contextmanager
def device_errors() -> Iterator[None]:
    """Give the errors of a GPU that was stopped, or of too little memory, as DeviceErrors; also those that MLX keeps
    to itself until the GPU is next used. Another computation can follow.
    """
    try:
        yield
        synchronize()
    except (RuntimeError, MemoryError) as error:
        message = None if isinstance(error, DeviceError) else explain(error)
        if message is None:
            raise
        with suppress(RuntimeError):
            synchronize()  # takes the errors of what was under way besides
        raise DeviceError(message) from error


def synchronize() -> None:
    """Wait for the GPU, and raise the errors of its work. ``mx.eval`` leaves out those of commands that it handed over
    on the way (ml-explore/mlx 3979): what they should have computed is then taken for computed.
    """
    if on_gpu():
        mx.synchronize()


def default_dtype() -> mx.Dtype:
    """float32 on the CPU backend, float16 on M1 and M2, which emulate bfloat16, bfloat16 on every other GPU."""
    if not on_gpu():
        return mx.float32
    # Apple's GPU generations: g13 is M1, g14 is M2.
    apple = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return mx.float16 if apple and int(apple[1]) <= 14 else mx.bfloat16


def stage_dtype(stage: str, dtype: mx.Dtype, vae_dtype: mx.Dtype | None = None) -> mx.Dtype:
    """The dtype of a stage in a pipeline of ``dtype``. In float16 the text encoder and the autoencoder
    stay in bfloat16, since their activations leave float16's range.

    Args:
        vae_dtype: the autoencoder's, where one is asked for. By default it is float32 on a GPU: Metal computes nearly
            all of its convolutions as Winograd F(6x6, 3x3), whose error in 16 bits is many times that of a direct one.
    """
    if stage == "autoencoder" and (vae_dtype is not None or on_gpu()):
        return vae_dtype or mx.float32
    return mx.bfloat16 if dtype == mx.float16 and stage != "transformer" else dtype


def rounds_to_tf32() -> bool:
    """Whether MLX rounds the factors of float32 products to TF32, whose numbers have ten bits after the point."""
    return bool(mx.matmul(mx.full((128, 128), 1 + 2**-12), mx.eye(128)).max().item() == 1)


def warn_of_tf32() -> None:
    """Warn where float32 on a GPU is TF32 though nobody asked for it: MLX had multiplied before this was imported."""
    if on_gpu() and os.environ["MLX_ENABLE_TF32"] == "0" and rounds_to_tf32():
        warnings.warn(
            "MLX rounds float32 products to TF32, since it had multiplied before flux2_mlx was imported; import "
            "flux2_mlx first, or set MLX_ENABLE_TF32=0",
            stacklevel=2,
        )


def weights_of(module: nn.Module) -> dict[str, mx.array]:
    """A module's weights by name, without evaluating them."""
    return {name: part for name, part in parts_of(module).items() if isinstance(part, mx.array)}


def parts_of(module: nn.Module) -> dict[str, nn.Module | mx.array]:
    """A module's modules and weights by name, itself as "", without evaluating them: what MLX's named_modules and
    parameters list, in a quarter of their time, which every step of an image would take several times.
    """
    found: dict[str, nn.Module | mx.array] = {"": module}
    _collect_parts("", _children(module), found)
    return found


def _children(module: nn.Module) -> list[tuple[str, Any]]:
    return [child for child in module.items() if child[0][0] != "_"]


# No function within parts_of: one that calls itself keeps the weights until Python looks for circles.
def _collect_parts(start: str, children: Iterable[tuple[Any, Any]], found: dict[str, nn.Module | mx.array]) -> None:
    for key, child in children:
        name = f"{start}{key}"
        if isinstance(child, mx.array):
            found[name] = child
        elif isinstance(child, nn.Module):
            found[name] = child
            _collect_parts(f"{name}.", _children(child), found)
        elif isinstance(child, (dict, list)):
            _collect_parts(f"{name}.", child.items() if isinstance(child, dict) else enumerate(child), found)


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
    if current_thread() is not main_thread() and not hasattr(_thread, "streams"):
        _thread.streams = _Streams()
