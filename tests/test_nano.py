"""nano: what ships, how well it draws, its world, and that its training can be left and gone on with."""

import json
import os
import random
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import nano_score, nano_world
from benchmarks.nano_world import COLOURS, EDITS, PLACES, SHAPES, SIZES, Scene, Thing, judge, random_task, render
from examples import train_nano
from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.images import read_metadata
from flux2_mlx.weights import open_checkpoint, read_header

ROOT = Path(__file__).parents[1]
NANO = ROOT / "flux2_mlx" / "nano"
KINDS = ("draw", "combine", *EDITS)


@pytest.fixture(scope="module")
def nano():
    return Flux2Pipeline.from_pretrained("nano")


# ------------------------------------------------------------------------------------------------ what ships


def test_nano_is_small_and_has_the_parts_of_a_klein():
    files = [path for path in NANO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    checkpoint = open_checkpoint("nano")
    assert checkpoint.is_distilled
    assert json.loads((NANO / "text_encoder" / "config.json").read_text())["num_hidden_layers"] >= 28
    assert checkpoint.autoencoder.latent_channels == 32
    assert len(checkpoint.transformer.axes_dims_rope) == 4


def test_every_quantization_group_size_applies():
    """Of the matrices that are quantized in the released models, those that take 1000s of features there."""
    for part in ("transformer", "text_encoder"):
        (file,) = open_checkpoint("nano").files[part]
        for name, (_, shape) in read_header(file).items():
            if len(shape) == 2:
                assert shape[1] % 128 == 0, name


def test_nano_sets_its_own_size_and_text_length(nano):
    result = nano("a red circle", seed=0)
    assert result.images[0].size == (128, 128)
    assert result.settings[0].max_sequence_length == 64
    assert result.settings[0].model == "nano"


def test_a_folder_called_nano_goes_first(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(checkpoint, tmp_path / "nano")
    assert open_checkpoint("nano").folder == Path("nano")


def test_nano_has_no_revisions():
    with pytest.raises(InputError, match="revision 'main' has no meaning"):
        open_checkpoint("nano", revision="main")


def test_the_wheel_draws_in_an_empty_environment_without_a_network(tmp_path):
    """The environment has the dependencies and the wheel, not this project; a socket that is opened ends it."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "dist")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    assert sdist.stat().st_size > 5_000_000  # nano is in it
    venv.create(tmp_path / "venv")
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as file:  # what an installer does with a pure wheel
        file.extractall(packages)
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "import flux2_mlx; print(flux2_mlx.__file__)\n"
        "from flux2_mlx.generate import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    prompt = "a large red circle on the left, white background"
    arguments = [prompt, "--model", "nano", "--seed", "3", "--output", "circle.png"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", code, *arguments],
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(packages))
    with Image.open(tmp_path / "circle.png") as picture:
        verdict = judge(np.array(picture), Scene("white", (Thing("circle", "red", "large", "left"),)))
    assert all(all(right) for right in verdict.values())
    assert read_metadata(tmp_path / "circle.png")["model"] == "nano"


# ------------------------------------------------------------------------------------------------ how well


def test_32_unseen_captions_and_16_edits_stay_above_a_floor(nano):
    captions = nano_score.rates(nano_score.draw(nano, nano_score.unseen_tasks(32)))
    edits = nano_score.rates(nano_score.draw(nano, nano_score.unseen_edits(16)))
    floors = {"ground": 96, "colour": 95, "place": 95, "shape": 90, "whole": 80}
    assert {part: rate for part, rate in captions.items() if rate < floors.get(part, 0)} == {}
    assert edits["whole"] >= 80


def test_the_autoencoder_keeps_scenes(nano):
    assert nano_score.autoencoder_psnr(nano, nano_score.unseen_tasks(8)) >= 30


def test_the_score_ends_with_a_json_line_and_a_sheet(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    nano_score.main(["--captions", "2", "--edits", "2", "--sheet", str(sheet), "--quantize", "8", "--guidance", "1.5"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["benchmark"] == "nano_score"
    assert report["variant"]["quantize"] == 8
    assert report["figures"]["psnr"] > 30
    with Image.open(sheet) as picture:
        assert picture.width > 4 * 128


def test_quantization_reaches_the_drawing_model():
    arguments = nano_score.build_parser().parse_args(["--quantize", "4", "--group-size", "128"])
    pipe = nano_score.open_variant(arguments)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.bits == 4
    assert pipe.text_encoder.layers[0].mlp.up_proj.group_size == 128


# ------------------------------------------------------------------------------------------------ its world


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (192, 96), (112, 176)])
def test_a_rendered_scene_is_right_in_every_part(size):
    rng = random.Random(0)
    for _ in range(40):
        scene = random_task(rng).scene
        verdict = judge(render(scene, *size), scene)
        assert all(all(right) for right in verdict.values()), scene
        assert len(verdict["shape"]) == len(scene.things)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("ground", lambda scene, thing: replace(scene, ground="purple")),
        ("colour", lambda scene, thing: Scene(scene.ground, (replace(thing, colour="green"),))),
        ("place", lambda scene, thing: Scene(scene.ground, (replace(thing, place="right"),))),
        ("shape", lambda scene, thing: Scene(scene.ground, (replace(thing, size="large"),))),
        ("shape", lambda scene, thing: Scene(scene.ground, (replace(thing, shape="cross"),))),
        ("clean", lambda scene, thing: Scene(scene.ground, (thing, Thing("moon", "black", "small", "bottom")))),
    ],
)
def test_a_picture_of_another_scene_is_wrong_in_that_part(part, change):
    thing = Thing("circle", "red", "medium", "top left")
    scene = Scene("white", (thing,))
    assert not all(judge(render(change(scene, thing), 128, 128), scene)[part])


def test_a_lost_thing_is_wrong_in_all_its_parts():
    scene = Scene("white", (Thing("circle", "red", "medium", "left"), Thing("star", "blue", "small", "right")))
    verdict = judge(render(Scene("white", scene.things[:1]), 128, 128), scene)
    assert verdict["ground"] == [True]
    assert verdict["colour"] == verdict["place"] == verdict["shape"] == [True, False]


def test_training_never_draws_what_is_held_out():
    rng = random.Random(1)
    for kind in KINDS:
        for _ in range(100):
            task = random_task(rng, kind)
            assert not any(map(nano_world.held_out, (task.scene, *task.references)))
            if kind != "remove":  # an empty scene has nothing to hold out
                assert nano_world.held_out(random_task(rng, kind, unseen=True).scene)


def test_the_world_is_as_wide_as_it_says():
    rng = random.Random(2)
    tasks = [random_task(rng) for _ in range(3000)]
    things = [thing for task in tasks for thing in task.scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == {task.scene.ground for task in tasks} == set(COLOURS)
    assert {thing.place for thing in things} == set(PLACES)
    assert {thing.size for thing in things} == set(SIZES)
    words = {word.strip(",.") for task in tasks for word in task.caption.lower().split()}
    assert {"grey", "gray", "centre", "center", "left", "above", "below", "red-coloured", "red-colored"} <= words
    assert len({task.caption for task in tasks}) > 2900


def test_captions_fit_the_text_length(nano):
    rng = random.Random(3)
    captions = [random_task(rng, kind).caption for kind in KINDS for _ in range(200)]
    ids, mask = nano.tokenizer(captions)  # a prompt that is cut warns, and warnings are errors
    assert ids.shape == (len(captions), 64)
    assert mask.sum(axis=1).max() < 64


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind):
    rng = random.Random(4)
    for _ in range(100):
        task = random_task(rng, kind)
        (before,), after = task.references, task.scene
        assert (before.ground != after.ground) == (kind == "ground")
        gone, come = set(before.things) - set(after.things), set(after.things) - set(before.things)
        assert (len(gone), len(come)) == {"remove": (1, 0), "add": (0, 1), "ground": (0, 0)}.get(kind, (1, 1))
        field = {"recolour": "colour", "resize": "size", "move": "place", "reshape": "shape"}.get(kind)
        if field is not None:
            (old,), (new,) = gone, come
            assert replace(old, **{field: getattr(new, field)}) == new
            assert old != new


def test_two_pictures_make_one():
    rng = random.Random(5)
    for _ in range(100):
        task = random_task(rng, "combine")
        source, other = task.references if "of the first" in task.caption else task.references[::-1]
        assert task.scene.ground == other.ground
        assert task.scene.things[0] in source.things


# ------------------------------------------------------------------------------------------------ its training


class Interrupted(Exception):
    pass


def train_a_line(folder, stop_at=None):
    training = train_nano.Training(folder, 0, 1.0)
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)

    def loss_of(step, rng):
        if step == stop_at:
            raise Interrupted
        return (module(torch.randn(8, 4)) - rng.random()).square().mean()

    training.fit("line", module, loss_of, steps=12, rate=0.1)
    return module.weight


def test_training_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(train_nano, "SAVE_EVERY", 0)
    whole = train_a_line(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_a_line(tmp_path / "halves", stop_at=7)
    assert torch.equal(train_a_line(tmp_path / "halves"), whole)
    assert not torch.equal(whole, train_a_line(tmp_path / "whole", stop_at=0) * 0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_whole_training_ends_in_a_checkpoint_that_draws(tmp_path, monkeypatch):
    """A few steps of each stage: the pictures are noise, the checkpoint is complete."""
    monkeypatch.setattr(sys, "argv", ["train_nano", str(tmp_path), "--speed", "0.0005"])
    train_nano.main()
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "sheets").iterdir())[0] == "autoencoder"
    files = {str(path.relative_to(NANO)) for path in NANO.rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path / "nano")) for path in (tmp_path / "nano").rglob("*.*")} == files
    for name in ("config.json",):
        for part in ("transformer", "text_encoder", "vae"):
            assert (tmp_path / "nano" / part / name).read_text() == (NANO / part / name).read_text()
    assert (tmp_path / "nano" / "tokenizer" / "tokenizer.json").read_text() == (
        NANO / "tokenizer" / "tokenizer.json"
    ).read_text()
    picture = Flux2Pipeline.from_pretrained(tmp_path / "nano")("a red circle", seed=0).images[0]
    assert picture.size == (128, 128)
