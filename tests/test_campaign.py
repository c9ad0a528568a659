"""A sample of the campaign in tests/campaign, in processes of its own; nightly, more: see docs/robustness.md."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.mutate import mutate
from tests.campaign.targets import TARGETS
from tests.campaign.workloads import WORKLOADS

ROOT = Path(__file__).parents[1]
EVERY = {"images": 40, "fuse": 400}  # one of so many operations


def campaign(module: str, *words: object) -> list[dict]:
    """The figures that a part of the campaign prints; fails with the finds."""
    command = [sys.executable, "-m", f"tests.campaign.{module}", *map(str, words)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLUX2_MLX_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("count", [8, pytest.param(500, marks=pytest.mark.nightly)])
def test_strangers_files_and_words_end_as_they_should(count):
    """Each in success or in one of the project's errors."""
    seed = 0 if count == 8 else 10**6
    *targets, total = campaign("fuzz", "all", "--seed", seed, "--count", count)
    assert [figures["target"] for figures in targets] == list(TARGETS)
    assert total["inputs"] == count * len(TARGETS)


def test_an_input_is_told_by_its_seed():
    for name, content in (
        ("a.json", b'{"a": [1, 2]}'),
        ("a.txt", b"a\nb"),
        ("a.png", bytes(99)),
        ("a.safetensors", b"\2"),
    ):
        first, again, other = (mutate(random.Random(seed), name, content) for seed in (1, 1, 2))
        assert first == again
        assert {first, other} != {content}


@pytest.mark.skipif(sys.platform != "linux", reason="the faults come from a library that is loaded as on Linux")
@pytest.mark.parametrize(
    "command", ["images", "fuse", *(pytest.param(name, marks=pytest.mark.nightly) for name in WORKLOADS)]
)
def test_faults_of_the_disk_lose_nothing(command, request):
    """Nor do signals; and nothing half written stays."""
    is_nightly = request.node.get_closest_marker("nightly") is not None
    (figures,) = campaign("inject", command, "--every", 8 if is_nightly else EVERY[command])
    assert figures["operations"] > 10
    if is_nightly:
        (figures,) = campaign("inject", command, "--kills", 20)
        assert figures["kills"] == 20


def test_the_page_names_every_part():
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE))
    assert set(TARGETS) | set(WORKLOADS) <= rows
