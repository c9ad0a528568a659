"""Every format that klein comes in: written from a tiny diffusers checkpoint, loaded, and equal to the original."""

import contextlib
import dataclasses
import json
import struct
import sys

import gguf
import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flux2_mlx import (
    RELEASED,
    CheckpointError,
    Flux2Pipeline,
    families,
    lazy,
    load_safetensors,
    open_checkpoint,
    sanitize_flux2_klein_weights,
    sanitize_qwen3_weights,
    sanitize_vae_weights,
)
from flux2_mlx.checkpoints.files import load_files
from flux2_mlx.checkpoints.formats import decode as decoding
from flux2_mlx.checkpoints.formats import dfloat11
from flux2_mlx.checkpoints.formats.blocks import BLOCKS
from flux2_mlx.checkpoints.formats.gguf import read_gguf
from flux2_mlx.checkpoints.formats.marks import Format
from flux2_mlx.checkpoints.load import (
    load_autoencoder,
    load_preview_decoder,
    load_text_encoder,
    load_transformer,
    load_weights,
)
from flux2_mlx.device import weights_of
from flux2_mlx.quantization.layers import QuantizedEmbedding, QuantizedLinear
from flux2_mlx.quantization.packing import dequantize
from flux2_mlx.quantization.spec import Quantization
from tests import formats, tiny

LOADERS = {"transformer": load_transformer, "text_encoder": load_text_encoder, "vae": load_autoencoder}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline whose shapes tell its configs (32 groups, as FLUX.2 has), and its folder in the diffusers layout."""
    pipe = tiny.pipeline(seed=5)
    pipe.register_modules(vae=tiny.autoencoder((32, 64, 64, 64), norm_num_groups=32))
    folder = tmp_path_factory.mktemp("formats") / "diffusers"
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture(scope="module")
def tensors(whole):
    pipe, _ = whole
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    return {part: {name: t.detach() for name, t in module.state_dict().items()} for part, module in parts.items()}


def opened(folder, model=None, **parts):
    """A checkpoint of which a part, or the model's file, is another."""
    rest = {"text_encoder": folder / "text_encoder", "vae": folder / "vae", "tokenizer": folder / "tokenizer"}
    if model is not None:
        return open_checkpoint(model, distilled=True, **{**rest, **parts})
    return open_checkpoint(folder, distilled=True, **parts)


def loaded(checkpoint, part):
    """A part's weights in memory, packed layers as floats."""
    module = LOADERS[part](checkpoint, mx.float32)
    for _ in load_weights(module):
        pass
    weights = weights_of(module)
    for path, layer in module.named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
            parts = [weights.pop(f"{path}.{name}", None) for name in ("weight", "scales", "biases")]
            weights[f"{path}.weight"] = dequantize(*parts, layer.spec)
    return weights


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        a, b = formats.as_numpy(weight), formats.as_numpy(expected[name])
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= tolerance * max(1e-3, np.abs(b).max()), name


def original(folder, part):
    return loaded(open_checkpoint(folder), part)


# ------------------------------------------------------------------------------------------------ transformer


@pytest.mark.parametrize("norm", ["scale", "weight"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bfl_single_file(whole, tensors, tmp_path, norm, prefix):
    written = formats.bfl_transformer(tensors["transformer"], norm, prefix)
    file = formats.save(written, tmp_path / "a file of any name")
    assert_equal(loaded(opened(whole[1], file), "transformer"), original(whole[1], "transformer"))
    assert_equal(loaded(opened(whole[1], transformer=file), "transformer"), original(whole[1], "transformer"))


def test_bfl_names_become_what_diffusers_makes_of_them(tensors):
    written = formats.bfl_transformer(tensors["transformer"])
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(written))
    ours = sanitize_flux2_klein_weights({name: mx.array(t.numpy()) for name, t in written.items()})
    assert_equal(ours, theirs)


def test_a_single_file_tells_the_shapes(whole, tensors, tmp_path):
    file = formats.save(formats.bfl_transformer(tensors["transformer"]), tmp_path / "bfl.safetensors")
    found, expected = opened(whole[1], file), open_checkpoint(whole[1])
    assert found.transformer == expected.transformer
    vae = formats.save(formats.bfl_vae(tensors["vae"]), tmp_path / "ae.safetensors")
    text = formats.save(tensors["text_encoder"], tmp_path / "qwen.safetensors")
    found = opened(whole[1], file, vae=vae, text_encoder=text)
    assert found.text_encoder == expected.text_encoder
    assert found.autoencoder == expected.autoencoder


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("convention", ["bfl", "old", "mark", "header", "plain", "rows", "marked rows"])
def test_fp8(whole, tensors, tmp_path, convention, dtype):
    written, metadata, expected = formats.scaled(formats.bfl_transformer(tensors["transformer"]), convention, dtype)
    file = formats.save(written, tmp_path / "fp8.safetensors", metadata)
    expected = sanitize_flux2_klein_weights({name: mx.array(t.float().numpy()) for name, t in expected.items()})
    assert_equal(loaded(opened(whole[1], file), "transformer"), expected)


@pytest.mark.parametrize("convention", ["mark", "header", "marked rows"])
def test_int8(whole, tensors, tmp_path, convention):
    written, metadata, expected = formats.scaled(
        formats.bfl_transformer(tensors["transformer"]), convention, torch.int8
    )
    file = formats.save(written, tmp_path / "int8.safetensors", metadata)
    expected = sanitize_flux2_klein_weights({name: mx.array(t.float().numpy()) for name, t in expected.items()})
    assert_equal(loaded(opened(whole[1], file), "transformer"), expected)


@pytest.mark.parametrize(("size", "where"), [(4, "mark"), (16, "header"), (64, "mark")])
def test_int8_that_was_rotated(whole, tensors, tmp_path, size, where):
    written, metadata, expected = formats.rotated(formats.bfl_transformer(tensors["transformer"]), size, where)
    expected = sanitize_flux2_klein_weights({name: mx.array(t.float().numpy()) for name, t in expected.items()})
    for other in ({}, {"scaled_fp8": torch.zeros(1, dtype=torch.float8_e5m2)}):  # which makes MLX refuse the file
        file = formats.save(written | other, tmp_path / "convrot.safetensors", metadata)
        assert_equal(loaded(opened(whole[1], file), "transformer"), expected, 1e-6)


@pytest.mark.parametrize("convention", ["plain", "marked rows"])
def test_text_encoder_in_e5m2(whole, tensors, tmp_path, convention):
    written, _, expected = formats.scaled(tensors["text_encoder"], convention, torch.float8_e5m2)
    file = formats.save(written, tmp_path / "qwen.safetensors")
    expected = sanitize_qwen3_weights({name: mx.array(t.float().numpy()) for name, t in expected.items()})
    assert_equal(loaded(opened(whole[1], text_encoder=file), "text_encoder"), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_code_of_fp8(tmp_path, dtype):
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64).view(dtype)
    other = torch.zeros(1, dtype=torch.float8_e5m2)  # which makes MLX refuse the file
    found = load_files([formats.save({"x.weight": codes, "y": other}, tmp_path / "w")])
    np.testing.assert_array_equal(np.array(found["x.weight"].load().astype(mx.float32)), codes.float().numpy())


def test_every_dtype_of_a_file_with_e5m2(tmp_path):
    """MLX reads nothing of such a file, so all of it is read here."""
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    written = {}
    for dtype in (*floats, torch.int8, torch.uint8, torch.uint32):
        written[f"{dtype}.weight"] = torch.arange(12).reshape(3, 4).to(dtype)
        written[str(dtype)] = torch.tensor(3).to(dtype)
    found = load_files([formats.save(written, tmp_path / "w")])
    for name, tensor in written.items():
        array = found[name].load() if name.endswith(".weight") else found[name]
        assert array.shape == tensor.shape
        np.testing.assert_array_equal(formats.as_numpy(array), tensor.float().numpy())


def test_a_matrix_in_e5m2_is_converted_some_rows_at_a_time(tmp_path, monkeypatch, memory):
    """Nothing is read when the file is opened, and parts of a fused one hold no more than themselves."""
    written, _, expected = formats.scaled(
        {"double_blocks.0.img_attn.qkv.weight": torch.randn(3 * 128, 256)}, "marked rows", torch.float8_e5m2
    )
    file = formats.save(written, tmp_path / "w")
    monkeypatch.setattr(lazy, "ROWS_AT_ONCE", 7)
    before = memory()
    parts = sanitize_flux2_klein_weights(load_files([file]))
    assert memory() - before < 4096  # the scales
    made = {name: part.load() for name, part in parts.items()}
    assert memory() - before < 1.1 * sum(array.nbytes for array in made.values())
    found = np.concatenate([np.array(made[f"transformer_blocks.0.attn.to_{name}.weight"]) for name in "qkv"])
    np.testing.assert_array_equal(found, expected["double_blocks.0.img_attn.qkv.weight"].numpy())


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_mxfp8(whole, tensors, tmp_path, stored):
    written, expected = {}, {}
    for name, tensor in formats.bfl_transformer(tensors["transformer"]).items():
        written[name] = expected[name] = tensor
        if formats.is_quantized(name):
            layer = name.removesuffix(".weight")
            written[name], scale, expected[name] = formats.mxfp8(tensor)
            written |= {f"{layer}.weight_scale": scale.view(stored), f"{layer}.comfy_quant": formats.mark("mxfp8")}
    file = formats.save(written, tmp_path / "mxfp8.safetensors")
    expected = sanitize_flux2_klein_weights({name: mx.array(t.numpy()) for name, t in expected.items()})
    assert_equal(loaded(opened(whole[1], file), "transformer"), expected)


@pytest.mark.parametrize("size", [(64, 32), (200, 160), (384, 128)])
def test_mxfp8_of_any_size_and_scale(size, tmp_path):
    """Powers of two from the smallest on, in files that MLX reads and in those that it does not."""
    torch.manual_seed(0)
    tensor = torch.randn(size).to(torch.float8_e4m3fn)
    scales = torch.randint(0, 240, (size[0], size[1] // 32), dtype=torch.uint8)
    scales[0] = 0
    written = {
        "img_in.weight": tensor,
        "img_in.weight_scale": formats.tiled(scales),
        "img_in.comfy_quant": formats.mark("mxfp8"),
    }
    expected = tensor.float() * scales.view(torch.float8_e8m0fnu).float().repeat_interleave(32, dim=1)
    for other in ({}, {"other": torch.zeros(1, dtype=torch.float8_e5m2)}):
        found = sanitize_flux2_klein_weights(load_files([formats.save(written | other, tmp_path / "w")]))
        weight = found["x_embedder.weight"]
        weight = weight.load() if other else weight
        np.testing.assert_array_equal(np.array(weight), expected.numpy())


@pytest.mark.parametrize("size", [(200, 320), (128, 128), (96, 72)])
def test_fp8_in_blocks_of_128(size):
    weight = mx.random.normal(size)
    scales = mx.random.uniform(0.5, 2, (-(-size[0] // 128), -(-size[1] // 128)))
    layer = "model.layers.3.mlp.up_proj"
    found = sanitize_qwen3_weights({f"{layer}.weight": weight, f"{layer}.weight_scale_inv": scales})
    expected = np.array(weight)
    for row in range(size[0]):
        for column in range(size[1]):
            expected[row, column] *= np.array(scales)[row // 128, column // 128]
    assert_equal(found, {f"{layer}.weight": mx.array(expected)})


@pytest.mark.parametrize("layout", ["comfy", "modelopt"])
@pytest.mark.parametrize("size", [(64, 64), (200, 144), (384, 128)])
def test_nvfp4(layout, size, tmp_path):
    torch.manual_seed(0)
    weight, scale, scale_2, expected = formats.nvfp4(torch.randn(size), layout)
    layer = "transformer_blocks.0.ff.linear_in"
    written = {f"{layer}.weight": weight, f"{layer}.weight_scale": scale, f"{layer}.weight_scale_2": scale_2}
    written[f"{layer}.comfy_quant"] = formats.mark("nvfp4" if layout == "comfy" else "modelopt_nvfp4")
    found = sanitize_flux2_klein_weights(load_safetensors(formats.save(written, tmp_path / "w")))
    assert_equal(found, {f"{layer}.weight": expected}, 1e-6)
    written["other"] = torch.zeros(1, dtype=torch.float8_e5m2)  # which makes MLX refuse the file
    found = sanitize_flux2_klein_weights(load_files([formats.save(written, tmp_path / "w")]))
    assert_equal({"w": found[f"{layer}.weight"].load()}, {"w": expected}, 1e-6)


def test_nvfp4_of_modelopt_is_told_by_the_config(whole, tensors, tmp_path):
    written = dict(tensors["text_encoder"])
    layer = "model.layers.2.mlp.up_proj"
    weight, scale, scale_2, expected = formats.nvfp4(written[f"{layer}.weight"], "modelopt")
    written |= {f"{layer}.weight": weight, f"{layer}.weight_scale": scale, f"{layer}.weight_scale_2": scale_2}
    folder = tmp_path / "text"
    formats.save(written, folder / "model.safetensors")
    config = json.loads((whole[1] / "text_encoder" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (folder / "config.json").write_text(json.dumps(config))
    found = loaded(opened(whole[1], text_encoder=folder), "text_encoder")
    assert_equal({"w": found[f"{layer}.weight"]}, {"w": expected}, 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_by_mlx(whole, tensors, tmp_path, bits):
    written, expected = formats.packed(formats.mflux_names(tensors["transformer"]), bits, 32)
    file = formats.save(written, tmp_path / "packed.safetensors")
    checkpoint = opened(whole[1], file)
    assert checkpoint.transformer == open_checkpoint(whole[1]).transformer
    assert_equal(loaded(checkpoint, "transformer"), sanitize_flux2_klein_weights(expected))
    layer = load_transformer(checkpoint, mx.float32).transformer_blocks[0].attn.to_q
    assert (layer.spec.bits, layer.spec.group_size, layer.spec.mode) == (bits, 32, "affine")


@pytest.mark.parametrize(("bits", "group", "mode"), [(8, 64, "affine"), (4, 32, "affine"), (4, 32, "mxfp4")])
def test_packed_by_flux_2_swift_mlx(whole, tensors, tmp_path, bits, group, mode):
    """Its exports hold the transformer, in float16 beside the words, under names that nothing else has."""
    named = {name: t.half() for name, t in formats.swift_names(tensors["transformer"]).items()}
    written, expected = formats.packed(named, bits, group, mode=mode)
    metadata = {"format": "flux2-mlx-prequantized-v1", "component": "transformer", "created_by": "flux-2-swift-mlx"}
    file = formats.save(written, tmp_path / "transformer.safetensors", metadata)
    checkpoint = opened(whole[1], file)
    assert checkpoint.transformer == open_checkpoint(whole[1]).transformer
    values = dict(zip(tensors["transformer"], expected.values(), strict=True))
    assert_equal(loaded(checkpoint, "transformer"), values, 1e-6)


def test_packed_by_mlx_gen(whole, tensors, tmp_path):
    """SceneWorks' mlx-gen keeps diffusers' folders and names, and says in each config how its part is packed."""
    folder = tiny.copy(whole[1], tmp_path / "saved")
    expected = {}
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        written, expected[part] = formats.packed(tensors[part], 4, 64)
        (folder / part / f"{stem}.safetensors").unlink()
        formats.save(written, folder / part / f"{stem}.safetensors")
        config = json.loads((folder / part / "config.json").read_text()) | {"quantization": {"bits": 4}}
        tiny.rewrite(folder / part / "config.json", json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert_equal(loaded(checkpoint, "transformer"), expected["transformer"])
    assert_equal(loaded(checkpoint, "text_encoder"), sanitize_qwen3_weights(expected["text_encoder"]))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_transformer(whole, tensors, tmp_path, type_name):
    file = tmp_path / "klein.gguf"
    expected = formats.write_gguf(file, formats.bfl_transformer(tensors["transformer"]), type_name)
    expected = sanitize_flux2_klein_weights({name: mx.array(t.numpy()) for name, t in expected.items()})
    checkpoint = opened(whole[1], file)
    assert_equal(loaded(checkpoint, "transformer"), expected, 1e-6)
    layer = load_transformer(checkpoint, mx.float32).single_transformer_blocks[0].attn.to_out
    bits = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}.get(type_name)
    assert (layer.spec.bits if isinstance(layer, QuantizedLinear) else None) == bits


def gguf_bytes(name, shape, kind, raw, *, values=(), version=3):
    """A GGUF file of one tensor, by hand."""
    header = struct.pack("<4sIQQ", b"GGUF", version, 1, len(values)) + b"".join(values)
    header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    header += b"".join(struct.pack("<Q", size) for size in reversed(shape)) + struct.pack("<IQ", kind, 0)
    return header + bytes(-len(header) % 32) + raw


DEQUANTIZED = sorted(kind for kind in gguf.quants._type_traits if kind not in (0, 1, 2, 3, 8, 30))


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_every_other_type_of_gguf(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 100, (3, 2 * size), np.uint8)
    (tmp_path / "w").write_bytes(gguf_bytes("img_in.weight", (3, 2 * block), int(kind), raw.tobytes()))
    found = np.array(read_gguf(tmp_path / "w")["img_in.weight"].load())
    np.testing.assert_array_equal(found, gguf.quants.dequantize(raw, kind).reshape(3, 2 * block))


@pytest.mark.parametrize("kind", sorted(BLOCKS), ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_types_that_need_no_package(tmp_path, monkeypatch, kind):
    """Of all values of each byte, and to the bit; three dimensions, since some matrices stay packed."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (12, 2, size), np.uint8)
    for at in {2: [0], 3: [0, 2], 7: [0, 2], 10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2], 14: [208]}.get(kind, [0]):
        raw[:, :, at + 1] &= 0b10111011  # finite scales
    expected = gguf.quants.dequantize(raw.reshape(12, -1), kind).reshape(4, 3, 2 * block)
    (tmp_path / "w").write_bytes(gguf_bytes("img_in.weight", (4, 3, 2 * block), int(kind), raw.tobytes()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    found = np.array(read_gguf(tmp_path / "w")["img_in.weight"].load())
    np.testing.assert_array_equal(found, expected)


DFLOAT11 = {
    r"transformer_blocks\.\d+": [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")],
    r"single_transformer_blocks\.[0-9]+": ["attn.to_qkv_mlp_proj", "attn.to_out"],
    "context_embedder": [],
}


def dfloat11_folder(tensors, source, folder):
    """A transformer of which some matrices are in DFloat11, with its config; the names of its arrays."""
    written = {name: t.bfloat16() for name, t in tensors.items()}
    groups = {"context_embedder": ["context_embedder.weight"]}
    for blocks, inner in zip(("transformer_blocks", "single_transformer_blocks"), DFLOAT11.values(), strict=False):
        numbers = {name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")}
        groups |= {f"{blocks}.{k}": [f"{blocks}.{k}.{name}.weight" for name in inner] for k in numbers}
    for group, names in groups.items():
        arrays = formats.dfloat11([written.pop(name) for name in names])
        written |= {f"{group}.{kind}": array for kind, array in arrays.items()}
    formats.save(written, folder / "model.safetensors")
    said = {"version": "0.5.0", "threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": DFLOAT11}
    own = json.loads((source / "transformer" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | {"dfloat11_config": said}))
    return written.keys()


def test_dfloat11(whole, tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "ROWS_AT_ONCE", 100)
    names = dfloat11_folder(tensors["transformer"], whole[1], tmp_path / "df11")
    assert sum(name.endswith(".luts") for name in names) == 2 + 3 + 1
    expected = {name: t.bfloat16() for name, t in tensors["transformer"].items()}
    assert_equal(loaded(opened(whole[1], transformer=tmp_path / "df11"), "transformer"), expected)
    refused(
        "stored as DFloat11 without its config.json has them",
        model=whole[1],
        transformer=tmp_path / "df11" / "model.safetensors",
        distilled=True,
    )


def test_every_bit_of_dfloat11(monkeypatch):
    """Exponents so rare that their codes take three bytes; any rows, in blocks of one run and of several."""
    counts = [int(1.7**k) + 1 for k in range(20)]
    exponents = np.random.default_rng(0).permutation(np.repeat(np.arange(100, 100 + len(counts)), counts))
    exponents = exponents[: len(exponents) // 64 * 64]
    bits = (exponents << 7) | np.random.default_rng(1).integers(0, 2**16, len(exponents)) & 0x807F
    bits = bits.astype(np.uint16).reshape(-1, 64)
    matrix = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    arrays = formats.dfloat11([matrix[:200], matrix[200:]])
    assert arrays["luts"][-1].max() > 16
    names = ["g.a.weight", "g.b.weight"]
    weights = {f"g.{kind}": mx.array(array.numpy()) for kind, array in arrays.items()}
    shapes = dict(zip(names, [(200, 64), (len(matrix) - 200, 64)], strict=True))
    config = {"pattern_dict": {"g": ["a", "b"]}}
    for run in (1, 64):
        monkeypatch.setattr(dfloat11, "_RUN", run)
        found = dfloat11.decode_groups(weights, config, shapes, lambda _: True)
        assert found.keys() == set(names)
        whole = np.concatenate([np.array(found[name].load().view(mx.uint16)) for name in names])
        np.testing.assert_array_equal(whole, bits)
        for start, stop in ((0, 1), (3, 90), (517, 518)):
            rows = np.array(found["g.b.weight"].read(start, stop).view(mx.uint16))
            np.testing.assert_array_equal(rows, bits[200 + start : 200 + stop])
    broken = arrays["luts"].clone()
    broken[-1, 100 + len(counts) - 1] = 7
    weights["g.luts"] = mx.array(broken.numpy())
    damaged = dfloat11.decode_groups(weights, config, shapes, lambda _: True)
    with pytest.raises(CheckpointError, match=r"g is damaged: \d+ codes in blocks \d+ to \d+, and \d+ are said"):
        damaged["g.a.weight"].load()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"g.gaps": None}, "g is in DFloat11, but has no gaps"),
        ({"g.gaps": mx.zeros(8, mx.uint8)}, "too few gaps"),
        ({"g.luts": mx.zeros((2, 255), mx.uint8)}, "its arrays are of other shapes or dtypes"),
        ({"g.split_positions": mx.array([32.0])}, "its arrays are of other shapes or dtypes"),
        ({"g.output_positions": mx.array([1, 0, 0, 0, 64, 0, 0, 0], mx.uint8)}, "are no positions"),
        ({"g.output_positions": mx.array([0, 0, 0, 0, 65, 0, 0, 0], mx.uint8)}, "are no positions"),
        ({"g.split_positions": mx.array([64], mx.int64)}, "are no positions"),
        ({"g.split_positions": mx.array([16, 32], mx.int64)}, "g holds 3 matrices, and dfloat11_config names 2"),
        ({"g.split_positions": mx.array([16], mx.int64)}, r"g.a.weight has 16 weights in DFloat11, not \(4, 8\)"),
        ({"config": {"pattern_dict": {"h": ["a", "b"]}}}, "does not say which matrices"),
        ({"config": {"pattern_dict": {"(g+)+": ["a", "b"]}}}, "does not say which matrices"),
        ({"config": []}, "does not say which matrices"),
    ],
)
def test_groups_of_dfloat11_that_do_not_fit(change, says):
    arrays = formats.dfloat11([torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()])
    weights = {f"g.{kind}": mx.array(array.numpy()) for kind, array in arrays.items()} | change
    config = weights.pop("config", {"pattern_dict": {"g": ["a", "b"]}})
    shapes = {"g.a.weight": (4, 8), "g.b.weight": (4, 8)}
    with pytest.raises(CheckpointError, match=says):
        dfloat11.decode_groups(weights, config, shapes, lambda _: True)


# ------------------------------------------------------------------------------------------------ text encoder


@pytest.mark.parametrize(
    "prefix",
    ["", "text_encoders.qwen3_4b.transformer.", "text_encoders.llm.", "text_encoder.", "qwen3_8b.transformer."],
)
def test_text_encoder_file(whole, tensors, tmp_path, prefix):
    written = {prefix + name: t for name, t in tensors["text_encoder"].items()}
    file = formats.save(written, tmp_path / "qwen.safetensors")
    assert_equal(loaded(opened(whole[1], text_encoder=file), "text_encoder"), original(whole[1], "text_encoder"))


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q5_1"])
def test_gguf_text_encoder(whole, tensors, tmp_path, type_name):
    file = tmp_path / "qwen.gguf"
    expected = formats.write_gguf(file, formats.llama_names(tensors["text_encoder"]), type_name, "qwen3")
    expected = sanitize_qwen3_weights({name: mx.array(t.numpy()) for name, t in expected.items()})
    assert_equal(loaded(opened(whole[1], text_encoder=file), "text_encoder"), expected, 1e-6)


def test_gguf_says_what_no_shape_tells(whole, tensors, tmp_path):
    """Qwen3 for longer texts has another RoPE."""
    names = formats.llama_names(tensors["text_encoder"])
    told = {"qwen3.rope.freq_base": 5e6, "qwen3.attention.layer_norm_rms_epsilon": 0.5}
    formats.write_gguf(tmp_path / "long.gguf", names, "F32", "qwen3", told)
    config = opened(whole[1], text_encoder=tmp_path / "long.gguf").text_encoder
    assert (config.rope_theta, config.rms_norm_eps) == (5e6, 0.5)
    formats.write_gguf(tmp_path / "bad.gguf", names, "F32", "qwen3", {"qwen3.rope.freq_base": float("nan")})
    refused("rope_theta cannot be nan", model=whole[1], text_encoder=tmp_path / "bad.gguf")


@pytest.mark.parametrize("model", ["model.", ""])
def test_mlx_text_encoder_folder(whole, tensors, tmp_path, model):
    """As mlx-lm and mflux save one, the embedding packed too."""
    packed, expected = formats.packed(tensors["text_encoder"], 4, 64)
    written = {name.replace("model.", model, 1): array for name, array in packed.items()}
    formats.save(written, tmp_path / "text" / "model.safetensors")
    checkpoint = opened(whole[1], text_encoder=tmp_path / "text")
    assert_equal(loaded(checkpoint, "text_encoder"), sanitize_qwen3_weights(expected))
    pipe = Flux2Pipeline(checkpoint)
    pipe("a red fox", height=64, width=64, num_steps=1, max_sequence_length=16)


# ------------------------------------------------------------------------------------------------ autoencoder


@pytest.mark.parametrize("prefix", ["", "vae."])
@pytest.mark.parametrize(
    "write", [formats.bfl_vae, lambda tensors, prefix: {prefix + k: v for k, v in tensors.items()}]
)
def test_vae_file(whole, tensors, tmp_path, prefix, write):
    file = formats.save(write(tensors["vae"], prefix), tmp_path / "ae.safetensors")
    assert_equal(loaded(opened(whole[1], vae=file), "vae"), original(whole[1], "vae"))


@pytest.mark.parametrize("write", [formats.bfl_vae, dict])
def test_a_decoder_alone(whole, tensors, tmp_path, write):
    """It replaces the decoder; encoder and statistics stay the model's."""
    small = tiny.autoencoder((32, 64, 64, 64), norm_num_groups=32, decoder_block_out_channels=(32, 32, 64, 64))
    state = {name: t.detach() for name, t in small.state_dict().items()}
    decoder = {name: t for name, t in state.items() if name.startswith(("decoder.", "post_quant_conv."))}
    file = formats.save(write(decoder), tmp_path / "small_decoder.safetensors")
    checkpoint = opened(whole[1], vae=file)
    assert checkpoint.autoencoder.decoder_channels == (32, 32, 64, 64)
    found, before = loaded(checkpoint, "vae"), original(whole[1], "vae")
    expected = sanitize_vae_weights({name: mx.array(t.numpy()) for name, t in decoder.items()})
    kept = {name: array for name, array in before.items() if not name.startswith("decoder.")}
    assert_equal(found, kept | expected)


# ------------------------------------------------------------------------------------------------ several parts


def test_mflux_folder_without_configs(whole, tensors, tmp_path):
    """Packed everywhere, the autoencoder's attention too; its convolutions are in NHWC already."""
    folder, expected = tmp_path / "saved", {}
    for part in ("transformer", "text_encoder", "vae"):
        source = tensors[part]
        if part == "vae":
            source = {
                n: t.permute(0, 2, 3, 1) if t.ndim == 4 else t for n, t in source.items() if "num_batches" not in n
            }
        written, dense = formats.packed(formats.mflux_names(source), 8, 64)
        half = sorted(written)[: len(written) // 2]
        formats.save({name: written[name] for name in half}, folder / part / "0.safetensors")
        formats.save({n: a for n, a in written.items() if n not in half}, folder / part / "1.safetensors")
        index = {"weight_map": {name: f"{int(name not in half)}.safetensors" for name in written}}
        if part != "vae":  # the index is optional
            (folder / part / "model.safetensors.index.json").write_text(json.dumps(index))
        expected[part] = dense
    (folder / "tokenizer").symlink_to(whole[1] / "tokenizer")
    with pytest.raises(CheckpointError, match=r"does not say whether .* distilled=True or False .*--no-distilled"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, distilled=False)
    assert not checkpoint.is_distilled
    sanitize = {"transformer": sanitize_flux2_klein_weights, "text_encoder": sanitize_qwen3_weights}
    for part, function in sanitize.items():
        assert_equal(loaded(checkpoint, part), function(expected[part]))
    assert_equal(loaded(checkpoint, "vae"), original(whole[1], "vae"), 0.02)  # 8 bits of its attention


def test_a_full_checkpoint_in_one_file(whole, tensors, tmp_path):
    written = formats.bfl_transformer(tensors["transformer"], prefix="model.diffusion_model.")
    written |= formats.bfl_vae(tensors["vae"], "vae.")
    written |= {f"text_encoders.qwen3_8b.transformer.{n}": t for n, t in tensors["text_encoder"].items()}
    file = formats.save(written, tmp_path / "full.safetensors")
    checkpoint = open_checkpoint(file, tokenizer=whole[1] / "tokenizer", distilled=True)
    for part in LOADERS:
        assert_equal(loaded(checkpoint, part), original(whole[1], part))


def test_the_rest_of_a_file_is_the_released_model_of_its_size(whole, tensors, tmp_path, monkeypatch):
    asked = []

    def snapshot(repo, *, revision, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(whole[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    sizes = {"klein-9b": 1, "klein-4b": 192}
    released = [release for release in families.RELEASES if release.name in sizes]
    params = [dataclasses.replace(release.transformer, txt_embed_dim=sizes[release.name]) for release in released]
    fakes = [dataclasses.replace(release, transformer=shape) for release, shape in zip(released, params, strict=True)]
    monkeypatch.setattr(families, "RELEASES", tuple(fakes))
    file = formats.save(formats.bfl_transformer(tensors["transformer"]), tmp_path / "bfl.safetensors")
    refused("does not say whether", model=file)
    assert asked == []  # before anything is downloaded
    checkpoint = open_checkpoint(file, distilled=False)
    assert {repo for repo, _ in asked} == {RELEASED["klein-4b"]}
    patterns = [pattern for _, patterns in asked for pattern in patterns]
    assert any(pattern.startswith("text_encoder/") for pattern in patterns)
    assert not any(pattern.startswith("transformer/") for pattern in patterns)
    assert checkpoint.tokenizer == whole[1] / "tokenizer"
    assert_equal(loaded(checkpoint, "transformer"), original(whole[1], "transformer"))
    assert_equal(loaded(checkpoint, "vae"), original(whole[1], "vae"))


def test_the_picture_is_the_same_from_a_file(whole, tensors, tmp_path):
    file = formats.save(formats.bfl_transformer(tensors["transformer"]), tmp_path / "bfl.safetensors")
    vae = formats.save(formats.bfl_vae(tensors["vae"]), tmp_path / "ae.safetensors")
    options = {"height": 64, "width": 96, "num_steps": 2, "seed": 1, "max_sequence_length": 24, "output_type": "np"}
    expected = Flux2Pipeline.from_pretrained(whole[1])("a red fox", **options).images
    pipe = Flux2Pipeline.from_pretrained(
        file, text_encoder=whole[1] / "text_encoder", vae=vae, tokenizer=whole[1] / "tokenizer", distilled=True
    )
    np.testing.assert_array_equal(pipe("a red fox", **options).images, expected)


def test_sanitizing_twice_changes_nothing(tensors):
    written = {
        sanitize_flux2_klein_weights: formats.bfl_transformer(tensors["transformer"], prefix="model.diffusion_model."),
        sanitize_qwen3_weights: formats.llama_names(tensors["text_encoder"]),
        sanitize_vae_weights: formats.bfl_vae(tensors["vae"], "vae."),
    }
    for sanitize, foreign in written.items():
        once = sanitize({name: mx.array(t.float().numpy()) for name, t in foreign.items()})
        twice = sanitize(once)
        assert once.keys() == twice.keys()
        assert all(once[name] is twice[name] for name in once)


def test_names_neither_decode_nor_change_what_has_them(tensors):
    """Scales, marks and packed words get the modules' names, and stay what they are."""
    foreign = {
        "transformer": formats.bfl_transformer(tensors["transformer"]),
        "text_encoder": formats.llama_names(tensors["text_encoder"]),
        "vae": formats.bfl_vae(tensors["vae"]),
    }
    for key, part in families.PARTS.items():
        arrays = {name: mx.array(t.float().numpy()) for name, t in foreign[key].items()}
        arrays["blk.0.attn_q.scales" if key == "text_encoder" else "img_in.weight_scale"] = mx.ones((3, 4), mx.uint8)
        once = part.names.rename(part.names.select(arrays))
        twice = part.names.rename(once)
        assert once.keys() == twice.keys()
        assert all(once[name] is twice[name] for name in once)
        stored = [name for name in once if name.endswith(("scale", "scales"))]
        assert [(name, once[name].dtype) for name in stored] == [(stored[0], mx.uint8)]


def test_a_format_is_one_more_among_those_that_are_read(whole, tensors, tmp_path, monkeypatch):
    """Weights stored as twice their value, under a mark of their own."""
    doubled = Format(("doubled",), lambda layer: layer.mark == "doubled", lambda layer: layer.weight / 2)
    written = formats.bfl_transformer(tensors["transformer"])
    layers = ["img_in", "double_blocks.1.img_attn.qkv", "final_layer.adaLN_modulation.1"]
    written |= {f"{layer}.weight": 2 * written[f"{layer}.weight"] for layer in layers}
    written |= {f"{layer}.comfy_quant": formats.mark("doubled") for layer in layers}
    file = formats.save(written, tmp_path / "doubled.safetensors")
    refused("stored as doubled, which is not read, only", model=whole[1], transformer=file, distilled=True)
    monkeypatch.setattr(decoding, "FORMATS", (*decoding.FORMATS, doubled))
    assert_equal(loaded(opened(whole[1], transformer=file), "transformer"), original(whole[1], "transformer"))


# ------------------------------------------------------------------------------------------------ refused


def refused(*expected, **parts):
    with pytest.raises(CheckpointError) as caught:
        Flux2Pipeline.from_pretrained(**parts)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert text in message, message


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["double_blocks.0.img_mod.lin.weight", "img_in.weight", "vector_in.in_layer.weight"], "FLUX.1"),
        (["x_embedder.weight", "transformer_blocks.0.norm1.linear.weight"], "FLUX.1"),
        (["img_in.weight", "guidance_in.in_layer.weight"], "FLUX.2-dev"),
        (["img_in.weight"], "no FLUX.2 [klein] transformer: there is no proj_out.weight"),
        (["transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight"], "looks like a LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "looks like Stable Diffusion"),
        (
            ["model.embed_tokens.weight"],
            "holds no transformer; give a model, and this file as --text-encoder",
        ),
        (["something"], "holds no part of a FLUX.2 [klein] model (its first weights: something)"),
    ],
)
def test_other_files_are_named(tmp_path, whole, keys, says):
    file = formats.save({key: torch.zeros(2, 2) for key in keys}, tmp_path / "other.safetensors")
    refused(str(file), says, model=file, distilled=True)


def test_a_part_of_another_kind_is_refused(whole, tensors, tmp_path):
    file = formats.save(formats.bfl_vae(tensors["vae"]), tmp_path / "ae.safetensors")
    refused("holds no transformer, but autoencoder", model=whole[1], transformer=file, distilled=True)
    refused("no autoencoder 'nowhere': there is no such file or folder", model=whole[1], vae="nowhere")


def test_parts_that_do_not_fit(whole, tmp_path):
    other = tiny.text_encoder(text_hidden=80, text_heads=4, text_kv_heads=1)
    file = formats.save(other.state_dict(), tmp_path / "qwen.safetensors")
    refused("takes prompt embeddings of 192", "gives 240", "klein-4b goes with", model=whole[1], text_encoder=file)


def test_nvfp4_that_does_not_say_its_layout(tmp_path):
    weight, scale, scale_2, _ = formats.nvfp4(torch.randn(64, 64), "comfy")
    written = {"img_in.weight": weight, "img_in.weight_scale": scale, "img_in.weight_scale_2": scale_2}
    file = formats.save(written, tmp_path / "w.safetensors")
    refused("NVFP4", "which of two layouts", model=file, distilled=True)


INT8 = {"img_in.weight": torch.ones(64, 128, dtype=torch.int8), "img_in.weight_scale": torch.ones(64, 1)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"img_in.comfy_quant": formats.mark("hybrid_mxfp8")}, "stored as hybrid_mxfp8, which is not read, only"),
        (
            {**INT8, "img_in.comfy_quant": formats.mark("int8_tensorwise", convrot=True)},
            "img_in is (64, 128), and rotated (convrot) in groups of 256; these are powers of four that divide",
        ),
        (
            {**INT8, "img_in.comfy_quant": formats.mark("int8_tensorwise", convrot=True, convrot_groupsize=32)},
            "in groups of 32",
        ),
        (
            {**INT8, "img_in.comfy_quant": formats.mark("nvfp4", params={"convrot": True})},
            "img_in is mlx.core.int8, marked nvfp4 with convrot, which is not read",
        ),
        ({"img_in.comfy_quant": formats.mark("int8_tensorwise", convrot=1, convrot_groupsize="a")}, "say a format"),
        ({"img_in.comfy_quant": formats.mark("mxfp8", params=3)}, "img_in.comfy_quant does not say a format"),
        ({"img_in.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "img_in.comfy_quant does not say a format"),
        ({"img_in.weight_scale": torch.tensor(float("nan"))}, "img_in.weight_scale is not a finite number"),
        ({"img_in.weight_scale": torch.ones(7, 3)}, "do not belong together"),
        ({"img_in.weight_scale": torch.ones(()), "img_in.scale_weight": torch.ones(())}, "more than one scale"),
        (INT8, "img_in is mlx.core.int8, marked with no format, which is not read"),
        ({"img_in.weight": INT8["img_in.weight"]}, "in formats that are not read: x_embedder.weight is mlx.core.int8"),
        (
            {"img_in.weight_scale": torch.ones(()), "img_in.comfy_quant": formats.mark("int8_tensorwise")},
            "img_in is mlx.core.float32, marked int8_tensorwise, which is not read",
        ),
        ({"img_in.weight_scale": torch.ones(128, 4, dtype=torch.uint8)}, "no comfy_quant mark that says their layout"),
        ({"img_in.comfy_quant": formats.mark("mxfp8")}, "img_in is marked mxfp8, but is not FP8 with one weight_scale"),
        (
            {**INT8, "img_in.comfy_quant": formats.mark("mxfp8")},
            "img_in is marked mxfp8, but is not FP8 with one weight_scale",
        ),
        (
            {
                "img_in.weight_scale": torch.ones(64, 4, dtype=torch.uint8),
                "img_in.comfy_quant": formats.mark("mxfp8"),
            },
            "img_in: 256 scales in tiles for 64 x 4 blocks",
        ),
        (
            {
                "img_in.weight_scale": torch.full((128, 4), 255, dtype=torch.uint8),
                "img_in.comfy_quant": formats.mark("mxfp8"),
            },
            "img_in.weight_scale is not a finite number",
        ),
        (
            {
                "img_in.weight": torch.zeros(64, 128, dtype=torch.float8_e5m2),
                "img_in.weight_scale": torch.tensor(float("inf")),
            },
            "img_in.weight_scale is not a finite number",
        ),
        ({"img_in.weight": torch.zeros(64, 128, dtype=torch.int32)}, "(I32)"),
        ({"img_in.weight": torch.zeros(64, 128, dtype=torch.uint8)}, "in formats that are not read: x_embedder.weight"),
        ({"img_in.extra": torch.ones(2)}, "1 unknown: x_embedder.extra"),
        ({"img_in.scales": torch.ones(64, 3)}, "no packing of 128 columns"),
    ],
)
def test_broken_weights(whole, tensors, tmp_path, change, says):
    written = formats.bfl_transformer(tensors["transformer"]) | change
    refused(says, model=whole[1], distilled=True, transformer=formats.save(written, tmp_path / "broken.safetensors"))


def test_a_header_that_does_not_say_the_formats(whole, tensors, tmp_path):
    for content in ("no JSON", "[]", '{"layers": {"a": 3}}'):
        metadata = {"_quantization_metadata": content}
        file = formats.save(formats.bfl_transformer(tensors["transformer"]), tmp_path / "w.safetensors", metadata)
        refused("_quantization_metadata", model=whole[1], transformer=file, distilled=True)


def test_scales_that_are_not_finite_are_told_when_loaded(whole, tensors, tmp_path):
    written, _ = formats.packed(tensors["transformer"], 4, 32)
    written["proj_out.scales"] = mx.full(written["proj_out.scales"].shape, float("nan"))
    file = formats.save(written, tmp_path / "w.safetensors")
    pipe = Flux2Pipeline.from_pretrained(whole[1], transformer=file, distilled=True)
    with pytest.raises(CheckpointError, match=r"proj_out\.scales has values that are not finite"):
        pipe("a", height=64, width=64, num_steps=1, max_sequence_length=16)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02"])
def test_a_pickle_of_any_name_is_refused(tmp_path, start):
    file = tmp_path / "model.safetensors"
    file.write_bytes(start + bytes(100))
    refused("is a pickle", model=file, distilled=True)


GGUF = gguf_bytes("img_in.weight", (2, 32), 0, bytes(256))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUF", "ends within its header"),
        (GGUF[:-1], "ends beyond its"),
        (GGUF[:60], "ends within its header"),
        (GGUF.replace(b"\x03", b"\x09", 1), "GGUF of version 9"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0), "claims"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 2**62), "ends within its header"),
        (gguf_bytes("w", (2, 32), 999, b""), "type 999, which the gguf package does not read"),
        (gguf_bytes("w", (2, 31), 2, bytes(99)), "in blocks of 32"),
        (gguf_bytes("w", (2**40, 2**40), 0, bytes(99)), "ends beyond its"),
    ],
)
def test_broken_gguf_files(tmp_path, content, says):
    file = tmp_path / "w.gguf"
    file.write_bytes(content)
    refused(str(file), says, model=file, distilled=True)


def test_gguf_that_has_no_place(whole, tensors, tmp_path):
    formats.write_gguf(tmp_path / "vae.gguf", {name: t for name, t in tensors["vae"].items() if t.ndim}, "F32")
    refused("autoencoders in GGUF or F8_E5M2 are not read", model=whole[1], vae=tmp_path / "vae.gguf")
    with pytest.raises(CheckpointError, match="is GGUF or has F8_E5M2, which open_checkpoint and Flux2Pipeline read"):
        load_safetensors(tmp_path / "vae.gguf")


def test_e5m2_that_has_no_place(whole, tensors, tmp_path):
    written = {name: t.to(torch.float8_e5m2) for name, t in formats.bfl_vae(tensors["vae"]).items()}
    file = formats.save(written, tmp_path / "ae.safetensors")
    refused("autoencoders in GGUF or F8_E5M2 are not read", model=whole[1], vae=file)
    for load in (load_safetensors, lambda file: load_preview_decoder(file, mx.float32)):
        with pytest.raises(CheckpointError, match="is GGUF or has F8_E5M2, which open_checkpoint and Flux2Pipeline"):
            load(file)


def test_a_gguf_matrix_is_converted_some_rows_at_a_time(tmp_path, monkeypatch, memory):
    """Parts of a fused one hold no more than themselves."""
    tensor = torch.randn(96, 64)
    expected = formats.write_gguf(tmp_path / "w.gguf", {"double_blocks.0.img_attn.qkv.weight": tensor}, "Q4_1")
    monkeypatch.setattr(lazy, "ROWS_AT_ONCE", 7)
    before = memory()
    parts = sanitize_flux2_klein_weights(read_gguf(tmp_path / "w.gguf"))
    assert memory() == before
    made = {name: part.load() for name, part in parts.items()}
    assert memory() - before < 1.5 * sum(array.nbytes for array in made.values())
    layers = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    how = Quantization(4, 32)
    found = [dequantize(*(made[f"{layer}.{kind}"] for kind in ("weight", "scales", "biases")), how) for layer in layers]
    whole = np.concatenate([np.array(array) for array in found])
    np.testing.assert_allclose(whole, expected["double_blocks.0.img_attn.qkv.weight"].numpy(), atol=5e-3)


def test_some_layers_packed_and_others_dense(whole, tensors, tmp_path):
    """No config says the shapes, and not every layer has scales."""
    for skip in (("norm_out.linear",), ("context_embedder",), ("proj_out", "x_embedder")):
        written, expected = formats.packed(tensors["transformer"], 4, 64, skip)
        checkpoint = opened(whole[1], formats.save(written, tmp_path / "w.safetensors"))
        assert checkpoint.transformer == open_checkpoint(whole[1]).transformer
        assert_equal(loaded(checkpoint, "transformer"), expected)


def test_a_replaced_transformer_is_taken_for_what_the_model_is(whole, tensors, tmp_path):
    file = formats.save(formats.bfl_transformer(tensors["transformer"]), tmp_path / "w.safetensors")
    says = json.loads((whole[1] / "model_index.json").read_text())["is_distilled"]
    with pytest.warns(UserWarning, match=r"w\.safetensors is taken for .* else say distilled=(True|False)"):
        assert open_checkpoint(whole[1], transformer=file).is_distilled == says
    assert open_checkpoint(whole[1], transformer=file, distilled=not says).is_distilled != says


def test_a_gguf_type_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    file = tmp_path / "w.gguf"
    file.write_bytes(gguf_bytes("w", (2, 256), 19, bytes(100)))  # IQ1_S
    refused("pip install 'flux2-mlx[gguf]'", model=file, distilled=True)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_header_crashes_or_is_believed(tmp_path, data):
    """Bytes changed, cut or made up: each is read or refused, and nothing is allocated that a header merely claims."""
    file = tmp_path / "fuzzed"
    dtype = data.draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
    save_file({"img_in.weight": torch.zeros(2, 32), "b": torch.zeros(3, dtype=dtype)}, file)
    whole = data.draw(st.sampled_from([GGUF, file.read_bytes()]))
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 200)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=16))
    file.write_bytes(content)
    before = mx.get_peak_memory()
    with contextlib.suppress(CheckpointError):
        weights = read_gguf(file) if content.startswith(b"GGUF") else load_safetensors(file)
        assert all(len(weight.shape) <= 8 for weight in weights.values())
    assert mx.get_peak_memory() - before < 2**20
