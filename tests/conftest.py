"""Fixtures that several test files share: checkpoints written by diffusers, and this library's pipelines on them."""

import gc
import os
import signal
from pathlib import Path

import hypothesis
import mlx.core as mx
import pytest
import torch

from flux2_mlx import Flux2Pipeline
from tests import device, tiny

device.choose()

# No test finds what another has kept, and no result depends on what was measured, but in tests of just that.
os.environ["FLUX2_MLX_CACHE"] = os.devnull
os.environ["FLUX2_MLX_DENSE_ROWS"] = "128"

# The machines that run this are shared: an example that takes long says nothing.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


def pytest_collection_finish():
    """What was imported stays: garbage is looked for among the rest alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cpu_order():
    """Skip on a GPU what counts on the CPU's order of computing: peaks of memory, and plans of them."""
    if os.environ.get("FLUX2_MLX_TEST_DEVICE") == "gpu":
        pytest.skip("counts on the CPU's order of computing")


@pytest.fixture
def memory(cpu_order):
    """A function that tells the bytes of MLX arrays, once nothing of earlier tests is left to be freed, or to be used
    again: an array takes all of a freed buffer that is somewhat too large for it.
    """

    def settled() -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    return settled


@pytest.fixture(scope="module", params=["4b", "9b"])
def model(request):
    """diffusers' transformer in the layouts of both sizes."""
    torch.manual_seed(3)
    layout = tiny.LAYOUTS[request.param]
    return tiny.transformer(layout["heads"], layout["depth"], layout["depth_single"], layout["text_hidden"])


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """diffusers' pipeline (distilled) and the folder it was written to."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    pipe = tiny.pipeline()
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture(scope="session")
def checkpoint(reference) -> Path:
    return reference[1]


@pytest.fixture(scope="session")
def base_reference(tmp_path_factory):
    """A base model: no is_distilled, so guidance is on."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-base"
    pipe = tiny.pipeline(distilled=False, seed=1)
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture(scope="session")
def pipe(checkpoint) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained(checkpoint)


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint to damage; see tiny.rewrite."""
    return tiny.copy(checkpoint, tmp_path / "damaged")


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Models of the pipelines that are opened from here on."""
    models: list[str] = []
    open_pipeline = Flux2Pipeline.from_pretrained.__func__
    monkeypatch.setattr(
        Flux2Pipeline,
        "from_pretrained",
        classmethod(lambda cls, model, **options: models.append(model) or open_pipeline(cls, model, **options)),
    )
    return models


@pytest.fixture
def as_in_a_terminal():
    """No signal is ignored, as SIGINT is in a shell's background job and SIGHUP under nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
