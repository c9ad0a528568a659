"""Paths: one rule on every surface, and what of them an image carries and may ask for."""

import json
import os
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from flux2_mlx import InputError, Settings, read_metadata, save_image
from flux2_mlx.checks import MAX_PROMPT
from flux2_mlx.cli.arguments import build_parser, check, complete, output_path
from flux2_mlx.cli.jobs import Job
from flux2_mlx.cli.session import Session, SessionImage
from flux2_mlx.cli.training import parse, read_config
from flux2_mlx.generate import main
from flux2_mlx.inputs import Inputs
from flux2_mlx.options import CheckpointOptions, ModelOptions
from flux2_mlx.paths import expand, without_home
from flux2_mlx.training.options import TrainingOptions
from tests.test_images import SETTINGS


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "home" / "ann"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PICTURES", str(home))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save(home / "a.png")
    return home


def task_of(*words):
    return complete(build_parser().parse_args(["a", *map(str, words)]), None)


def test_the_rule(home):
    assert expand("~/a.png") == expand("$PICTURES/a.png") == expand("${PICTURES}/a.png") == f"{home}/a.png"
    assert expand("a/b.png") == "a/b.png"
    assert expand("$NOT_SET/a.png") == "$NOT_SET/a.png"
    assert expand("~nobody-of-that-name/x") == "~nobody-of-that-name/x"


@pytest.mark.parametrize("prefix", ["~", "$PICTURES", "${PICTURES}"])
def test_every_surface_has_the_rule(home, prefix):
    written, path = f"{prefix}/a.png", f"{home}/a.png"
    names = ("model", "transformer", "text_encoder", "vae", "tokenizer")
    options = CheckpointOptions(**dict.fromkeys(names, written))
    assert [getattr(options, name) for name in names] == [path] * 5
    assert ModelOptions(lora=[f"{written}:0.5"]).lora == (f"{path}:0.5",)
    task = task_of("--image", written, "--init-image", written, "--mask", written, "--preview", written)
    assert len(task.inputs.images) == 1
    assert task.preview == Path(path)
    assert output_path(written, 0, 0) == Path(path)
    parser = build_parser()
    line = json.dumps({"prompt": "a", "model": written, "image": [written], "mask": written, "output": written})
    line = line.replace('"mask"', '"init-image": "' + written + '", "mask"')
    task = complete(Job(1, line).arguments(parser, parser.parse_args([])), None)
    assert task.model.model == path
    assert task.outputs == [Path(path)]
    assert len(Inputs(prompt="", image=[written], init_image=written, mask=written).opened().images) == 1
    session = Session(lambda *_: None)
    session.handle(f"load {written}")
    assert len(session.images) == 1
    (home / "run.json").write_text(json.dumps({"data": written, "output": written, "validation_image": [written]}))
    trained = TrainingOptions(**read_config(home / "run.json"), validation_prompt="a", preserve=written)
    assert (trained.data, trained.output, trained.preserve, trained.validation_image) == (path, path, path, (path,))
    assert parse(["--config", f"{prefix}/run.json", "--validation-prompt", "a"])[0].data == path


def test_an_image_carries_no_folder_of_the_home_folder(home, tmp_path):
    assert without_home(f"{home}/secret/klein") == without_home(f"{home}/secret/../other/klein") == "~/.../klein"
    assert without_home(f"{home}/klein") == "~/klein"
    (tmp_path / "link").symlink_to(home / "secret")
    (home / "secret").mkdir()
    assert without_home(f"{tmp_path}/link/x") == "~/.../x"
    for plain in ("klein-4b", "owner/name", "here/klein", f"{tmp_path}/klein", f"{home}by/klein"):
        assert without_home(plain) == plain
    lora = f"{home}/secret/style.safetensors:0.5", "owner/name:2"
    metadata = replace(SETTINGS, model=f"{home}/secret/klein", tokenizer="~/secret/t", lora=lora).metadata()
    assert (metadata["model"], metadata["tokenizer"]) == ("~/.../klein", "~/.../t")
    assert metadata["lora"] == ["~/.../style.safetensors:0.5", "owner/name:2"]
    assert "secret" not in json.dumps(metadata)
    assert "ann" not in json.dumps(metadata)


def image_of(path, **changes):
    settings = {**SETTINGS.metadata(), **changes}
    return save_image(Image.new("RGB", (64, 64)), path, settings, "")


def test_what_the_home_folder_hides_is_asked_for(home, tmp_path):
    image = image_of(tmp_path / "a.png", model="~/.../klein", lora=["~/.../style.safetensors:0.5"], quantize=4)
    with pytest.raises(InputError, match=r"give it: --model FOLDER/klein$"):
        task_of("--from-image", image)
    with pytest.raises(InputError, match=r"give it: --lora FOLDER/style\.safetensors:0\.5$"):
        task_of("--from-image", image, "--model", "~/deep/klein")
    model = task_of("--from-image", image, "--model", "~/deep/klein", "--lora", "~/x/style.safetensors:0.5").model
    assert (model.model, model.quantize) == (f"{home}/deep/klein", 4), "the same model keeps what belongs to it"
    assert task_of("--from-image", image, "--model", "nano").model.lora == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "stranger/repo"}, "the image's model, 'stranger/repo', is neither here nor in the Hub's cache"),
        ({"model": "klein-4b", "revision": "refs/pr/1"}, "of revision 'refs/pr/1', is neither"),
        ({"lora": ["stranger/repo/a.safetensors:2"]}, "the image's lora, 'stranger/repo/a.safetensors', is neither"),
        ({"transformer": "stranger/repo/a.gguf"}, "or --transformer with yours"),
        ({"text_encoder": "stranger/repo"}, "or --text-encoder with yours"),
        ({"vae": "stranger/repo"}, "or --vae with yours"),
        ({"vae": "pipe"}, "'pipe', is neither a file nor a folder"),
    ],
)
def test_a_strangers_image_fetches_and_opens_nothing(home, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("snapshot_download", "hf_hub_download", "list_repo_files"):
        real = getattr(huggingface_hub, name)

        def offline(*given, real=real, **more):
            assert more.get("local_files_only"), "the Hub was asked"
            return real(*given, **more)

        monkeypatch.setattr(huggingface_hub, name, offline)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=message):
        task_of("--from-image", image_of(tmp_path / "a.png", **changes))
    name = next(iter(changes))
    given = task_of("--from-image", tmp_path / "a.png", f"--{name.replace('_', '-')}", "own/one")
    assert getattr(given.model, name) in ("own/one", ("own/one",))


def test_what_is_cached_is_taken(home, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--some--style"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "a.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder / "snapshots" / ("0" * 40)))
    image = image_of(tmp_path / "a.png", lora=["some/style:0.5"])
    assert task_of("--from-image", image).model.lora == ("some/style:0.5",)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_without_metadata(home, tmp_path, suffix):
    given = ["--model", "nano", "--steps", "1", "--quiet", "--output"]
    assert main(["a", *given, f"a.{suffix}", "--no-metadata"]) == 0
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert not image.getexif()
        assert not image.info.keys() & {"flux2_mlx", "parameters"}
    with pytest.raises(InputError, match="has no settings of flux2_mlx"):
        read_metadata(tmp_path / f"a.{suffix}")


def test_metadata_is_an_option_everywhere(home):
    parser = build_parser()
    assert task_of().write_metadata
    line = json.dumps({"prompt": "a", "metadata": False})
    assert not complete(Job(1, line).arguments(parser, parser.parse_args([])), None).write_metadata
    session = Session(lambda *_: None, images=[SessionImage(Image.new("RGB", (64, 64)), SETTINGS)])
    session.handle("set metadata off")
    session.handle("save ~/b.png")
    with pytest.raises(InputError, match="has no settings"):
        read_metadata(home / "b.png")
    session.handle("set metadata on")
    session.handle("save ~/c.png")
    assert Settings.from_metadata(read_metadata(home / "c.png")) == SETTINGS


def test_prompts_have_a_limit(home, tmp_path):
    Settings.from_metadata({**SETTINGS.metadata(), "prompt": "a" * MAX_PROMPT})
    (tmp_path / "long.txt").write_text("é" * (MAX_PROMPT + 1))
    (tmp_path / "longer.txt").write_text("a" + "é" * (3 * MAX_PROMPT))
    message = r"at most 100,000 characters"
    for name in ("long", "longer"):
        arguments = build_parser().parse_args(["--prompt-file", f"{name}.txt"])
        with pytest.raises(InputError, match=message):
            check(complete(arguments, None))
    with pytest.raises(InputError, match=message):
        task_of("--from-image", image_of(tmp_path / "a.png", prompt="a" * (MAX_PROMPT + 1)))
    with pytest.raises(InputError, match="has no settings of flux2_mlx"):
        read_metadata(image_of(tmp_path / "b.png", prompt="a" * 2**22))
