"""Fixtures that several test files share: checkpoints written by diffusers, and this library's pipelines on them."""

from pathlib import Path

import pytest

from flux2_mlx import Flux2Pipeline
from tests import tiny


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Diffusers' pipeline (distilled) and the folder it was written to."""
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
