"""Downloads, against a stand-in for the Hub on this machine; each in a process of its own, as a user starts it."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from flux2_mlx import RELEASED, CheckpointError, open_checkpoint
from flux2_mlx.checkpoints.hub import fetching
from tests import loras
from tests.hub import Hub
from tests.test_weights import split
from tests.tiny import rewrite

REPO = RELEASED["klein-4b"]
GATED = RELEASED["klein-9b"]


@pytest.fixture
def hub(damaged):
    (damaged / "flux-2-klein-4b.safetensors").write_bytes(b"a second copy that nobody needs")
    (damaged / "text_encoder" / "model.safetensors.md").write_text("nor this")
    with Hub({REPO: damaged, GATED: damaged, "someone/klein-tune": damaged}, gated={GATED: "hf_secret"}) as server:
        yield server


def generate(tmp_path, *arguments, url="http://127.0.0.1:9", **environment):
    """Run the command with a Hub at url (by default one where nobody answers) and an own cache."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [
        sys.executable,
        "-m",
        "flux2_mlx.generate",
        "a red fox",
        "--width",
        "64",
        "--height",
        "64",
        "--steps",
        "1",
    ]
    command += ["--max-sequence-length", "16", "--seed", "0", "--output", str(tmp_path / "fox.png"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def assert_refused(run, *expected):
    assert run.returncode == 2, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in run.stderr
    for text in expected:
        assert text in errors[0], errors[0]


def test_a_released_name_downloads_what_is_needed_once_and_works_offline(hub, tmp_path):
    run = generate(tmp_path, url=hub.url)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "fox.png").is_file()
    assert "Fetching" not in run.stderr  # the Hub's progress bar, which is for terminals
    assert sorted(hub.downloads) == [
        f"{REPO}/{file}"
        for file in (
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        )
    ]
    offline = generate(tmp_path, "--quiet", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stderr == ""
    nobody = generate(tmp_path)
    assert nobody.returncode == 0, nobody.stderr
    assert_refused(
        generate(tmp_path, "--model", "klein-9b"), "cannot fetch", GATED, "(cached: klein-4b)", "--model a folder"
    )


def test_shards_that_nobody_reads_are_not_downloaded(hub, damaged, tmp_path):
    """And the adapter of a smaller text encoder is, which a converted folder has in no index."""
    (damaged / "text_encoder" / "adapter_v14_bal.safetensors").write_bytes(b"an adapter")
    weight_map = split(damaged / "text_encoder", 2, "model")
    index = damaged / "text_encoder" / "model.safetensors.index.json"
    tensors = {
        name: value
        for file in set(weight_map.values())
        for name, value in load_file(damaged / "text_encoder" / file).items()
    }
    late = {name for name in tensors if "layers.27." in name or name == "model.norm.weight"}
    files = {True: "model-00002-of-00002.safetensors", False: "model-00001-of-00002.safetensors"}
    for is_late, file in files.items():
        save_file({n: v for n, v in tensors.items() if (n in late) == is_late}, damaged / "text_encoder" / file)
    rewrite(index, json.dumps({"weight_map": {name: files[name in late] for name in tensors}}))
    run = generate(tmp_path, "--model", "someone/klein-tune", "--revision", "v1", url=hub.url)
    assert run.returncode == 0, run.stderr
    assert "someone/klein-tune/text_encoder/model-00001-of-00002.safetensors" in hub.downloads
    assert "someone/klein-tune/text_encoder/model-00002-of-00002.safetensors" not in hub.downloads
    assert "someone/klein-tune/text_encoder/adapter_v14_bal.safetensors" in hub.downloads


def test_a_gated_model_says_where_to_accept_and_how_to_log_in(hub, tmp_path):
    assert_refused(
        generate(tmp_path, "--model", "klein-9b", url=hub.url),
        f"{GATED} is gated",
        f"https://huggingface.co/{GATED}",
        "hf auth login",
        "HF_TOKEN",
    )
    assert hub.downloads == []
    run = generate(tmp_path, "--model", "klein-9b", url=hub.url, HF_TOKEN="hf_secret")
    assert run.returncode == 0, run.stderr


def test_unknown_repositories_and_revisions(hub, tmp_path):
    assert_refused(
        generate(tmp_path, "--model", "someone/nothing", url=hub.url),
        "'someone/nothing'",
        "no such repository",
        "klein-4b",
    )
    assert_refused(generate(tmp_path, "--revision", "v9", url=hub.url), REPO, "no revision 'v9'")


def test_no_network_and_nothing_cached(tmp_path):
    assert_refused(generate(tmp_path), "the Hub cannot be reached", "(cached: no klein model)", "--model a folder")
    assert_refused(generate(tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "--model nano")


@pytest.mark.parametrize(
    ("status", "meaning"),
    [(403, "the token may not"), (429, "too many requests"), (500, "its fault"), (503, "its fault")],
)
def test_an_answer_of_the_hub_is_told_as_what_it_is(status, meaning, tmp_path, monkeypatch):
    """The Hub's client gives it as a file that is not in the cache, and its cause has the answer."""

    class Answer(OSError):
        response = SimpleNamespace(status_code=status)

    def fetch():
        raise LocalEntryNotFoundError("cannot find the snapshot") from Answer("refused")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=rf"the Hub answered {status} \({meaning}"):
        fetching(REPO, REPO, None, fetch)
    assert not (tmp_path / "fox.png").exists()


def test_another_model_is_refused_before_its_weights_are_downloaded(hub, damaged, tmp_path):
    index = json.loads((damaged / "model_index.json").read_text())
    rewrite(damaged / "model_index.json", json.dumps({**index, "_class_name": "FluxPipeline"}))
    assert_refused(generate(tmp_path, url=hub.url), "a FluxPipeline (FLUX.1), not a Flux2KleinPipeline")
    assert not [path for path in hub.downloads if path.endswith(".safetensors")]


@pytest.mark.parametrize("index", [{"_class_name": "Flux2Pipeline"}, {}], ids=["dev's pipeline", "klein's pipeline"])
def test_flux2_dev_by_its_id_lists_what_there_is(damaged, monkeypatch, index):
    """Whether its model_index.json says it or only the transformer's config does."""
    for path, changes in (("model_index.json", index), ("transformer/config.json", {"guidance_embeds": True})):
        rewrite(damaged / path, json.dumps(json.loads((damaged / path).read_text()) | changes))

    def snapshot(repo, *, revision, allow_patterns):
        assert not [pattern for pattern in allow_patterns if pattern.endswith(".safetensors")], "weights are fetched"
        return str(damaged)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=rf"FLUX\.2-dev.*; released klein models: {', '.join(RELEASED)}"):
        open_checkpoint("someone/flux2-dev")


def test_a_download_that_breaks_off(hub, tmp_path):
    hub.cut_after = 1000
    assert_refused(
        generate(tmp_path, url=hub.url),
        f"cannot fetch {REPO}: ",
        "; run it again, which keeps the files that are whole",
    )
    assert_refused(generate(tmp_path, HF_HUB_OFFLINE="1"), "the cache has not all of it")
    hub.cut_after = None
    run = generate(tmp_path, url=hub.url)
    assert run.returncode == 0, run.stderr


def test_a_repository_without_weights(hub, damaged, tmp_path):
    rewrite(damaged / "transformer" / "diffusion_pytorch_model.safetensors", None)
    run = generate(tmp_path, url=hub.url)
    assert_refused(run, "found no weights; or the download is incomplete: run it again with a connection")


def test_a_full_disk(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"cannot fetch .*: the disk is full; HF_HOME moves the Hub's cache"):
        open_checkpoint("klein-4b")


def test_a_repository_that_is_no_klein_checkpoint(hub, damaged, tmp_path):
    rewrite(damaged / "model_index.json", None)
    assert_refused(generate(tmp_path, url=hub.url), "no FLUX.2 [klein] checkpoint", "no model_index.json")


def test_a_file_on_the_hub(hub, tmp_path):
    name = "someone/klein-tune/transformer/diffusion_pytorch_model.safetensors"
    run = generate(tmp_path, "--transformer", name, "--distilled", url=hub.url)
    assert run.returncode == 0, run.stderr
    assert hub.downloads.count(name) == 1
    assert f"{REPO}/transformer/diffusion_pytorch_model.safetensors" not in hub.downloads
    assert_refused(
        generate(tmp_path, "--vae", "someone/klein-tune/none.safetensors", url=hub.url),
        "someone/klein-tune has no file none.safetensors",
    )


def test_a_repository_without_a_model_index(hub, damaged, tmp_path):
    """As mflux saves one: a folder for each part, and nothing that says whether it is distilled."""
    rewrite(damaged / "model_index.json", None)
    rewrite(damaged / "scheduler" / "scheduler_config.json", None)
    run = generate(tmp_path, "--model", "someone/klein-tune", "--distilled", url=hub.url)
    assert run.returncode == 0, run.stderr
    assert_refused(generate(tmp_path, "--model", "someone/klein-tune", url=hub.url), "does not say whether")


def test_a_part_that_is_a_repository(hub, damaged, tmp_path):
    """Its config comes first, then the shards that are used; one without a config lists the files that it has."""
    split(damaged / "text_encoder", 2, "model")
    rewrite(damaged / "text_encoder" / "another.safetensors", b"that nobody needs")
    hub.repos |= {"someone/text": damaged / "text_encoder", "someone/files": damaged.parent / "files"}
    (damaged.parent / "files" / "split").mkdir(parents=True)
    (damaged.parent / "files" / "split" / "klein.safetensors").write_bytes(b"large")
    run = generate(tmp_path, "--text-encoder", "someone/text", url=hub.url)
    assert run.returncode == 0, run.stderr
    assert {name for name in hub.downloads if name.startswith("someone/text/")} == {
        "someone/text/config.json",
        "someone/text/model.safetensors.index.json",
        "someone/text/model-00001-of-00002.safetensors",
        "someone/text/model-00002-of-00002.safetensors",
    }
    for arguments in (["--transformer", "someone/files"], ["--model", "someone/files"]):
        run = generate(tmp_path, *arguments, "--distilled", url=hub.url)
        assert_refused(run, "name the file: someone/files/split/klein.safetensors")
    assert not any(name.endswith("klein.safetensors") for name in hub.downloads)


def test_loras(damaged, tmp_path):
    """The only file of a repository, with the config beside it, and a file of one that has several."""
    weights = load_file(damaged / "transformer" / "diffusion_pytorch_model.safetensors")
    files = {"one": ["adapter_model", ".style"], "more": ["style", "other"], "peft": ["v2/adapter_model"]}
    for repo, names in files.items():
        (tmp_path / repo / "v2").mkdir(parents=True)
        for name in names:
            loras.write(tmp_path / repo / f"{name}.safetensors", weights)
    for folder in (tmp_path / "one", tmp_path / "peft" / "v2", tmp_path / "more"):
        (folder / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    with Hub({f"someone/{repo}": tmp_path / repo for repo in files}) as hub:
        model = ["--model", str(damaged)]
        drawn = generate(tmp_path, *model, "--lora", "someone/one:0.5", url=hub.url)
        assert drawn.returncode == 0, drawn.stderr
        assert "someone/one:0.5: LoRA, 15 of 39 layers, rank 4, alpha 8" in drawn.stderr
        named = ["--lora", "someone/more/other.safetensors", "--lora", "someone/peft/v2/adapter_model.safetensors"]
        drawn = generate(tmp_path, *model, *named, url=hub.url)
        assert drawn.returncode == 0, drawn.stderr
        assert "other.safetensors: LoRA, 15 of 39 layers, rank 4, alpha 4\n" in drawn.stderr
        assert "v2/adapter_model.safetensors: LoRA, 15 of 39 layers, rank 4, alpha 8" in drawn.stderr
        assert_refused(
            generate(tmp_path, *model, "--lora", "someone/more", url=hub.url),
            "several files; name one: someone/more/other.safetensors, someone/more/style.safetensors",
        )
        assert_refused(generate(tmp_path, *model, "--lora", "someone/none", url=hub.url), "no such repository")
    # By its id, too, it is drawn with again where nobody answers.
    cached = ["--lora", "someone/one:0.5", "--lora", "someone/peft/v2/adapter_model.safetensors"]
    drawn = generate(tmp_path, *model, *cached, HF_HUB_OFFLINE="1")
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stderr.count("LoRA, 15 of 39 layers, rank 4, alpha 8") == 2
    refused = generate(tmp_path, *model, "--lora", "someone/none")
    assert_refused(refused, "the Hub cannot be reached", "connect, or give the LoRA as a file")
    assert "--model" not in refused.stderr
