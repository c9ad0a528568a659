"""Data sets of subfolders with repeats, and several with weights: what is drawn how often, in which order."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux2_mlx import InputError
from flux2_mlx.cli.training import parse
from flux2_mlx.lora import main
from flux2_mlx.training.dataset import BatchSampler, Example, PassSampler, fingerprint, read_dataset, read_datasets
from flux2_mlx.training.folder import DataError
from flux2_mlx.training.latent_cache import LatentCache
from flux2_mlx.training.options import TrainingOptions
from flux2_mlx.training.run import STATE, describe_dataset
from flux2_mlx.training.trainer import Trainer


def write_images(folder: Path, count: int = 3, size: tuple[int, int] = (64, 64), name: str = "") -> Path:
    folder.mkdir(parents=True)
    for k in range(count):
        Image.new("RGB", size, (80 * (k % 4), 90, 120)).save(folder / f"{name}{k}.png")
        (folder / f"{name}{k}.txt").write_text(f"a picture {k} of {folder.name}")
    return folder


def drawn(sampler, examples: list[Example], passes: range) -> Counter[Path]:
    return Counter(examples[number].image for k in passes for number in sampler[k])


# ------------------------------------------------------------------------------------------------ repeats


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_an_image_counts_as_often_as_its_folder_says(tmp_path, batch_size):
    """By the names of the folders alone. Images beside them count once; two shapes make incomplete batches."""
    write_images(tmp_path / "data", 2)
    write_images(tmp_path / "data" / "3_sks fox", 3, (64, 128))
    write_images(tmp_path / "data" / "02_dog", 1)
    expected = Counter()
    for path in (tmp_path / "data").rglob("*.png"):
        parent = path.parent.name
        expected[path] = int(parent.split("_")[0]) if "_" in parent else 1
    assert sum(expected.values()) == 2 * 1 + 3 * 3 + 1 * 2
    examples = read_dataset(tmp_path / "data", 64)
    assert {example.image: example.caption for example in examples} == {
        path: path.with_suffix(".txt").read_text() for path in expected
    }
    sampler = BatchSampler(examples, batch_size, seed=3)
    assert sampler.batches_per_epoch == {1: 13, 2: 2 + 5, 4: 1 + 3}[batch_size]
    orders = set()
    for epoch in range(4):
        passes = range(epoch * sampler.batches_per_epoch, (epoch + 1) * sampler.batches_per_epoch)
        assert drawn(sampler, examples, passes) == expected
        assert all(len({examples[number].shape for number in sampler[k]}) == 1 for k in passes)
        orders.add(str([sampler[k] for k in passes]))
    assert len(orders) == 4


def test_subfolders_are_folders_like_their_own(tmp_path):
    """Edits in a metadata.jsonl, the trigger word, warnings and messages that say which folder."""
    write_images(tmp_path / "data" / "1_still", 2)
    edits = write_images(tmp_path / "data" / "4_edits", 2)
    lines = [{"file_name": f"{k}.png", "text": "make it sks night", "reference": f"{1 - k}.png"} for k in range(2)]
    (edits / "metadata.jsonl").write_text("\n".join(json.dumps(line | {"width": 64}) for line in lines))
    (tmp_path / "data" / "1_still" / "notes.md").write_text("")
    (tmp_path / "data" / "1_still" / "0.json").write_text("")
    write_images(tmp_path / "data" / "1_still" / "deeper", 1)
    write_images(tmp_path / "data" / "_later", 1)
    with pytest.warns(UserWarning, match="not read") as told:
        examples = read_dataset(tmp_path / "data", 64, "sks")
    assert [
        (example.image.name, example.caption, example.repeats, len(example.references)) for example in examples
    ] == [
        ("0.png", "sks, a picture 0 of 1_still", 1, 0),
        ("1.png", "sks, a picture 1 of 1_still", 1, 0),
        ("0.png", "make it sks night", 4, 1),
        ("1.png", "make it sks night", 4, 1),
    ]
    messages = [str(warning.message).removeprefix(f"{tmp_path / 'data'}") for warning in told]
    assert messages == [
        "/4_edits/metadata.jsonl: keys that are not read: 'width' (known are file_name, text, reference)",
        ": subfolders are not read: _later (1 image)",
        "/1_still: subfolders are not read: deeper (1 image)",
        "/1_still: not read, captions are .txt or .caption: 0.json",
        "/4_edits: not read, metadata.jsonl has the captions: 0.txt, 1.txt",
    ]


def test_metadata_of_the_whole_folder_lists_all(tmp_path):
    """As it did: what it names in a subfolder counts once, whatever that is called."""
    folder = write_images(tmp_path / "data" / "10_fox").parent
    lines = [{"file_name": f"10_fox/{k}.png", "text": "a fox"} for k in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [example.repeats for example in read_dataset(folder, 64)] == [1, 1, 1]


def test_faults_of_subfolders(tmp_path):
    folder = write_images(tmp_path / "data", 3)
    write_images(folder / "0_never", 1)
    write_images(folder / "20240615_holidays", 1)
    (folder / "10_empty").mkdir()
    broken = write_images(folder / "2_broken", 3)
    (broken / "0.png").write_bytes(b"no image")
    (broken / "1.txt").write_text("")
    (broken / "stray.txt").write_text("of nothing")
    (write_images(folder / "5_listed", 1) / "metadata.jsonl").write_text("{")
    with pytest.raises(DataError) as caught:
        read_dataset(folder, 64)
    *faults, line, broken, empty = caught.value.faults
    no_number = "is no number of repeats, which is from 1 to 1000; rename the folder"
    assert faults == [
        f"0_never: 0 {no_number}",
        "10_empty: no images; remove the folder, or fill it",
        f"20240615_holidays: 20240615 {no_number}",
        "2_broken/stray.txt: there is no image of this name",
    ]
    assert line.startswith("5_listed/metadata.jsonl, line 1: no JSON")
    assert broken.startswith("2_broken/0.png: ")
    assert empty == "2_broken/1.png: the caption is empty; write one, or give a trigger word"


def test_too_few_images_in_subfolders(tmp_path):
    folder = write_images(tmp_path / "data" / "10_fox", 2).parent
    with pytest.raises(DataError, match="2 images, and at least 3 are needed"):
        read_dataset(folder, 64)


def test_repeats_and_data_sets_are_in_the_fingerprint(tmp_path):
    folder = write_images(tmp_path / "data" / "1_fox").parent
    found = [fingerprint(read_dataset(folder, 64))]
    (folder / "1_fox").rename(folder / "2_fox")
    found.append(fingerprint(read_dataset(folder, 64)))
    write_images(tmp_path / "more")
    found.append(fingerprint(read_datasets([str(folder), str(tmp_path / "more")], 64)))
    assert len(set(found)) == 3


# ------------------------------------------------------------------------------------------------ weights


def examples_of(*sets: tuple[float, int]) -> list[Example]:
    """Examples of data sets with these weights and numbers of images, with 1, 2, 1, 2, ... repeats."""
    return [
        Example(Path(f"{place}/{k}.png"), "a", (), (64, 64), (), 1 + k % 2, place, weight)
        for place, (weight, count) in enumerate(sets)
        for k in range(count)
    ]


@pytest.mark.parametrize(
    "sets",
    [
        [(3, 4), (1, 5)],
        [(1, 3), (1, 300)],
        [(0.3, 3), (0.1, 3), (0.6, 7)],
        [(1000, 3), (1, 3)],
        [(0.07, 3), (0.93, 4)],
    ],
)
def test_a_weight_is_a_share_of_the_passes(sets):
    """Of the first n passes, whatever n; counted anew from the images that are drawn. Within each data set the passes
    of an epoch have each image as often as it repeats.
    """
    examples, weights = examples_of(*sets), [Fraction(str(weight)) for weight, _ in sets]
    sampler, passes = PassSampler(examples, 1, seed=7), 1500
    of_sets = [int(examples[number].image.parent.name) for k in range(passes) for number in sampler[k]]
    counts = [0] * len(sets)
    for n, place in enumerate(of_sets, 1):
        counts[place] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - n * weight / sum(weights)) < 1
    for place, (_, count) in enumerate(sets):
        own = [examples[sampler[k][0]].image.name for k in range(passes) if of_sets[k] == place]
        per_epoch = {f"{k}.png": 1 + k % 2 for k in range(count)}
        length = sum(per_epoch.values())
        for start in range(0, len(own) - length + 1, length):
            assert Counter(own[start : start + length]) == per_epoch


def test_turns_are_websters_apportionment():
    """Sainte-Laguë's sequence for three parties of 53, 24 and 23: in the order of votes / (2 seats + 1)."""
    votes = (53, 24, 23)
    quotients = sorted(
        ((Fraction(vote, 2 * seats + 1), -party) for party, vote in enumerate(votes) for seats in range(100)),
        reverse=True,
    )
    examples = examples_of(*((vote, 3) for vote in votes))
    sampler = PassSampler(examples, 1, 0)
    assert [examples[sampler[k][0]].dataset for k in range(80)] == [-party for _, party in quotients[:80]]


def test_one_data_set_is_drawn_as_before_there_were_several():
    """By NumPy alone: a permutation of the images by seed and epoch, and one of the batches."""
    examples = [Example(Path(f"{k}.png"), "a", (), (64, 64), ()) for k in range(7)]
    sampler = PassSampler(examples, 1, seed=11)
    for epoch in range(3):
        rng = np.random.default_rng([11, epoch])
        order = rng.permutation(7)
        assert [sampler[7 * epoch + k] for k in range(7)] == [[order[place]] for place in rng.permutation(7)]


def test_passes_are_the_same_in_any_order_of_asking():
    """As processes that share a step's passes ask, and a run that goes on."""
    examples = examples_of((2, 4), (1, 3), (0.5, 5))
    whole = [PassSampler(examples, 2, seed=1)[k] for k in range(60)]
    for asked in (range(59, -1, -1), range(1, 60, 2), range(40, 60)):
        sampler = PassSampler(examples, 2, seed=1)
        assert [sampler[k] for k in asked] == [whole[k] for k in asked]
    assert all(len({examples[number].dataset for number in batch}) == 1 for batch in whole)
    assert whole != [PassSampler(examples, 2, seed=2)[k] for k in range(60)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:0", "the weight of a data set must be a number above 0, up to 1000, got 0 for data"),
        ("data:-1", "above 0, up to 1000, got -1 for data"),
        ("data:nan", "got nan for data"),
        ("data:inf", "got inf for data"),
        ("data:1001", "got 1001 for data"),
    ],
)
def test_weights_that_are_refused(text, message, capsys):
    with pytest.raises(InputError, match=message):
        TrainingOptions(["other", text], "run")
    assert main(["--data", "other", "--data", text, "--output", "run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the weight of a data set")
    assert told.count("\n") == 1


def test_data_sets_of_a_command_and_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"data": ["a:3", "~/b"], "output": "run"}))
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(["--config", "a.json"])[0].data == ("a:3", "/home/me/b")
    assert parse(["--config", "a.json", "--data", "c"])[0].data == "c", "as it was written when there was one"
    assert parse(["--data", "a:0.5", "--dataset", "b", "--output", "run"])[0].data == ("a:0.5", "b")
    assert TrainingOptions("a", "run").metadata()["data"] == "a"
    assert json.loads(json.dumps(TrainingOptions(["a", "b"], "run").metadata()))["data"] == ["a", "b"]


def test_faults_of_all_data_sets_are_told(tmp_path, capsys):
    good, few = write_images(tmp_path / "good"), write_images(tmp_path / "few", 2)
    (tmp_path / "empty").mkdir()
    words = ["--output", str(tmp_path / "run"), "--model", "nano", "--allow-distilled"]
    assert main(["--data", str(good), "--data", f"{few}:2", "--data", str(tmp_path / "empty"), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: the data has 2 faults:"
    assert lines[1] == f"  {few}: 2 images, and at least 3 are needed"
    assert lines[2].startswith(f"  {tmp_path / 'empty'}: no images (.png, ")
    assert main(["--data", str(good), "--data", f"{few}:2", *words]) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"error: {few} has 1 fault:"


def test_a_folder_may_be_named_like_a_weight(tmp_path):
    """What exists is a folder; names that no folder can have are told as any that is not there."""
    for text in ("x" * 5000 + ":3", "a\0b:3"):
        with pytest.raises(DataError, match="there is no such folder"):
            read_datasets(text, 64)
    write_images(tmp_path / "pictures:3")
    (example, *_) = read_datasets([str(tmp_path / "pictures:3")], 64)
    assert (example.image.parent.name, example.weight) == ("pictures:3", 1)
    assert read_datasets(f"{tmp_path / 'pictures:3'}:5", 64)[0].weight == 5


def test_the_summary_says_how_often_images_are_seen(tmp_path):
    write_images(tmp_path / "own" / "2_close", 3)
    write_images(tmp_path / "own" / "1_far", 2)
    write_images(tmp_path / "others", 10)
    data = [f"{tmp_path / 'own'}:3", str(tmp_path / "others")]
    options = TrainingOptions(data, "run", steps=100, accumulate=2)
    assert describe_dataset(read_datasets(options.data, 64), options).splitlines() == [
        f"{tmp_path / 'own'}, 0.75 of the passes: 5 images (5 of 64 x 64), each is seen about 18.8 to 37.5 times",
        f"{tmp_path / 'others'}, 0.25 of the passes: 10 images (10 of 64 x 64), each is seen about 5 times",
    ]
    options = TrainingOptions(data[1], "run", steps=50)
    told = "10 images (10 of 64 x 64), each is seen about 5 times"
    assert describe_dataset(read_datasets(options.data, 64), options) == told


# ------------------------------------------------------------------------------------------------ a run


def test_nano_is_trained_on_two_data_sets_by_three_to_one(tmp_path, monkeypatch, capsys):
    """Four passes, of which three are of one and one of the other, whose images are edits; a run that is stopped goes
    on to the same numbers.
    """
    write_images(tmp_path / "own" / "2_close", 2)
    write_images(tmp_path / "own" / "1_far", 1)
    edits = write_images(tmp_path / "edits", 3)
    lines = [{"file_name": f"{k}.png", "text": "make it red", "reference": "0.png"} for k in range(3)]
    (edits / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for path in edits.glob("*.txt"):
        path.unlink()
    (tmp_path / "keep.txt").write_text("a blue star")
    words = ["--data", f"{tmp_path / 'own'}:3", "--data", str(edits), "--steps", "4", "--save-every", "2"]
    words += ["--preserve", str(tmp_path / "keep.txt"), "--model", "nano", "--allow-distilled", "--quiet"]
    words += ["--resolution", "64", "--rank", "2", "--targets", "to_q"]
    seen: list[str] = []
    latents, step = LatentCache.latents, Trainer.take_step

    def watched(cache, path, size):
        seen.append(path.relative_to(tmp_path).parts[0])
        return latents(cache, path, size)

    monkeypatch.setattr(LatentCache, "latents", watched)
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    assert Counter(seen) == {"own": 3, "edits": 2}, "of an edit the image and its reference"

    def killed(trainer):
        if trainer.step == 3:
            raise OSError("the power fails")
        return step(trainer)

    monkeypatch.setattr(Trainer, "take_step", killed)
    assert main([*words, "--output", str(tmp_path / "parts")]) == 2
    monkeypatch.setattr(Trainer, "take_step", step)
    assert main(["--resume", str(tmp_path / "parts"), "--quiet"]) == 0
    whole, parts = (mx.load(str(tmp_path / name / STATE)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(mx.array_equal(whole[name], parts[name]) for name in whole)
    again = ["--resume", str(tmp_path / "parts"), "--steps", "5", "--quiet"]
    capsys.readouterr()
    (tmp_path / "own" / "1_far").rename(tmp_path / "own" / "3_far")
    assert main(again) == 2
    assert "was trained on other images or captions than the data has now" in capsys.readouterr().err
