"""Converted folders hold the same weights, appear whole or not at all, and are checked."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from safetensors.torch import load_file

from flux2_mlx import Flux2Pipeline, InputError, Quantization, open_checkpoint
from flux2_mlx.checkpoints import write as writing
from flux2_mlx.checkpoints.load import load_autoencoder, load_text_encoder, load_transformer, load_weights
from flux2_mlx.checkpoints.sanitize import sanitize_vae_weights
from flux2_mlx.convert import main
from flux2_mlx.device import weights_of
from flux2_mlx.lazy import read
from flux2_mlx.models.names.autoencoder import bfl_vae
from tests import formats, tiny

LOADERS = {"transformer": load_transformer, "text_encoder": load_text_encoder, "vae": load_autoencoder}
OPTIONS = {"height": 64, "width": 96, "num_steps": 2, "seed": 1, "max_sequence_length": 16, "output_type": "np"}


def weights(folder, part, **options):
    module = LOADERS[part](open_checkpoint(folder, **options), mx.bfloat16)
    for _ in load_weights(module):
        pass
    return weights_of(module)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


def test_dense(checkpoint, tmp_path, capsys):
    assert main([str(checkpoint), str(tmp_path / "copy"), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'copy'}\n"
    for part in LOADERS:
        assert_same(weights(tmp_path / "copy", part), weights(checkpoint, part))
    assert open_checkpoint(tmp_path / "copy").is_distilled
    assert main(["--check", str(tmp_path / "copy")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]  # no partial folder is left


def test_diffusers_opens_the_parts(reference, tmp_path):
    """All but the text encoder, which lacks the layers that klein does not read."""
    pipe, folder = reference
    assert main([str(folder), str(tmp_path / "copy"), "--quiet"]) == 0
    for part, cls, theirs in (
        ("transformer", Flux2Transformer2DModel, pipe.transformer),
        ("vae", AutoencoderKLFlux2, pipe.vae),
    ):
        state = cls.from_pretrained(tmp_path / "copy" / part).state_dict()
        expected = theirs.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(state[name].float().numpy(), tensor.float().numpy(), rtol=2**-8)


@pytest.mark.parametrize(
    "bits", [["--quantize", "4", "--group-size", "32"], ["--quantize", "8", "--quantize-text-encoder", "6"]]
)
def test_packed_as_on_loading(checkpoint, tmp_path, bits):
    assert main([str(checkpoint), str(tmp_path / "packed"), "--quiet", *bits]) == 0
    named = dict(zip((name[2:].replace("-", "_") for name in bits[::2]), map(int, bits[1::2]), strict=True))
    expected = Flux2Pipeline.from_pretrained(checkpoint, dtype="bfloat16", **named)
    found = Flux2Pipeline.from_pretrained(tmp_path / "packed", dtype="bfloat16")
    for stage in ("transformer", "text_encoder"):
        for pipe in (found, expected):
            assert sum(load_weights(getattr(pipe, stage)))
        assert_same(weights_of(getattr(found, stage)), weights_of(getattr(expected, stage)))
        config = json.loads((tmp_path / "packed" / stage / "config.json").read_text())
        assert config["quantization"]["mode"] == "affine"
    np.testing.assert_array_equal(found("a red fox", **OPTIONS).images, expected("a red fox", **OPTIONS).images)


def test_bfl_layout(checkpoint, tmp_path):
    assert main([str(checkpoint), str(tmp_path / "bfl"), "--quiet", "--layout", "bfl"]) == 0
    folder = tmp_path / "bfl"
    tensors = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    assert load_file(folder / "transformer.safetensors").keys() == formats.bfl_transformer(tensors).keys()
    tensors = load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    assert load_file(folder / "ae.safetensors").keys() == formats.bfl_vae(tensors).keys()
    assert_same(
        weights(checkpoint, "transformer", transformer=folder / "transformer.safetensors", distilled=True),
        weights(checkpoint, "transformer"),
    )
    text = folder / "text_encoder.safetensors"
    assert_same(weights(checkpoint, "text_encoder", text_encoder=text), weights(checkpoint, "text_encoder"))


def test_bfl_vae_and_back(tmp_path):
    """With shapes that tell the config, as the released one has."""
    vae = tiny.autoencoder((32, 64, 64, 64), norm_num_groups=32)
    state = {name: t.detach() for name, t in vae.state_dict().items()}
    sanitized = sanitize_vae_weights({name: mx.array(t.numpy()) for name, t in state.items()})
    found, expected = bfl_vae(sanitized), formats.bfl_vae(state)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(np.array(read(found[name])), expected[name].numpy()) for name in expected)


def test_from_gguf_and_packed_files(checkpoint, tmp_path):
    tensors = {name: t.detach() for name, t in tiny.transformer().state_dict().items()}
    formats.write_gguf(tmp_path / "w.gguf", formats.bfl_transformer(tensors), "Q5_0")
    arguments = [str(checkpoint), str(tmp_path / "out"), "--transformer", str(tmp_path / "w.gguf"), "--quiet"]
    assert (
        main([*arguments, "--distilled", "--quantize", "8", "--quantize-text-encoder", "4", "--group-size", "32"]) == 0
    )
    expected = Flux2Pipeline.from_pretrained(
        checkpoint, transformer=tmp_path / "w.gguf", distilled=True, dtype="bfloat16", quantize=8, group_size=32
    )
    for _ in load_weights(expected.transformer):
        pass
    assert_same(weights(tmp_path / "out", "transformer"), weights_of(expected.transformer))


def test_what_was_packed_stays_and_is_told(checkpoint, tmp_path, capsys):
    eight, mixed = tmp_path / "eight", tmp_path / "mixed"
    assert main([str(checkpoint), str(eight), "--quiet", "--quantize", "8", "--quantize-text-encoder", "none"]) == 0
    assert main([str(eight), str(mixed), "--quiet", "--quantize", "4", "--group-size", "32"]) == 0
    for folder, part, bits in ((mixed, "transformer", 8), (mixed, "text_encoder", 6)):
        assert json.loads((folder / part / "config.json").read_text())["quantization"]["bits"] == bits
    assert "quantization" not in json.loads((eight / "text_encoder" / "config.json").read_text())
    assert "transformer mostly in 8 bits" in (mixed / "README.md").read_text()
    assert_same(weights(mixed, "transformer"), weights(eight, "transformer"))
    capsys.readouterr()
    assert "no packed weights" in refused(capsys, eight, tmp_path / "bfl", "--layout", "bfl")


def test_little_is_held(tmp_path, memory):
    """Of the largest tensor what is read and what is written, and what checks its values."""
    pipe = tiny.pipeline(depth_single=24)
    pipe.save_pretrained(tmp_path / "large")
    largest = max(4 * t.numel() for t in pipe.transformer.state_dict().values())
    largest = max(largest, 4 * pipe.text_encoder.model.embed_tokens.weight.numel())
    checkpoint = open_checkpoint(tmp_path / "large")
    for name, quantization in (("dense", {}), ("packed", {"transformer": Quantization(4, 32)})):
        before = memory()
        mx.reset_peak_memory()
        writing.convert(checkpoint, tmp_path / name, quantization=quantization)
        assert mx.get_peak_memory() - before <= 2.5 * largest
        assert memory() == before


def test_shards(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 200_000)
    assert main([str(checkpoint), str(tmp_path / "copy"), "--quiet"]) == 0
    shards = sorted((tmp_path / "copy" / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    assert_same(weights(tmp_path / "copy", "transformer"), weights(checkpoint, "transformer"))
    assert main(["--check", str(tmp_path / "copy")]) == 0


# ------------------------------------------------------------------------------------------------ refused


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_converted(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    assert "there exists; give another name" in refused(capsys, checkpoint, tmp_path / "there")
    assert "give a model and a target" in refused(capsys, checkpoint)
    assert "is no folder" in refused(capsys, checkpoint, tmp_path / "no" / "where")
    assert "no packed weights" in refused(capsys, checkpoint, tmp_path / "a", "--layout", "bfl", "--quantize", "4")
    assert "no multiple of the group size 128" in refused(
        capsys, checkpoint, tmp_path / "a", "--quantize", "4", "--group-size", "128"
    )
    assert "see --help" in refused(capsys, checkpoint, tmp_path / "a", "--layout", "other")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "GB are free in" in refused(capsys, checkpoint, tmp_path / "a", "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
    with pytest.raises(InputError, match="layout must be one of diffusers, bfl, got 'x'"):
        writing.convert(open_checkpoint(checkpoint), tmp_path / "a", layout="x")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("disk")])
def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path, capsys, monkeypatch, fault):
    write, count = writing.write_safetensors, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 2:
            raise fault
        return write(*arguments)

    monkeypatch.setattr(writing, "write_safetensors", interrupted)
    assert main([str(checkpoint), str(tmp_path / "out"), "--quiet"]) == (130 if fault is KeyboardInterrupt else 2)
    assert list(tmp_path.iterdir()) == []
    told = f"error: cannot write {tmp_path / 'out'}: disk; choose another file\n"
    assert capsys.readouterr().err in ("interrupted; nothing was written\n", told)


def test_values_that_are_not_finite(damaged, tmp_path, capsys):
    tiny.edit_weights(
        damaged / "transformer" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors["proj_out.weight"].fill_(float("nan")),
    )
    assert "proj_out.weight has values that are not finite" in refused(capsys, damaged, tmp_path / "out", "--quiet")
    assert "proj_out.weight has values that are not finite" in refused(capsys, "--check", damaged)


def test_a_folder_that_was_damaged(checkpoint, tmp_path, capsys):
    folder = tmp_path / "copy"
    assert main([str(checkpoint), str(folder), "--quiet"]) == 0
    capsys.readouterr()
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "is not what was written: its SHA-256" in refused(capsys, "--check", folder)
    file.write_bytes(content[:-1])
    assert "cut short or damaged" in refused(capsys, "--check", folder)
    file.unlink()
    assert "has no vae/diffusion_pytorch_model.safetensors" in refused(capsys, "--check", folder)
    assert "has no safetensors files" in refused(capsys, "--check", tmp_path / "nowhere")
    assert "either a model and a target, or --check" in refused(capsys, checkpoint, "--check", folder)


def test_upload(checkpoint, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: calls.append((repo, options)))
    monkeypatch.setattr(
        huggingface_hub,
        "upload_folder",
        lambda repo_id, folder_path: calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir()))),
    )
    assert main([str(checkpoint), str(tmp_path / "out"), "--quiet", "--upload", "me/klein"]) == 0
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/klein\n")
    assert calls[0] == ("me/klein", {"private": True, "exist_ok": True})
    assert {"README.md", "SHA256SUMS", "model_index.json", "transformer"} <= set(calls[1][1])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\n")
    assert str(tmp_path) not in card

    def refuse(*_, **__):
        raise ValueError("not logged in")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    error = refused(capsys, checkpoint, tmp_path / "again", "--quiet", "--upload", "me/klein")
    assert "cannot upload to me/klein: not logged in; the folder" in error
    assert (tmp_path / "again" / "model_index.json").is_file()


def test_a_transformer_that_keeps_its_references_stays_one(checkpoint, tmp_path, capsys):
    """Said of a file, written into the folder's index."""
    file = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    target = tmp_path / "kept"
    words = [str(checkpoint), str(target), "--transformer", str(file), "--distilled", "--quiet"]
    assert main([*words, "--kv-cache"]) == 0
    assert open_checkpoint(target).has_kv_cache
    assert main([str(checkpoint), str(tmp_path / "other"), "--kv-cache", "--quiet"]) == 2
    assert "was not trained to cache its references" in capsys.readouterr().err
