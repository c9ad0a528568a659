"""README and examples do what they print, on a tiny checkpoint."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from flux2_mlx import RELEASED
from flux2_mlx.generate import main
from tests import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Sizes of the README, cut down so that reference BLAS draws them in a moment.
SMALLER = {
    "(1, 1024, 128)": "(1, 16, 128)",
    "image_ids(512, 512)": "image_ids(64, 64)",
    "height=512, width=512": "height=64, width=64",
    "width=1024, height=768": "width=96, height=64",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The command lines of the README that draw."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(python -m flux2_mlx\.generate|flux2-generate) ", line)]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """A tiny checkpoint with heads of 128, so that compute_rope's defaults fit it, and small pictures."""
    folder = tmp_path_factory.mktemp("readme") / "klein"
    tiny.pipeline(heads=1, head_dim=128, sample_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_python_examples_run_in_order(klein, tmp_path, capsys):
    assert len(blocks("python")) >= 3
    namespace: dict = {}
    for code in blocks("python"):
        code = code.replace('"klein-4b"', repr(str(klein)))
        for large, little in SMALLER.items():
            code = code.replace(large, little)
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["image"].shape == (1, 64, 64, 3)
    assert size_of(tmp_path / "fox.png") == (96, 64)
    assert "step 4 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_command_examples_run(command, klein, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("a red fox")
    side = "128" if "--expand" in command else "64"  # or it would be too elongated
    for picture in set(re.findall(r"--(?:from-image|image|init-image|mask) (\S+)", command)):
        drawn = ["a fox", "--output", picture, "--model", str(klein), "--width", side, "--height", side]
        assert main([*drawn, "--max-sequence-length", "16"]) == 0
    arguments = shlex.split(command, comments=True)
    arguments = arguments[3:] if arguments[0] == "python" else arguments[1:]
    small = ["--model", str(klein), "--height", "64", "--max-sequence-length", "16"]
    if "--expand" not in command:
        small += ["--width", "64"]
    assert main([*arguments, *small]) == 0
    assert ("memory: " if "--plan" in command else "seed ") in capsys.readouterr().out


def test_the_readme_has_commands():
    assert len(commands()) >= 5


def test_every_released_model_is_in_the_readme():
    for name, repo in RELEASED.items():
        assert f"`{name}`" in README
        assert repo in README


def test_links_inside_the_project_lead_somewhere():
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!http|#|mailto)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize(
    ("script", "files"),
    [
        ("text_to_image.py", ["seed-1.png", "seed-2.png", "seed-3.png"]),
        ("watch_steps.py", ["step-1.png", "step-2.png", "step-3.png", "step-4.png"]),
        ("seed_grid.py", ["grid.png"]),
        ("edits.py", ["edits.png"]),
    ],
)
def test_examples_run(script, files, checkpoint, tmp_path, monkeypatch):
    given = ["a red fox", "--model", str(checkpoint), "--size", "64"]
    monkeypatch.setattr(sys, "argv", [script, *(given if script != "edits.py" else ())])  # that one is for nano
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert all(size_of(tmp_path / file)[0] >= 64 for file in files)


def test_every_example_is_tested():
    tested = {mark.args[1][i][0] for mark in test_examples_run.pytestmark for i in range(len(mark.args[1]))}
    tested |= {"train_nano.py", "teach_nano.py", "nano_world.py", "nano_score.py"}  # by test_nano.py, test_lora.py
    assert tested == {path.name for path in (ROOT / "examples").glob("*.py")}
