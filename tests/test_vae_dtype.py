"""The autoencoder's dtype: what Metal's convolutions lose in each, the default, and where the option arrives."""

from collections import deque

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from PIL import Image

from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.checkpoints.checkpoint import open_checkpoint
from flux2_mlx.checkpoints.load import load_autoencoder
from flux2_mlx.cli.arguments import build_parser, complete
from flux2_mlx.device import stage_dtype
from flux2_mlx.generate import main
from flux2_mlx.imaging.files import save_image
from flux2_mlx.imaging.preprocess import image_array
from flux2_mlx.imaging.preview import random_image
from flux2_mlx.models import autoencoder as module
from flux2_mlx.training.latent_cache import LatentCache
from flux2_mlx.training.options import TrainingOptions
from flux2_mlx.training.run import open_pipeline

SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16}

# F(6x6, 3x3) of Lavin and Gray (arXiv:1509.09308), with the matrices of MLX's backend/metal/kernels/conv.metal.
B = np.array(
    [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, -1, 0.5, -0.5, 2, -2, -1],
        [-5.25, 1, 1, 0.25, 0.25, 4, 4, 0],
        [0, -4.25, 4.25, -2.5, 2.5, -2.5, 2.5, 5.25],
        [5.25, -4.25, -4.25, -1.25, -1.25, -5, -5, 0],
        [0, 1, -1, 2, -2, 0.5, -0.5, -5.25],
        [-1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ],
    np.float32,
)
A = np.array([[x**k for k in range(6)] for x in (0, 1, -1, 2, -2, 0.5, -0.5)] + [[0] * 5 + [1]], np.float32)
G = np.array(
    [
        [1, 0, 0],
        [-2 / 9, -2 / 9, -2 / 9],
        [-2 / 9, 2 / 9, -2 / 9],
        [1 / 90, 1 / 45, 2 / 45],
        [1 / 90, -1 / 45, 2 / 45],
        [32 / 45, 16 / 45, 8 / 45],
        [32 / 45, -16 / 45, 8 / 45],
        [0, 0, 1],
    ],
    np.float32,
)


def transformed(matrix: np.ndarray, x: mx.array, dtype: mx.Dtype) -> mx.array:
    """matrix x matrix^T over x's axes -3 and -2, computed in float32 and stored in dtype, as Metal's kernels do it."""
    m, x = mx.array(matrix), x.astype(mx.float32)
    return mx.einsum("ia,...abc,jb->...ijc", m, x, m).astype(dtype)


def winograd(conv, rows: mx.array) -> mx.array:
    """What models.autoencoder.conv3x3 gives, by F(6x6, 3x3), with its three intermediates in the dtype of ``rows``."""
    batch, height, width, channels = rows.shape[0], rows.shape[1] - 2, rows.shape[2], rows.shape[3]
    down, across = -(-height // 6), -(-width // 6)
    padded = mx.pad(rows, [(0, 0), (0, 6 * down - height), (1, 6 * across - width + 1), (0, 0)])
    row, step = padded.shape[2] * channels, padded.shape[1] * padded.shape[2] * channels
    strides = (step, 6 * row, 6 * channels, row, channels, 1)
    patches = mx.as_strided(mx.contiguous(padded), (batch, down, across, 8, 8, channels), strides)
    seen = transformed(B.T, patches, rows.dtype).reshape(-1, 64, channels).transpose(1, 0, 2)
    kernel = transformed(G, conv.weight, rows.dtype).reshape(-1, 64, channels).transpose(1, 2, 0)
    product = (seen.astype(mx.float32) @ kernel.astype(mx.float32)).astype(rows.dtype)
    product = product.transpose(1, 0, 2).reshape(batch, down, across, 8, 8, -1)
    out = transformed(A.T, product, rows.dtype).transpose(0, 1, 3, 2, 4, 5).reshape(batch, 6 * down, 6 * across, -1)
    return out[:, :height, :width]


def levels(decoder, z: mx.array) -> np.ndarray:
    """The image, in levels of 255."""
    return np.array(decoder(z).astype(mx.float32)) * 127.5


@pytest.mark.parametrize("size", [(1, 12, 18), (2, 7, 16)])
def test_the_emulation_is_a_convolution(size):
    rng, (batch, height, width) = np.random.default_rng(1), size
    conv = nn.Conv2d(8, 4, 3, padding=1)
    rows = mx.array(rng.standard_normal((batch, height + 2, width, 8), np.float32))
    expected = module.conv3x3(conv, rows)
    assert winograd(conv, rows).shape == expected.shape
    assert mx.allclose(winograd(conv, rows), expected, rtol=0, atol=1e-4).item()


def test_float32_survives_winograd_and_bfloat16_does_not(monkeypatch):
    """nano's decoder, as Metal would compute it."""
    checkpoint = open_checkpoint("nano")
    exact, brain = (load_autoencoder(checkpoint, dtype) for dtype in (mx.float32, mx.bfloat16))
    z = exact.encoder(image_array(random_image(np.random.default_rng(3)))[:, :64, :64])
    expected = levels(exact.decoder, z)
    direct = np.abs(levels(brain.decoder, z) - expected).max()
    monkeypatch.setattr(module, "conv3x3", winograd)
    errors = {model.dtype: np.abs(levels(model.decoder, z) - expected).max() for model in (exact, brain)}
    assert errors[mx.float32] < 1
    assert errors[mx.bfloat16] > 2 * direct > 1


# ------------------------------------------------------------------------------------------------ default and option


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("flux2_mlx.device.on_gpu", lambda: True)


def test_the_default_on_a_cpu_follows_the_transformer():
    found = [stage_dtype("autoencoder", dtype) for dtype in (mx.float32, mx.float16, mx.bfloat16)]
    assert found == [mx.float32, mx.bfloat16, mx.bfloat16]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_default_on_a_gpu_is_float32(checkpoint, gpu, dtype):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, dtype=dtype)
    assert (pipe.autoencoder.dtype, pipe.vae_dtype, pipe.options.vae_dtype) == (mx.float32, mx.float32, "float32")
    assert stage_dtype("text_encoder", pipe.dtype) == (mx.float32 if dtype == "float32" else mx.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", mx.bfloat16, torch.bfloat16])
def test_it_may_be_asked_for(checkpoint, dtype):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, dtype="float32", vae_dtype=dtype)
    assert (pipe.dtype, pipe.vae_dtype, pipe.autoencoder.dtype) == (mx.float32, mx.bfloat16, mx.bfloat16)
    result = pipe("a red fox", **SMALL)
    assert result.settings[0].vae_dtype == "bfloat16"
    assert result.images[0].size == (80, 64)


@pytest.mark.parametrize("dtype", ["float16", "int8", mx.float16, torch.float64])
def test_float16_is_refused(checkpoint, dtype):
    with pytest.raises(InputError, match="vae_dtype must be one of float32, bfloat16, got"):
        Flux2Pipeline.from_pretrained(checkpoint, vae_dtype=dtype)


def test_the_command_plans_in_it(capsys):
    def decoder(*options: str) -> list[float]:
        assert main(["--plan", "--dtype", "bfloat16", *options]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("decoder"))
        return [float(word) for word in line.split()[1:3]]

    brain, exact = decoder(), decoder("--vae-dtype", "float32")
    assert exact[0] == pytest.approx(2 * brain[0], abs=0.02)
    assert exact[1] > brain[1]


def test_a_folder_is_planned_in_it(checkpoint, gpu):
    brain, exact = (
        Flux2Pipeline.from_pretrained(checkpoint, dtype="bfloat16", vae_dtype=dtype).plan(64, 80, references=[(64, 64)])
        for dtype in ("bfloat16", None)
    )
    for name in ("references", "decoder"):
        small, large = (next(s for s in plan.stages if s.name == name) for plan in (brain, exact))
        assert large.weights == 2 * small.weights
        assert large.activation_bytes > small.activation_bytes


def test_another_model_keeps_the_dtypes_of_the_replayed_image(checkpoint, tmp_path):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, vae_dtype="bfloat16")
    (step,) = pipe.stream("a red fox", **SMALL | {"num_steps": 1})
    file = save_image(step.picture(), tmp_path / "fox.png", step.settings.metadata(), step.settings.parameters())
    for more in ([], ["--model", "nano"]):
        assert (
            complete(build_parser().parse_args(["--from-image", str(file), *more]), None).model.vae_dtype == "bfloat16"
        )


def test_training_encodes_in_it(checkpoint, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "fox.png")
    files, encoded = [], []
    for dtype in ("float32", "bfloat16"):
        options = TrainingOptions(
            model=str(checkpoint), data=str(tmp_path), output=str(tmp_path / "run"), dtype="float32", vae_dtype=dtype
        )
        pipe = open_pipeline(options, allow_distilled=True, limit=None, progress=False)
        cache = LatentCache(pipe, tmp_path / "latents")
        deque(cache.encode([], [(tmp_path / "fox.png", (64, 64))]), maxlen=0)
        files.append(cache._latents_file(tmp_path / "fox.png", (64, 64)))
        encoded.append(cache.latents(tmp_path / "fox.png", (64, 64)))
    assert files[0] != files[1]
    assert 0 < mx.abs(encoded[0] - encoded[1]).max().item() < 0.2
