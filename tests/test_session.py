"""A session: what a line means, what a fault costs, and the whole of it with a small model."""

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from flux2_mlx import InputError, read_metadata
from flux2_mlx.cli.session import HELP, Session, SessionImage, complete_word, converse
from flux2_mlx.generate import main
from tests.test_images import SETTINGS


@pytest.fixture
def session():
    """One whose generate notes what it is asked for; the red of an image is the number of its call."""
    asked = []

    def generate(prompt, references, options, add):
        asked.append((prompt, references, dict(options)))
        add(SessionImage(Image.new("RGB", (64, 64), (len(asked), 0, 0)), SETTINGS))

    session = Session(generate)
    session.asked = asked
    return session


NOTHING: dict = {}


def test_a_line_is_generated(session):
    assert session.handle("a red fox") == "image 1"
    assert session.handle("  a blue fox ") == "image 2"
    assert session.handle("   ") == ""
    assert session.asked == [("a red fox", [], NOTHING), ("a blue fox", [], NOTHING)]


@pytest.mark.parametrize(
    "text",
    ["seed packets on a table", "size matters in this picture", "steps of a temple", "the size of a house", "fox",
     "sea", "loading a ship with tea", "help me find my hat", "quit smoking at the beach", "a 4", "road to rome"],
)  # fmt: skip
def test_what_is_no_command_is_a_prompt(session, text):
    session.handle(text)
    assert session.asked == [(text, [], NOTHING)]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("size 96 96", "size W x H"), ("size 96 by 96", "size W x H"), ("size foo", "size W x H"),
        ("size 64", "size W x H"), ("sizes 96x96", "size W x H"), ("size " + "9" * 5000 + "x96", "size W x H"),
        ("Steps 4", "steps N"), ("stpes 4", "steps N"), ("seed -1", "seed N"), ("seed " + "9" * 5000, "seed N"),
        ("steps " + "9" * 5000, "steps N"), ("agian", "again"), ("again!", "again"),
        ("set guidence 3", "set NAME VALUE"), ("guidance 3", "set guidance VALUE"), ("lora style", "lora FILE[:SCALE]"),
        ("load fox", "load FILE"), ("save 5", "save [N] FILE"),
        ("undo", None), ("exit now", None), ("help me", "help, quit"),
    ],
)  # fmt: skip
def test_what_is_nearly_a_command_is_generated_only_the_second_time(session, text, meant):
    usage = "no command; help lists them" if meant is None else f"no command, which is typed {meant};"
    with pytest.raises(InputError, match=re.escape(usage)):
        session.handle(text)
    assert session.asked == []
    session.handle(text)
    assert session.asked == [(text, [], NOTHING)]


def test_older_images_are_not_kept_beyond_a_bound(session, monkeypatch):
    monkeypatch.setattr("flux2_mlx.cli.session.MOST_BYTES", 3 * 64 * 64 * 2)
    for prompt in "abc":
        session.handle(prompt)
    assert [image.image is None for image in session.images] == [True, False, False]
    for line in ("a fox in the hat of $1", "save 1 a.png"):
        with pytest.raises(InputError, match="image 1 is no longer kept, 0 MB are; load FILE loads it again"):
            session.handle(line)
    assert session.handle("$2 and $3") == "image 4"


def test_settings_stay_until_they_are_taken_back(session):
    assert [session.handle(line) for line in ("seed 7", "size 96x64", "steps 8")] == [
        "seed 7",
        "size 96 x 64",
        "8 steps",
    ]
    session.handle("a")
    session.handle("b")
    expected = NOTHING | {"seed": 7, "height": 64, "width": 96, "num_steps": 8}
    assert [options for _, _, options in session.asked] == [expected] * 2
    assert [session.handle(line) for line in ("seed", "size", "steps")] == [
        "seed random",
        "default size",
        "default steps",
    ]
    session.handle("c")
    assert session.asked[-1] == ("c", [], NOTHING)


def test_again_takes_another_seed(session):
    with pytest.raises(InputError, match="there is no prompt to generate again"):
        session.handle("again")
    session.handle("seed 7")
    session.handle("a")
    assert session.handle("again") == "image 2"
    assert [options["seed"] for _, _, options in session.asked] == [7, 8]
    session.handle("seed")
    session.handle("again")
    assert session.asked[-1] == ("a", [], NOTHING)
    for line in ("seed 7", "again", "again", "set seed 7", "again"):  # the one that was set comes first
        session.handle(line)
    assert [options["seed"] for _, _, options in session.asked[-3:]] == [7, 8, 7]


def test_images_are_referred_to_by_their_numbers(session):
    for prompt in "abc":
        session.handle(prompt)
    session.handle("the hat of $3 on the fox of $1, as in $3, for $$5")
    prompt, references, _ = session.asked[-1]
    assert prompt == "the hat of image 1 on the fox of image 2, as in image 1, for $5"
    assert references == [session.images[2].image, session.images[0].image]
    session.handle("again")
    assert session.asked[-1][:2] == (prompt, references)
    for text in ("$6", "$0", "$" + "9" * 5000):
        with pytest.raises(
            InputError, match=r"there is no image \d{1,9} \(the last is 5\); a dollar sign is written \$\$"
        ):
            session.handle(text)
    assert len(session.asked) == 5
    with pytest.raises(InputError, match=r"there is no image 1 \(there is none yet\)"):
        Session(session.generate).handle("$1")


def test_images_are_saved_and_loaded(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, message in (("save a.png", "no image yet"), ("save 2 a.png", "no image 2")):
        with pytest.raises(InputError, match=message):
            session.handle(line)
    session.handle("a")
    session.handle("b")
    assert session.handle("save my fox.png") == "my fox.png"
    assert session.handle("save 1 a.png") == "a.png"
    assert session.handle("save 1 a.png") == "a-2.png"
    assert read_metadata("a.png")["prompt"] == SETTINGS.prompt
    with Image.open("a.png") as first, Image.open("my fox.png") as last:
        assert (first.getpixel((0, 0)), last.getpixel((0, 0))) == ((1, 0, 0), (2, 0, 0))
    assert session.handle("load a.png") == "image 3"
    assert session.images[2].image.getpixel((0, 0)) == (1, 0, 0)
    with pytest.raises(InputError, match="that image was loaded"):
        session.handle("save 3 b.png")
    with pytest.raises(InputError, match=r"nowhere\.png: cannot be read"):
        session.handle("load nowhere.png")


def test_help_and_quit(session):
    assert session.handle("help") == session.handle("?") == HELP
    assert session.handle("quit") is None
    assert session.handle("exit") is None


def test_faults_and_interrupts_cost_one_line(session, monkeypatch, capsys):
    """The first line's too; images that were saved before an interrupt are there."""
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "")
    lines = iter([KeyboardInterrupt, "a", undecodable, "interrupted", "b", EOFError, "never"])

    def answer(prompt):
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    generate = session.generate

    def interrupted(prompt, *rest):
        generate(prompt, *rest)
        if prompt == "interrupted":
            raise KeyboardInterrupt

    session.generate = interrupted
    monkeypatch.setattr("builtins.input", answer)
    converse(session, "$9")
    captured = capsys.readouterr()
    assert captured.out == "image 1\nimage 3\n\n"
    fault = "error: there is no image 9 (there is none yet); a dollar sign is written $$"
    assert captured.err.splitlines() == [fault, "interrupted", "error: that is not utf-8 text", "interrupted"]
    converse(Session(session.generate), "quit")
    assert capsys.readouterr().out == ""


def test_again_goes_past_the_seeds_of_several_images(session):
    generate = session.generate
    session.generate = lambda *given: [generate(*given) for _ in range(4)]
    session.handle("seed 7")
    assert session.handle("a") == "images 1 to 4"
    session.handle("again")
    assert [options["seed"] for _, _, options in session.asked[::4]] == [7, 11]


def test_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fox.png", "forest.webp", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").touch()

    def every(text):
        return [found for k in range(9) if (found := complete_word(text, k)) is not None]

    assert every("s") == ["seed ", "size ", "steps ", "set ", "save "]
    assert every("fo") == ["folder/", "forest.webp", "fox.png"]
    assert every("folder/") == ["folder/a.png"]
    assert every(f"{tmp_path}/fox") == [f"{tmp_path}/fox.png"]
    assert every("nowhere/") == every("") == every("a\0b/") == []


def test_a_session(checkpoint, pipe, tmp_path, monkeypatch, capsys, opened):
    """The model is opened once; an image of it, and one of --image, are references of the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "cache"))
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    given.save("given.png")
    monkeypatch.setattr("flux2_mlx.cli.session.random_seed", lambda: 11)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("seed 3\na fox like $1 and $2\nsize 100x64\na fox\nsize\nseed\na fox\nquit\n")
    )
    command = ["a hat", "--interactive", "--model", str(checkpoint), "--image", "given.png", "--seed", "2"]
    small = ["--width", "96", "--height", "64", "--steps", "2", "--max-sequence-length", "32"]
    assert main([*command, *small, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.out.replace("> ", "").splitlines() if line] == [
        "seed 2  flux2-2.png", "image 2", "seed 3", "seed 3  flux2-3.png", "image 3", "size 100 x 64",
        "default size", "seed random", "seed 11  flux2-11.png", "image 4",
    ]  # fmt: skip
    assert captured.err == "error: width must be a multiple of 16, got 100; the nearest are 96 and 112\n"
    assert opened == [str(checkpoint)]
    options = {"width": 96, "height": 64, "num_steps": 2, "max_sequence_length": 32}
    hat = pipe("a hat", seed=2, **options).images[0]
    fox = pipe("a fox like image 1 and image 2", image=[given, hat], seed=3, **options).images[0]
    for name, expected in (("flux2-2.png", hat), ("flux2-3.png", fox)):
        with Image.open(name) as saved:
            assert np.array_equal(np.asarray(saved), np.asarray(expected))
    assert (tmp_path / "cache" / "history").exists()


def test_options_that_a_session_does_not_go_with(capsys):
    for option in (["--plan"], ["--jobs", "jobs.jsonl"]):
        assert main(["--interactive", *option]) == 2
        assert "--interactive goes neither with --plan nor with --jobs" in capsys.readouterr().err
