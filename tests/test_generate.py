"""The command: what it prints, writes and refuses."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline, __version__
from flux2_mlx.generate import main, output_path
from tests import tiny
from tests.prompts import LONG

SMALL = ["--width", "80", "--height", "64", "--steps", "2", "--max-sequence-length", "16"]


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; gives (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=checkpoint, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
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
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert "Traceback" not in err
    for text in expected:
        assert text in lines[0], lines[0]
    if folder is not None:
        assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------ drawing


def test_a_prompt_becomes_a_picture(run, pipe, tmp_path):
    code, out, err = run("a red fox", "--seed", 5)
    assert (code, out) == (0, "seed 5  flux2-5.png\n")
    assert re.search(
        r"s in all \(load .* s  text_encoder .* s  denoise .* s  decode .* s\), peak memory \d+\.\d\d GB", err
    )
    assert "drawing:" in err
    assert "loading transformer" in err
    expected = pipe("a red fox", seed=5, width=80, height=64, num_steps=2, max_sequence_length=16).images[0]
    with Image.open(tmp_path / "flux2-5.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_every_option_reaches_the_pipeline(run, tmp_path, base_reference):
    code, out, _ = run(
        "a red fox", "--guidance", 2.5, "--seed", 3, "--num-images", 2, "--schedule", "comfy", "--noise", "mlx",
        "--dtype", "bfloat16", "--negative-prompt", "blur", "--output", "out-{seed}-{index}.webp", "--quiet",
        model=base_reference[1],
    )  # fmt: skip
    assert (code, out) == (0, "seed 3  out-3-0.webp\nseed 4  out-4-1.webp\n")
    from flux2_mlx import read_metadata

    assert read_metadata(tmp_path / "out-4-1.webp") == {
        "prompt": "a red fox",
        "negative_prompt": "blur",
        "model": "tiny-base",
        "seed": 4,
        "width": 80,
        "height": 64,
        "num_steps": 2,
        "guidance": 2.5,
        "schedule": "comfy",
        "sigmas": None,
        "noise": "mlx",
        "dtype": "bfloat16",
        "max_sequence_length": 16,
        "version": __version__,
    }


def test_quiet_prints_the_seed_and_the_file_alone(run):
    code, out, err = run("a red fox", "--quiet")
    assert code == 0
    assert re.fullmatch(r"seed (\d+)  flux2-\1\.png\n", out)
    assert err == ""


def test_stats_are_a_json_line(run):
    _, out, _ = run("a red fox", "--stats", "--quiet")
    stats = json.loads(out.splitlines()[-1])
    assert set(stats["seconds"]) == set(stats["peak_bytes"]) == {"load", "text_encoder", "denoise", "decode"}


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


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_from_image_repeats_a_picture(run, tmp_path, suffix):
    options = ["--schedule", "linear", "--noise", "mlx", "--sigmas", "1", "0.3"]
    code, _, err = run("a red fox", *options, "--seed", 8, "--output", f"first.{suffix}", "--quiet")
    assert code == 0, err
    code, out, err = run("--from-image", f"first.{suffix}", "--output", f"again.{suffix}", "--quiet")
    assert (code, out) == (0, f"seed 8  again.{suffix}\n"), err
    first, again = (np.asarray(Image.open(tmp_path / f"{name}.{suffix}")) for name in ("first", "again"))
    assert np.array_equal(first, again)
    code, out, _ = run("--from-image", f"first.{suffix}", "--seed", 9, "--output", f"other.{suffix}", "--quiet")
    assert out == f"seed 9  other.{suffix}\n"
    assert not np.array_equal(first, np.asarray(Image.open(tmp_path / f"other.{suffix}")))


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
        "stats quiet revision version from-image negative-prompt sigmas"
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
        (["a", "--steps", "0"], ["num_steps must be a whole number of at least 1, got 0"]),
        (["a", "--num-images", "0"], ["num_images must be a whole number of at least 1, got 0"]),
        (["a", "--seed", "-4"], ["seed must be a whole number of at least 0, got -4"]),
        (["a", "--model", "klein4b"], ["no model 'klein4b'", "did you mean klein-4b"]),
        (["a", "--model", "."], ["no FLUX.2 [klein] checkpoint in the diffusers layout: no model_index.json"]),
        (["a", "--schedule", "karras"], ["invalid choice: 'karras'"]),
        (["a", "--output", "fox.bmp"], ["cannot write fox.bmp: the suffix must be one of .png"]),
        (["a", "--output", "gone/fox.png"], ["cannot write gone/fox.png: there is no folder gone"]),
        (["a", "--output", "{prompt}.png"], ["--output takes {seed} and {index} alone, got '{prompt}.png'"]),
        (["a", "--output", "{.png"], ["--output takes {seed} and {index} alone"]),
        (["a", "--prompt-file", "x.txt"], ["either as an argument or as --prompt-file"]),
        (["--prompt-file", "gone.txt"], ["cannot read gone.txt: No such file or directory"]),
        (["--from-image", "gone.png"], ["cannot read gone.png: No such file or directory"]),
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


def test_a_prompt_file_that_is_no_text(run, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    refused(run("--prompt-file", "x.txt"), "x.txt is not UTF-8 text")


def test_no_prompt_at_a_terminal(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    refused(run(), "no prompt: give one")


def test_an_unwritable_folder(run, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", forbidden)
    refused(run("a", "--output", "fox.png"), "cannot write fox.png: Permission denied; choose another --output")


def test_a_truncated_file(run, damaged):
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    tiny.rewrite(path, path.read_bytes()[:-1])
    refused(run("a", model=damaged), str(path), "is cut short or damaged", "fetch or copy it again")


def test_latents_that_are_not_finite(run, damaged):
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    tiny.edit_weights(path, lambda tensors: tensors["proj_out.weight"].fill_(float("inf")))
    refused(run("a", "--quiet", model=damaged), "step 1 of 2: the latents are not finite in float32", "--dtype")


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
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = b""
    while b"drawing" not in seen:
        byte = os.read(process.stderr.fileno(), 1)
        assert byte, seen
        seen += byte
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err
    assert out == b""
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_program_is_not_hidden(run, monkeypatch):
    """Only what the user can mend becomes one line; a bug keeps its traceback."""

    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(Flux2Pipeline, "stream", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("a red fox")
