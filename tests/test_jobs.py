"""Files of jobs: what a line may say, that a fault costs one line alone, and that processes share them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline, InputError, read_metadata
from flux2_mlx.cli.arguments import build_parser
from flux2_mlx.cli.jobs import Job, missing_runs, read_jobs
from flux2_mlx.generate import main
from flux2_mlx.models.qwen3 import Qwen3TextEncoder
from flux2_mlx.runtime.distributed import random_seed, shared_seed

SMALL = {"width": 80, "height": 64, "steps": 1, "max_sequence_length": 16}


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Generate lines, objects or text, with small images; options that are given stand on the command line."""
    monkeypatch.chdir(tmp_path)

    def call(*lines, options=(), model=checkpoint):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        Path("jobs.jsonl").write_text(text, encoding="utf-8")
        base = ["--jobs", "jobs.jsonl", "--model", str(model), "--quiet"]
        small = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        code = main([*base, *small, *map(str, options)])
        return code, *capsys.readouterr()

    return call


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def parsed(line, *words):
    return Job(1, json.dumps(line)).arguments(build_parser(), build_parser().parse_args(words))


# ------------------------------------------------------------------------------------------------ lines


def test_a_line_is_a_command_line():
    line = {
        "prompt": "-a fox",
        "width": 512,
        "num_steps": 8,
        "guidance-interval": [0.3, 0.9],
        "sigmas": [1, 0.5],
        "image": ["a.png", "b.png"],
        "expand": {"left": 16, "top": 8},
        "force_guidance": True,
        "distilled": False,
        "cache": False,
        "mask": None,
        "quantize": 4,
        "output": "-x {seed}.png",
    }
    arguments = parsed(line)
    assert (arguments.prompt, arguments.width, arguments.num_steps) == ("-a fox", 512, 8)
    assert (arguments.guidance_interval, arguments.sigmas) == ([0.3, 0.9], [1, 0.5])
    assert (arguments.image, arguments.expand) == (["a.png", "b.png"], {"left": 16, "top": 8})
    assert (arguments.force_guidance, arguments.distilled, arguments.cache) == (True, False, False)
    assert (arguments.mask, arguments.quantize, arguments.output) == (None, "4", "-x {seed}.png")


def test_levels_of_a_line_win_too():
    for line in ({"schedule": "comfy"}, {"steps": 3}, {"num_steps": 3}):
        assert parsed(line, "a", "--sigmas", "1,0.5").sigmas is None
    assert parsed({"steps": None, "image": None}, "a", "--sigmas", "1,0.5", "--image", "a.png").sigmas == [1, 0.5]
    assert parsed({"image": None}, "a", "--image", "a.png").image == ["a.png"]


def test_a_line_wins_over_the_command_line():
    given = ["a fox", "--width", "256", "--height", "128", "--image", "a.png", "--seed", "3"]
    arguments = parsed({"width": 512, "image": "b.png"}, *given)
    assert (arguments.prompt, arguments.width, arguments.height, arguments.seed) == ("a fox", 512, 128, 3)
    assert arguments.image == ["b.png"]
    assert parsed({}, *given).image == ["a.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", r"a job must be a JSON object, got \[1\]"),
        ('{"prompt": "a", "widht": 512}', r"unknown option --widht; did you mean --width\?"),
        ('{"prompt": "a", "wid": 512}', "unknown option --wid; did you mean --width"),
        ('{"prompt": "a", "width": "wide"}', "argument --width: invalid int value"),
        ('{"prompt": "a", "width": true}', "--width"),
        ('{"prompt": "a", "steps": [1, 2]}', "argument --steps"),
        ('{"prompt": "a", "expand": {"left": "x"}}', "argument --expand"),
        ('{"prompt": 5}', "a prompt must be a string, got 5"),
        ('{"prompt": "a", "jobs": "other.jsonl"}', "--jobs is for the command line"),
        ('{"prompt": "a", "help": true}', "--help is for the command line"),
        ('{"prompt": "a", "version": true}', "--version is for the command line"),
    ],
)  # fmt: skip
def test_what_is_no_job_is_refused(line, message):
    with pytest.raises(InputError, match=message):
        Job(1, line).arguments(build_parser(), build_parser().parse_args([]))


def test_lines_without_a_seed_get_one_that_stays():
    seeds = [Job(*job).seed for job in ((1, "{}"), (1, "{}"), (2, "{}"), (1, '{"width": 64}'))]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\r\n\n  {}  \n', encoding="utf-8")
    assert read_jobs(path) == [Job(1, '{"prompt": "a\u2028b"}'), Job(3, "{}")]
    path.write_text(" \n\n")
    with pytest.raises(InputError, match=r"has no jobs: one JSON object a line"):
        read_jobs(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_jobs(path)
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        read_jobs(tmp_path / "nowhere")


def test_what_is_missing(tmp_path):
    paths = [tmp_path / str(k) for k in range(6)]
    for k in (0, 3):
        paths[k].write_bytes(b"an image")
    assert missing_runs(paths) == [range(1, 3), range(4, 6)]
    assert missing_runs(paths[:1]) == []


# ------------------------------------------------------------------------------------------------ generating


def test_jobs_are_generated_and_a_failed_line_costs_no_other(run, pipe):
    code, out, err = run(
        {"prompt": "a fox", "seed": 1, "output": "one.png"},
        {"prompt": "a fox", "width": 100},
        "",
        {"prompt": "a cat", "seed": 5, "num_images": 2, "output": "cat-{index}.webp"},
        "oops",
        {"prompt": "a fox", "image": ["one.png"], "seed": 2, "output": "two.png"},
        {"prompt": "a", "output": "nowhere/a.png"},
        {"prompt": "a", "model": "nowhere"},
        '{"prompt": "a", "output": "fox-\\ud83d.png"}',
        {"prompt": "a", "init_image": "one.png", "expand": {"left": 10_000_000_000}},
    )
    assert code == 1
    assert out == "seed 1  one.png\nseed 5  cat-0.webp\nseed 6  cat-1.webp\nseed 2  two.png\n"
    lines = err.splitlines()
    assert [re.match(r"error: line (\d+)", line)[1] for line in lines[:-1]] == ["2", "5", "7", "8", "9", "10"]
    assert "width must be a multiple of 16, got 100" in lines[0]
    assert lines[-1] == "jobs: 4 images generated, 6 lines failed: 2, 5, 7, 8, 9, 10"
    options = {"width": 80, "height": 64, "num_steps": 1, "max_sequence_length": 16}
    assert np.array_equal(pixels("one.png"), np.asarray(pipe("a fox", seed=1, **options).images[0]))
    edited = pipe("a fox", image=Image.open("one.png"), seed=2, **options).images[0]
    assert np.array_equal(pixels("two.png"), np.asarray(edited))
    assert read_metadata("cat-1.webp")["seed"] == 6


def test_a_line_without_a_seed_gives_the_same_again(run):
    codes = [run({"prompt": "a fox"}, {"prompt": "a fox"}, options=["--output", "{index}.png"])[0] for _ in range(2)]
    assert codes == [0, 0]
    first, second, again = (pixels(f"0{suffix}.png") for suffix in ("", "-2", "-3"))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, again)


def test_a_line_repeats_a_picture(run):
    assert run(
        {"prompt": "a fox", "seed": 1, "output": "fox.png"}, {"from_image": "fox.png", "output": "again.png"}
    ) == (
        0,
        "seed 1  fox.png\nseed 1  again.png\n",
        "jobs: 2 images generated\n",
    )
    assert Path("fox.png").read_bytes() == Path("again.png").read_bytes()
    assert "line 1: no prompt: give one" in run({"seed": 1})[2]


def test_what_is_missing_is_generated_on_resuming(run):
    lines = [
        {"prompt": "a fox", "seed": 1, "output": "fox.png"},
        {"prompt": "a cat", "seed": 1, "num_images": 4, "output": "cat-{index}.png"},
    ]
    assert run(*lines)[0] == 0
    before = {path.name: path.read_bytes() for path in Path().glob("*.png")}
    for name in ("cat-1.png", "cat-2.png"):
        os.remove(name)
    code, out, err = run(*lines, options=["--resume"])
    assert (code, out) == (0, "seed 2  cat-1.png\nseed 3  cat-2.png\n")
    assert err == "jobs: 2 images generated, 3 skipped because they exist\n"
    after = {path.name: path.read_bytes() for path in Path().glob("*.png")}
    assert after == before
    assert run(*lines, options=["--resume"])[1:] == ("", "jobs: 0 images generated, 5 skipped because they exist\n")


def test_resuming_needs_files_of_their_own(run):
    lines = [{"prompt": prompt, "output": "same.png"} for prompt in ("a", "b")]
    code, out, err = run(*lines, options=["--resume"])
    assert (code, out.endswith("same.png\n")) == (1, True)
    assert "error: line 2: line 1 writes same.png too; with --resume each job needs files of its own" in err
    assert run(*lines)[0] == 0
    several = {"prompt": "a", "num_images": 2, "output": "fox.png"}
    assert (
        "2 images of one name; with --resume, --output needs {seed} or {index}" in run(several, options=["--resume"])[2]
    )


def test_what_was_generated_before_a_fault_is_counted(run, monkeypatch):
    stream = Flux2Pipeline.stream

    def failing(*given, **options):
        yield from list(stream(*given, **options))[:2]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Flux2Pipeline, "stream", failing)
    code, _, err = run({"prompt": "a", "num_images": 3}, {"prompt": "b"})
    assert code == 1
    assert "error: line 1: RuntimeError: out of memory; " in err
    assert "jobs: 3 images generated, 2 lines failed: 1, 2" in err


def test_prompts_are_encoded_once_and_models_opened_when_they_change(
    run, monkeypatch, checkpoint, base_reference, opened
):
    encode, encoded = Qwen3TextEncoder.__call__, []
    monkeypatch.setattr(Qwen3TextEncoder, "__call__", lambda *given: encoded.append(1) or encode(*given))
    base = str(base_reference[1])
    prompts = [{"prompt": prompt, "cache": False, "seed": 1} for prompt in "aba"]
    assert run(*prompts, {**prompts[0], "model": base, "guidance": 2})[0] == 0
    assert opened == [str(checkpoint), base]
    assert len(encoded) == 4  # a and b, then of the base model a and what guidance leads away from


def test_options_that_jobs_do_not_go_with(run, capsys, tmp_path, monkeypatch):
    for options, expected in (
        (["--plan"], "--jobs goes neither with --plan nor with --prompt-file"),
        (["--prompt-file", "a.txt"], "--jobs goes neither with --plan nor with --prompt-file"),
    ):
        code, out, err = run({"prompt": "a"}, options=options)
        assert (code, out) == (2, "")
        assert expected in err
    assert main(["a", "--resume"]) == 2
    assert "--resume belongs to --jobs" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Flux2Pipeline, "stream", interrupted)
    code, _, err = run({"prompt": "a"}, {"prompt": "b"})
    assert code == 130
    assert err == "jobs: 0 images generated\ninterrupted; --resume generates what is missing\n"


# ------------------------------------------------------------------------------------------------ processes


def launch(*words, cwd):
    """The command in two processes on this machine."""
    launcher = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring"]
    command = [*launcher, "--", sys.executable, "-m", "tests.device", "flux2_mlx.generate", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_processes_share_a_file_of_jobs(tmp_path, checkpoint, pipe):
    """A line that fails costs no other, in the other process neither: all end together."""
    lines = [{"prompt": 7}, *({"prompt": f"fox {k}", "seed": k, "output": f"{k}.png"} for k in range(3))]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    small = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = launch("--jobs", "jobs.jsonl", "--model", checkpoint, *small, "--quiet", cwd=tmp_path)
    assert "error: line 1: a prompt must be a string" in done.stdout + done.stderr
    assert "jobs: 2 images generated" in done.stdout + done.stderr
    assert "jobs: 1 images generated" in done.stdout + done.stderr
    options = {"width": 80, "height": 64, "num_steps": 1, "max_sequence_length": 16}
    for k in range(3):
        assert np.array_equal(pixels(tmp_path / f"{k}.png"), np.asarray(pipe(f"fox {k}", seed=k, **options).images[0]))
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize("more", [{"num_steps": 2, "hires": 1.25}, {"num_steps": 12, "step_cache": 1.0}], ids=str)
def test_processes_share_the_passes_of_guidance(tmp_path, base_reference, more):
    """At both sizes of hires, too; and decide together which steps reuse others."""
    folder = base_reference[1]
    words = ["a fox", "--model", folder, "--guidance", 3, "--negative-prompt", "rain", "--quiet", "--stats"]
    words += [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", value)]
    small = ["--width", 96, "--height", 80, "--max-sequence-length", 16]
    done = launch(*words, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*.png")
    settings = read_metadata(written)
    alone = Flux2Pipeline.from_pretrained(folder)(
        "a fox", seed=settings["seed"], guidance=3, negative_prompt="rain", width=96, height=80,
        max_sequence_length=16, **more,
    )  # fmt: skip
    difference = np.abs(pixels(written).astype(int) - np.asarray(alone.images[0]))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3
    assert json.dumps({"steps": alone.steps})[1:-1] in done.stdout
    assert (alone.steps["reused"] > 0) == ("step_cache" in more)


class Group:
    def __init__(self, size):
        self.size = lambda: size


def test_guidance_is_shared_by_two(checkpoint):
    with pytest.raises(InputError, match="CFG has two passes to share, and the group has 3 processes"):
        Flux2Pipeline.from_pretrained(checkpoint, group=Group(3))


def test_processes_that_share_guidance_need_a_seed(base_reference):
    pipe = Flux2Pipeline.from_pretrained(base_reference[1], group=Group(2))
    with pytest.raises(InputError, match="need the same seed, and none is given"):
        pipe.stream("a", guidance=3)
    with pytest.raises(InputError, match="share the passes of CFG, and there is no CFG"):
        pipe.stream("a", guidance=1, seed=1)


def test_one_process_has_a_seed_of_its_own():
    group = mx.distributed.init()
    assert group.size() == 1
    assert 0 <= shared_seed(group) < 2**32
    assert 0 <= random_seed() < 2**32
