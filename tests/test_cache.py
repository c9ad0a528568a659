"""What is kept between runs is used when it belongs, and never missed."""

import os
from threading import Event

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux2_mlx import Flux2Pipeline, Qwen3TextEncoder
from flux2_mlx import disk_cache as cache
from flux2_mlx.checkpoints.files import read_through
from flux2_mlx.generate import main
from flux2_mlx.runtime import residency
from tests import tiny

SIZE = {"height": 64, "width": 64, "num_steps": 1, "output_type": "np", "seed": 1, "max_sequence_length": 16}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(folder):
    return sorted((folder / "prompts").glob("*"))


def draw(checkpoint, prompt="a fox", *, options=None, **settings):
    """(picture, whether the text encoder was needed)"""
    result = Flux2Pipeline.from_pretrained(checkpoint, **(options or {}))(prompt, **(SIZE | settings))
    return result.images, "text_encoder" in result.seconds


def test_a_prompt_that_was_drawn_before_needs_no_text_encoder(checkpoint, folder, monkeypatch):
    picture, encoded = draw(checkpoint)
    assert encoded
    assert len(kept(folder)) == 1
    monkeypatch.setattr(Qwen3TextEncoder, "__call__", None)
    again, encoded = draw(checkpoint)
    assert not encoded
    assert np.array_equal(again, picture)


def test_only_the_new_prompts_of_a_batch_are_encoded(base_reference, folder):
    draw(base_reference[1], "a fox", guidance=1.0)
    picture, encoded = draw(base_reference[1], ["a fox", "a dog"], guidance=3.0, negative_prompt="rain")
    assert encoded
    assert len(kept(folder)) == 3
    again, encoded = draw(base_reference[1], ["a fox", "a dog"], guidance=3.0, negative_prompt="rain")
    assert not encoded
    assert np.array_equal(again, picture)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a fux"},
        {"max_sequence_length": 17},
        {"options": {"dtype": "bfloat16"}},
        {"options": {"quantize_text_encoder": 8, "group_size": 32}},
    ],
    ids=str,
)
def test_what_differs_is_encoded_again(checkpoint, change):
    draw(checkpoint)
    assert draw(checkpoint, **change)[1]


def test_changed_weights_are_read_again(checkpoint, tmp_path):
    copy = tiny.copy(checkpoint, tmp_path / "copy")
    draw(copy)
    assert not draw(copy)[1]
    (file,) = (copy / "text_encoder").glob("*.safetensors")
    before = file.stat()
    tiny.rewrite(file, file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as some tools copy
    assert draw(copy)[1]


def test_a_changed_text_encoder_encodes_for_itself(checkpoint):
    draw(checkpoint)
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    nn.quantize(pipe.text_encoder, 32, 2)
    assert "text_encoder" in pipe("a fox", **SIZE).seconds
    assert not draw(checkpoint)[1]


def test_without_the_cache(checkpoint, folder):
    draw(checkpoint)
    (file,) = kept(folder)
    file.unlink()
    assert draw(checkpoint, options={"cache": False})[1]
    assert kept(folder) == []
    command = ["a fox", "--model", str(checkpoint), "--width", "64", "--height", "64", "--steps", "1", "--no-cache"]
    assert main([*command, "--output", str(folder / "fox.png")]) == 0
    assert kept(folder) == []


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_file_is_written_again(checkpoint, folder, damage):
    picture, _ = draw(checkpoint)
    (file,) = kept(folder)
    content = file.read_bytes()
    if damage == "other":
        mx.save_safetensors(str(file), {"embeds": mx.zeros((1, 16, 96))})
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    again, encoded = draw(checkpoint)
    assert encoded
    assert np.array_equal(again, picture)
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_is_not_missed(checkpoint, folder):
    folder.touch()
    draw(checkpoint)
    assert draw(checkpoint)[1]


def test_the_latest_are_kept_up_to_the_cap(checkpoint, folder, monkeypatch):
    draw(checkpoint, "one")
    size = kept(folder)[0].stat().st_size
    monkeypatch.setattr(cache, "PROMPT_BYTES", 2 * size)
    draw(checkpoint, "two")
    for age, file in enumerate(kept(folder)):
        os.utime(file, ns=(age, age))
    draw(checkpoint, "one")  # so it is the later one now
    draw(checkpoint, "three")
    assert len(kept(folder)) == 2
    assert [draw(checkpoint, prompt)[1] for prompt in ("one", "three")] == [False, False]
    monkeypatch.setattr(cache, "PROMPT_BYTES", 1)  # a single one is kept whatever its size
    draw(checkpoint, "four")
    assert len(kept(folder)) == 1
    assert not draw(checkpoint, "four")[1]


@pytest.mark.parametrize(
    ("variables", "platform", "expected"),
    [
        ({"FLUX2_MLX_CACHE": "~/there"}, "linux", "HOME/there"),
        ({}, "darwin", "HOME/Library/Caches/flux2_mlx"),
        ({}, "linux", "HOME/.cache/flux2_mlx"),
        ({"XDG_CACHE_HOME": "/x"}, "linux", "/x/flux2_mlx"),
    ],
)
def test_where_the_folder_is(variables, platform, expected, monkeypatch):
    for name in ("FLUX2_MLX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("sys.platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_folder()) == expected.replace("HOME", "/home/me")


# ------------------------------------------------------------------------------------------------ reading ahead


def test_files_are_read_to_their_end_where_there_is_room(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(1000))
    assert read_through(files, 2000, Event()) == 2000
    assert read_through(files, 1999, Event()) == 0
    assert read_through([*files, tmp_path / "c"], 9000, Event()) == 0
    stop = Event()
    stop.set()
    assert read_through(files, 2000, stop) == 0


def test_the_transformer_is_read_while_the_text_encoder_works(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(residency, "read_through", lambda files, room, stop: asked.append(files))
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    sources = pipe.checkpoint.sources
    pipe("a fox", **SIZE)
    assert asked == [sources["transformer"].files]
    pipe("a dog", **SIZE)  # now it is loaded
    assert len(asked) == 1
