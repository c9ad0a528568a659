"""Previews: a map that is fitted and kept, a file that is rewritten, and pictures in terminals."""

import base64
import gc
import io
import json
import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.disk_cache import cache_folder
from flux2_mlx.generate import main
from flux2_mlx.imaging import preview
from flux2_mlx.imaging.files import PREVIEW_KEY, check_preview, save_preview
from flux2_mlx.imaging.terminal import MAX_SIDE, detect_protocol, encode, encode_sixel

SMALL = {"height": 64, "width": 80, "num_steps": 3, "max_sequence_length": 16, "seed": 1}


@pytest.fixture(scope="module")
def nano():
    return Flux2Pipeline.from_pretrained("nano")


@pytest.fixture(autouse=True)
def small_pictures(request, monkeypatch):
    """Fit maps on little, but where a test looks at what a map shows: a random model's shows nothing."""
    if "nano" not in request.fixturenames:
        monkeypatch.setattr(preview, "IMAGES", 2)
        monkeypatch.setattr(preview, "SIDE", 64)


def levels(image):
    return np.asarray(image, np.float32)


# ------------------------------------------------------------------------------------------------ the map


def test_a_preview_shows_what_stands_where(nano):
    steps = list(nano.stream("a large red circle on the left, white background", seed=1))
    for step in steps[1:]:
        seen, truth = levels(step.preview()), levels(step.picture())
        assert seen.shape == truth.shape == (128, 128, 3)
        assert np.abs(seen - truth).mean() < 0.5 * np.abs(255 - seen - truth).mean()
        ring, ground = seen[50:78, 20:46].mean((0, 1)), seen[:, 90:].mean((0, 1))
        assert ring[2] < ground[2] - 60  # red has no blue, white has
        assert ground.min() > ring.min()


def test_a_map_gives_back_a_linear_decoder(monkeypatch, nano):
    """With noise in the latents and channels that say nothing, whose weights are next to nothing then."""

    class Linear:
        bn = nano.autoencoder.bn
        rng = np.random.default_rng(0)
        truth = 0.1 * rng.standard_normal((128, 12)).astype(np.float32)
        truth[64:] = 0

        def encoder(self, picture):
            return mx.array(self.rng.standard_normal((1, preview.SIDE // 8, preview.SIDE // 8, 32), np.float32))

        def decoder(self, z):
            tokens = np.array(self.bn.normalize(preview.pack_latents(z))[0])
            side = preview.SIDE // 16
            cells = (tokens @ self.truth).reshape(side, side, 2, 2, 3).transpose(0, 2, 1, 3, 4)
            pixels = np.repeat(np.repeat(cells.reshape(2 * side, 2 * side, 3), 8, 0), 8, 1)
            return mx.array(pixels[None])

    monkeypatch.setattr(preview, "to_unit", lambda decoded: decoded)
    monkeypatch.setattr(preview, "RIDGE", 1e-6)
    fitted = preview.fit_map(Linear())
    assert np.abs(fitted[:-1] - Linear.truth).max() < 1e-3


def test_a_map_is_fitted_once_for_a_checkpoint(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "cache"))
    fitted = []
    fit = preview.fit_map
    monkeypatch.setattr(preview, "fit_map", lambda autoencoder: fitted.append(1) or fit(autoencoder))
    for _ in range(2):
        pipe = Flux2Pipeline.from_pretrained(checkpoint)
        first = [step.preview() for step in pipe.stream("a", **SMALL)]
        assert len(fitted) == 1
    (kept,) = cache_folder().glob("preview-*.json")
    for damage in (
        "{",
        '{"map": [[1, 2], [3]]}',
        '{"map": [[NaN]]}',
        '{"map": "x"}',
        json.dumps({"map": [[1.0] * 12]}),
    ):
        kept.write_text(damage)
        again = [step.preview() for step in Flux2Pipeline.from_pretrained(checkpoint).stream("a", **SMALL)]
        assert all(np.array_equal(levels(a), levels(b)) for a, b in zip(first, again, strict=True))
    assert len(fitted) == 6


def test_a_preview_loads_and_unloads_nothing(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="staged")
    for step in pipe.stream("a", **SMALL):
        step.preview()
        assert pipe.stages.loaded() == {"transformer"}


def test_a_preview_of_what_is_repainted_keeps_the_rest(pipe):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 45, 70))
    step = next(pipe.stream("a", init_image=picture, mask=mask, num_steps=2, max_sequence_length=16, seed=1))
    assert np.array_equal(levels(step.preview())[:, 45:], levels(picture)[:, 45:])


def test_a_caller_who_stops_gets_the_steps_memory_back(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    pipe("a", **SMALL)
    gc.collect()
    before = mx.get_active_memory()
    stream = pipe.stream("a", **SMALL, num_images=3)
    next(stream)
    stream.close()
    del stream
    gc.collect()
    assert mx.get_cache_memory() == 0
    assert mx.get_active_memory() <= before


# ------------------------------------------------------------------------------------------------ the file


def test_the_preview_file_is_rewritten_after_each_step(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written = []
    save = save_preview
    monkeypatch.setattr(
        "flux2_mlx.cli.runner.save_preview", lambda image, path: written.append(image) or save(image, path)
    )
    small = ["--width", "80", "--height", "64", "--steps", "2", "--max-sequence-length", "16"]
    command = ["a", "--model", str(checkpoint), *small, "--preview", "now.png", "--num-images", "2", "--quiet"]
    for _ in range(2):
        assert main(command) == 0
    assert len(written) == 8
    with Image.open("now.png") as shown:
        assert np.array_equal(levels(shown), levels(written[-1]))
        assert PREVIEW_KEY in shown.info
    assert len(list(tmp_path.glob("*"))) == 5
    (tmp_path / "mine.png").write_bytes(b"precious")
    for name, expected in (("mine.png", "mine.png exists and is no preview"), ("a.jpg", "a preview is a PNG file")):
        assert main([*command[:-4], name, "--quiet"]) == 2
        assert expected in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"precious"
    with pytest.raises(InputError, match="there is no folder"):
        check_preview(tmp_path / "nowhere" / "a.png")


# ------------------------------------------------------------------------------------------------ terminals


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, None),
        ({}, None),
    ],
)
def test_a_terminals_way_is_told_from_what_it_says(environment, expected):
    assert detect_protocol(environment) == expected


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 700, 3), np.uint8))


def test_kitty(picture):
    text = encode(picture, "kitty")
    parts = re.findall("\033_G([^;]*);([A-Za-z0-9+/=]*)\033\\\\", text)
    assert "".join(f"\033_G{keys};{data}\033\\" for keys, data in parts) + "\n" == text
    assert [keys for keys, _ in parts] == ["a=T,f=100,m=1", *["m=1"] * (len(parts) - 2), "m=0"]
    assert all(len(data) <= 4096 for _, data in parts)
    with Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in parts)))) as shown:
        assert shown.size == (MAX_SIDE, 219)
    small = encode(picture.crop((0, 0, 8, 8)), "kitty")
    assert small.startswith("\033_Ga=T,f=100,m=0;")


def test_iterm2(picture):
    size, data = re.fullmatch("\033]1337;File=inline=1;size=(\\d+):(.*)\a\n", encode(picture, "iterm2")).groups()
    assert len(base64.b64decode(data)) == int(size)
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.size == (MAX_SIDE, 219)


def unsixel(text):
    """Pixels of sixel text, by the manual's words."""
    width, height, body = re.fullmatch('\033Pq"1;1;(\\d+);(\\d+)(.*)\033\\\\\n', text).groups()
    out = np.full((int(height) + 6, int(width), 3), -1)
    colours, x, y, colour = {}, 0, 0, None
    for define, red, green, blue, select, count, run, one, move in re.findall(
        r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$-])", body
    ):
        if define:
            colours[define] = [int(red), int(green), int(blue)]
        elif select:
            colour = colours[select]
        elif move:
            x, y = 0, y + 6 * (move == "-")
        else:
            stop = x + int(count or 1)
            for bit in range(6):
                if (ord(run or one) - 63) >> bit & 1:
                    out[y + bit, x:stop] = colour
            x = stop
    return out[: int(height)]


def test_sixel():
    """Six rows and a part of six, of few colours: what a terminal draws is the picture, in hundredths."""
    rng = np.random.default_rng(1)
    palette = np.array([(0, 0, 0), (255, 255, 255), (51, 102, 204), (255, 0, 0)], np.uint8)
    pixels = np.repeat(palette[rng.integers(0, 4, (14, 5))], 4, axis=1)
    drawn = unsixel(encode_sixel(Image.fromarray(pixels)))
    assert np.array_equal(drawn, (pixels.astype(int) * 100 + 127) // 255)
    assert encode(Image.fromarray(pixels), "sixel") == encode_sixel(Image.fromarray(pixels))


def test_pictures_are_shown(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    small = ["--width", "80", "--height", "64", "--steps", "1", "--max-sequence-length", "16"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command = ["a", "--model", str(checkpoint), *small, "--quiet", "--show"]
    for term, more, begins in (
        ("xterm-kitty", [], "\033_G"),
        ("dumb", ["iterm2"], "\033]1337"),
        ("foot", [], "\033Pq"),
    ):
        monkeypatch.setenv("TERM", term)
        assert main([*command, *more]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith(begins)
    for term, is_terminal in (("dumb", True), ("foot", False)):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert main(command) == 0
        captured = capsys.readouterr()
        assert captured.out.count("\n") == 1
        assert captured.err == (
            "warning: nothing is known to show images here; try one of --show kitty, --show iterm2, --show sixel\n"
        )


def test_bars_are_for_terminals_and_one_at_a_time(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--width", "80", "--height", "64", "--steps", "1", "--max-sequence-length", "16", "--num-images", "2"]
    command = ["a", "--model", str(checkpoint), *small, "--memory", "staged"]
    assert main(command) == 0
    written = capsys.readouterr().err
    assert "\r" not in written
    assert "\033" not in written
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    assert main(command) == 0
    written = capsys.readouterr().err
    assert all(bar in written for bar in ("\rloading text encoder: ", "\rgenerating: ", "\rloading autoencoder: "))
    assert "\033[A" not in written  # which goes up a line, from a bar below another one
