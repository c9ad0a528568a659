"""nano's world, how pictures of it are scored, and that its training can be left and gone on with."""

import json
import random
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from PIL import Image

from benchmarks import quality
from examples import nano_score, nano_world, train_nano
from examples.nano_world import COLOURS, EDITS, PLACES, SHAPES, SIZES, Scene, Thing, judge, random_task, render
from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoints.checkpoint import open_checkpoint
from flux2_mlx.checkpoints.files import read_header
from flux2_mlx.conditioning.tokenizer import Qwen3Tokenizer
from flux2_mlx.generate import main

ROOT = Path(__file__).parents[1]
NANO_FOLDER = ROOT / "flux2_mlx" / "nano"
KINDS = ("draw", "combine", *EDITS)


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
        ("clean", lambda scene, thing: Scene(scene.ground, (thing, Thing("star", "black", "small", "bottom")))),
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


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind):
    rng = random.Random(4)
    for _ in range(100):
        task = random_task(rng, kind)
        (before,), after = task.references, task.scene
        assert (before.ground != after.ground) == (kind == "ground")
        gone, come = set(before.things) - set(after.things), set(after.things) - set(before.things)
        assert (len(gone), len(come)) == {"remove": (1, 0), "add": (0, 1), "ground": (0, 0)}.get(kind, (1, 1))
        if kind == "recolour":
            (old,), (new,) = gone, come
            assert replace(old, colour=new.colour) == new
            assert old != new


def test_two_pictures_make_one():
    rng = random.Random(5)
    for _ in range(100):
        task = random_task(rng, "combine")
        source, other = task.references if re.search(r"of the first \w+ on", task.caption) else task.references[::-1]
        assert task.scene.ground == other.ground
        assert task.scene.things[0] in source.things


# ------------------------------------------------------------------------------------------------ its training


class Marked(train_nano.Encoders):
    """Encoders whose tokens are the pictures' mean levels."""

    def __init__(self):
        self.training = SimpleNamespace(device="cpu")

    def tokens(self, pictures):
        return torch.tensor([[picture.mean()] for picture in pictures])[..., None].expand(-1, 64, 128).float()

    def embed(self, captions, length):
        return torch.zeros(len(captions), length, 384)


def test_a_batch_holds_every_reference_in_its_place():
    rng = random.Random(7)
    tasks = [random_task(rng, "combine") for _ in range(4)]
    batch = Marked().batch(tasks, 128, 128, 48, (128, 128))
    for k in range(2):
        part = slice(64 * k, 64 * (k + 1))
        levels = [render(task.references[k], 128, 128).mean() for task in tasks]
        assert batch.references[:, part].mean((1, 2)).tolist() == pytest.approx(levels, abs=1e-3)
        assert batch.reference_ids[part, 0].tolist() == [10 + 10 * k] * 64
        for row, task in enumerate(tasks):
            found = {tuple(classes) for classes in batch.references_show[row, part].tolist()}
            assert found == {tuple(classes) for classes in train_nano.shown(task.references[k], 128, 128).tolist()}


def test_tokens_show_what_stands_there():
    scene = Scene(
        "white", (Thing("circle", "red", "large", "top left"), Thing("star", "grey", "small", "bottom right"))
    )
    classes = train_nano.shown(scene, 128, 192).reshape(8, 12, -1)
    red, grey, white = (list(COLOURS).index(name) for name in ("red", "grey", "white"))
    assert classes[2, 3].tolist() == [white, 1, red + 1, 3, 1]
    assert classes[5, 8].tolist()[1:3] == [SHAPES.index("star") + 1, grey + 1]
    assert classes[0, 11].tolist() == [white, 0, 0, 0, 0]


class Interrupted(Exception):
    pass


def train_a_line(folder, stop_at=None):
    training = train_nano.Training(folder, 0, 1.0)
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"blocks": torch.nn.Linear(4, 4), "out": torch.nn.Linear(4, 1)})  # for both optimizers

    def loss_of(step, rng):
        if step == stop_at:
            raise Interrupted
        return (module["out"](module["blocks"](torch.randn(8, 4))) - rng.random()).square().mean()

    training.fit("line", module, loss_of, steps=12, rate=0.1, muon_rate=0.1)
    return torch.cat([p.flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def in_float32():
    """Nothing is timed to find the faster dtype, which on a busy machine is one or the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_nano, "fastest_dtype", lambda device: torch.float32)
        yield


@pytest.mark.usefixtures("in_float32")
def test_training_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(train_nano, "SAVE_EVERY", 0)
    whole = train_a_line(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_a_line(tmp_path / "halves", stop_at=7)
    assert torch.equal(train_a_line(tmp_path / "halves"), whole)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, in_float32):
    """What two steps of each stage make: the pictures are noise, the checkpoint is complete."""
    folder, sample = tmp_path_factory.mktemp("training"), train_nano.sample
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and transformers', which are not this project's
        patch.setattr(sys, "argv", ["train_nano", str(folder), "--speed", "0.0001"])
        patch.setattr(train_nano, "HOME", (64, 64))
        patch.setattr(train_nano, "SIDES", (64,))
        patch.setattr(train_nano, "sample", lambda model, batch, noise, steps: sample(model, batch, noise, 1))
        train_nano.main()
    return folder


@pytest.mark.nightly
def test_training_ends_in_a_checkpoint_that_draws(untrained):
    assert {path.name.split("-")[0] for path in (untrained / "sheets").iterdir()} == {"autoencoder", "transformer"}
    files = [path for path in (untrained / "nano").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    result = Flux2Pipeline.from_pretrained(untrained / "nano")("a red circle", seed=0)
    assert result.images[0].size == (64, 64)
    assert result.settings[0].max_sequence_length == train_nano.TEXT_LENGTH


def test_every_quantization_group_size_applies():
    """Groups lie along a matrix's rows, so rows of a multiple of 128 take groups of 32, 64 and 128."""
    for part in ("transformer", "text_encoder"):
        (file,) = open_checkpoint(NANO_FOLDER).sources[part].files
        for name, (_, shape) in read_header(file).items():
            if len(shape) == 2:
                assert shape[1] % 128 == 0, name


def test_captions_fit_the_text_length():
    tokenizer = Qwen3Tokenizer(NANO_FOLDER / "tokenizer")
    rng = random.Random(3)
    captions = [random_task(rng, kind).caption for kind in KINDS for _ in range(200)]
    ids, mask = tokenizer(captions)  # a prompt that is cut warns, and warnings are errors
    assert ids.shape == (len(captions), train_nano.TEXT_LENGTH)
    assert mask.sum(axis=1).max().item() < train_nano.TEXT_LENGTH


def test_the_score_ends_with_a_json_line_and_a_sheet(tmp_path, capsys):
    sheet, model = tmp_path / "sheet.png", str(NANO_FOLDER)
    variant = ["guidance=1.5", "num_steps=2", "step_cache=0", "--model", model, "--quantize", "8"]
    quality.main([*variant, "--captions", "2", "--edits", "2", "--sheet", str(sheet)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["benchmark"] == "quality"
    assert report["variant"]["quantize"] == "8"
    assert report["figures"].keys() >= nano_score.BOUNDS.keys()
    with Image.open(sheet) as picture:
        assert picture.width > 4 * 128


def test_quantization_reaches_the_model_that_generates():
    options = ["--model", str(NANO_FOLDER), "--quantize", "4", "--group-size", "128"]
    pipe = quality.open_variant(quality.build_parser().parse_args(options))
    assert pipe.transformer.transformer_blocks[0].attn.to_q.spec.bits == 4
    assert pipe.text_encoder.model.layers[0].mlp.up_proj.spec.group_size == 128


# ------------------------------------------------------------------------------------------------ its weights


@pytest.fixture(scope="module")
def nano():
    return Flux2Pipeline.from_pretrained("nano")


@pytest.mark.parametrize(("count", "slack"), [(8, 8), pytest.param(32, 2, marks=pytest.mark.nightly)])
def test_nano_draws_what_training_never_saw(nano, count, slack):
    """One or two of the things may be wrong, some thirteen or fifty, where the bounds are for hundreds."""
    figures = nano_score.rates(nano_score.draw(nano, nano_score.unseen_tasks(count)))
    assert {part: figure for part, figure in figures.items() if figure < nano_score.BOUNDS.get(part, 0) - slack} == {}


@pytest.mark.parametrize("size", [(96, 96), (112, 160), (192, 192)])
def test_nano_draws_other_sizes(nano, size):
    """Of shapes it gets about half; things are where and what they are to be in most pictures."""
    figures = nano_score.rates(nano_score.draw(nano, nano_score.unseen_tasks(3), size))
    assert figures["ground"] == 100
    assert figures["colour"] >= 60
    assert figures["place"] >= 75


@pytest.mark.parametrize(
    ("count", "least"), [(4, 50), pytest.param(20, nano_score.BOUNDS["edits"], marks=pytest.mark.nightly)]
)
def test_nano_edits(nano, count, least):
    """Whole pictures: of four, half of them, where one that edits nothing has none."""
    drawn = nano_score.draw(nano, nano_score.unseen_edits(count))
    assert nano_score.rates(drawn)["whole"] >= least


LEFT = Thing("circle", "blue", "medium", "left")
RIGHT = Thing("star", "red", "medium", "right")
LEFT_HALF = Image.fromarray(np.repeat(np.where(np.arange(128) < 64, 255, 0)[None], 128, axis=0).astype(np.uint8))


@pytest.mark.parametrize(
    ("prompt", "options", "scene"),
    [
        ("make the circle green", {}, Scene("white", (replace(LEFT, colour="green"), RIGHT))),
        ("make the circle green", {"mask_padding": 0}, Scene("white", (replace(LEFT, colour="green"), RIGHT))),
        ("remove the circle", {}, Scene("white", (RIGHT,))),
        ("make the star green", {}, Scene("white", (LEFT, RIGHT))),
    ],
)
def test_nano_repaints_what_a_mask_shows(nano, prompt, options, scene):
    before = render(Scene("white", (LEFT, RIGHT)), 128, 128)
    after = nano(prompt, init_image=Image.fromarray(before), mask=LEFT_HALF, seed=1, **options).images[0]
    assert all(all(right) for right in judge(np.asarray(after), scene).values())
    assert np.array_equal(np.asarray(after)[:, 64:], before[:, 64:])


def test_nano_paints_on_beyond_the_edge(nano):
    before = render(Scene("white", (LEFT,)), 128, 128)[:, :80]
    prompt = "add a red star on the right"
    after = nano(prompt, init_image=Image.fromarray(before), expand={"right": 48}, seed=1).images[0]
    assert all(all(right) for right in judge(np.asarray(after), Scene("white", (LEFT, RIGHT))).values())
    assert np.array_equal(np.asarray(after)[:, :80], before)


def test_nano_begins_from_a_picture(nano):
    """With its words it changes the picture; with less strength it keeps more of it."""
    before = Image.fromarray(render(Scene("white", (LEFT, RIGHT)), 128, 128))
    after = nano("make the circle green", image=before, init_image=before, strength=0.75, seed=1).images[0]
    changed = Scene("white", (replace(LEFT, colour="green"), RIGHT))
    assert all(all(right) for right in judge(np.asarray(after), changed).values())
    few, many = (
        nano("a green circle left of a red star", init_image=before, strength=strength, seed=1).images[0]
        for strength in (0.25, 0.75)
    )
    distance = [np.abs(np.asarray(image, float) - np.asarray(before, float)).mean() for image in (few, many)]
    assert distance[0] < distance[1]


def test_nano_is_guided(nano):
    scene = Scene("grey", (Thing("cross", "black", "large", "centre"),))
    options = {"seed": 1, "guidance": 1.5, "force_guidance": True}
    after = nano("a large black cross, grey background", **options).images[0]
    assert all(all(right) for right in judge(np.asarray(after), scene).values())


def test_nano_keeps_pictures(nano):
    assert nano_score.autoencoder_psnr(nano, nano_score.unseen_tasks(3)) >= nano_score.BOUNDS["psnr"]


def test_nano_is_small(nano):
    files = [path for path in NANO_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_a_folder_here_goes_before_nano_in_the_package(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("nano").folder == NANO_FOLDER
    (tmp_path / "nano").symlink_to(checkpoint)
    assert open_checkpoint("nano").folder == Path("nano")


def test_nano_draws_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["a red circle", "--model", "nano", "--seed", "1"]) == 0
    with Image.open(tmp_path / "flux2-1.png") as picture:
        assert picture.size == (128, 128)


def test_the_wheel_and_the_sdist_hold_nano():
    """What hatchling would pack; `.ci/run` builds the wheel and draws with it."""
    wanted = {str(path.relative_to(ROOT)) for path in NANO_FOLDER.rglob("*") if path.is_file()}
    assert len(wanted) > 8
    for builder in (WheelBuilder(str(ROOT)), SdistBuilder(str(ROOT))):
        assert wanted <= {file.distribution_path for file in builder.recurse_included_files()}
