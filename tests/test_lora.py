"""Training LoRAs: the data set and its faults, the command, going on, processes, the plan."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from PIL import Image

from benchmarks.kernels import VIEWS
from examples import teach_nano
from examples.nano_world import random_task, render
from flux2_mlx import Flux2Pipeline, FluxKlein, FluxKleinParams, InputError, Quantization, image_ids, text_ids
from flux2_mlx.cli.training import parse
from flux2_mlx.device import memory_limit, weight_bytes
from flux2_mlx.lora import main
from flux2_mlx.models.qwen3 import Qwen3TextEncoder
from flux2_mlx.quantization.layers import QuantizedLinear, quantize
from flux2_mlx.quantization.packing import quantize_rtn
from flux2_mlx.quantization.recipes import largest_dense_bytes
from flux2_mlx.runtime.activations import training_bytes
from flux2_mlx.sampling.schedules import flux2_sigmas
from flux2_mlx.training.adapter import add_adapters, target_layers
from flux2_mlx.training.dataset import BatchSampler, DataError, bucket, fingerprint, read_dataset
from flux2_mlx.training.log import plot_losses
from flux2_mlx.training.losses import SHIFT_STEPS, draw_timesteps, flow_loss, learning_rate_at
from flux2_mlx.training.options import TIMESTEPS, TrainingOptions
from flux2_mlx.training.recompute import checkpoint_block
from flux2_mlx.training.run import LORA, STATE, lock
from flux2_mlx.training.trainer import Trainer

SMALL = ["--model", "nano", "--allow-distilled", "--resolution", "64", "--rank", "2", "--targets", "to_q", "linear_in"]


def write_pictures(folder: Path, sizes=((64, 64), (64, 64), (64, 96), (80, 64))) -> Path:
    """Scenes of nano's world and their captions."""
    rng = random.Random(4)
    folder.mkdir()
    for k, (height, width) in enumerate(sizes):
        task = random_task(rng)
        Image.fromarray(render(task.scene, height, width)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(task.caption)
    return folder


def write_edits(folder: Path) -> Path:
    rng = random.Random(4)
    folder.mkdir()
    lines = []
    for k in range(3):
        task = random_task(rng, "recolour")
        Image.fromarray(render(task.scene, 64, 64)).save(folder / f"{k}.png")
        Image.fromarray(render(task.references[0], 64, 64)).save(folder / f"{k}-before.png")
        lines.append({"file_name": f"{k}.png", "text": task.caption, "reference": f"{k}-before.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def write_captions(path: Path, *captions: str) -> Path:
    path.write_text("\n".join(captions))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


def state(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(folder / STATE)).items()}


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(pictures: Path, output: Path, *words: object) -> int:
    return main([*SMALL, "--data", str(pictures), "--output", str(output), "--quiet", *map(str, words)])


# ------------------------------------------------------------------------------------------------ data sets


def test_a_folder_of_pictures(pictures):
    examples = read_dataset(pictures, 64, trigger="sks")
    assert [example.image.name for example in examples] == ["0.png", "1.png", "2.png", "3.png"]
    assert all(example.caption == f"sks, {(pictures / f'{k}.txt').read_text()}" for k, example in enumerate(examples))
    assert {example.size for example in examples} == {(64, 64)}
    assert [example.size for example in read_dataset(pictures, 512)] == [(64, 64), (64, 64), (64, 96), (80, 64)]


def test_a_trigger_word_stands_once_and_alone(tmp_path):
    folder = write_pictures(tmp_path / "data")
    (folder / "0.txt").write_text("a picture of sks")
    (folder / "1.txt").unlink()
    (folder / "2.txt").write_text("\ufeff \n")
    with pytest.warns(UserWarning, match=r"without a caption, trained on the trigger word alone: 1\.png, 2\.png$"):
        captions = [example.caption for example in read_dataset(folder, 64, trigger="sks")]
    assert captions[:3] == ["a picture of sks", "sks", "sks"]


@pytest.mark.parametrize("trigger", ["", "sks"])
@pytest.mark.parametrize("suffix", [".TXT", ".caption", ".Caption"])
def test_captions_of_other_suffixes_are_read(tmp_path, suffix, trigger):
    """kohya's scripts look for .caption by default (--caption_extension); cameras and Windows write in capitals."""
    folder = write_pictures(tmp_path / "data")
    before = read_dataset(folder, 64, trigger)
    for path in list(folder.glob("*.txt")):
        path.rename(path.with_suffix(suffix))
    assert read_dataset(folder, 64, trigger) == before


def test_two_captions_of_an_image_are_a_fault(tmp_path):
    folder = write_pictures(tmp_path / "data")
    (folder / "1.caption").write_text("another")
    (folder / "stray.caption").write_text("of nothing")
    with pytest.raises(DataError) as caught:
        read_dataset(folder, 64, trigger="sks")
    assert caught.value.faults == [
        "stray.caption: there is no image of this name",
        "1.caption and 1.txt: captions of one image; keep one of them",
    ]


def left_out(folder, trigger=""):
    with pytest.warns(UserWarning, match=r"not read|left out") as told:
        read_dataset(folder, 64, trigger)
    return [str(warning.message).removeprefix(str(folder)).lstrip("/: ") for warning in told]


def test_what_is_left_out_is_told(tmp_path):
    folder = write_pictures(tmp_path / "data")
    for name in ("0.json", "1.tags", "metadata.csv", "notes.md", ".DS_Store"):
        (folder / name).write_text("x")
    write_pictures(folder / "sks fox")
    (folder / "empty").mkdir()
    assert left_out(folder) == [
        "subfolders are not read: sks fox (4 images)",
        "not read, captions are in .txt or .caption files or metadata.jsonl: metadata.csv",
        "not read, captions are .txt or .caption: 0.json, 1.tags",
    ]
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"0\.png: the caption is empty; .* \(0\.json is not read\)"):
        read_dataset(folder, 64)


def test_what_metadata_leaves_out_is_told(tmp_path):
    folder = write_pictures(tmp_path / "data")
    write_pictures(folder / "train")
    rows = [{"file_name": f"train/{k}.png", "text": "a", "width": 64, "score": 0.5} for k in range(2)]
    rows.append({"file_name": "0.png", "text": "b"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert left_out(folder) == [
        "metadata.jsonl: keys that are not read: 'width', 'score' (known are file_name, text, reference)",
        "not read, metadata.jsonl has the captions: 0.txt, 1.txt",
        "images that metadata.jsonl does not name are left out: 1.png, 2.png, 3.png",
    ]


def test_a_folder_of_folders_is_told(tmp_path):
    (tmp_path / "data").mkdir()
    write_pictures(tmp_path / "data" / "sks fox")
    with pytest.raises(DataError, match=r"subfolders are not read, give one of them: sks fox \(4 images\)"):
        read_dataset(tmp_path / "data", 64)


def test_edits_have_references(tmp_path):
    folder = write_edits(tmp_path / "data")
    examples = read_dataset(folder, 64)
    assert [[path.name for path in example.references] for example in examples] == [
        [f"{k}-before.png"] for k in range(3)
    ]
    assert {example.shape for example in examples} == {((64, 64), (64, 64))}


def test_all_faults_are_told_at_once(tmp_path, capsys, monkeypatch):
    folder = write_pictures(tmp_path / "data", [(64, 64)] * 8)
    (folder / "0.txt").write_text(" \n")
    (folder / "1.txt").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "4.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "5.txt").write_text("a" * 200_000)
    Image.new("RGB", (30, 200)).save(folder / "6.png")
    (folder / "stray.txt").write_text("a fox")
    (folder / ".hidden.txt").write_text("")
    (folder / "folder.png").mkdir()
    (folder / "folder.txt").write_text("a")
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("a")
    monkeypatch.setattr(Flux2Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    assert train(folder, tmp_path / "run") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {folder} has 10 faults:"
    told = dict(line.strip().split(": ", 1) for line in lines[1:])
    pictures = {"0.png", "1.png", "2.png", "3.png", "6.png", "folder.png", "pipe.png"}
    assert told.keys() == pictures | {"4.txt", "5.txt", "stray.txt"}
    assert told["0.png"] == told["1.png"] == "the caption is empty; write one, or give a trigger word"
    assert "truncated" in told["2.png"]
    assert "no image of a known format" in told["3.png"]
    assert "not UTF-8" in told["4.txt"]
    assert told["5.txt"] == "200,000 bytes are no caption"
    assert "too small" in told["6.png"]
    assert told["stray.txt"] == "there is no image of this name"
    assert told["pipe.png"] == told["folder.png"] == "there is no such file"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "an object is expected"),
        ('{"file_name": "0.png", "text": "a", "refrence": "1.png"}', "unknown key 'refrence'; reference?"),
        ('{"file_name": "0.png", "caption": "a"}', "unknown key 'caption'; text?"),
        ('{"file_name": "0.png", "Text": "a"}', "unknown key 'Text'; text?"),
        ('{"text": "a"}', "a file's name is expected, got None"),
        ('{"file_name": 7, "text": "a"}', "a file's name is expected, got 7"),
        ('{"file_name": "../0.png", "text": "a"}', "'../0.png' is outside of the folder"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "outside of the folder"),
        ('{"file_name": "0\\u0000.png", "text": "a"}', "a file's name is expected"),
        ('{"file_name": "\\ud83d.png", "text": "a"}', "a file's name is expected"),
        ('{"file_name": "nowhere.png", "text": "a"}', "nowhere.png: there is no such file"),
        ('{"file_name": "0.png", "text": 5}', "text must be a caption, got '5'"),
        ('{"file_name": "0.png", "text": "\\ud83d"}', "text must be a caption"),
        ('{"file_name": "0.png", "text": ""}', "the caption is empty"),
        ('{"file_name": "0.png", "text": "a", "reference": 5}', "reference must be a file or a list of files, got 5"),
        ('{"file_name": "0.png", "text": "a", "reference": ["nowhere.png"]}', "nowhere.png: there is no such file"),
    ],
)  # fmt: skip
def test_lines_of_metadata_that_are_refused(tmp_path, line, message):
    folder = write_pictures(tmp_path / "data")
    good = [json.dumps({"file_name": f"{k}.png", "text": "a"}) for k in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join([*good, line]))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_dataset(folder, 64)
    assert len(caught.value.faults) == 1
    assert "\n" not in caught.value.faults[0]


def test_too_few_pictures(tmp_path):
    folder = write_pictures(tmp_path / "data", [(64, 64)] * 2)
    with pytest.raises(DataError, match="2 images, and at least 3 are needed"):
        read_dataset(folder, 64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images .* and no metadata\.jsonl"):
        read_dataset(tmp_path / "empty", 64)
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl is empty"):
        read_dataset(folder, 64)
    with pytest.raises(DataError, match="there is no such folder"):
        read_dataset(tmp_path / "nowhere", 64)


@given(st.integers(64, 4000), st.floats(1 / 8, 8), st.integers(64, 2048))
def test_buckets(height, aspect, resolution):
    width = round(height * aspect)
    if width < 64 or max(width, height) > 8 * min(width, height):
        return
    tall, wide = bucket(height, width, resolution)
    assert tall % 16 == wide % 16 == 0
    assert min(tall, wide) >= 64
    assert tall * wide <= min(resolution**2, height * width)
    if resolution >= 256:  # or the smallest side allows no such aspect
        assert 0.75 < (tall / wide) / (height / width) < 1.34


def test_usual_buckets():
    assert bucket(3000, 2000, 512) == (608, 416)
    assert bucket(1080, 1920, 1024) == (768, 1344)
    assert bucket(512, 512, 512) == bucket(4000, 4000, 512) == (512, 512)
    assert bucket(128, 128, 512) == (128, 128), "nothing is enlarged"


def test_every_epoch_has_every_picture_once(pictures):
    examples = read_dataset(pictures, 512)
    batches = BatchSampler(examples, 2, seed=5)
    assert batches.batches_per_epoch == 3  # two of one size, two of their own
    epochs = [[batches[3 * epoch + k] for k in range(3)] for epoch in range(20)]
    for epoch in epochs:
        assert sorted(number for batch in epoch for number in batch) == [0, 1, 2, 3]
        assert all(len({examples[k].shape for k in batch}) == 1 for batch in epoch)
    assert len({str(epoch) for epoch in epochs}) > 5
    again = BatchSampler(examples, 2, seed=5)
    assert [again[k] for k in (50, 3, 4)] == [epochs[16][2], epochs[1][0], epochs[1][1]]


def test_the_fingerprint_sees_every_change(tmp_path):
    folder = write_pictures(tmp_path / "data")
    found = {fingerprint(read_dataset(folder, 64)), fingerprint(read_dataset(folder, 512))}
    (folder / "1.txt").write_text("another")
    found.add(fingerprint(read_dataset(folder, 64)))
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    found.add(fingerprint(read_dataset(folder, 64)))
    assert len(found) == 4


# ------------------------------------------------------------------------------------------------ mathematics


def test_noise_levels():
    for kind in TIMESTEPS:
        levels = draw_timesteps(kind, np.random.default_rng(0), 20_000, 1024)
        assert 0 < levels.min() < levels.max() <= 1
        mean = {"logit-normal": 0.5, "uniform": 0.5}.get(kind)
        assert mean is None or abs(levels.mean() - mean) < 0.01
    assert abs(np.median(draw_timesteps("logit-normal", np.random.default_rng(0), 20_000, 1024)) - 0.5) < 0.01
    middle = flux2_sigmas(SHIFT_STEPS, 1024)[SHIFT_STEPS // 2]
    assert abs(np.median(draw_timesteps("shifted", np.random.default_rng(0), 20_000, 1024)) - middle) < 0.01
    values, counts = np.unique(draw_timesteps("four", np.random.default_rng(0), 20_000, 1024), return_counts=True)
    assert values.tolist() == sorted(flux2_sigmas(4, 1024)[:-1])
    assert counts.min() > 4_500


def test_the_learning_rate_rises_and_falls():
    options = TrainingOptions("", "", steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate_at(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    constant = TrainingOptions("", "", steps=5, warmup=10, decay="constant", learning_rate=1.0)
    assert [learning_rate_at(step, constant) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_steps_are_those_of_torch_adamw(pictures, tmp_path, monkeypatch):
    """Clipping, moments, bias correction and decay, over some steps."""
    taken: list[dict[str, torch.Tensor]] = []
    apply = nn.value_and_grad

    def watched(model, function):
        inner = apply(model, function)

        def call(*given):
            loss, gradients = inner(*given)
            taken.append({name: torch.tensor(np.array(g)) for name, g in tree_flatten(gradients)})
            return loss, gradients

        return call

    monkeypatch.setattr("flux2_mlx.training.trainer.nn.value_and_grad", watched)
    words = ["--learning-rate", 0.01, "--warmup", 2, "--weight-decay", 0.1, "--clip", 0.001, "--save-every", 1]
    assert train(pictures, tmp_path / "run", "--steps", 4, *words) == 0
    options = TrainingOptions("", "", steps=4, warmup=2, learning_rate=0.01)
    model = Flux2Pipeline.from_pretrained("nano").transformer
    start = add_adapters(model, TrainingOptions("", "", rank=2, targets=["to_q", "linear_in"]))
    named = {f"{path}.deltas.0.{kind}": start[path][kind] for path in start for kind in ("down", "up")}
    parameters = {name: torch.nn.Parameter(torch.tensor(np.array(array))) for name, array in named.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.1)
    for step, gradients in enumerate(taken):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.001)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, options)
        optimizer.step()
    found = state(tmp_path / "run")
    for name, parameter in parameters.items():
        expected = parameter.detach().numpy()
        assert np.abs(found[f"parameters/{name}"] - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-7, name


def test_targets():
    model = FluxKlein(FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=96, depth=1, depth_single=2))
    blocks = target_layers(model, [])
    assert len(blocks) == 12 + 2 * 2
    assert all("blocks" in path for path in blocks)
    assert set(target_layers(model, ["to_k", "proj_out"])) == {"transformer_blocks.0.attn.to_k", "proj_out"}
    assert len(target_layers(model, ["single_transformer_blocks.1"])) == 2
    with pytest.raises(InputError, match=r"no layer has 'to_queue' in its path; there are to_q"):
        target_layers(model, ["to_queue"])


def test_computing_blocks_again_adds_less_than_a_forward_pass():
    """The last block is not computed again, and gradients that nobody asks for are not computed."""

    def kernels(*arrays):
        text = io.StringIO()
        mx.export_to_dot(text, *arrays)
        names = re.findall(r'label ="(\w+)[^"]*", shape=rectangle', text.getvalue())
        return sum(name not in VIEWS | {"Depends", "Copy"} for name in names)  # a CPU's copies are no arithmetic

    params = FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=128, depth=2, depth_single=2)
    model = FluxKlein(params)
    add_adapters(model, TrainingOptions("", ""))
    given = mx.zeros((1, 4, 128)), mx.ones((1, 4, 128)), mx.array([0.5]), None, mx.ones((1, 8, 128))
    given = *given, FluxKlein.compute_rope(text_ids(8), image_ids(32, 32))
    mx.eval(model.parameters(), *given)
    forward, counts = kernels(flow_loss(model, *given)), []
    for run in (model.block_runner, checkpoint_block):
        model.block_runner = run
        loss, gradients = nn.value_and_grad(model, lambda *values: flow_loss(model, *values))(*given)
        counts.append(kernels(loss, *dict(tree_flatten(gradients)).values()))
    assert 0.5 * forward < counts[1] - counts[0] < forward


@pytest.mark.parametrize(("dropout", "bits"), [(0.0, None), (0.5, None), (0.0, 4), (0.0, 5)])
def test_computing_blocks_again_changes_no_number(dropout, bits):
    """What dropout leaves out is left out again; also of blocks without a LoRA, and of packed ones."""
    params = FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=128, depth=2, depth_single=2)
    mx.random.seed(0)
    model = FluxKlein(params)
    if bits is not None:
        quantize(model, lambda *_: Quantization(bits))
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.dense_rows = 1
    targets = ["transformer_blocks.0.attn", "single_transformer_blocks.1", "double_stream_modulation_img"]
    for adapter in add_adapters(model, TrainingOptions("", "", dropout=dropout, targets=targets)).values():
        adapter.up = 0.1 * mx.random.normal(adapter.up.shape)
    clean, noise, txt = (mx.random.normal((2, n, c)) for n, c in ((4, 128), (4, 128), (8, 128)))
    rope = FluxKlein.compute_rope(text_ids(8), image_ids(32, 32))
    given = clean, noise, mx.array([0.2, 0.7]), None, txt, rope
    found = []
    for run in (model.block_runner, checkpoint_block):
        model.block_runner = run
        loss, gradients = nn.value_and_grad(model, lambda *values: flow_loss(model, *values))(*given)
        found.append((loss.item(), dict(tree_flatten(gradients))))
    (loss, gradients), (again, others) = found
    assert loss == pytest.approx(again, rel=1e-6)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert mx.abs(gradient - others[name]).max().item() <= 1e-5 * mx.abs(gradient).max().item(), name


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no data: give one, as in --data photos"),
        (["--data", "a"], "no output"),
        (["--rank", "0"], "rank must be a whole number from 1 to 1024, got 0"),
        (["--rank", "x"], "argument --rank: invalid int value"),
        (["--dropout", "nan"], "dropout must be a number from 0 to 0.99, got nan"),
        (["--learning-rate", "-1"], "learning_rate must be a number from 0 to 10, got -1"),
        (["--timesteps", "linear"], "argument --timesteps: invalid choice"),
        (["--quantize", "9"], "got 9"),
        (["--memory-limit", "nan"], "argument --memory-limit: invalid gigabytes value"),
        (["--validation-image", "a.png"], "validation_image belongs to validation_prompt"),
        (["--config", "nowhere.json"], "cannot read nowhere.json"),
        (["--resume", "nowhere"], "nowhere has no checkpoints/state.safetensors"),
        (["--resume", "a", "--config", "b"], "--config is for a new one"),
        (["--rnak", "4"], "unknown option --rnak; did you mean --rank?"),
    ],
)  # fmt: skip
def test_options_that_are_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = [] if words[:1] in ([], ["--data"]) else ["--data", "a", "--output", "b"]
    assert main([*usual, *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_file_of_options(tmp_path):
    path = tmp_path / "fox.json"
    path.write_text(json.dumps({"data": "a", "output": "b", "rank": 8, "learning-rate": 1, "targets": ["to_q"]}))
    options, _ = parse(["--config", str(path), "--rank", "4"])
    assert (options.data, options.rank, options.learning_rate, options.targets) == ("a", 4, 1, ("to_q",))
    if sys.version_info >= (3, 11):
        path = tmp_path / "fox.toml"
        path.write_text('data = "a"\noutput = "b"\ngrad_checkpoint = false\ntargets = ["to_q", "to_k"]\n')
        options, _ = parse(["--config", str(path)])
        assert (options.grad_checkpoint, options.targets) == (False, ("to_q", "to_k"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "must be an object of options"),
        ('{"rnak": 4}', "has an unknown option 'rnak'; did you mean rank?"),
        ('{"data": "a", "output": "b", "rank": "4"}', "rank must be a whole number from 1 to 1024, got '4'"),
        ('{"data": "a", "output": "b", "rank": true}', "rank must be a whole number from 1 to 1024, got True"),
        ('{"data": "a", "output": "b", "targets": "to_q"}', "targets must be a list of strings, got 'to_q'"),
        ('{"data": "a", "output": "b", "targets": [1]}', "targets must be a list of strings"),
        ('{"data": "a", "output": "b", "dtype": "float16"}', "dtype must be one of bfloat16, float32, got 'float16'"),
        ('{"data": 5, "output": "b"}', "data must be a string or a list of strings, got 5"),
        ('{"data": "a", "output": "b", "quantize": [4]}', "quantize must be a whole number or a string"),
    ],
)  # fmt: skip
def test_files_of_options_that_are_refused(text, message, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert main(["--config", str(tmp_path / "a.json")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_distilled_models_are_not_trained_unasked(pictures, tmp_path, capsys):
    words = ["--model", "nano", "--data", str(pictures), "--output", str(tmp_path / "run")]
    assert main(words) == 2
    assert "nano is distilled, and training it undoes that: train the base model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ runs

RANDOM = ["--dropout", 0.2, "--caption-dropout", 0.3, "--ema", 0.9, "--batch-size", 2, "--accumulate", 2]


def test_a_run_writes_what_it_says(pictures, tmp_path, capsys):
    output = tmp_path / "run"
    words = ["--steps", 4, "--save-every", 2, "--validation-prompt", "a red circle", "--validate-every", 3]
    assert train(pictures, output, *words, "--ema", 0.5, "--learning-rate", 0.05, "--warmup", 0) == 0
    assert capsys.readouterr().out == f"{output / LORA}\n"
    files = {"config.json", "log.jsonl", "lora.safetensors", "loss.png"}
    assert {path.name for path in output.iterdir()} == files | {"cache", "checkpoints", "samples", ".lock"}
    kept = {path.name for path in (output / "checkpoints").iterdir()}
    assert kept == {"step-000002.safetensors", "state.safetensors"}
    samples = sorted((output / "samples").iterdir())
    assert [path.name for path in samples] == [f"step-{k:06}.png" for k in (0, 3, 4)]
    lines = log(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["pictures_per_second"] > 0 and line["peak_bytes"] > 0 for line in lines)
    with Image.open(output / "loss.png") as image:
        assert image.size == (960, 480)
    mode = (output / LORA).stat().st_mode & 0o777
    assert mode == (pictures / "0.txt").stat().st_mode & 0o777
    # The last sample is what is drawn with the file.
    pipe = Flux2Pipeline.from_pretrained("nano")
    options = {"seed": 0, "height": 64, "width": 64}
    plain = np.asarray(pipe("a red circle", **options).images[0], int)
    pipe.load_lora(output)
    drawn = np.asarray(pipe("a red circle", **options).images[0], int)
    first, last = (np.asarray(Image.open(path), int) for path in (samples[0], samples[-1]))
    assert np.abs(first - plain).max() <= 1
    assert np.abs(last - drawn).max() <= 1
    assert np.abs(last - plain).max() > 1
    assert main([*SMALL, "--data", str(pictures), "--output", str(output)]) == 2
    assert f"{output} has a run: --resume {output} goes on with it" in capsys.readouterr().err


def test_the_example_runs(tmp_path, monkeypatch):
    """A step teaches nothing; what many do is the nightly test's to say."""
    monkeypatch.setattr(teach_nano, "PICTURES", 3)
    found = teach_nano.main([str(tmp_path), "--steps", "1", "--batch-size", "1", "--captions", "1", "--quiet"])
    assert found.keys() == {f"{what}, {when}" for what in ("landscapes", "others") for when in ("before", "after")}
    assert len(log(tmp_path / "run")) == 1
    assert (tmp_path / "teach_nano.png").is_file()


@pytest.mark.nightly
def test_nano_learns_a_word_and_keeps_the_old_ones(tmp_path):
    """The example, shortened."""
    words = ["--steps", "80", "--learning-rate", "1e-2", "--warmup", "5", "--batch-size", "2"]
    found = teach_nano.main([str(tmp_path), *words, "--captions", "8", "--quiet"])
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])
    assert found["landscapes, before"]["ground"] == 0
    assert found["landscapes, after"]["ground"] > 0
    parts = "ground", "colour", "place", "shape"
    before, after = (np.mean([found[f"others, {when}"][part] for part in parts]) for when in ("before", "after"))
    assert after >= before - 2
    assert (tmp_path / "teach_nano.png").is_file()


def test_going_on_is_never_having_stopped(pictures, tmp_path, capsys):
    preserved = write_captions(tmp_path / "captions.txt", "a blue star", "a red cross", "a green disc")
    for name, steps in (("whole", 4), ("parts", 4)):
        words = ["--steps", steps, "--save-every", 2, *RANDOM, "--preserve", preserved]
        if name == "whole":
            assert train(pictures, tmp_path / name, *words) == 0
            continue
        step = Trainer.take_step
        count = []

        def killed(trainer, step=step, count=count):
            count.append(1)
            if len(count) == 4:
                raise OSError("the power fails")
            return step(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "take_step", killed)
            assert train(pictures, tmp_path / name, *words) == 2
        assert len(log(tmp_path / name)) == 3, "a line after the last checkpoint"
        assert main(["--resume", str(tmp_path / name), "--quiet"]) == 0
    whole, parts = (state(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        assert np.array_equal(whole[name], parts[name]), name
    told = [[(line["step"], line["loss"]) for line in log(tmp_path / name)] for name in ("whole", "parts")]
    assert told[0] == told[1]
    assert (tmp_path / "whole" / LORA).read_bytes() == (tmp_path / "parts" / LORA).read_bytes()


@pytest.mark.usefixtures("as_in_a_terminal")
def test_an_interrupt_saves(pictures, tmp_path, capsys, monkeypatch):
    step = Trainer.take_step

    def pressed(trainer):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "take_step", pressed)
    before = signal.getsignal(signal.SIGINT)
    assert train(pictures, tmp_path / "run", "--steps", 4) == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert f"interrupted after step 2; flux2-lora --resume {tmp_path / 'run'} goes on" in capsys.readouterr().err
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2]
    monkeypatch.setattr(Trainer, "take_step", step)
    assert main(["--resume", str(tmp_path / "run"), "--quiet", "--steps", "3"]) == 0
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3]


def test_an_interrupt_in_the_last_step_leaves_its_image_to_the_next_run(pictures, tmp_path, monkeypatch):
    """It is no success, as the image is not there."""
    step, run = Trainer.take_step, tmp_path / "run"
    monkeypatch.setattr(Trainer, "take_step", lambda trainer: os.kill(os.getpid(), signal.SIGTERM) or step(trainer))
    words = ["--steps", 1, "--validation-prompt", "a red circle", "--validation-steps", 1]
    assert train(pictures, run, *words) == 143
    assert [path.name for path in run.glob("samples/*")] == ["step-000000.png"]
    monkeypatch.setattr(Trainer, "take_step", step)
    assert main(["--resume", str(run), "--quiet"]) == 0
    assert (run / "samples" / "step-000001.png").is_file()


def test_what_a_kill_leaves_is_made_up_for(pictures, tmp_path):
    """Between the last save and the last image and curve; half a line, and what is no line, in the log; half a file."""
    run = tmp_path / "run"
    words = ["--steps", 2, "--validation-prompt", "a red circle"]
    assert train(pictures, run, *words) == 0
    made = [run / "samples" / "step-000002.png", run / "loss.png"]
    before, lines = [path.read_bytes() for path in made], (run / "log.jsonl").read_text().splitlines()
    for path in made:
        path.unlink()
    rubbish = ["[1]", "{}", '{"step": 1}', '{"step": "1", "loss": 2}', "[" * 100_000, "\ufffd", lines[1][:20]]
    rubbish += [f'{{"step": 1, "loss": {loss}}}' for loss in ("NaN", "-Infinity", "1e300", "9" * 400)]
    (run / "log.jsonl").write_text("\n".join([lines[0], *rubbish, lines[1], '{"st']))
    half = run / ".lora.partial-abcd_123.safetensors"
    half.write_bytes(b"half")
    assert main(["--resume", str(run), "--quiet"]) == 0
    assert [path.read_bytes() for path in made] == before
    assert (run / "log.jsonl").read_text().splitlines() == lines
    assert not half.exists()


def test_a_state_of_another_form_is_refused(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "run", "--steps", 1) == 0
    arrays = mx.load(str(tmp_path / "run" / STATE))
    mx.eval(arrays)  # before their file is written over
    for note in ("[]", "{}", '{"step": 1, "options": 5, "data": ""}', '{"step": 1e999, "options": {}}'):
        mx.save_safetensors(str(tmp_path / "run" / STATE), arrays, {"flux2_mlx_training": note})
        assert main(["--resume", str(tmp_path / "run"), "--quiet"]) == 2, note
        assert "is no checkpoint of a training run, or is damaged" in capsys.readouterr().err, note


def test_one_process_trains_in_a_folder(pictures, tmp_path, capsys):
    """A lock belongs to an open file, so that another of this process is as good as another process's."""
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        assert train(pictures, tmp_path / "run", "--steps", 1) == 2
    assert f"is trained in by another process ({os.getpid()}); wait for it" in capsys.readouterr().err
    (tmp_path / "run" / ".lock").write_text("1")  # of one that was killed
    assert train(pictures, tmp_path / "run", "--steps", 1) == 0


def test_going_on_otherwise_is_refused(tmp_path, capsys):
    folder = write_pictures(tmp_path / "data")
    assert train(folder, tmp_path / "run", "--steps", 1) == 0
    again = ["--resume", str(tmp_path / "run"), "--quiet", "--steps", "2"]
    assert main([*again, "--rank", "4", "--seed", "1"]) == 2
    assert "was trained with other options: rank (2, now 4), seed (0, now 1)" in capsys.readouterr().err
    caption = (folder / "0.txt").read_text()
    (folder / "0.txt").write_text("another")
    assert main(again) == 2
    assert "was trained on other images or captions" in capsys.readouterr().err
    (folder / "0.txt").write_text(caption)
    (tmp_path / "run" / STATE).write_bytes((tmp_path / "run" / STATE).read_bytes()[:-100])
    assert main(again) == 2
    assert "is no checkpoint of a training run, or is damaged" in capsys.readouterr().err


def test_what_is_encoded_is_kept_and_the_encoders_are_not(pictures, tmp_path, monkeypatch):
    encode, encoded = Qwen3TextEncoder.__call__, []
    monkeypatch.setattr(Qwen3TextEncoder, "__call__", lambda *given: encoded.append(1) or encode(*given))
    unloaded = []
    monkeypatch.setattr(Flux2Pipeline, "unload", lambda _, stage: unloaded.append(stage))
    assert train(pictures, tmp_path / "run", "--steps", 1) == 0
    assert len(encoded) == 5, "four captions, and none"
    assert unloaded == ["text_encoder", "autoencoder"]
    file = next((tmp_path / "run" / "cache").iterdir())
    file.write_bytes(file.read_bytes()[:-10])
    count = len(encoded)
    assert main(["--resume", str(tmp_path / "run"), "--quiet", "--steps", "2"]) == 0
    assert len(encoded) <= count + 1, "what was cut short alone"


def test_edits_are_trained(tmp_path):
    folder = write_edits(tmp_path / "data")
    reference = str(folder / "0-before.png")
    words = ["--validation-prompt", "make it red", "--validation-image", reference, "--batch-size", 2, "--steps", 1]
    assert train(folder, tmp_path / "run", *words, "--quantize", 8, "--names", "comfyui") == 0
    pipe = Flux2Pipeline.from_pretrained("nano", quantize=8)
    pipe.load_lora(tmp_path / "run")
    drawn = pipe("make it red", image=Image.open(reference).convert("RGB"), seed=0).images[0]
    with Image.open(tmp_path / "run" / "samples" / "step-000001.png") as sample:
        assert np.abs(np.asarray(sample, int) - np.asarray(drawn, int)).max() <= 1


def test_numbers_that_are_not_finite_end_a_run(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flux2_mlx.training.trainer.flow_loss", lambda model, *_: mx.array(float("nan")))
    assert train(pictures, tmp_path / "run", "--steps", 2) == 2
    assert "step 1: the loss is nan" in capsys.readouterr().err


def test_what_a_gpu_failed_to_compute_is_not_saved(pictures, tmp_path, capsys, monkeypatch):
    """MLX tells of it when the GPU is next used, which is before the step counts."""

    def synchronize():
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008).")

    monkeypatch.setattr("flux2_mlx.training.trainer.synchronize", synchronize)
    assert train(pictures, tmp_path / "run", "--steps", 1) == 2
    assert "error: memory is too little (Insufficient Memory)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "lora.safetensors").exists()


def test_a_curve_of_one_loss():
    assert plot_losses([0.5]).size == (960, 480)
    assert len(np.unique(np.asarray(plot_losses([0.5, 0.7, 0.6] * 40)))) > 3


# ------------------------------------------------------------------------------------------------ processes


def test_processes_share_the_passes_of_a_step(pictures, tmp_path):
    preserved = write_captions(tmp_path / "captions.txt", "a blue star", "a red cross")
    words = [
        *SMALL,
        "--data",
        str(pictures),
        "--steps",
        "2",
        "--quiet",
        *map(str, RANDOM),
        "--preserve",
        str(preserved),
    ]
    launcher = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
    module = ["-m", "tests.device", "flux2_mlx.lora"]
    command = [*launcher, sys.executable, *module, *words, "--output", str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    for name in one:
        assert np.abs(one[name].astype(float) - two[name]).max() <= 1e-6, name
    for figure in ("loss", "change"):
        found = [[line[figure] for line in log(tmp_path / name)] for name in ("one", "two")]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][1] > 0
    assert [line["step"] for line in log(tmp_path / "two")] == [1, 2]


class Group:
    def size(self):
        return 2


def test_processes_need_passes_to_share():
    model = FluxKlein(FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=96, depth=1, depth_single=1))
    with pytest.raises(
        InputError, match="2 processes cannot share the 3 passes of a step; accumulate must be a multiple"
    ):
        Trainer(model, TrainingOptions("", "", accumulate=3), [], None, group=Group())


def test_what_is_preserved_changes_less(pictures, tmp_path, capsys):
    """By the velocities of the model without the LoRA, for a caption that no picture has."""
    preserved = write_captions(tmp_path / "captions.txt", "\ufeffa blue star on the left", "", "a red cross")
    words = "--steps", 5, "--learning-rate", 2e-2, "--warmup", 0
    assert train(pictures, tmp_path / "without", *words) == 0
    changes = []
    for weight in (1e-6, 100):
        output = tmp_path / str(weight)
        assert train(pictures, output, *words, "--preserve", preserved, "--preserve-weight", weight) == 0
        lines = log(output)
        assert lines[0]["change"] == 0  # before the first step the LoRA does nothing
        changes.append(lines[-1]["change"])
    assert changes[0] > 1.5 * changes[1] > 0
    assert [line["change"] for line in log(tmp_path / "without")] == [0] * 5
    light, without = (state(tmp_path / name) for name in ("1e-06", "without"))
    for name in without:  # as good as no weight is as good as no captions
        assert np.abs(light[name].astype(float) - without[name]).max() <= 1e-4, name
    write_captions(preserved, "a blue star on the left")
    assert main(["--resume", str(tmp_path / "100"), "--steps", "6"]) == 2
    assert "was trained on other images or captions" in capsys.readouterr().err


def test_captions_to_preserve_that_are_refused(pictures, tmp_path, capsys):
    learned = (pictures / "2.txt").read_text()
    for captions, message in (
        (("", " "), "no captions; write one a line"),
        (("a cat", learned, learned), f"{learned!r} is a caption of the data set, too"),
        (("\u00e9" * 100_001,), "is too long"),
    ):
        file = write_captions(tmp_path / "captions.txt", *captions)
        assert train(pictures, tmp_path / "run", "--preserve", file) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {file} has 1 fault:")
        assert message in told
    (tmp_path / "captions.txt").write_bytes(b"\xff\xfe")
    for file, message in ((tmp_path / "captions.txt", "not UTF-8 text"), (tmp_path / "none.txt", "No such file")):
        assert train(pictures, tmp_path / "run", "--preserve", file) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("side", "length", "batch", "dtype", "packed", "recompute"),
    [
        (128, 192, 1, mx.float32, False, True),
        pytest.param(128, 192, 1, mx.bfloat16, True, True, marks=pytest.mark.nightly),  # which CPUs multiply slowly
        (80, 160, 2, mx.float32, True, True),
        (128, 192, 1, mx.float32, False, False),
    ],
)
def test_training_needs_what_the_plan_says(side, length, batch, dtype, packed, recompute, memory):
    """The plan says what operations in order need. MLX's CPU backend dispatches ten kernels, two for an operation,
    before it looks at the memory again, so that on a busy machine the outputs of five operations more are there: none
    wider than what a feed-forward layer is made of, or attention's scores.
    """
    params = FluxKleinParams(hidden_size=384, num_heads=3, txt_embed_dim=960, depth=1, depth_single=3)
    model = FluxKlein(params)
    model.set_dtype(dtype)
    if packed:
        quantize(model, lambda *_: Quantization(4), quantize_rtn)
    add_adapters(model, TrainingOptions("", "", rank=4))
    if recompute:
        model.block_runner = checkpoint_block
    tokens = side * side // 256
    widest = max(params.mlp_hidden, params.num_heads * (length + tokens))
    ahead = 5 * batch * (length + tokens) * widest * dtype.size
    rope = FluxKlein.compute_rope(text_ids(length), image_ids(side, side))
    clean, noise, txt = (mx.random.normal((batch, n, c)) for n, c in ((tokens, 128), (tokens, 128), (length, 960)))
    mx.eval(model.parameters(), clean, noise, txt, *rope)
    before = memory()
    unpacked = largest_dense_bytes(model, dtype)
    working = training_bytes(params, length + tokens, dtype, batch, recompute=recompute, packed=packed) + unpacked
    gradients = nn.value_and_grad(model, lambda *values: flow_loss(model, *values))
    with memory_limit(before + working, working):
        mx.reset_peak_memory()
        mx.eval(gradients(clean, noise, mx.full((batch,), 0.5), None, txt, rope))
        peak = mx.get_peak_memory() - before
    weights = weight_bytes(model)
    assert 0.85 * (working + weights) <= peak + weights
    assert 0.7 * working <= peak <= 1.05 * working + ahead


def test_a_base_model_is_trained_in_ten_gigabytes(capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    words = ["--plan", "--model", "klein-base-4b", "--quantize", "4", "--resolution", "512", "--dtype", "bfloat16"]
    assert main([*words, "--memory-limit", "10"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^training +\d\.\d\d", out, re.MULTILINE)
    peak = float(re.search(r"memory: about (\d+\.\d\d) of 10\.00 GB", out)[1])
    assert 3 < peak < 10
    assert main([*words, "--memory-limit", "3"]) == 0
    assert "which is too much" in capsys.readouterr().out


def test_the_plan_of_a_data_set(pictures, capsys):
    assert main(["--plan", "--model", "nano", "--data", str(pictures), "--allow-distilled"]) == 0
    assert re.search(r"^training ", capsys.readouterr().out, re.MULTILINE)
