"""README, docs and examples do what they print, on a tiny checkpoint.

Of README and docs/*.md:

- ```python blocks run, those of a page in their order, with "klein-4b" replaced by a tiny checkpoint;
- commands in ```bash blocks that generate run on that checkpoint, each once, in small;
- all commands of this package and its benchmarks, those in ```sh blocks too (which need the Hub, several machines or
  minutes), are taken by their command's parser, and every long option in running text is one of some command's.
"""

import argparse
import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from flux2_mlx import RELEASED
from flux2_mlx.cli.common import Parser
from flux2_mlx.conditioning import enhance
from flux2_mlx.generate import main
from tests import loras, tiny
from tests.test_structure import ORDER, PACKAGE

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
# Whose links are followed.
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r'^(flux2-\w+) = "(flux2_mlx[.\w]+):main"$', PROJECT, re.MULTILINE))

BENCHMARKS = (
    "compare",
    "step",
    "plan",
    "quality",
    "training",
    "kernels",
    "parity",
    "gpu",
    "hires",
    "serve",
    "strengths",
    "regions",
)

# Sizes of the documents, cut down so that reference BLAS computes them in a moment.
SMALLER = {
    "(1, 1024, 128)": "(1, 16, 128)",
    "text_ids(512), image_ids(512, 512)": "text_ids(64), image_ids(64, 64)",
    "height=512, width=512": "height=64, width=64",
    "width=512, height=512": "width=64, height=64",
    "width=1024, height=768": "width=96, height=64",
}
# What a user types into a search box, and finds here.
SEARCHED = (
    "img2img",
    "inpaint",
    "outpaint",
    "CFG",
    "classifier-free",
    "LoRA strength",
    "out of memory",
    "offline",
    "gated",
    "scheduler",
    "troubleshooting",
)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(*languages: str) -> list[str]:
    """This package's command lines in the documents' blocks of these languages, each once."""
    text = "".join(block for page in PAGES.values() for language in languages for block in blocks(language, page))
    lines = re.split(r"\n| && ", text.replace("\\\n", " "))
    one = re.compile(r"(?:^|(?<=\s))(?:python -m (?:flux2_mlx|benchmarks)\.\w+|flux2-\w+)(?= |$).*")
    found = [one.search(line) for line in lines]
    return list(dict.fromkeys(match[0] for match in found if match))


def split(command: str) -> tuple[str, list[str]]:
    """The module of a command line, and its arguments."""
    words = shlex.split(command, comments=True)
    if words[0] != "python":
        return SCRIPTS[words[0]], words[1:]
    return (f"{words[2]}.__main__" if words[2] == "flux2_mlx.serve" else words[2]), words[3:]


def is_run(command: str) -> bool:
    return split(command)[0] == "flux2_mlx.generate"


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """A tiny checkpoint with heads of 128, so that compute_rope's defaults fit it, and small images."""
    folder = tmp_path_factory.mktemp("readme") / "klein"
    tiny.pipeline(heads=1, head_dim=128, sample_size=64).save_pretrained(folder)
    config = folder / "tokenizer" / "tokenizer_config.json"
    tiny.rewrite(config, json.dumps({**json.loads(config.read_text()), "model_max_length": 64}))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(enhance, "MOST_WRITTEN", 2)  # tokens


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks("python", text)])
def test_python_examples_run_in_order(page, klein, tmp_path, capsys):
    weights = load_file(klein / "transformer" / "diffusion_pytorch_model.safetensors")
    loras.write(tmp_path / "style.safetensors", weights, layers=("img_in",))
    namespace: dict = {}
    for code in blocks("python", PAGES[page]):
        code = code.replace('"klein-4b"', repr(str(klein)))
        for large, little in SMALLER.items():
            code = code.replace(large, little)
        exec(compile(code, page, "exec"), namespace)
    if page in ("README.md", "docs/python.md"):
        assert size_of(tmp_path / "fox.png") == (96, 64)
        assert "step 4 of 4" in capsys.readouterr().out
    if page == "docs/python.md":
        assert namespace["image"].shape == (1, 64, 64, 3)


@pytest.mark.parametrize("command", [command for command in commands("bash") if is_run(command)])
def test_command_examples_run(command, klein, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("a red fox")
    (tmp_path / "jobs.jsonl").write_text("".join(blocks("json", PAGES["docs/batch.md"])).replace("768", "64"))
    module, arguments = split(command)
    side = "128" if "--expand" in command else "64"  # or it would be too elongated
    for mask in re.findall(r"--mask (\S+)", command):
        Image.new("L", (64, 64), "white").save(mask)
    for picture in set(re.findall(r"--(?:from-image|image|init-image) (\S+)", command)):
        drawn = ["a fox", "--output", picture, "--model", str(klein), "--width", side, "--height", side]
        assert main([*drawn, "--max-sequence-length", "16"]) == 0
    small = ["--model", str(klein), "--height", "64", "--max-sequence-length", "16"]
    if "--expand" not in command:
        small += ["--width", "64"]
    assert importlib.import_module(module).main([*arguments, *small]) == 0
    assert ("memory: " if "--plan" in command else "seed ") in capsys.readouterr().out


class Taken(SystemExit):
    """A parser took a command line."""


def taking_parser(module: str, arguments: list[str]) -> argparse.ArgumentParser:
    """The parser of a command, once it has taken a command line; the command does nothing."""
    taken: list[argparse.ArgumentParser] = []
    with pytest.MonkeyPatch.context() as patch:
        for cls in (argparse.ArgumentParser, Parser):  # the second one has a parse_args of its own

            def stop(parser, argv=None, namespace=None, parse=cls.parse_args):
                parse(parser, argv, namespace)
                taken.append(parser)
                raise Taken

            patch.setattr(cls, "parse_args", stop)
        with pytest.raises(Taken):
            importlib.import_module(module).main(arguments)
    return taken[0]


@pytest.mark.parametrize("command", commands("bash", "sh"))
def test_commands_are_taken_by_their_parsers(command):
    taking_parser(*split(command))


def test_options_in_the_text_exist():
    known = {"--force-reinstall", "--no-deps"}  # pip's
    for module, arguments in dict(map(split, commands("bash", "sh"))).items():
        known |= set(taking_parser(module, arguments)._option_string_actions)
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prose)) - known
        assert not unknown, f"{page}: {unknown}"


def test_the_documents_have_commands():
    assert len([command for command in commands("bash") if is_run(command)]) >= 15
    modules = {split(command)[0] for command in commands("bash", "sh")}
    assert set(SCRIPTS.values()) <= modules
    assert {f"benchmarks.{name}" for name in BENCHMARKS} <= modules


@pytest.mark.parametrize(("name", "page"), [("generate", "docs/options.md"), ("lora", "docs/training.md")])
def test_every_alias_is_told(name, page):
    """A flag that --help hides is on the page of the command's options."""
    actions = taking_parser(f"flux2_mlx.{name}", [])._actions
    hidden = {flag for action in actions if action.help == argparse.SUPPRESS for flag in action.option_strings}
    told = set(re.findall(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*", PAGES[page] + PAGES["docs/options.md"]))
    assert {flag for flag in hidden if not flag.startswith("--no-")} <= told


def rows_of(heading: str) -> list[str]:
    """The names that begin the rows of the tables under a heading of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)]


def test_every_part_of_the_package_has_a_row():
    """In the order of the imports."""
    rows = rows_of("Where things are")
    places = {name: level for level, line in enumerate(ORDER) for name in line if name != "_version"}
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/*/__init__.py")}
    assert set(rows) == {*places, *folders}
    levels = [places[name.split("/")[0]] for name in rows]
    assert levels == sorted(levels)


def test_every_benchmark_has_a_row():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "common", "cold"}
    assert set(rows_of("Benchmarks")) == scripts
    assert scripts - {"contenders"} == set(BENCHMARKS)


def test_the_workflow_runs_what_is_there():
    """Commands that their parsers take, and actions that stay what they are."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    runs = re.findall(r"run: (python -m (?:flux2_mlx|benchmarks)\.\w+ [^|\n]*)", workflow)
    assert len(runs) == 2
    for command in runs:
        taking_parser(*split(command))
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", used) for used in re.findall(r"uses: (.*)", workflow))
    assert "run: .ci/run\n" in workflow
    assert 'run: pip install -e ".[dev]"\n' in workflow


def test_every_released_model_is_in_the_readme():
    for name, repo in RELEASED.items():
        assert f"`{name}`" in README
        assert repo in README


@pytest.mark.usefixtures("cpu_order")
def test_options_by_memory_are_those_of_the_plan(capsys):
    rows = re.findall(r"^\| (\d+) GB \| `(--model .*?)` \| ([\d.]+) of ([\d.]+) \| (.*?) \|$", README, re.MULTILINE)
    assert {int(memory) for memory, *_ in rows} == {8, 16, 24, 32, 64}
    size = ["--dtype", "bfloat16", "--vae-dtype", "float32", "--width", "1024", "--height", "1024"]
    for memory, options, needed, limit, stays in rows:
        assert float(limit) <= 2 / 3 * int(memory)
        assert main(["--plan", *size, "--memory-limit", limit, *options.split()]) == 0
        mode = {"everything": "resident", "one stage at a time": "staged"}[stays]
        assert f"memory: {mode}, about {needed} of {limit} GB" in capsys.readouterr().out


def test_the_readme_is_short():
    assert len(README.encode()) <= 9000


def test_every_page_is_in_the_readme():
    for page in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        name = page.relative_to(ROOT).as_posix()
        assert name == "README.md" or re.search(rf"\]\({name}[)#]", README), f"README.md has no link to {name}"


@pytest.mark.parametrize("word", SEARCHED)
def test_what_users_search_for_is_found(word):
    assert word.lower() in "\n".join(PAGES.values()).lower()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_inside_the_project_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)#?([^)]*)\)", text):
        path = document.parent / target if target else document
        assert path.exists(), f"{target} does not exist"
        assert not anchor or anchor in slugs(path.read_text(encoding="utf-8")), f"{target} has no heading #{anchor}"


def test_every_trap_names_tests_that_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / "NOTES.md").read_text(encoding="utf-8")):
        assert re.search(rf"def {name}\b", text), f"NOTES.md: there is no {name}"
    for name in re.findall(r"`((?:parity/)?test_\w+\.py)`", (ROOT / "NOTES.md").read_text(encoding="utf-8")):
        assert (ROOT / "tests" / name).exists(), f"NOTES.md: there is no {name}"


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
    tested |= {
        "train_nano.py",
        "teach_nano.py",
        "nano_world.py",
        "nano_score.py",
        "edit_score.py",
    }  # by test_nano, test_lora, test_edits
    assert tested == {path.name for path in (ROOT / "examples").glob("*.py")}
