"""The command: what it prints, writes and refuses."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageOps

from flux2_mlx import Flux2Pipeline, InputError, Settings, __version__, read_metadata, save_image
from flux2_mlx.cli.arguments import build_parser, check, complete, output_path
from flux2_mlx.generate import main
from tests import tiny
from tests.prompts import LONG


def task_of(*words):
    return complete(build_parser().parse_args([str(word) for word in words]), None)


SMALL = ["--width", "80", "--height", "64", "--steps", "2", "--max-sequence-length", "16"]


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; gives (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=checkpoint, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        try:
            code = main([*map(str, arguments), *SMALL, "--model", str(model)])
        except SystemExit as exit:  # argparse
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result, *expected, folder=None):
    """Exit code 2, one line on standard error that says the expected, no traceback, nothing written."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not re.match(r"(loading|generating)", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for text in expected:
        assert text in lines[0], lines[0]
    if folder is not None:
        assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------ generating


def test_a_prompt_becomes_a_picture(run, pipe, tmp_path):
    code, out, err = run("a red fox", "--seed", 5)
    assert (code, out) == (0, "seed 5  flux2-5.png\n")
    assert re.search(
        r"s in all \(load .* s  text_encoder .* s  denoise .* s  decode .* s\), peak memory \d+\.\d\d GB", err
    )
    expected = pipe("a red fox", seed=5, width=80, height=64, num_steps=2, max_sequence_length=16).images[0]
    with Image.open(tmp_path / "flux2-5.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_every_option_reaches_the_pipeline(run, tmp_path, base_reference):
    folder = base_reference[1]
    transformer = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    code, out, _ = run(
        "a red fox", "--guidance", 2.5, "--guidance-interval", "0.1,0.9", "--guidance-rescale", 0.5,
        "--step-cache", 0.25, "--seed", 3, "--num-images", 2, "--schedule", "comfy", "--noise", "mlx",
        "--dtype", "bfloat16", "--negative-prompt", "blur", "--output", "out-{seed}-{index}.webp", "--quiet",
        "--transformer", transformer, "--text-encoder", folder / "text_encoder", "--vae", folder / "vae",
        "--tokenizer", folder / "tokenizer", "--no-distilled", "--quantize", "8", "--quantize-text-encoder", "mxfp8",
        "--group-size", 32, model=folder,
    )  # fmt: skip
    assert (code, out) == (0, "seed 3  out-3-0.webp\nseed 4  out-4-1.webp\n")
    assert read_metadata(tmp_path / "out-4-1.webp") == {
        "prompt": "a red fox",
        "original_prompt": None,
        "negative_prompt": "blur",
        "model": str(folder),
        "revision": None,
        "transformer": str(transformer),
        "text_encoder": str(folder / "text_encoder"),
        "vae": str(folder / "vae"),
        "tokenizer": str(folder / "tokenizer"),
        "distilled": False,
        "kv_cache": None,
        "lora": [],
        "lora_merge": False,
        "lora_partial": False,
        "quantize": 8,
        "quantize_text_encoder": "mxfp8",
        "group_size": 32,
        "region": [],
        "reference_strength": [],
        "strength": None,
        "mask_blur": 0.0,
        "mask_padding": None,
        "expand": None,
        "color_match": False,
        "edit_composite": None,
        "inputs": [],
        "seed": 4,
        "width": 80,
        "height": 64,
        "hires": None,
        "hires_strength": None,
        "hires_tile": None,
        "num_steps": 2,
        "guidance": 2.5,
        "guidance_interval": [0.1, 0.9],
        "guidance_rescale": 0.5,
        "force_guidance": False,
        "step_cache": 0.25,
        "reuse": None,
        "schedule": "comfy",
        "sigmas": None,
        "noise": "mlx",
        "dtype": "bfloat16",
        "vae_dtype": "bfloat16",
        "max_sequence_length": 16,
        "version": __version__,
    }
    assert main(["--from-image", "out-3-0.webp", "--output", "again.webp", "--quiet"]) == 0
    assert (tmp_path / "again.webp").read_bytes() == (tmp_path / "out-3-0.webp").read_bytes()


@pytest.fixture
def fox(tmp_path):
    """A picture file of 100 x 70 pixels, encoded as 96 x 64."""
    levels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "fox.png")
    return Image.fromarray(levels)


def test_pictures_are_edited(checkpoint, pipe, tmp_path, monkeypatch, fox):
    monkeypatch.chdir(tmp_path)
    fox.rotate(90, expand=True).save("other.png")
    base = ["$1 of the second image", "--model", str(checkpoint), "--max-sequence-length", "32", "--seed", "5"]
    options = {"seed": 5, "max_sequence_length": 32}
    for more, size in (([], {}), (["--width", "192"], {"width": 192}), (["--height", "80"], {"height": 80})):
        assert main([*base, "--image", "fox.png", "--image", "other.png", "--output", "a.png", "--quiet", *more]) == 0
        expected = pipe("$1 of the second image", image=[fox, fox.rotate(90, expand=True)], **options, **size)
        with Image.open("a.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(expected.images[0]))
            assert picture.size == {"width": (192, 128), "height": (128, 80)}.get(next(iter(size), ""), (96, 64))
        os.remove("a.png")


def test_an_edit_is_repeated_with_its_references(run, tmp_path, fox):
    assert run("a red fox", "--image", "fox.png", "--output", "a.png")[0] == 0
    assert read_metadata(tmp_path / "a.png")["inputs"] == ["image"]
    assert command("--from-image", "a.png", "--output", "b.png") == 2
    assert command("--from-image", "a.png", "--image", "fox.png", "--output", "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_is_drawn_anew(checkpoint, pipe, tmp_path, monkeypatch, fox):
    monkeypatch.chdir(tmp_path)
    base = ["a blue fox", "--model", str(checkpoint), "--max-sequence-length", "32", "--seed", "5", "--quiet"]
    assert main([*base, "--init-image", "fox.png", "--strength", "0.5", "--output", "a.png"]) == 0
    expected = pipe("a blue fox", init_image=fox, strength=0.5, seed=5, max_sequence_length=32).images[0]
    with Image.open("a.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    metadata = read_metadata("a.png")
    assert (metadata["inputs"], metadata["strength"]) == (["init_image"], 0.5)
    assert main(["--from-image", "a.png", "--init-image", "fox.png", "--output", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_part_of_a_picture_is_repainted(checkpoint, pipe, tmp_path, monkeypatch, fox):
    """What is white in a file, or transparent in the picture itself; the rest comes back as it was."""
    monkeypatch.chdir(tmp_path)
    mask = Image.new("L", fox.size)
    mask.paste(255, (20, 10, 80, 60))
    mask.save("mask.png")
    cut_out = fox.copy()
    cut_out.putalpha(ImageOps.invert(mask))
    cut_out.save("cut-out.png")
    base = ["a hat", "--model", str(checkpoint), "--max-sequence-length", "32", "--seed", "5", "--quiet"]
    ways = {
        "white": (["--init-image", "fox.png", "--mask", "mask.png", "--mask-blur", "2", "--mask-padding", "8"],
                  {"init_image": fox, "mask": mask, "mask_blur": 2, "mask_padding": 8}),
        "alpha": (["--init-image", "cut-out.png", "--mask", "alpha", "--strength", "0.5"],
                  {"init_image": cut_out, "mask": "alpha", "strength": 0.5}),
        "expand": (["--init-image", "fox.png", "--expand", "left=20,top=4", "--image", "fox.png"],
                   {"init_image": fox, "expand": {"left": 20, "top": 4}, "image": fox}),
    }  # fmt: skip
    for name, (arguments, options) in ways.items():
        assert main([*base, *arguments, "--output", f"{name}.png"]) == 0
        expected = pipe("a hat", seed=5, max_sequence_length=32, **options).images[0]
        assert np.array_equal(pixels(f"{name}.png"), np.asarray(expected))
        again = arguments[: 4 if name != "expand" else 2] + (["--image", "fox.png"] if name == "expand" else [])
        assert command("--from-image", f"{name}.png", *again, "--output", "again.png") == 0
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / "again.png").read_bytes()
        os.remove("again.png")
    assert np.array_equal(pixels("expand.png")[4:, 20:], np.asarray(fox))
    assert read_metadata("expand.png")["expand"] == {"left": 20, "top": 4}


def test_masks_that_cannot_be_used_are_refused_before_the_model_is_opened(run, fox):
    Image.new("L", (64, 64), 255).save("square.png")
    Image.new("L", fox.size).save("black.png")
    fox.save("fox.png")
    begin = ["--init-image", "fox.png"]
    for options, expected in (
        (["--mask", "square.png"], "mask belongs to init_image"),
        ([*begin, "--mask", "nowhere.png"], "nowhere.png: cannot be read"),
        ([*begin, "--mask", "square.png"], "the mask is 64 x 64 and the image 100 x 70"),
        ([*begin, "--mask", "black.png"], "the mask is black everywhere"),
        ([*begin, "--mask", "alpha"], "has no transparency"),
        ([*begin, "--mask-padding", 8], "mask_blur and mask_padding belong to mask"),
        (["--mask-blur", 8], "mask_blur and mask_padding belong to mask"),
        ([*begin, "--expand", "up=8"], "expand must give pixels, up to 10000, to add on some of left"),
        ([*begin, "--expand", "left=8,left=9"], "argument --expand"),
        ([*begin, "--expand", "left"], "argument --expand"),
    ):
        refused(run("a", *options, model="no/such/model"), expected)


def test_kept_references_are_planned(run, fox):
    """As generating keeps them, before the model is downloaded."""
    options = ["--plan", "--image", "fox.png", "--memory-limit", 100]
    plans = [run(*options, *more, model="klein-9b-kv")[1] for more in ([], ["--no-kv-cache"])]
    assert plans[0] != plans[1] == run(*options, model="klein-9b")[1]
    refused(run(*options, "--kv-cache", model="klein-4b"), "klein-4b was not trained to cache its references")


def test_one_side_beside_a_picture_goes_before_both_of_its_own(run, fox):
    assert run("a", "--image", "fox.png", "--output", "a.png")[0] == 0
    again = ["--from-image", "a.png", "--image", "fox.png", "--width", "96", "--output", "b.png"]
    assert command(*again) == 0
    with Image.open("b.png") as picture:
        assert picture.size == (96, 64)


def test_what_is_repainted_is_planned(run, fox):
    plans = [run("--plan", "--init-image", "fox.png", *more)[1] for more in ([], ["--expand", "left=16"])]
    assert ["references" in plan for plan in plans] == [False, True]


def test_a_distilled_model_is_guided_where_that_is_forced(run, tmp_path):
    options = ["--guidance", 3, "--seed", 1, "--quiet"]
    code, _, err = run("a", *options, "--output", "plain.png")
    assert (code, "--force-guidance" in err) == (0, True)
    assert run("a", *options, "--force-guidance", "--output", "forced.png")[::2] == (0, "")
    assert not np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "forced")))
    assert command("--from-image", "forced.png", "--output", "again.png", "--quiet") == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "forced.png").read_bytes()


def test_a_strength_without_a_picture_to_begin_from_is_refused(run):
    refused(
        run("a", "--strength", 0.5, model="no/such/model"),
        "strength belongs to init_image (--init-image), and none is given",
    )


def test_references_that_cannot_be_used_are_refused_before_the_model_is_opened(run, fox):
    fox.resize((70, 60)).save("small.png")
    fox.resize((900, 100)).save("long.png")
    nowhere = ["--image", "fox.png", "--image"]
    for name, expected in {
        "small.png": "small.png: an image of 70 x 60 is too small: at least 64 pixels a side",
        "long.png": "long.png: an image of 900 x 100 is too elongated: at most 8 to 1",
        "nowhere.png": "nowhere.png: cannot be read: No such file",
    }.items():
        refused(run("a", *nowhere, name, model="no/such/model"), expected)


def test_what_a_reference_asks_for_is_refused_before_the_model_is_opened(run, fox):
    fox.resize((512, 64)).save("wide.png")
    base = ["a", "--model", "no/such/model", "--image", "wide.png", "--height", "1024"]
    with pytest.raises(InputError, match="megapixels"):
        check(task_of(*base))
    refused(run("a", "--image", "fox.png", "--kv-cache", model="klein-9b"), "klein-9b was not trained to cache its")


def test_references_are_planned(run, fox):
    alone, edit = (run("--plan", *images)[1] for images in ([], ["--image", "fox.png"]))
    assert "references" in edit
    assert "references" not in alone
    assert "references" in run("--plan", "--image", "fox.png", model="klein-4b")[1]


def test_quiet_prints_the_seed_and_the_file_alone(run):
    code, out, err = run("a red fox", "--quiet")
    assert code == 0
    assert re.fullmatch(r"seed (\d+)  flux2-\1\.png\n", out)
    assert err == ""


def test_stats_are_a_json_line(run):
    _, out, _ = run("a red fox", "--stats", "--quiet")
    stats = json.loads(out.splitlines()[-1])
    assert set(stats["seconds"]) == set(stats["peak_bytes"]) == {"load", "text_encoder", "denoise", "decode"}
    assert stats["steps"] == {"computed": 2, "reused": 0}


def test_steps_that_reuse_others_are_told(checkpoint, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--width", "80", "--height", "64", "--steps", "12", "--max-sequence-length", "16", "--seed", "5"]
    assert main(["a", "--model", str(checkpoint), *small, "--step-cache", "1e6", "--stats", "--output", "a.png"]) == 0
    captured = capsys.readouterr()
    assert "s), 2 of 12 steps computed, peak memory" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["steps"] == {"computed": 2, "reused": 10}
    options = {"width": 80, "height": 64, "num_steps": 12, "max_sequence_length": 16, "seed": 5}
    assert np.array_equal(pixels("a.png"), np.asarray(pipe("a", step_cache=1e6, **options).images[0]))
    assert command("--from-image", "a.png", "--output", "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_is_cached_is_planned(checkpoint, capsys):
    """Of a folder and of a released model."""
    for model in (checkpoint, "klein-base-4b"):
        works = []
        for more in ([], ["--step-cache", "0.1"]):
            assert main(["--plan", "--model", str(model), "--width", "2048", "--height", "2048", *more]) == 0
            works.append(float(re.search(r"^transformer +\S+ +(\S+)", capsys.readouterr().out, re.MULTILINE)[1]))
        assert works[0] < works[1]


def test_the_prompt_from_a_file_and_from_standard_input(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("a red fox, 狐\n", encoding="utf-8")
    pictures = []
    for arguments, stdin in (
        (["a red fox, 狐"], None),
        (["--prompt-file", "prompt.txt"], None),
        (["-"], "a red fox, 狐\n"),
        ([], "a red fox, 狐"),
    ):
        code, out, err = run(*arguments, "--seed", 1, "--quiet", stdin=stdin)
        assert code == 0, err
        pictures.append(np.asarray(Image.open(out.split("  ")[1].strip())))
    assert all(np.array_equal(pictures[0], picture) for picture in pictures[1:])


def test_an_existing_file_is_kept(run, tmp_path):
    (tmp_path / "fox.png").write_bytes(b"precious")
    code, out, _ = run("a red fox", "--seed", 1, "--num-images", 2, "--output", "fox.png", "--quiet")
    assert (code, out) == (0, "seed 1  fox-2.png\nseed 2  fox-3.png\n")
    assert (tmp_path / "fox.png").read_bytes() == b"precious"


def command(*arguments):
    """main() without the options that ``run`` adds: (exit code, pictures' bytes are compared by the caller)."""
    return main([*map(str, arguments), "--quiet"])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("levels", [["--schedule", "linear"], ["--sigmas", "1,0.3"]], ids=lambda levels: levels[0])
def test_from_image_repeats_a_picture(run, tmp_path, capsys, suffix, levels):
    """With no more than the picture: model, size, levels and all come from it; what is given wins."""
    code, _, err = run("a red fox", *levels, "--noise", "mlx", "--seed", 8, "--output", f"first.{suffix}", "--quiet")
    assert code == 0, err
    assert command("--from-image", f"first.{suffix}", "--output", f"again.{suffix}") == 0
    assert capsys.readouterr().out == f"seed 8  again.{suffix}\n"
    assert np.array_equal(pixels(f"first.{suffix}"), pixels(f"again.{suffix}"))
    for k, given in enumerate((["--seed", "9"], ["--schedule", "comfy"], ["--sigmas", "1,0.9,0.1"], ["--steps", "3"])):
        assert command("--from-image", f"first.{suffix}", *given, "--output", f"{k}.{suffix}") == 0, given
        assert not np.array_equal(pixels(f"first.{suffix}"), pixels(f"{k}.{suffix}")), given
    assert command("--from-image", f"first.{suffix}", "a blue fox", "--output", f"blue.{suffix}") == 0
    assert read_metadata(tmp_path / f"blue.{suffix}")["prompt"] == "a blue fox"
    assert read_metadata(tmp_path / f"2.{suffix}")["num_steps"] == 3
    assert read_metadata(tmp_path / f"3.{suffix}")["sigmas"] is None


def test_from_image_keeps_a_revision_with_its_model_alone(run, tmp_path, monkeypatch):
    assert run("a", "--seed", 1, "--output", "first.png", "--quiet")[0] == 0
    settings = Settings.from_metadata(read_metadata(tmp_path / "first.png"))
    image = Image.open(tmp_path / "first.png")
    hub = replace(settings, model="klein-4b", revision="v1")
    save_image(image, tmp_path / "hub.png", hub.metadata(), hub.parameters())
    image.close()
    model = task_of("--from-image", tmp_path / "hub.png").model
    assert (model.model, model.revision) == ("klein-4b", "v1")
    model = task_of("--from-image", tmp_path / "hub.png", "--model", "klein-9b").model
    assert (model.model, model.revision) == ("klein-9b", None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": 5}, "cannot be read: model"),
        ({"sigmas": 5}, "cannot be read: sigmas"),
        ({"sigmas": ["x"]}, "cannot be read: sigmas"),
        ({"prompt": ["a", "b"]}, "cannot be read: prompt"),
        ({"lora": [5]}, "cannot be read: lora"),
        ({"sigmas": [True]}, "cannot be read: sigmas"),
        ({"force_guidance": "no"}, "cannot be read: force_guidance"),
        ({"seed": None, "width": "64"}, "cannot be read: width, seed"),
        ({"inputs": ["image", "latents"]}, "carries (image, latents), and cannot be repeated"),
        ({"inputs": ["image"]}, "carries (image); give it again (--image)"),
        ({"width": 10**9}, "megapixels"),
        ({"schedule": "karras"}, "schedule must be one of"),
        ({"model": "../../nowhere"}, "no model '../../nowhere'"),
    ],
)
def test_settings_of_a_picture_that_cannot_be_used(run, tmp_path, capsys, changes, expected):
    assert run("a", "--output", "first.png", "--quiet")[0] == 0
    metadata = {**read_metadata(tmp_path / "first.png"), **changes}
    with Image.open(tmp_path / "first.png") as image:
        save_image(image, tmp_path / "bad.png", metadata, "")
    code = command("--from-image", "bad.png", "--output", "again.png")
    captured = capsys.readouterr()
    refused((code, captured.out, captured.err), expected)


def test_a_dash_in_a_pictures_prompt_does_not_read_standard_input(run, tmp_path):
    assert run("-", "--seed", 1, "--output", "dash.png", "--quiet", stdin="-")[0] == 0
    assert task_of("--from-image", tmp_path / "dash.png").inputs.prompt == "-"


def test_a_long_prompt_is_cut_with_a_warning(run):
    code, _, err = run(LONG, "--quiet")
    assert code == 0
    assert re.match(r"warning: the prompt has 684 tokens and max_sequence_length is 16; cut off: '.*'\n$", err)


def test_version_and_help(run):
    assert run("--version")[:2] == (0, f"flux2_mlx {__version__}\n")
    code, out, _ = run("--help")
    assert code == 0
    flags = (
        "model width height steps guidance seed num-images schedule noise dtype prompt-file max-sequence-length output "
        "stats quiet revision version from-image negative-prompt sigmas memory memory-limit plan measure image "
        "init-image strength mask mask-blur mask-padding expand"
    )
    assert not [flag for flag in flags.split() if f"--{flag}" not in out]


def test_output_names():
    assert str(output_path("a-{seed}-{index:03}.png", 5, 1)) == "a-5-001.png"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "--width", "100"], ["width must be a multiple of 16, got 100; the nearest are 96 and 112"]),
        (["a", "--height", "32"], ["height must be a whole number of at least 64, got 32"]),
        (["a", "--width", "4096", "--height", "4096"], ["4096 x 4096 is 16.00 megapixels; at most 4 (2048 x 2048)"]),
        (["a", "--width", "wide"], ["argument --width: invalid int value: 'wide'"]),
        (["a", "--steps", "0"], ["num_steps must be a whole number from 1 to 1000, got 0"]),
        (["a", "--num-images", "0"], ["num_images must be a whole number from 1 to 10000, got 0"]),
        (["a", "--seed", "-4"], ["seed must be a whole number of at least 0, got -4; leave it out for a random one"]),
        (["a", "--model", "klein4b"], ["no model 'klein4b'", "did you mean klein-4b"]),
        (["a", "--model", "."], ["no FLUX.2 [klein] checkpoint in the diffusers layout: no model_index.json"]),
        (["a", "--schedule", "karras"], ["invalid choice: 'karras'"]),
        (["a", "--output", "fox.bmp"], ["cannot write fox.bmp: the suffix must be one of .png"]),
        (
            ["a", "--output", "gone/fox.png"],
            ["cannot write gone/fox.png: there is no folder gone; mkdir -p gone makes it"],
        ),
        (["a", "--output", "{model}.png"], ["--output takes {seed}, {index} and {prompt} only, got '{model}.png'"]),
        (["a", "--output", "{.png"], ["--output takes {seed}, {index} and {prompt} only"]),
        (["a", "--output", "{seed:{prompt}}.png"], ["--output takes {seed}, {index} and {prompt} only"]),
        (["a", "--output", "{seed:c}.png"], ["--output takes {seed}, {index} and {prompt} only"]),
        (["a", "--output", "~nobody-of-that-name/x.png"], ["cannot write ~nobody-of-that-name/x.png"]),
        (["a", "--output", "x" * 300 + ".png"], ["File name too long"]),
        (["a", "--num-images", "10001"], ["num_images must be a whole number from 1 to 10000, got 10001"]),
        (
            ["a", "--max-sequence-length", "1000000000000"],
            ["max_sequence_length must be a whole number from 1 to 40960"],
        ),
        (["a", "--schedule", "linear", "--sigmas", "1,0.5"], ["not allowed with argument --schedule"]),
        (["a", "--sigmas", "1,x"], ["argument --sigmas: invalid numbers value: '1,x'"]),
        (["a\udcff"], ["the prompt is not Unicode text: '\\udcff' at 1"]),
        (["a", "--negative-prompt", "\udcff"], ["the prompt is not Unicode text: '\\udcff' at 0"]),
        (["a", "--prompt-file", "x.txt"], ["either as an argument or as --prompt-file"]),
        (["--prompt-file", "gone.txt"], ["cannot read gone.txt: No such file or directory"]),
        (["--from-image", "gone.png"], ["gone.png: cannot be read: No such file or directory"]),
    ],
)
def test_bad_input_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    defaults = ["--model", str(checkpoint), "--width", "64", "--height", "64", "--max-sequence-length", "16"]
    try:
        code = main([*defaults, *arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    refused((code, captured.out, captured.err), *expected, folder=tmp_path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--width", "65"), ("--steps", "0"), ("--num-images", "0"), ("--seed", "-1"), ("--guidance", "-1")],
)
def test_bad_options_are_refused_before_anything_is_downloaded(tmp_path, monkeypatch, capsys, flag, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Flux2Pipeline, "from_pretrained", None)
    code = main(["a", "--model", "klein-4b", flag, value])
    captured = capsys.readouterr()
    refused((code, captured.out, captured.err), value, folder=tmp_path)


def test_an_error_is_one_line_whatever_it_names(run, damaged):
    index = damaged / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "two\nlines.safetensors"}}))
    refused(run("a", model=damaged), r"names the shard 'two\nlines.safetensors', which is")


def test_a_prompt_file_that_is_no_text(run, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    refused(run("--prompt-file", "x.txt"), "x.txt is not UTF-8 text")


def test_no_prompt_at_a_terminal(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    refused(run(), "no prompt: give one")


def test_standard_input_that_is_no_text(run, monkeypatch):
    refused(run("-", stdin=io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")), "standard input is not utf-8")
    monkeypatch.setattr(sys, "stdin", None)
    refused(run(), "no prompt: give one")


def test_a_byte_order_mark_is_no_part_of_the_prompt(run, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa fox")
    assert run("--prompt-file", "x.txt", "--output", "x.png", "--quiet")[0] == 0
    assert read_metadata(tmp_path / "x.png")["prompt"] == "a fox"


def test_seeds_of_any_size(run):
    for noise in ("torch", "mlx"):
        assert run("a", "--seed", 2**64 - 1, "--num-images", 2, "--noise", noise, "--quiet")[0] == 0


CLOSED_STREAMS = [
    ("<&-", 0, ""),
    (">&-", 0, ""),
    ("2>&-", 0, ""),
    ("| true; exit ${PIPESTATUS[0]}", 2, "error: standard output: [Errno 32] Broken pipe; the work was done"),
]
if os.path.exists("/dev/full"):  # Linux alone has it
    CLOSED_STREAMS.append(("> /dev/full", 2, "error: standard output: [Errno 28] No space left on device"))
    CLOSED_STREAMS.append(("2> /dev/full", 0, ""))


@pytest.mark.parametrize(("shell", "code", "expected"), CLOSED_STREAMS)
def test_closed_and_full_streams(checkpoint, tmp_path, shell, code, expected):
    command = shlex.join(
        [sys.executable, "-m", "flux2_mlx.generate", "a", "--quiet", "--model", str(checkpoint), *SMALL]
    )
    done = subprocess.run(
        ["bash", "-c", f"{command} {shell}"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(expected)
    assert "Traceback" not in done.stderr
    assert len(list(tmp_path.iterdir())) == 1  # the picture is there all the same


def test_a_terminal_that_lacks_letters(checkpoint, tmp_path):
    command = [sys.executable, "-m", "flux2_mlx.generate", "a", "--quiet", "--model", str(checkpoint), *SMALL]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run([*command, "--output", "狐.png"], cwd=tmp_path, env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"\\u72d0.png" in done.stdout
    assert (tmp_path / "狐.png").is_file()


def test_an_unwritable_folder(run, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", forbidden)
    refused(run("a", "--output", "fox.png"), "cannot write fox.png: Permission denied; choose another file")


def test_a_truncated_file(run, damaged):
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    tiny.rewrite(path, path.read_bytes()[:-1])
    refused(run("a", model=damaged), str(path), "is cut short or damaged", "fetch or copy it again")


def test_latents_that_are_not_finite(run, damaged):
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    tiny.edit_weights(path, lambda tensors: tensors["proj_out.weight"].fill_(float("inf")))
    refused(
        run("a", "--quiet", model=damaged),
        "step 1 of 2: values are not finite in float32; check the checkpoint's files (seed ",
    )


def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path):
    """The write really fails here: the process may not make files of more than 2,000 bytes."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from flux2_mlx.generate import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "a red fox", "--quiet", "--model", str(checkpoint), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    refused((done.returncode, done.stdout, done.stderr), "cannot write flux2-", "File too large", folder=tmp_path)


def test_ctrl_c_ends_with_130_and_no_file(checkpoint, tmp_path):
    command = [sys.executable, "-m", "flux2_mlx.generate", "a red fox", "--model", str(checkpoint), *SMALL]
    command += ["--steps", "1000"]
    takes_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore them
    ours, terminal = pty.openpty()  # bars are shown in terminals alone, and in those that have a size
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=terminal, stdout=subprocess.PIPE, preexec_fn=takes_interrupts
    )
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # EIO, once the terminal is closed
        while byte := os.read(ours, 1):
            seen += byte
            if process.poll() is None and re.search(rb"generating.* [1-9]\d*/1000\D*$", seen):
                process.send_signal(signal.SIGINT)  # not before a step: a compiler of kernels ignores it
                break
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert process.communicate(timeout=60)[0] == b""
    assert process.returncode == 130
    assert re.search(rb"interrupted \(seed \d+\)", seen)
    assert b"Traceback" not in seen
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_program_is_one_line_and_can_be_traced(run, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(Flux2Pipeline, "stream", broken)
    code, _, err = run("a red fox", "--quiet")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ValueError: a bug; a damaged file, or a fault of flux2_mlx")
    assert "FLUX2_MLX_DEBUG=1 shows where" in err
    monkeypatch.setenv("FLUX2_MLX_DEBUG", "1")
    code, _, err = run("a red fox", "--quiet")
    assert code == 2
    assert "in broken" in err
