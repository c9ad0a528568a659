"""The recipes of docs/training.md are those of examples/lora_*.json, and flux2-lora takes them as they stand."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from flux2_mlx.cli.training import check, parse
from flux2_mlx.fields import flag_of
from flux2_mlx.lora import main
from flux2_mlx.training.options import TrainingOptions

ROOT = Path(__file__).parents[1]
FILES = {path.stem.removeprefix("lora_"): path for path in sorted((ROOT / "examples").glob("lora_*.json"))}
KINDS = ("style", "subject", "edit")
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
TABLE = PAGE[PAGE.index("| | [style]") : PAGE.index("(The last row is")]


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Three edits of 1024 x 1024."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    Image.new("RGB", (1024, 1024), "navy").save(folder / "before.png")
    for k in range(3):
        Image.new("RGB", (1024, 1024), (80 * k, 0, 0)).save(folder / f"{k}.png")
    lines = [{"file_name": f"{k}.png", "text": "make it red", "reference": "before.png"} for k in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_there_is_a_file_for_each_kind():
    assert set(FILES) == set(KINDS)
    assert re.findall(r"\]\(\.\./examples/lora_(\w+)\.json\)", TABLE) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_is_taken_as_it_stands(kind, tmp_path):
    options, own = parse(["--config", str(FILES[kind]), "--data", "data", "--output", str(tmp_path / "run")])
    check(options, resumes=False)
    assert own.resume is None
    values = json.loads(FILES[kind].read_text())
    assert {name: getattr(options, name) for name in values} == values
    assert not {"data", "output", "trigger", "preserve", "validation_prompt"} & set(values), "these are the user's"
    assert options.release is not None
    assert not options.release.is_distilled


def test_the_table_has_the_numbers_of_the_files():
    told: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for names, *cells in re.findall(r"^\| (`--[^|]*`) \|(.*?)\|(.*?)\|(.*?)\|$", TABLE, re.MULTILINE):
        for flag in re.findall(r"`--([\w-]+)`", names):
            for kind, cell in zip(KINDS, cells, strict=True):
                told[kind][flag] = cell.strip()
    for kind, path in FILES.items():
        flags = {flag_of(TrainingOptions.field(name)): value for name, value in json.loads(path.read_text()).items()}
        assert set(flags) == {flag for flag, cell in told[kind].items() if cell and flag != "preserve"}
        for flag, value in flags.items():
            assert (told[kind][flag] if isinstance(value, str) else float(told[kind][flag])) == value, flag


@pytest.mark.usefixtures("cpu_order")
@pytest.mark.parametrize(("kind", "quantize", "place"), [("style", "", 0), ("subject", "4", 2), ("edit", "8", 1)])
def test_the_planned_memory_is_that_of_the_plan(kind, quantize, place, pairs, capsys, monkeypatch):
    """Of klein-base-4b without its weights, whose transformer's file has 7,751,105,712 bytes."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    words = ["--config", str(FILES[kind]), "--plan", "--dtype", "bfloat16", "--memory-limit", "64"]
    words += ["--quantize", quantize] if quantize else []
    words += ["--data", str(pairs)] if kind == "edit" else []
    assert main(words) == 0
    out = capsys.readouterr().out
    (cells,) = re.findall(r"^\| planned memory.*? \|(.*?)\|(.*?)\|(.*?)\|$", TABLE, re.MULTILINE)
    told = re.findall(r"\d+\.\d+", cells[KINDS.index(kind)])
    assert f"memory: about {told[place]} of 64.00 GB" in out
    weights = float(re.search(r"^training +(\d+\.\d+)", out, re.MULTILINE)[1])
    assert weights > 7.75 if not quantize else weights < 7.75


@pytest.mark.parametrize("kind", KINDS)
def test_nano_takes_a_step_of_each(kind, pairs, tmp_path):
    (tmp_path / "keep.txt").write_text("a blue star")
    words = ["--config", str(FILES[kind]), "--data", str(pairs), "--output", str(tmp_path / "run"), "--quiet"]
    words += ["--model", "nano", "--allow-distilled", "--resolution", "64", "--steps", "1", "--no-grad-checkpoint"]
    words += ["--preserve", str(tmp_path / "keep.txt")] if kind == "subject" else []
    assert main(words) == 0
    assert (tmp_path / "run" / "lora.safetensors").is_file()
