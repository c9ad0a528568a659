"""Prompts written out: the text is drawn with, kept, and told; the rest of Qwen3 is there for it alone."""

import io
import json
import os
import subprocess
import sys
import warnings

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux2_mlx import CheckpointError, Flux2Pipeline, InputError, Qwen3Tokenizer, read_metadata
from flux2_mlx.checkpoints.checkpoint import open_checkpoint
from flux2_mlx.checkpoints.language import find_language_model
from flux2_mlx.checkpoints.sanitize import sanitize
from flux2_mlx.cli.arguments import build_parser, complete
from flux2_mlx.conditioning import enhance
from flux2_mlx.conditioning.enhance import Enhancer
from flux2_mlx.convert import main as convert
from flux2_mlx.device import weight_bytes
from flux2_mlx.families import LANGUAGE_MODEL as PART
from flux2_mlx.families import TEXT_ENCODER
from flux2_mlx.generate import main
from flux2_mlx.models.language_model import Qwen3LanguageModel, generate
from flux2_mlx.models.qwen3 import Qwen3TextEncoder
from flux2_mlx.options import BatchOptions
from flux2_mlx.refusals import check_enhance
from flux2_mlx.runtime.plan import LANGUAGE_MODEL, WRITTEN_TOKENS
from tests import formats, tiny
from tests.hub import Hub

SMALL = {"height": 64, "width": 64, "num_steps": 1, "max_sequence_length": 48, "seed": 1}
WORDS = ["--width", "64", "--height", "64", "--steps", "1", "--max-sequence-length", "48", "--seed", "1"]
IMAGE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def writer(checkpoint, tmp_path_factory):
    """A checkpoint whose language model has a head of its own."""
    folder = tiny.copy(checkpoint, tmp_path_factory.mktemp("writer") / "writer")

    def add_head(tensors):
        shape = tensors["model.embed_tokens.weight"].shape
        tensors["lm_head.weight"] = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))

    tiny.edit_weights(folder / "text_encoder" / "model.safetensors", add_head)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    tiny.rewrite(folder / "text_encoder" / "config.json", json.dumps({**config, "tie_word_embeddings": False}))
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setattr(enhance, "MOST_WRITTEN", 4)
    monkeypatch.setattr(enhance, "GENERATE", "write")
    monkeypatch.setattr(enhance, "EDIT", "edit")
    monkeypatch.setattr(Qwen3Tokenizer, "decode", lambda self, ids: " ".join(map(str, ids)))  # of any vocabulary
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def loads(monkeypatch):
    """The other stages that are loaded each time that the language model writes."""
    seen = []
    write = Enhancer._write_one

    def watched(self, *arguments):
        seen.append(self.stages.loaded())
        return write(self, *arguments)

    monkeypatch.setattr(Enhancer, "_write_one", watched)
    return seen


# ------------------------------------------------------------------------------------------------ text


def test_what_is_written_depends_on_prompt_kind_and_seed(writer, monkeypatch):
    given = []
    monkeypatch.setattr(enhance, "generate", lambda model, ids, *how: given.append(ids) or generate(model, ids, *how))
    pipe = Flux2Pipeline.from_pretrained(writer, cache=False)
    write, ids = pipe.enhance, pipe.tokenizer.chat_ids
    first, drawn = write("a red fox"), write("a red fox", seed=3)
    assert len(first.split()) == 4
    assert drawn != first
    write("a fox", edit=True)
    assert given == [ids("write", "a red fox"), ids("write", "a red fox"), ids("edit", "a fox")]
    again = Flux2Pipeline.from_pretrained(writer, cache=False).enhance
    assert (again("a red fox"), again("a red fox", seed=3)) == (first, drawn)


def written(monkeypatch, pipe, answer, most=300):
    """What becomes of an answer of these tokens, the last of which ends it unless there are ``most``."""
    monkeypatch.setattr(enhance, "MOST_WRITTEN", most)
    monkeypatch.setattr(enhance, "generate", lambda *_: iter(range(answer.count(" ") + 1)))
    monkeypatch.setattr(pipe.tokenizer, "decode", lambda ids: answer)
    return pipe.enhance("a red fox")


@pytest.mark.parametrize(
    ("answer", "most", "text"),
    [
        ("A red fox.\n\n It  runs\t", 300, "A red fox. It runs"),
        ("A red fox. It runs in", 6, "A red fox."),  # cut off
        ("A red fox in the", 5, "A red fox in the"),
        (" \n", 300, "a red fox"),  # nothing was written
    ],
)
def test_an_answer_is_one_line_of_whole_sentences(writer, monkeypatch, answer, most, text):
    assert written(monkeypatch, Flux2Pipeline.from_pretrained(writer, cache=False), answer, most) == text


def test_long_prompts_are_left_as_they_are(writer, loads):
    pipe, long = Flux2Pipeline.from_pretrained(writer), "red " * 400
    with pytest.warns(UserWarning, match=r"the prompt has \d+ tokens and is left as it is"):
        assert pipe.enhance(long) == long
    assert not loads


@pytest.mark.parametrize(("prompt", "seed", "message"), [(7, None, "a prompt must be"), ("a", -1, "enhance_seed")])
def test_bad_values(pipe, prompt, seed, message):
    with pytest.raises(InputError, match=message):
        pipe.enhance(prompt, seed=seed)
    with pytest.raises(InputError, match=r"enhance_seed belongs to enhance \(--enhance\)"):
        pipe("a red fox", enhance_seed=1)


# ------------------------------------------------------------------------------------------------ images


def test_images_are_drawn_with_what_is_written(writer, loads):
    pipe = Flux2Pipeline.from_pretrained(writer)
    prompts = ["a red fox", "a blue fox"]
    result = pipe(prompts, enhance=True, output_type="np", **SMALL)
    texts = [own.prompt for own in result.settings]
    assert [own.original_prompt for own in result.settings] == prompts
    assert texts == [pipe.enhance(prompt) for prompt in prompts] != prompts
    expected = pipe(texts, output_type="np", **SMALL)
    assert np.array_equal(result.images, expected.images)
    assert [own.original_prompt for own in expected.settings] == [None, None]
    assert len(loads) == 2


def test_what_sees_an_image_is_an_edit(writer, monkeypatch):
    pipe, seen = Flux2Pipeline.from_pretrained(writer), {}
    monkeypatch.setattr(Enhancer, "write", lambda self, prompts, *, edit, **how: {prompts[0]: f"edit {edit}"})
    mask = Image.new("L", IMAGE.size, 255)
    for name, options in {
        "reference": {"image": IMAGE},
        "left out": {"image": IMAGE, "reference_strength": [0.0]},
        "img2img": {"init_image": IMAGE, "strength": 1.0},
        "inpaint": {"init_image": IMAGE, "mask": mask},
    }.items():
        steps = pipe.stream("a red fox", enhance=True, **SMALL, **options)
        seen[name] = next(steps).settings.prompt
    text, edit = "edit False", "edit True"
    assert seen == {"reference": edit, "left out": text, "img2img": text, "inpaint": edit}


def test_layers_are_in_memory_once(writer, loads, memory):
    """The text encoder is unloaded before, the language model after; the plan says what it needs."""
    pipe = Flux2Pipeline.from_pretrained(writer, memory="resident", cache=False)
    plan = pipe.plan(64, 64, 48, enhance=True)
    stage = plan.stages[0]
    pipe("a red fox", **SMALL)
    assert "text_encoder" in pipe.stages.loaded()
    pipe.unload("transformer")
    pipe.unload("autoencoder")
    before = memory() - weight_bytes(pipe.text_encoder)
    result = pipe("a blue fox", enhance=True, **SMALL)
    assert loads == [set()]
    peak = result.peak_bytes["enhance"] - before
    assert stage.weights < peak < stage.weights + stage.activation_bytes
    assert memory() - before < plan.resident - stage.weights + plan.stages[1].weights + 2**20


def test_the_plan_has_the_language_model_in_the_place_of_the_text_encoder(writer):
    pipe = Flux2Pipeline.from_pretrained(writer)
    plan, without = pipe.plan(64, 64, enhance=True), pipe.plan(64, 64)
    assert [own.name for own in plan.stages] == [LANGUAGE_MODEL, *(own.name for own in without.stages)]
    stage, encoder = plan.stages[:2]
    config = pipe.checkpoint.text_encoder
    shapes = {name: array.nbytes for name, array in load_file(writer / "text_encoder" / "model.safetensors").items()}
    assert stage.weights == sum(shapes.values())
    assert stage.streamed == stage.weights
    assert plan.resident - without.resident == pytest.approx(
        stage.weights - encoder.weights + stage.activation_bytes - max(own.activation_bytes for own in without.stages),
        abs=2**24,
    )
    assert stage.activation_bytes > 2 * 28 * WRITTEN_TOKENS * config.num_key_value_heads * config.head_dim * 4


def test_a_released_model_is_planned_without_it(capsys):
    assert main(["--plan", "--enhance", "--model", "klein-9b", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "language model         16.38" in told  # Qwen3-8B's 8,190,735,360 parameters
    assert main(["--plan", "--enhance", "--text-encoder", "small"]) == 2
    assert "too small to write prompts out; a model in the diffusers layout" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ caches


def test_what_was_written_is_kept_on_disk(writer, loads, monkeypatch):
    text = Flux2Pipeline.from_pretrained(writer).enhance("a red fox", seed=1)
    monkeypatch.setattr(Enhancer, "_loaded", None)
    again = Flux2Pipeline.from_pretrained(writer).enhance
    assert again("a red fox", seed=1) == text
    assert len(loads) == 1
    for change in ({"seed": 2}, {"edit": True}, {"prompt": "a red fux"}):
        with pytest.raises(TypeError):
            again(**{"prompt": "a red fox", "seed": 1, **change})
    for options in ({"dtype": "bfloat16"}, {"quantize_text_encoder": 8, "group_size": 32}, {"cache": False}):
        with pytest.raises(TypeError):
            Flux2Pipeline.from_pretrained(writer, **options).enhance("a red fox", seed=1)


def test_the_latest_are_kept(writer, monkeypatch):
    monkeypatch.setattr(enhance, "MOST_KEPT", 2)
    monkeypatch.setattr(enhance, "generate", lambda *_: iter(()))
    pipe = Flux2Pipeline.from_pretrained(writer)
    for prompt in ("a", "b", "c"):
        pipe.enhance(prompt)
    assert list(enhance.read_table(enhance.TABLE).values()) == ["b", "c"]


def test_a_fault_leaves_nothing_loaded(writer, monkeypatch):
    pipe = Flux2Pipeline.from_pretrained(writer)
    monkeypatch.setattr(Qwen3LanguageModel, "__call__", lambda *_: mx.full((1, 9), mx.nan))
    with pytest.raises(FloatingPointError, match="writing the prompt out: values are not finite in float32"):
        pipe.enhance("a red fox")
    assert not pipe.stages.is_loaded("language_model")
    assert enhance.read_table(enhance.TABLE) == {}


@pytest.mark.filterwarnings("ignore:weights are quantized")
def test_packed_on_the_way(writer):
    packed = Flux2Pipeline.from_pretrained(writer, quantize=8, group_size=32)
    assert packed.enhance("a red fox")
    stage = packed.plan(64, 64, enhance=True).stages[0]
    assert stage.weights < 0.4 * Flux2Pipeline.from_pretrained(writer).plan(64, 64, enhance=True).stages[0].weights


# ------------------------------------------------------------------------------------------------ what has none


def refused(folder, message, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Flux2Pipeline.from_pretrained(folder, **options)
    for call in (lambda: pipe.stream("a", enhance=True), lambda: pipe.enhance("a"), lambda: pipe.plan(enhance=True)):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("or leave out enhance (--enhance)")


def test_checkpoints_that_have_not_all_of_it(writer, tmp_path):
    assert convert([str(writer), str(tmp_path / "converted"), "--quiet"]) == 0
    refused(tmp_path / "converted", "has no language model to write prompts out with, but the 27 layers that images")
    weights = load_file(writer / "text_encoder" / "model.safetensors")
    cut = {name: value for name, value in weights.items() if name not in ("model.norm.weight", "lm_head.weight")}
    save_file(cut, tmp_path / "cut.safetensors")
    refused(writer, "cut.safetensors has no language model", text_encoder=tmp_path / "cut.safetensors")
    refused("nano", "nano's text encoder knows the words of its scenes alone")


def test_a_file_may_have_all_of_it(writer):
    """Its content decides; without a config its head is its own where it has one."""
    file = writer / "text_encoder" / "model.safetensors"
    pipe, other = Flux2Pipeline.from_pretrained(writer, text_encoder=file), Flux2Pipeline.from_pretrained(writer)
    assert pipe.enhance("a red fox") == other.enhance("a red fox")


def test_packed_files_write_what_they_stand_for(checkpoint, tmp_path):
    """As mlx-lm packs Qwen3, which is what Bonsai's folder has."""
    config = json.loads((checkpoint / "text_encoder" / "config.json").read_text())
    weights = load_file(checkpoint / "text_encoder" / "model.safetensors")
    packed, expected = formats.packed(weights, 4, 64)
    texts = {}
    for name, tensors, more in (
        ("packed", packed, {"quantization": {"bits": 4, "group_size": 64}}),
        ("dense", expected, {}),
    ):
        formats.save(tensors, tmp_path / name / "model.safetensors", {"format": "mlx"})
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
        texts[name] = Flux2Pipeline.from_pretrained(checkpoint, text_encoder=tmp_path / name).enhance("a red fox")
    assert texts["packed"] == texts["dense"]


def test_a_head_that_is_there_twice_is_read_once(checkpoint, damaged):
    """The config says that it is the embedding's table, and the file has a copy."""
    path = damaged / "text_encoder" / "model.safetensors"
    tiny.edit_weights(path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in find_language_model(open_checkpoint(checkpoint, text_encoder=path))[1]
    found = [find_language_model(open_checkpoint(folder))[1] for folder in (damaged, checkpoint)]
    assert found[0].keys() == found[1].keys()
    assert "lm_head.weight" not in found[0]


def test_names_of_llama_cpp_and_mflux():
    theirs = ["token_embd.weight", "blk.27.attn_q.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"]
    ours = [
        "model.embed_tokens.weight",
        "model.layers.27.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    mflux = [name.removeprefix("model.") for name in ours]
    for names in (theirs, ours, mflux):
        found = sanitize(PART, {name: mx.zeros((2, 2)) for name in names})
        assert sorted(found) == sorted(ours)
        assert list(sanitize(TEXT_ENCODER, {name: mx.zeros((2, 2)) for name in names})) == ours[:1]


def test_a_tokenizer_of_another_model(writer, monkeypatch):
    monkeypatch.setattr(Qwen3Tokenizer, "chat_ids", lambda *_: [5, 151936])
    with pytest.raises(CheckpointError, match="the tokenizer gives token 151936, but the text encoder knows 151936"):
        Flux2Pipeline.from_pretrained(writer).enhance("a red fox")


def test_what_enhance_does_not_go_with(pipe):
    embeds = mx.zeros((1, 16, pipe.checkpoint.transformer.txt_embed_dim))
    with pytest.raises(InputError, match="prompt_embeds are given in their place"):
        pipe(prompt_embeds=embeds, enhance=True)
    with pytest.raises(InputError, match="might write different prompts"):
        check_enhance(BatchOptions(enhance=True), pipe.checkpoint, has_embeds=False, shares_cfg=True)


# ------------------------------------------------------------------------------------------------ downloads


FETCH = """
import sys
from flux2_mlx import open_checkpoint
from flux2_mlx.checkpoints.language import find_language_model
from flux2_mlx.checkpoints.sanitize import sanitize
from flux2_mlx.cli.arguments import build_parser, complete
checkpoint = open_checkpoint("someone/klein")
print("opened", flush=True)
sys.stdin.readline()
source, weights = find_language_model(checkpoint)
print(len(source.files), "lm_head.weight" in weights, flush=True)
"""


def test_the_rest_is_fetched_once_it_is_asked_for(writer, tmp_path):
    folder = tiny.copy(writer, tmp_path / "hub")
    shards = {True: "model-00002-of-00002.safetensors", False: "model-00001-of-00002.safetensors"}
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    late = {name for name in tensors if "layers.27." in name or name in ("model.norm.weight", "lm_head.weight")}
    for is_late, shard in shards.items():
        save_file({n: v for n, v in tensors.items() if (n in late) == is_late}, folder / "text_encoder" / shard)
    (folder / "text_encoder" / "model.safetensors").unlink()
    index = {"weight_map": {name: shards[name in late] for name in tensors}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    rest = f"someone/klein/text_encoder/{shards[True]}"
    with Hub({"someone/klein": folder}) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", FETCH]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=env, **pipes) as process:
            assert process.stdout.readline() == "opened\n"
            assert rest not in hub.downloads
            told, _ = process.communicate("\n", timeout=60)
        assert told == "2 True\n"
        assert hub.downloads.count(rest) == 1
    # Where nobody answers, what is missing is told; here, and where the Hub's cache has it not.
    (snapshot,) = (tmp_path / "cache" / "hub" / "models--someone--klein" / "snapshots").iterdir()
    (snapshot / "text_encoder" / shards[True]).unlink()
    done = subprocess.run(
        [sys.executable, "-c", FETCH], env={**env, "HF_HUB_OFFLINE": "1"}, input="\n", capture_output=True, text=True
    )
    assert "HF_HUB_OFFLINE is set and the cache has not all of it" in done.stderr.splitlines()[-1]
    (folder / "text_encoder" / shards[True]).unlink()
    with pytest.raises(InputError, match=r"1 of 2 shards missing: .* which the text encoder does without"):
        find_language_model(open_checkpoint(folder))


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_tells_it_and_draws_it_again(writer, loads, tmp_path, monkeypatch, capsys):
    image, again, anew = (str(tmp_path / name) for name in ("fox.png", "again.png", "anew.png"))
    assert main(["a red fox", "--model", str(writer), "--enhance", *WORDS, "--output", image]) == 0
    settings = read_metadata(image)
    assert f"prompt: {settings['prompt']}\n" in capsys.readouterr().err
    assert settings["original_prompt"] == "a red fox"
    assert settings["prompt"] == Flux2Pipeline.from_pretrained(writer).enhance("a red fox")
    assert len(loads) == 1
    monkeypatch.setattr(Qwen3LanguageModel, "__call__", None)
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "empty"))
    assert main(["--from-image", image, "--output", again]) == 0
    assert "prompt: " not in capsys.readouterr().err
    assert np.array_equal(Image.open(again), Image.open(image))
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(
        Enhancer, "write", lambda self, prompts, **how: seen.append((prompts, how)) or {prompts[0]: "x"}
    )
    assert main(["--from-image", image, "--enhance", "--enhance-seed", "4", "--quiet", "--output", anew]) == 0
    assert seen[0][0] == ["a red fox"]  # as it was before
    assert seen[0][1]["seed"] == 4
    assert (read_metadata(anew)["prompt"], capsys.readouterr().err) == ("x", "")


def test_jobs_write_their_prompts_out_together(writer, loads, tmp_path, monkeypatch):
    calls = []
    encode = Qwen3TextEncoder.__call__
    monkeypatch.setattr(Qwen3TextEncoder, "__call__", lambda *given: calls.append(given) or encode(*given))
    IMAGE.save(tmp_path / "a.png")
    jobs = [
        {"prompt": "a red fox", "enhance": True},
        {"prompt": "a blue fox", "enhance": True, "image": str(tmp_path / "a.png")},
        {"prompt": "a red fox", "enhance": True, "seed": 5},
        {"prompt": "a fox"},
    ]
    lines = [json.dumps({"output": str(tmp_path / f"{k}.png"), **job}) for k, job in enumerate(jobs)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    words = ["--jobs", str(tmp_path / "jobs.jsonl"), "--model", str(writer), *WORDS, "--no-cache", "--quiet"]
    assert main(words) == 0
    pipe = Flux2Pipeline.from_pretrained(writer)
    red, blue = pipe.enhance("a red fox"), pipe.enhance("a blue fox", edit=True)
    assert [read_metadata(tmp_path / f"{k}.png")["prompt"] for k in range(4)] == [red, blue, red, "a fox"]
    assert len(calls) == 3  # each text once, none of the prompts that were written out
    assert len(loads) == 2 + 2  # and those of this test


def test_a_switch_swallows_no_prompt():
    task = complete(build_parser().parse_args(["--enhance", "a red fox"]), None)
    assert (task.batch.enhance, task.inputs.prompt) == (True, "a red fox")


def test_a_session_sets_it(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(Enhancer, "write", lambda self, prompts, **how: {prompts[0]: "a blue fox"})
    monkeypatch.setattr("sys.stdin", io.StringIO("set enhance on\na red fox\nset enhance\na red fox\nquit\n"))
    words = ["--interactive", "--model", str(writer), *WORDS, "--quiet", "--output", str(tmp_path / "{index}.png")]
    assert main(words) == 0
    told = [read_metadata(path)["original_prompt"] for path in sorted(tmp_path.glob("*.png"))]
    assert sorted(told, key=str) == [None, "a red fox"]
