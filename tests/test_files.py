"""Files as people bring them: what counts as weights, names and variants, what is told by name and refused."""

import json
import os
import shutil
import struct

import diffusers
import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_mlx import (
    CheckpointError,
    Decoder,
    Encoder,
    FluxKlein,
    FluxKleinParams,
    InputError,
    Qwen3Tokenizer,
    image_ids,
    load_quantized_flux_klein,
    load_safetensors,
    open_checkpoint,
    sanitize_vae_weights,
    text_ids,
)
from flux2_mlx.checkpoints.checkpoint import has_encoder
from flux2_mlx.checkpoints.folder import Source, weight_files
from flux2_mlx.checkpoints.formats.gguf import read_gguf
from flux2_mlx.checkpoints.hub import lora_file
from flux2_mlx.checkpoints.load import load_text_encoder, load_transformer
from flux2_mlx.checkpoints.publish import check
from flux2_mlx.checkpoints.write import tokenizer_files
from flux2_mlx.families import AUTOENCODER, TEXT_ENCODER, TRANSFORMER
from flux2_mlx.lazy import read
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


# ------------------------------------------------------------------------------------------------ crafted and damaged


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("vae/config.json", b"[" * 100_000, "is not JSON"),
        ("vae/config.json", b"\xff\xfe{}", "is not UTF-8"),
        ("vae/config.json", b" " * (2**22 + 1), "has 4,194,305 bytes, and at most 4,194,304 are read"),
        ("tokenizer/tokenizer_config.json", b"[" * 100_000, "is not JSON"),
        ("tokenizer/tokenizer_config.json", b'{"model_max_length": NaN}', "must be a positive number, got nan"),
        ("tokenizer/tokenizer.json", b"\xff", "is not UTF-8"),
    ],
)
def test_a_small_file_that_cannot_be_read(damaged, file, content, says):
    tiny.rewrite(damaged / file, content)
    refused(damaged, file, says)


@pytest.mark.parametrize(
    "file",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_a_pipe_does_not_hang(damaged, file):
    (damaged / file).unlink()
    os.mkfifo(damaged / file)
    refused(damaged, file.rpartition("/")[2])


def test_a_check_of_pipes_devices_and_checksums(damaged):
    (damaged / "SHA256SUMS").write_bytes(b"\xff")
    assert "SHA256SUMS is not UTF-8" in fault(list, check(damaged))
    (damaged / "SHA256SUMS").unlink()
    (damaged / "a.safetensors").symlink_to("/dev/zero")
    assert "it is a pipe or device, not a file" in fault(list, check(damaged))


def test_a_check_of_fp8(tmp_path):
    written = {"w": torch.ones(4, 4).to(torch.float8_e5m2), "v.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_file(written, tmp_path / "w.safetensors")
    assert [*check(tmp_path)] == [f"w.safetensors: 2 tensors, {(tmp_path / 'w.safetensors').stat().st_size} bytes"]
    save_file(
        written | {"x.weight": torch.full((2, 2), float("nan")).to(torch.float8_e5m2)}, tmp_path / "w.safetensors"
    )
    assert "x.weight has values that are not finite" in fault(list, check(tmp_path))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": ["x"]}, "the scheduler is a ['x']"),
        ("text_encoder/config.json", {"head_dim": 2**30}, "head_dim cannot be 1073741824"),
        ("text_encoder/config.json", {"head_dim": 2**19}, "of head_dim 524288 cannot be"),
        ("text_encoder/config.json", {"rope_parameters": ..., "rope_theta": 10**400}, "a config has a value"),
        ("vae/config.json", {"layers_per_block": 20000}, "layers_per_block is at most 16, got 20000"),
        ("transformer/config.json", {"num_attention_heads": "a" * 99, "attention_head_dim": 10**9}, "no whole numbers"),
        ("transformer/config.json", {"rope_theta": 10**400}, "rope_theta cannot be"),
    ],
)
def test_a_config_that_asks_for_the_impossible(damaged, file, changes, says):
    edit_config(damaged / file, **changes)
    assert len(refused(damaged, says)) < 2000


@pytest.mark.parametrize(
    "shard", ["a\0b", "\ud800", "a\x1b[2J.safetensors", "._diffusion_pytorch_model.safetensors", ""]
)
def test_an_index_that_names_what_is_no_file(tmp_path, shard):
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    assert "outside its folder or hidden" in fault(load_safetensors, tmp_path / "w.safetensors.index.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"double_blocks.0.img_attn.qkv.weight": torch.ones(())}, "img_attn.qkv.weight is a single number"),
        ({"final_layer.adaLN_modulation.1.weight": torch.ones(())}, "adaLN_modulation.1.weight is a single number"),
        ({"img_in.weight_scale": torch.ones(0)}, "its scales (0,); they do not belong together"),
        (
            {"img_in.comfy_quant": torch.full((9000,), 91, dtype=torch.uint8)},
            "img_in.comfy_quant does not say a format",
        ),
        ({f"double_blocks.{'9' * 5000}.img_attn.proj.weight": torch.ones(2)}, "unknown"),
        ({"x_embedder.weight": torch.ones(64, 128)}, "x_embedder.weight is there twice, under two names"),
    ],
)
def test_weights_that_no_writer_makes(checkpoint, tmp_path, change, says):
    tensors = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    file = formats.save(formats.bfl_transformer(tensors) | change, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_transformer(open_checkpoint(checkpoint, transformer=file, distilled=True), mx.float32)
    assert says in str(caught.value)


def safetensors_of(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_shapes_beyond_32_bits_and_crowded_headers(tmp_path):
    empty = {"dtype": "F32", "data_offsets": [0, 0]}
    for name, header, says in (
        ("wide", {"w": {**empty, "shape": [2**32, 0]}}, "shapes that cannot be: w"),
        ("crowded", {f"{k}": {**empty, "shape": [0]} for k in range(65537)}, "claims 65,537 tensors"),
        ("long", {"__metadata__": {"x": " " * 2**24}}, "its header has"),
    ):
        (tmp_path / name).write_bytes(safetensors_of(header))
        assert says in fault(load_safetensors, tmp_path / name)


def test_gguf_scales_cannot_be_replaced(tmp_path):
    """Packed layers get scales under a name that a tensor of the file may have too."""
    for names in (("l.weight", "l.scales"), ("l.scales", "l.weight")):
        writer = gguf.GGUFWriter(str(tmp_path / "w.gguf"), "flux")
        for name in names:
            raw = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "l.weight" else None
            writer.add_tensor(name, raw if kind else np.ones((4, 1), np.float32), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert "l.scales is there twice" in fault(read_gguf, tmp_path / "w.gguf")
        (tmp_path / "w.gguf").unlink()


@pytest.mark.parametrize(("kind", "scale"), [("Q8_0", 65504), ("Q5_1", np.nan), ("Q6_K", np.inf)])
def test_numbers_that_a_damaged_gguf_has_give_no_warning(tmp_path, kind, scale):
    """NumPy would tell of overflow with a line of code; what is not finite is refused where it is met."""
    package_type = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[package_type]
    raw = np.full(256 // values * size, 100, np.uint8)
    at = {"Q8_0": 0, "Q5_1": 0, "Q6_K": 208}[kind]
    raw[at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "w.gguf"), "flux")
    writer.add_tensor("l.weight", raw.reshape(1, -1), raw_dtype=package_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = {name: np.array(read(weight)) for name, weight in read_gguf(tmp_path / "w.gguf").items()}
    assert not all(np.isfinite(array).all() for array in weights.values())


def test_a_gguf_header_of_many_empty_strings(tmp_path):
    count = 2**20 + 1
    value = struct.pack("<Q1sIIQ", 1, b"x", 9, 8, count)
    (tmp_path / "w.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + value + bytes(8 * count))
    assert "claims 1,048,577 strings" in fault(read_gguf, tmp_path / "w.gguf")


def test_a_tokenizer_that_panics(damaged):
    """Rust's panic is no Exception of Python's; a prefix of subwords that is longer than they are has one."""

    class PanicException(BaseException):
        pass

    tokenizer = Qwen3Tokenizer(damaged / "tokenizer")

    class Panics:
        def encode(self, *_arguments, **_options):
            raise PanicException("byte index 3 is out of bounds")

    tokenizer._tokenizer = Panics()
    assert "cannot be used as a tokenizer (byte index 3" in fault(tokenizer, ["a"])
    file = damaged / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= {"continuing_subword_prefix": "a" * 99}
    tiny.rewrite(file, json.dumps(content))
    assert "cannot be used as a tokenizer" in fault(Qwen3Tokenizer, damaged / "tokenizer")


def test_only_a_tokenizers_own_files_are_copied(damaged, tmp_path):
    folder, secret = damaged / "tokenizer", tmp_path / "token"
    secret.write_text("hf_secret")
    (folder / "passwords.txt").write_text("secret")
    assert {file.name for file in tokenizer_files(folder)} <= {file.name for file in folder.iterdir()} - {
        "passwords.txt"
    }
    (folder / "merges.txt").unlink(missing_ok=True)
    (folder / "merges.txt").symlink_to(secret)
    assert "merges.txt is a link to" in fault(tokenizer_files, folder)
    cached = tmp_path / "models--someone--klein"
    for path in (cached / "blobs", cached / "snapshots" / "abc" / "tokenizer"):
        path.mkdir(parents=True)
    (cached / "blobs" / "0123").write_text("{}")
    (cached / "snapshots" / "abc" / "tokenizer" / "vocab.json").symlink_to(cached / "blobs" / "0123")
    assert len(tokenizer_files(cached / "snapshots" / "abc" / "tokenizer")) == 1


# ------------------------------------------------------------------------------------------------ the right one blamed


@pytest.mark.parametrize(
    ("channels", "named"), [(16, "16 are FLUX.1's"), (4, "4 are Stable Diffusion's"), (8, "8 latent")]
)
@pytest.mark.parametrize("parts", ["whole", "decoder"])
def test_another_models_autoencoder_is_blamed_itself(checkpoint, tmp_path, channels, named, parts):
    """As diffusers makes one, which has no statistics of latents."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": [32] * 4, "layers_per_block": 1, "latent_channels": channels}
    other = diffusers.AutoencoderKL(**blocks, **widths).state_dict()
    written = {name: t for name, t in other.items() if parts == "whole" or not name.startswith("encoder.")}
    file = formats.save(written, tmp_path / "ae.safetensors")
    message = fault(open_checkpoint, checkpoint, vae=file)
    assert named in message
    assert str(file) in message
    assert str(checkpoint) not in message


def test_a_decoder_with_statistics_is_a_decoder(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith(("encoder.", "quant_conv."))}
    assert "bn.running_mean" in kept
    for written, expected in ((kept, False), (tensors, True)):
        file = formats.save(written, tmp_path / f"{expected}.safetensors")
        assert has_encoder(Source(AUTOENCODER, str(file), (file,))) == expected


def test_a_whole_model_given_as_one_part(checkpoint):
    message = fault(open_checkpoint, checkpoint, vae=checkpoint)
    assert f"its autoencoder is in {checkpoint / 'vae'}: give that folder" in message


@pytest.mark.parametrize("name", ["klein.gguf", "./models/klein-4b.safetensors"])
def test_a_file_that_is_not_there(name):
    message = fault(open_checkpoint, name, distilled=True)
    assert "there is no such file" in message
    assert "did you mean" not in message


# ------------------------------------------------------------------------------------------------ Python's parts


def test_a_half_of_the_autoencoder_takes_its_own_weights(checkpoint):
    weights = sanitize_vae_weights(load_safetensors(checkpoint / "vae" / "diffusion_pytorch_model.safetensors"))
    config = open_checkpoint(checkpoint).autoencoder
    for module, prefix in ((Decoder(config), "decoder."), (Encoder(config), "encoder.")):
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        for given in (weights, list(weights.items()), own):
            module.load_weights(given)
            assert mx.array_equal(module.conv_in.weight, weights[f"{prefix}conv_in.weight"]).item()
        with pytest.raises(ValueError, match="Missing"):
            module.load_weights({f"{prefix}conv_in.weight": weights[f"{prefix}conv_in.weight"]})


def test_rotation_tables_of_another_model_and_a_path_for_weights():
    params = FluxKleinParams(
        hidden_size=32, num_heads=2, head_dim=16, axes_dims_rope=(4, 4, 4, 4), txt_embed_dim=8, depth=1, depth_single=1
    )
    rope = FluxKlein.compute_rope(text_ids(2), image_ids(32, 32))
    with pytest.raises(InputError, match=r"head_dim of 128, and the model's is 16; .*params\.axes_dims_rope"):
        FluxKlein(params).forward_with_rope(mx.zeros((1, 4, 128)), mx.zeros((1, 2, 8)), mx.array([1.0]), *rope)
    for function in (sanitize_vae_weights, lambda path: load_quantized_flux_klein(path, params)):
        with pytest.raises(InputError, match=r"as load_safetensors\(path\) gives them, got 'w.safetensors'"):
            function("w.safetensors")
