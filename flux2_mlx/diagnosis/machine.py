"""The machine, its memory, the cache folder, the Hub and the models that are here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version

import huggingface_hub
import mlx.core as mx
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, get_session

from .._version import __version__
from ..checkpoints.hub import cached_releases
from ..device import free_memory, machine_name, on_gpu, recommended_memory
from ..disk_cache import cache_folder
from ..families import RELEASES
from .findings import OK, SKIPPED, SLOW, WRONG, Finding

HUB_SECONDS = 5.0  # that the Hub has to answer


def describe_machine() -> Finding:
    found = (
        f"{machine_name()}, {mx.device_info().get('architecture', '')}, {platform.platform()}, "
        f"Python {platform.python_version()} ({platform.machine()}), flux2_mlx {__version__}"
    )
    if sys.platform == "darwin" and not on_gpu():
        return Finding(
            WRONG, f"{found}: MLX has no GPU", "use a Python for arm64, and no virtual machine without Metal"
        )
    wanted = wanted_mlx()
    ends = dict(re.findall(r"(>=|<)([\d.]+)", wanted))
    if not _numbers(ends.get(">=", "0")) <= _numbers(version("mlx")) < _numbers(ends.get("<", "1000")):
        return Finding(WRONG, f"{found}: {wanted} is needed", f"pip install '{wanted}'")
    return Finding(OK, found)


def wanted_mlx() -> str:
    """The versions of MLX that this package needs, as pip takes them: "mlx>=0.32.3,<0.33"; "" where nothing says it."""
    try:
        lines = [line.partition(";")[0].strip() for line in requires("flux2-mlx") or ()]
    except PackageNotFoundError:
        return ""
    return next((re.sub(r"\[.*?\]", "", line) for line in lines if re.match(r"mlx\b", line)), "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def check_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    recommended, free = recommended_memory(), free_memory()
    found = f"{total / 1e9:.1f} GB, {recommended / 1e9:.1f} recommended"
    if free is None and on_gpu() and sys.platform != "darwin":
        return Finding(OK, f"{found}, the GPU's own")
    if free is None or not 0 < free <= total or recommended <= 0:
        what = "none" if free is None else f"{free / 1e9:.1f}"
        return Finding(WRONG, f"{found}, {what} free: this cannot be", "say what to use: --memory-limit GB")
    return Finding(OK, f"{found}, {free / 1e9:.1f} free")


def check_cache_folder() -> Finding:
    """Whether the cache folder can be written to."""
    given = "FLUX2_MLX_CACHE's" if os.environ.get("FLUX2_MLX_CACHE") else "the usual"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (OSError, RuntimeError) as error:
        what = f"{given} folder cannot be written to ({type(error).__name__})"
        return Finding(SLOW, what, "prompts and speeds are found out anew each time: set FLUX2_MLX_CACHE to another")
    return Finding(OK, f"{given} folder, {free / 1e9:.1f} GB of disk free")


def check_hub() -> Finding:
    """Whether the Hub answers, and takes this user's token."""
    if constants.HF_HUB_OFFLINE:
        return Finding(SKIPPED, "HF_HUB_OFFLINE is set", "unset it to download")
    token = huggingface_hub.get_token()
    where = "whoami-v2" if token else f"models/{RELEASES[0].repo}"
    try:
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/{where}", headers=build_hf_headers(token=token or False), timeout=HUB_SECONDS
        )
    except Exception as error:  # the HTTP library, which changed between versions of the Hub's client, has its own
        return Finding(SKIPPED, f"the Hub cannot be reached ({type(error).__name__})", "without it, --model nano works")
    if answer.status_code in (401, 403) and token:
        return Finding(WRONG, f"the Hub refuses the token ({answer.status_code})", "log in anew with `hf auth login`")
    if answer.status_code != 200:
        return Finding(SKIPPED, f"the Hub answers with {answer.status_code}", "try again later")
    return Finding(OK, "reachable, logged in" if token else "reachable, not logged in (the 9B models need it)")


def find_models() -> Finding:
    found = cached_releases()
    return Finding(OK, f"{', '.join(found) or 'no klein model'} in the Hub's cache")
