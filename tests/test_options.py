"""Options: one field is the flag, the key of a job, a word of a session, the line of an image's file, the check."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

import flux2_mlx
from flux2_mlx import Flux2Pipeline, InputError, Settings
from flux2_mlx.cli import training as trainer
from flux2_mlx.cli.arguments import build_parser, complete, output_path
from flux2_mlx.cli.session import Session
from flux2_mlx.dtypes import dtype_of
from flux2_mlx.fields import Options, option, options_table
from flux2_mlx.options import (
    BatchOptions,
    CheckpointOptions,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    RuntimeOptions,
)
from flux2_mlx.request import INPUTS
from flux2_mlx.samplings import default_guidance, default_steps, resolve_sampling
from flux2_mlx.training.options import TrainingOptions

PACKAGE = Path(flux2_mlx.__file__).parent
ROOT = PACKAGE.parent
SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16}
CLASSES = (ModelOptions, GenerationOptions, BatchOptions, OutputOptions, RuntimeOptions)

# Flags that the command had before options were fields.
FLAGS = """
--prompt-file --negative-prompt --image --init-image --strength --mask --mask-blur --mask-padding --expand --model
--revision --transformer --text-encoder --vae --tokenizer --distilled --no-distilled --kv-cache --no-kv-cache
--quantize --quantize-text-encoder --group-size --lora --lora-merge --no-lora-merge --lora-partial --no-lora-partial
--width --height --steps --num-steps --guidance --guidance-interval --guidance-rescale --force-guidance
--no-force-guidance --step-cache --reuse --seed --num-images --batch-size --schedule --sigmas --noise --dtype
--vae-dtype
--max-sequence-length --output --from-image --jobs --interactive --resume --no-cache --memory --memory-limit --plan
--measure --preview --preview-decoder --show --stats --quiet --version --help
"""
TRAINING_FLAGS = """
--config --resume --data --output --model --revision --transformer --text-encoder --vae --tokenizer --distilled
--no-distilled --kv-cache --no-kv-cache --quantize --quantize-text-encoder --group-size --allow-distilled --dtype
--vae-dtype
--resolution --trigger --steps --batch-size --accumulate --rank --alpha --targets --dropout --learning-rate
--weight-decay --warmup --decay --clip --timesteps --caption-dropout --preserve --preserve-weight --ema
--grad-checkpoint --no-grad-checkpoint --seed --names --save-every --validation-prompt --validation-image
--validate-every --validation-steps --memory-limit --plan --quiet --version --help
"""


def task_of(*words):
    return complete(build_parser().parse_args([str(word) for word in words]), None)


def help_of(parser):
    return " ".join(parser.format_help().split())


# ------------------------------------------------------------------------------------------------ one list


@pytest.mark.parametrize(
    ("method", "classes", "others"),
    [
        (
            Flux2Pipeline.stream,
            [GenerationOptions, BatchOptions],
            ["self", "prompt", *INPUTS, "num_inference_steps", "guidance_scale", "num_images_per_prompt", "generator"],
        ),
        (Flux2Pipeline.from_pretrained, [CheckpointOptions, RuntimeOptions], ["group", "torch_dtype"]),
    ],
)
def test_explicit_signatures_equal_the_fields(method, classes, others):
    parameters = signature(method).parameters
    options = {f.name: f for cls in classes for f in fields(cls)}
    assert set(parameters) == {*options, *others}
    for name, f in options.items():
        default = None if name == "num_images" else f.default  # its other name may be given instead
        assert parameters[name].default == default, name


def test_every_alias_is_an_argument_of_the_pipeline():
    known = {*signature(Flux2Pipeline.stream).parameters, *signature(Flux2Pipeline.from_pretrained).parameters}
    assert {f.metadata["alias"] for cls in CLASSES for f in fields(cls) if f.metadata.get("alias")} <= known


def test_the_docstrings_name_every_option():
    for method, classes in (
        (Flux2Pipeline.stream, [GenerationOptions, BatchOptions]),
        (Flux2Pipeline.from_pretrained, [CheckpointOptions, RuntimeOptions]),
    ):
        text = method.__doc__
        assert not [f.name for cls in classes for f in fields(cls) if not re.search(rf"\b{f.name}\b[\w, ]*:", text)]


def test_every_flag_is_still_there_and_every_field_has_one():
    flags = set(build_parser()._option_string_actions)
    assert not set(FLAGS.split()) - flags
    assert not set(TRAINING_FLAGS.split()) - set(trainer.build_parser()._option_string_actions)
    named = {action.dest for action in build_parser()._actions}
    assert {f.name for cls in CLASSES for f in fields(cls) if f.metadata.get("flag", "") is not None} <= named


def test_settings_are_the_options_and_what_is_told_besides():
    own = {f.name for f in fields(ModelOptions)} | {f.name for f in fields(GenerationOptions)}
    assert {f.name for f in fields(Settings)} == own | {"prompt", "original_prompt", "inputs", "version"}


def test_a_new_field_reaches_command_job_session_file_and_replay(tmp_path):
    """One line in options.py and stream's signature, and nothing else, in a copy of the package."""
    package = tmp_path / "flux2_mlx"
    package.mkdir()
    for path in PACKAGE.iterdir():
        if path.name not in ("options.py", "pipeline.py", "__pycache__"):
            (package / path.name).symlink_to(path)
    line = (
        '    brightness: float = option(0.25, "how bright", group=SAMPLING, ge=0, le=1)\n    seed: int | None = option('
    )
    text = (PACKAGE / "options.py").read_text().replace("    seed: int | None = option(", line, 1)
    (package / "options.py").write_text(text)
    text = (PACKAGE / "pipeline.py").read_text()
    seed = "        seed: int | None = None,\n"
    assert text.count(seed) == 1
    (package / "pipeline.py").write_text(text.replace(seed, f"        brightness: float = 0.25,\n{seed}"))
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": "a", "brightness": 0.5, "output": "job.png"}))
    code = """
import io, sys
from flux2_mlx import read_metadata
from flux2_mlx.generate import main
small = ["--model", "nano", "--steps", "1", "--width", "64", "--height", "64", "--quiet"]
told = lambda name: read_metadata(name)["brightness"]
assert main(["a", *small, "--output", "default.png"]) == 0
assert main(["a", "--brightness", "0.75", *small, "--output", "flag.png"]) == 0
assert main(["--jobs", "jobs.jsonl", *small]) == 0
sys.stdin = io.StringIO("set brightness 0.875\\na\\nquit\\n")
assert main(["--interactive", *small, "--output", "session.png"]) == 0
assert main(["--from-image", "flag.png", "--output", "again.png", "--quiet"]) == 0
print([told(f"{name}.png") for name in ("default", "flag", "job", "session", "again")])
assert main(["a", "--brightness", "2", *small]) == 2
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[0.25, 0.75, 0.5, 0.875, 0.75]" in done.stdout
    assert "brightness must be a number from 0 to 1, got 2.0" in done.stderr


def test_the_documents_list_the_options():
    """docs/options.md is written by python -m tests.test_options."""
    found = re.search(r"<!-- options: begin -->\n(.*)<!-- options: end -->", DOCUMENT.read_text(), re.DOTALL)
    assert found[1] == options_table(*CLASSES)


DOCUMENT = ROOT / "docs" / "options.md"


# ------------------------------------------------------------------------------------------------ checks


@dataclass(frozen=True, kw_only=True)
class Sample(Options):
    count: int = option(1, "how many", ge=1, le=9)
    share: float | None = option(None, "how much", gt=0)
    names: tuple[str, ...] = option((), "which")
    path: str = option("", "where", is_path=True)
    is_on: bool = option(False, "whether")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be a whole number from 1 to 9, got 0"),
        ({"count": True}, "count must be a whole number from 1 to 9, got True"),
        ({"count": 2.0}, r"count must be a whole number from 1 to 9, got 2\.0"),
        ({"count": None}, "count must be a whole number from 1 to 9, got None"),
        ({"share": 0}, "share must be a number above 0, got 0"),
        ({"share": float("nan")}, "share must be a number above 0, got nan"),
        ({"share": float("inf")}, "share must be a number above 0, got inf"),
        ({"share": True}, "share must be a number above 0, got True"),
        ({"names": "ab"}, "names must be a list of strings, got 'ab'"),
        ({"names": [1]}, r"names must be a list of strings, got \[1\]"),
        ({"is_on": "no"}, "is_on must be true or false, got 'no'"),
        ({"is_on": 1}, "is_on must be true or false, got 1"),
    ],
)
def test_values_that_are_none_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Sample(**values)


def test_values_are_converted():
    sample = Sample(count=np.int64(3), share=np.float32(0.5), names=["a"], path="~/a", is_on=np.True_)
    assert sample == Sample(count=3, share=0.5, names=("a",), path=os.path.expanduser("~/a"), is_on=True)
    assert sample.metadata() == {"count": 3, "share": 0.5, "names": ["a"], "path": sample.path, "is_on": True}
    assert type(sample.count) is int
    assert json.loads(json.dumps(sample.metadata())) == sample.metadata()


def test_a_table_of_options():
    assert options_table(Sample).splitlines()[2:4] == [
        "| `--count` | `count` | 1 | how many |",
        "| `--share` | `share` | | how much |",
    ]


# ------------------------------------------------------------------------------------------------ the command line


def test_flags_from_habit():
    task = task_of("-p", "a", "-o", "x.png", "-n", 2, "-s", 3, "-W", 64, "-H", 96, "-m", "nano", "-q", 4)
    assert (task.inputs.prompt, task.output, task.batch.num_images, task.options.num_steps) == ("a", "x.png", 2, 3)
    assert (task.options.width, task.options.height, task.model.model, task.model.quantize) == (64, 96, "nano", "4")
    task = task_of("--prompt", "a", "--negative", "b", "--cfg-scale", 2, "--num-inference-steps", 7, "--size", "64x96")
    assert (task.inputs.prompt, task.options.negative_prompt, task.options.guidance) == ("a", "b", 2)
    assert (task.options.num_steps, task.options.width, task.options.height) == (7, 64, 96)
    assert task_of("a", "--guidance-scale", 3).options.guidance == 3


def test_a_prompt_may_begin_with_a_dash():
    for text in ("-some text", "-a fox", "-3 dogs", "--two dashes"):
        assert task_of(text).inputs.prompt == text
        assert task_of("a", "--negative-prompt", text).options.negative_prompt == text


def test_images_under_names_from_habit(tmp_path):
    for name in ("a.png", "mask.png"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / name)
    picture, mask = str(tmp_path / "a.png"), str(tmp_path / "mask.png")
    for flag in ("--init", "--image-path"):
        task = task_of("a", flag, picture, "--mask-image", mask, "--image-strength", 0.25)
        assert task.inputs.names == ("init_image", "mask")
        assert task.options.strength == 0.75  # there it says how much is kept


def test_strengths_of_loras_from_habit():
    assert task_of("a", "--lora", "a", "--lora-scale", 0.5, "--lora", "b").model.lora == ("a:0.5", "b")
    assert task_of("a", "--lora-paths", "a", "b", "--lora-scales", 0.5, 2).model.lora == ("a:0.5", "b:2")
    with pytest.raises(InputError, match="--lora-scale: belongs behind the --lora"):
        task_of("a", "--lora-scale", 0.5)


def test_habits_are_not_listed():
    text = help_of(build_parser())
    assert not [flag for flag in ("--size", "--cfg-scale", "--image-path", " -W", "--lora-scale") if flag in text]
    words = [
        "img2img",
        "inpainting",
        "outpainting",
        "CFG",
        "classifier-free",
        "denoising",
        "scheduler",
        "LoRA",
        "offloading",
    ]
    assert not [word for word in words if word not in text]
    titles = ["prompt and images", "model", "adapters", "sampling", "output", "memory and speed", "batch and session"]
    assert re.findall(r"^([\w ]+):$", build_parser().format_help(), re.MULTILINE)[1:] == titles


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--stpes", "4"], r"unknown option --stpes; did you mean --steps\?"),
        (["a", "--xyzzyx"], "unknown option --xyzzyx; see --help"),
        (["a", "red", "fox"], "'red' is one word too many: text with spaces needs quotes"),
        (["a", "--seed", "-1"], "got -1; leave it out for a random one"),
        (["a", "--size", "64"], "invalid size '64', as in 1024x768"),
        (["a", "--prompt", "b"], "give the prompt either"),
        (["a", "--schedule", "linear", "--sigmas", "1,0.5"], "not allowed with argument --schedule"),
    ],
)
def test_slips_are_answered_with_what_was_meant(words, message):
    with pytest.raises(InputError, match=message):
        task_of(*words)


def test_the_trainer_understands_habits_too(capsys):
    parser = trainer.build_parser()
    given = parser.parse_args(["--lr", "1e-3", "--max-train-steps", "7", "-o", "x", "--lora-rank", "4"])
    assert (given.learning_rate, given.steps, given.output, given.rank) == (1e-3, 7, "x", 4)
    with pytest.raises(InputError, match="unknown option --epochs: give --steps"):
        parser.parse_args(["--epochs", "3"])
    assert not re.search(r"dataclass|object at 0x|MISSING|None", parser.format_help())
    assert not re.search(r"dataclass|object at 0x|MISSING|None", build_parser().format_help())


def test_an_output_may_be_a_folder_or_hold_the_prompt(tmp_path):
    assert output_path(str(tmp_path), 5, 0) == tmp_path / "flux2-5.png"
    assert str(output_path("pics/", 5, 0)) == "pics/flux2-5.png"
    assert str(output_path("{prompt}-{seed}.png", 5, 0, "A red fox, in/the snow!")) == "A-red-fox-in-the-snow-5.png"
    assert str(output_path("{prompt}.png", 5, 0, "?")) == "image.png"
    assert len(str(output_path("{prompt}", 5, 0, "a" * 500))) == 40


def test_a_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    (tmp_path / "prompt.txt").write_text("a fox")
    arguments = ["--prompt-file", "~/prompt.txt", "--image", "~/a.png", "--init-image", "~/a.png", "--mask", "~/a.png"]
    task = task_of(*arguments, "--preview", "~/p.png", "--output", "~/x.png")
    assert (task.inputs.prompt, len(task.inputs.images), task.preview) == ("a fox", 1, tmp_path / "p.png")
    assert task.outputs == [tmp_path / "x.png"]
    assert TrainingOptions("~/data", "~/run").data == str(tmp_path / "data")


# ------------------------------------------------------------------------------------------------ a session


def test_a_session_sets_any_option():
    session = Session(lambda *_: None)
    assert session.handle("set guidance 3") == "guidance 3"
    for line in ("set guidance-interval 0.2,0.8", "set force_guidance on", "set steps 7", "set lora a.safetensors"):
        session.handle(line)
    expected = {"guidance": 3.0, "guidance_interval": (0.2, 0.8), "force_guidance": True, "num_steps": 7}
    assert session.options == expected | {"lora": ("a.safetensors",)}
    assert "num_steps 7" in session.handle("set")
    assert session.handle("set guidance") == "guidance default"
    assert "guidance" not in session.options
    for line, message in (
        ("set strength 2", "strength must be a number above 0, up to 1, got 2"),
        ("set guidance high", "guidance cannot be 'high': CFG scale"),
        ("set force-guidance maybe", "force_guidance cannot be 'maybe'"),
    ):
        with pytest.raises(InputError, match=message):
            session.handle(line)


# ------------------------------------------------------------------------------------------------ Python


def test_diffusers_names(pipe, tmp_path):
    expected = pipe("a", seed=5, **SMALL)
    names = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(5), "num_images_per_prompt": 1}
    small = {name: value for name, value in SMALL.items() if name != "num_steps"}
    (images,) = pipe("a", return_dict=False, **names, **small)
    assert np.array_equal(np.asarray(images[0]), np.asarray(expected.images[0]))
    for generator, message in (([1, 2], "generator must be one"), ("x", "must be a torch.Generator or a seed")):
        with pytest.raises(InputError, match=message):
            pipe("a", generator=generator)
    with pytest.raises(InputError, match=r"seed \(1\) and generator \(2\) are the same setting"):
        pipe("a", seed=1, generator=2)


def test_images_may_be_files(pipe, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 40, 64))
    picture.save(tmp_path / "a.png")
    mask.save(tmp_path / "mask.png")
    steps = {"seed": 1, "num_steps": 2, "max_sequence_length": 16}
    expected = pipe("a", image=[picture], init_image=picture, mask=mask, **steps).images[0]
    paths = {"image": [str(tmp_path / "a.png")], "init_image": tmp_path / "a.png", "mask": str(tmp_path / "mask.png")}
    assert np.array_equal(np.asarray(pipe("a", **paths, **steps).images[0]), np.asarray(expected))


def test_steps_are_called_back(pipe):
    calls = []
    pipe("a", seed=1, callback_on_step_end=lambda *given: calls.append(given) or {}, **SMALL)
    steps = list(pipe.stream("a", seed=1, **SMALL))
    assert [call[:2] for call in calls] == [(pipe, 0), (pipe, 1)]
    assert calls[0][2] == 1000
    assert calls[1][2] == pytest.approx(1000 * steps[0].sigma)
    assert mx.array_equal(calls[1][3]["latents"], steps[1].latents).item()
    with pytest.raises(InputError, match="callback_on_step_end cannot change latents"):
        pipe("a", callback_on_step_end=lambda *_: {"latents": mx.zeros((1, 20, 128))}, **SMALL)


def test_a_bad_call_names_what_was_called(pipe):
    with pytest.raises(TypeError, match=r"pipe\(\.\.\.\) has no option 'gudance'; did you mean guidance\?"):
        pipe("a", gudance=2)
    with pytest.raises(InputError, match=r"leave \.to\(\.\.\.\) out"):
        pipe.to("mps")


def test_dtypes_of_torch(checkpoint):
    assert dtype_of(torch.bfloat16) == dtype_of("bfloat16") == dtype_of(mx.bfloat16) == mx.bfloat16
    assert Flux2Pipeline.from_pretrained(checkpoint, torch_dtype=torch.float16).dtype == mx.float16
    with pytest.raises(InputError, match="are the same setting"):
        Flux2Pipeline.from_pretrained(checkpoint, torch_dtype=torch.float16, dtype="float32")
    with pytest.raises(InputError, match=r"dtype must be one of .*, got torch\.float64"):
        Flux2Pipeline.from_pretrained(checkpoint, torch_dtype=torch.float64)


def test_a_limit_in_gigabytes_is_not_taken_for_bytes():
    with pytest.raises(
        InputError, match=r"a number of bytes, at least 1000000, got 8; 8 GB are 8e9 \(--memory-limit 8\)"
    ):
        RuntimeOptions(memory_limit=8)


def test_warnings_point_to_the_caller(pipe):
    for call in (pipe, lambda *given, **options: list(pipe.stream(*given, **options))):
        with pytest.warns(UserWarning, match="is distilled") as caught:
            call("a", guidance=3, **SMALL)
        assert caught[0].filename == __file__


# ------------------------------------------------------------------------------------------------ planning


@pytest.mark.parametrize("distilled", [True, False])
def test_steps_are_planned_from_the_options(distilled):
    usual = resolve_sampling(GenerationOptions(), distilled, (64, 64), has_init=False, inpaints=False)
    assert (usual.num_steps, usual.guidance) == (default_steps(distilled), default_guidance(distilled))
    assert sum(step.passes for step in usual.steps) == (4 if distilled else 100)
    options = GenerationOptions(
        num_steps=4, guidance=2, schedule="linear", guidance_interval=(0.5, 0.75), strength=0.75
    )
    sampling = resolve_sampling(options, distilled, (64, 64), has_init=True, inpaints=False)
    assert [step.sigma for step in sampling.steps] == [0.75, 0.5, 0.25]
    assert [step.passes for step in sampling.steps] == ([1, 1, 1] if distilled else [2, 2, 1])


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition("<!-- options: begin -->\n")
    after = rest.partition("<!-- options: end -->")[2]
    table = options_table(*CLASSES)
    DOCUMENT.write_text(f"{before}<!-- options: begin -->\n{table}<!-- options: end -->{after}")
