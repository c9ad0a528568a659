"""Bonsai Image 4B: the layout of its two MLX repositories, and weights of one bit and two."""

import fnmatch
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux2_mlx import RELEASED, Flux2Pipeline, InputError, open_checkpoint
from flux2_mlx.checkpoints import load as loading
from flux2_mlx.checkpoints.write import convert
from flux2_mlx.device import weight_bytes, weights_of
from flux2_mlx.generate import main
from flux2_mlx.quantization import recipes
from flux2_mlx.quantization.layers import QuantizedEmbedding, QuantizedLinear
from flux2_mlx.quantization.packing import dequantize, widen_one_bit
from flux2_mlx.quantization.spec import Quantization
from flux2_mlx.runtime.released import download_bytes, released_modules
from tests import formats, tiny

SMALL = {"height": 64, "width": 64, "seed": 1, "max_sequence_length": 24, "output_type": "np"}
# Bytes of data in the files on the Hub (November 2026): each file's size less its header.
TRANSFORMER, TEXT_ENCODER = 1_425_226_752, 2_262_920_192
REPOSITORIES = {"bonsai-4b": 3_888_274_639, "bonsai-4b-1bit": 3_428_210_775}  # whole, two tokenizers among it


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Groups of 128 need inputs of 128."""
    folder = tmp_path_factory.mktemp("klein") / "klein"
    tiny.pipeline(heads=4, depth=1, depth_single=1, seed=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[2, 1])
def bonsai(request, original, tmp_path_factory):
    """(folder, bits, what the transformer's weights stand for)"""
    folder = tmp_path_factory.mktemp("bonsai") / "bonsai"
    return folder, request.param, formats.bonsai(original, folder, request.param)


@pytest.fixture
def old_mlx(monkeypatch):
    """MLX before 0.32.4, which multiplies with no weights of one bit."""
    monkeypatch.setattr(recipes, "has_one_bit", lambda: False)
    loading.tell_one_bit.cache_clear()


def dense(module):
    """The weights in float32 by name, and the specs of the packed ones."""
    weights, specs = weights_of(loading.load_all(module)), {}
    for path, layer in module.named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
            parts = [weights.pop(f"{path}.{kind}") for kind in ("weight", "scales", "biases")]
            weights[f"{path}.weight"], specs[path] = dequantize(*parts, layer.spec), layer.spec
    return {name: np.array(weight.astype(mx.float32)) for name, weight in weights.items()}, specs


def assert_values(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_allclose(weight, expected[name].double().numpy(), rtol=1e-6, atol=1e-8, err_msg=name)


def test_weights_are_those_that_numpy_decodes(bonsai):
    folder, bits, expected = bonsai
    checkpoint = open_checkpoint(folder)
    found, specs = dense(loading.load_transformer(checkpoint, mx.float32))
    assert_values(found, expected)
    assert set(specs.values()) == {Quantization(bits, 128)}
    assert len(specs) == 12 + 2  # of a double and a single block
    _, specs = dense(loading.load_text_encoder(checkpoint, mx.float32))
    assert set(specs.values()) == {Quantization(4, 64)}
    assert checkpoint.is_distilled
    assert not checkpoint.has_kv_cache


def test_without_kernels_of_one_bit_two_hold_the_same(bonsai, old_mlx):
    folder, bits, expected = bonsai
    checkpoint = open_checkpoint(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            found, specs = dense(loading.load_transformer(checkpoint, mx.float32))
    assert_values(found, expected)
    assert set(specs.values()) == {Quantization(2, 128)}
    assert [("held in 2 bits: the same values" in str(one.message)) for one in told] == [True] * (bits == 1)


def test_widening_keeps_every_code():
    words = np.random.default_rng(0).integers(0, 2**32, (3, 5), np.uint32)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    wide = np.array(widen_one_bit(mx.array(words)))
    assert wide.dtype == np.uint32
    np.testing.assert_array_equal(np.stack([wide >> shift & 3 for shift in range(0, 32, 2)], -1).reshape(3, -1), bits)


def test_it_draws_and_tells_that_it_edits_poorly(bonsai, tmp_path):
    folder, _, _ = bonsai
    pipe = Flux2Pipeline.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = pipe("a red fox", **SMALL)
    assert first.settings[0].num_steps == 4
    assert np.isfinite(first.images).all()
    with pytest.warns(UserWarning, match=r"is Bonsai Image, which was trained to draw from text alone: .* klein-4b"):
        pipe("make it blue", image=Image.new("RGB", (64, 64)), num_steps=1, **SMALL)
    convert(open_checkpoint(folder), tmp_path / "own")  # in this library's layout, the bits kept
    both = [open_checkpoint(model) for model in (folder, tmp_path / "own")]
    own, written = (dense(loading.load_transformer(checkpoint, mx.float32)) for checkpoint in both)
    assert own[1] == written[1]
    for name, weight in own[0].items():
        np.testing.assert_array_equal(weight, written[0][name])


def test_it_is_fetched_by_name_and_no_more_than_is_needed(bonsai, tmp_path, monkeypatch):
    source, bits, _ = bonsai
    (source / "transformer-gemlite-int2").mkdir(exist_ok=True)
    (source / "transformer-gemlite-int2" / "other.safetensors").write_bytes(b"of another runtime")

    def snapshot(repo, *, revision=None, allow_patterns, **_):
        assert repo == RELEASED[name]
        for file in source.rglob("*"):
            inside = file.relative_to(source).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns):
                (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / inside)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    name = "bonsai-4b" if bits == 2 else "bonsai-4b-1bit"
    checkpoint = open_checkpoint(name)
    assert checkpoint.is_bonsai
    assert checkpoint.is_distilled
    fetched = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    assert fetched == {
        "transformer-packed-mflux/diffusion_pytorch_model.safetensors",
        "text_encoder-mlx-4bit/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    other = open_checkpoint(name, transformer=source / "transformer-packed-mflux", distilled=True)
    assert not other.is_bonsai  # nobody knows of a transformer that is given
    assert Path(other.sources["text_encoder"].name) == tmp_path / "text_encoder-mlx-4bit"


@pytest.mark.parametrize(("name", "bits"), [("bonsai-4b", 2), ("bonsai-4b-1bit", 1)])
def test_bytes_are_those_of_the_files_on_the_hub(name, bits, capsys, old_mlx):
    """Shapes, bits, groups and dtypes that the sizes of published files confirm; of one bit the difference is that of
    the two repositories, up to a kilobyte of configs.
    """
    _, transformer, autoencoder = released_modules(name, mx.bfloat16, {}, mx.bfloat16)
    weights = weights_of(transformer)
    assert sum(name.endswith(".scales") for name in weights) == 5 * 12 + 20 * 2  # of double and of single blocks
    codes = sum(array.nbytes for name, array in weights.items() if array.dtype == mx.uint32)
    assert weight_bytes(transformer) == TRANSFORMER  # one bit is held in two here
    stored = TRANSFORMER - (codes // 2 if bits == 1 else 0)
    download = download_bytes(name)
    assert abs(download - stored - TEXT_ENCODER - weight_bytes(autoencoder)) < 1e-3 * TEXT_ENCODER
    assert 0 < REPOSITORIES[name] - download < 40e6  # tokenizers
    assert REPOSITORIES["bonsai-4b"] - REPOSITORIES["bonsai-4b-1bit"] == pytest.approx(codes // 2, abs=2e3)
    assert main(["--plan", "--model", name]) == 0
    assert f"download: up to {REPOSITORIES[name] / 1e9:.1f} GB" in capsys.readouterr().out


def test_one_bit_is_for_weights_that_were_trained_to_it():
    with pytest.raises(InputError, match=r"quantize must be 2, 3, 4, 5, 6, 8 bits or one of mxfp4, .* got 1"):
        Quantization.parse(1)
