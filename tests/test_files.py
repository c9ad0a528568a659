"""Files as people bring them: what counts as weights, names and variants, what is told by name and refused."""

import shutil
import struct

import mlx.core as mx
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_mlx import CheckpointError, load_safetensors, open_checkpoint
from flux2_mlx.checkpoints.folder import weight_files
from flux2_mlx.checkpoints.hub import lora_file
from flux2_mlx.checkpoints.load import load_text_encoder
from flux2_mlx.checkpoints.publish import check
from flux2_mlx.families import AUTOENCODER, TEXT_ENCODER, TRANSFORMER
from tests import formats, tiny
from tests.test_weights import edit_config, refused

SIDECAR = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(100)  # AppleDouble, RFC 1740


def fault(call, *arguments, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ which files


def test_what_macos_leaves_beside_files_is_no_weight(damaged, reference):
    """On drives of other systems each NAME has a ._NAME beside it."""
    shutil.rmtree(damaged / "transformer")
    reference[0].transformer.save_pretrained(damaged / "transformer", max_shard_size="300KB")
    (damaged / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    save_file({"w": torch.zeros(2)}, damaged / "style.safetensors")
    for file in [file for file in damaged.rglob("*") if file.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(SIDECAR)
    assert len(weight_files(damaged / "transformer", TRANSFORMER)) > 1
    open_checkpoint(damaged)
    assert lora_file(str(damaged)) == damaged / "style.safetensors"
    assert not any("._" in line for line in check(damaged))


@pytest.mark.parametrize("size", ["10GB", "300KB"])
def test_the_only_variant_is_taken(damaged, reference, size):
    """As diffusers and transformers write it, whole and in shards."""
    for key, module in (("transformer", reference[0].transformer), ("text_encoder", reference[0].text_encoder)):
        for file in (damaged / key).glob("*.safetensors*"):
            file.unlink()
        module.save_pretrained(damaged / key, variant="bf16", max_shard_size=size)
    opened = open_checkpoint(damaged)
    assert {len(opened.sources[key].files) > 1 for key in ("transformer", "text_encoder")} == {size == "300KB"}
    load_text_encoder(opened, mx.float32)
    first = opened.sources["transformer"].files[0]
    shutil.copyfile(first, first.with_name(first.name.replace("bf16", "fp16")))
    refused(damaged, "several variants, bf16, fp16; keep one, or name its file")


def test_a_variant_beside_the_plain_files_is_passed_over(damaged):
    for key, part in (("transformer", TRANSFORMER), ("text_encoder", TEXT_ENCODER), ("vae", AUTOENCODER)):
        file = damaged / key / f"{part.stem}.safetensors"
        shutil.copyfile(file, file.with_name(f"{part.stem}.fp16.safetensors"))
        assert weight_files(damaged / key, part) == (file,)


# ------------------------------------------------------------------------------------------------ told by content


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_as_a_pickle(tmp_path, length):
    file = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(2)}, file, {"note": "x"})
    (size,) = struct.unpack("<Q", file.read_bytes()[:8])
    save_file({"w": torch.ones(2)}, file, {"note": "x" * (length - size + 1)})
    assert file.read_bytes()[:8] == struct.pack("<Q", length)
    assert load_safetensors(file)["w"].tolist() == [1, 1]
    file.write_bytes(file.read_bytes()[:8] + b"}q\x00" + bytes(length))  # what pickle has there
    assert "is a pickle" in fault(load_safetensors, file)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 7751105712\n"


@pytest.mark.parametrize("file", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_pointer_of_git_lfs(damaged, file):
    tiny.rewrite(damaged / file, LFS)
    refused(damaged, file, "is a git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("method", "named"), [("bitsandbytes", "bitsandbytes"), ("sdnq", "SDNQ"), ("quanto", "quanto"), ("awq", "AWQ")]
)
def test_a_storage_format_that_a_config_names(damaged, method, named):
    edit_config(damaged / "transformer" / "config.json", quantization_config={"quant_method": method})
    assert refused(damaged, named, "get the same model in bfloat16", "--quantize").count("transformer") == 1


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("transformer_blocks.0.attn.to_q.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("transformer_blocks.0.attn.to_q.weight._data", "optimum-quanto"),
        ("transformer_blocks.0.attn.to_qkv.wscales", "Nunchaku"),
        ("transformer_blocks.0.attn.to_q.qzeros", "GPTQ or AWQ"),
    ],
)
def test_a_storage_format_that_names_tell(checkpoint, tmp_path, name, named):
    for others in ({}, {"x_embedder.weight": torch.zeros(2, 2)}):
        file = formats.save({name: torch.zeros(2), **others}, tmp_path / f"{len(others)}.safetensors")
        assert named in fault(open_checkpoint, checkpoint, transformer=file, distilled=True)


def test_qwen3_vl_is_told_by_name(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "text_encoder" / "model.safetensors")
    vision = {"visual.patch_embed.proj.weight": torch.zeros(2, 2)}
    transformers = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    for number, written in enumerate((tensors | vision, transformers)):
        file = formats.save(written, tmp_path / f"{number}.safetensors")
        assert "Qwen3-VL; " in fault(open_checkpoint, checkpoint, text_encoder=file).replace(", and", ";")


@pytest.mark.parametrize(
    ("architecture", "numbers", "says"),
    [
        ("qwen3vl", {}, "architecture 'qwen3vl'; FLUX.2 [klein] needs a Qwen3"),
        ("llama", {}, "architecture 'llama'"),
    ],
)
def test_gguf_of_another_architecture(checkpoint, tmp_path, architecture, numbers, says):
    names = formats.llama_names(load_file(checkpoint / "text_encoder" / "model.safetensors"))
    formats.write_gguf(tmp_path / "te.gguf", names, "F32", architecture, numbers)
    assert says in fault(open_checkpoint, checkpoint, text_encoder=tmp_path / "te.gguf")


def test_a_slow_tokenizer(damaged):
    (damaged / "tokenizer" / "tokenizer.json").unlink()
    (damaged / "tokenizer" / "vocab.json").write_text("{}")
    refused(damaged, "no tokenizer/tokenizer.json", "--tokenizer")
    assert "--tokenizer" in fault(open_checkpoint, damaged, tokenizer=damaged / "tokenizer")
