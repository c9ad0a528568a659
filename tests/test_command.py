"""How a command ends: faults, signals, and streams that are closed or full."""

import io
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flux2_mlx import InputError, convert, doctor, fuse, generate, lora
from flux2_mlx.cli import arguments, jobs, training
from flux2_mlx.cli.command import INTERRUPTED, run_command, tell
from flux2_mlx.cli.jobs import is_there, missing_runs
from flux2_mlx.cli.runner import interrupts_say_the_rest
from flux2_mlx.cli.session import Session, converse
from flux2_mlx.errors import printable


class Panic(BaseException):
    """As Rust's panics are, of the tokenizer's library: no Exception."""


FAULTS = [
    (InputError("no\nsuch file"), "error: no such file"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    (FloatingPointError("not finite"), "error: not finite"),
    (RuntimeError("[write] Unable to write"), "error: RuntimeError: [write] Unable to write; a damaged file, or"),
    (OverflowError("int too large"), "error: OverflowError: int too large; a damaged file, or"),
    (RecursionError("too deep"), "error: RecursionError: too deep; a damaged file, or"),
    (MemoryError(), "error: MemoryError: MemoryError; a damaged file, or"),
    (Panic("index out of range"), "error: Panic: index out of range; a damaged file, or"),
]


def raising(error):
    def run(*_, **__):
        raise error

    return run


@pytest.mark.parametrize(("error", "told"), FAULTS, ids=lambda value: type(value).__name__)
def test_every_fault_is_one_line(error, told, capsys, monkeypatch):
    assert run_command(raising(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
    monkeypatch.setenv("FLUX2_MLX_DEBUG", "1")
    assert run_command(raising(error)) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("module", [generate, convert, fuse, lora, doctor], ids=lambda module: module.__name__)
def test_every_command_has_the_net(module, capsys, monkeypatch):
    parser = "parse" if module is lora else "build_parser"
    place = {generate: arguments, lora: training}.get(module, module)
    monkeypatch.setattr(place, parser, raising(Panic("a panic")))
    assert module.main([]) == 2
    assert capsys.readouterr().err.startswith("error: Panic: a panic; a damaged file, or a fault of flux2_mlx")


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_as_ctrl_c_does(number, code, capsys):
    before = signal.getsignal(number)
    kept = []

    def run():
        try:
            signal.raise_signal(number)
        finally:
            kept.append("what a finally does")

    assert run_command(run, interrupted="nothing was written", about=lambda: " (seed 3)") == code
    assert capsys.readouterr().err == "interrupted (seed 3); nothing was written\n"
    assert kept
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("generate fox --model nano", ""),
        ("convert nano copy", "; nothing was written"),
        ("fuse nano copy --lora a.safetensors", "; nothing was written"),
        ("lora --data photos --output fox", "; what was saved before is kept"),
        ("doctor", ""),
        ("serve --model nano", ""),
        ("serve.mcp --model nano", ""),
    ],
)
def test_ctrl_c_while_importing_ends_with_130(words, left, tmp_path):
    """It comes as NumPy is looked for, which nothing has imported by then."""
    name, *arguments = words.split()
    code = (
        "import runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'numpy': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"runpy.run_module('flux2_mlx.{name}', run_name='__main__', alter_sys=True)\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"interrupted{left}\n")


def test_an_ignored_hang_up_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_says_what_is_left(capsys):
    assert run_command(raising(KeyboardInterrupt("x is whole")), interrupted="nothing was written") == INTERRUPTED
    assert capsys.readouterr().err == "interrupted; x is whole\n"


@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_session_ends_with_sigterm_and_not_with_ctrl_c(capsys, monkeypatch):
    numbers = iter([signal.SIGINT, signal.SIGTERM])
    monkeypatch.setattr("builtins.input", lambda _: signal.raise_signal(next(numbers)))
    assert run_command(lambda: converse(Session(raising(ValueError)))) == 143
    assert capsys.readouterr().err == "interrupted\ninterrupted\n"


def test_an_interrupt_between_images_says_how_to_go_on():
    task = SimpleNamespace(batch=SimpleNamespace(num_images=50), seed=1)

    def interrupted(saved):
        with interrupts_say_the_rest(task, saved):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^4 of 50 images .* --seed 5 --num-images 46 generates"):
        interrupted([1, 2, 3, 4])
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        interrupted([])


# ------------------------------------------------------------------------------------------------ streams


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def draws():
    print("a line")
    print("a bar", file=sys.stderr, flush=True)
    done.append(sys.stdin.read())


done: list[str] = []


@pytest.mark.parametrize(
    ("output", "errors", "code"),
    [(None, None, 0), (Full(), None, 2), (closed(), None, 2), (None, Full(), 0), (None, closed(), 0)],
    ids=["none", "output-full", "output-closed", "errors-full", "errors-closed"],
)
def test_streams_stop_no_work(output, errors, code, monkeypatch):
    done.clear()
    for name, stream in (("stdin", None), ("stdout", output), ("stderr", errors)):
        monkeypatch.setattr(sys, name, stream)
    assert run_command(draws) == code
    assert done == [""]
    assert (sys.stdin, sys.stdout, sys.stderr) == (None, output, errors)


def test_results_that_standard_output_did_not_take_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full())
    assert run_command(lambda: print("a line")) == 2
    expected = "error: standard output: [Errno 28] No space left on device; the work was done all the same\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [EOFError(), OSError(5, "Input/output error"), RuntimeError("lost sys.stdin")])
def test_a_session_ends_where_its_input_does(error, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", raising(error))
    converse(Session(raising(ValueError)))
    assert capsys.readouterr() == ("\n", "")


def test_a_session_survives_any_fault_of_a_line(monkeypatch, capsys):
    lines = iter(["a fox", "another fox", "quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    converse(Session(raising(Panic("a panic"))))
    assert capsys.readouterr().err.count("error: Panic: a panic;") == 2


# ------------------------------------------------------------------------------------------------ messages


def test_messages_hold_neither_escape_sequences_nor_books(capsys):
    assert printable("a\x1b]0;owned\x07\nb\0\x9b é 狐") == "a\\x1b]0;owned\\x07\\nb\\x00\\x9b é 狐"
    assert printable("\udcff") == "\\udcff"
    assert len(printable("x" * 10**6)) < 2100
    tell("error: " + "shard, " * 100_000 + "the way out")
    told = capsys.readouterr().err
    assert told.startswith("error: shard, ")
    assert told.endswith("the way out\n")
    assert len(told) < 2100
    error = InputError("weight, " * 10**6 + "the way out", source="file")  # of a file's names, in Python too
    assert str(error).startswith("file: weight, ")
    assert str(error).endswith("the way out")
    assert len(str(error)) < 10_100


# ------------------------------------------------------------------------------------------------ jobs


def test_an_empty_file_is_no_image(tmp_path):
    for name, content in (("a", b"x"), ("b", b""), ("d", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert [is_there(tmp_path / name) for name in ("a", "b", "c", "link")] == [True, False, False, True]
    assert missing_runs([tmp_path / name for name in "abcd"]) == [range(1, 4)]


@pytest.mark.parametrize("error", [OverflowError("too large"), TypeError("a list"), Panic("a panic")])
def test_any_fault_of_a_job_costs_its_line_alone(error, checkpoint, tmp_path, monkeypatch, capsys):
    """And --resume takes an empty file under an image's name for none."""
    monkeypatch.chdir(tmp_path)
    words = {"width": 64, "height": 64, "steps": 1, "max_sequence_length": 16}
    lines = [{"prompt": "bad"}, {"prompt": "a fox", "output": "fox.png", **words}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "fox.png").touch()
    own = jobs.check
    monkeypatch.setattr(jobs, "check", lambda task: raising(error)() if task.inputs.prompt == "bad" else own(task))
    assert generate.main(["--jobs", "jobs.jsonl", "--resume", "--quiet", "--model", str(checkpoint)]) == 1
    assert "error: line 1: " in capsys.readouterr().err
    assert (tmp_path / "fox.png").stat().st_size > 0
    (tmp_path / ".fox.partial-abc.png").touch()  # a kill's, once the image had its name: goes where all is skipped, too
    assert generate.main(["--jobs", "jobs.jsonl", "--resume", "--quiet", "--model", str(checkpoint)]) == 1
    assert len(list(tmp_path.iterdir())) == 2
