"""Packing, position ids and noise."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from hypothesis import given
from hypothesis import strategies as st

from flux2_mlx import image_ids, pack_latents, text_ids, torch_randn, unpack_latents
from flux2_mlx.sampling.latents import initial_noise, patchify, unpatchify

sides = st.integers(1, 9).map(lambda n: 16 * n)
batches = st.integers(1, 3)


@given(batches, sides, sides, st.integers(1, 5))
def test_patchify_and_back_loses_nothing(batch, height, width, channels):
    z = mx.arange(batch * height * width * channels // 64).reshape(batch, height // 8, width // 8, channels)
    assert mx.array_equal(unpatchify(patchify(z)), z).item()


@given(batches, sides, sides)
def test_packing_and_back_loses_nothing(batch, height, width):
    z = mx.arange(batch * height * width // 2).reshape(batch, height // 8, width // 8, 32)
    tokens = pack_latents(z)
    assert tokens.shape == (batch, height * width // 256, 128)
    assert mx.array_equal(unpack_latents(tokens, height, width), z).item()


@given(batches, sides, sides)
def test_packing_equals_diffusers(batch, height, width):
    z = torch.arange(batch * height * width // 2).reshape(batch, 32, height // 8, width // 8)
    expected = Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(z))
    ours = pack_latents(mx.array(z.permute(0, 2, 3, 1).contiguous().numpy()))
    assert np.array_equal(np.array(ours), expected.numpy())


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.integers(1, 40))
def test_position_ids_equal_diffusers(sizes, length):
    (height, width), *references = sizes
    expected = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 128, height // 16, width // 16))
    assert np.array_equal(np.array(image_ids(height, width)), expected.numpy())
    expected = Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, length, 8))
    assert np.array_equal(np.array(text_ids(length)), expected.numpy())
    if references:
        expected = Flux2KleinPipeline._prepare_image_ids([torch.zeros(1, 128, h // 16, w // 16) for h, w in references])
        ours = mx.concatenate([image_ids(h, w, reference=k) for k, (h, w) in enumerate(references)], axis=1)
        assert np.array_equal(np.array(ours), expected.numpy())


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**40 + 5])
@pytest.mark.parametrize(
    "shape", [(1,), (2,), (15,), (16,), (17,), (31,), (100,), (105,), (3, 7, 5), (1, 128, 4, 6), (1, 128, 64, 64)]
)
def test_noise_equals_torch(shape, seed):
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    ours = torch_randn(shape, seed)
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= 1e-6


def test_noise_equals_the_published_values():
    expected = [-1.1258398, -1.1523602, -0.2505786, -0.4338788, 0.8487104, 0.6920092, -0.3160128, -2.1152194]
    assert np.allclose(torch_randn((1, 128, 4, 4), 0).reshape(-1)[:8], expected, rtol=0, atol=1e-6)
    assert torch_randn((1, 128, 32, 32), 42).sum(dtype=np.float64) == pytest.approx(22.995362, abs=0.05)


def test_initial_noise_is_packed_torch_noise():
    expected = torch.randn((1, 128, 4, 6), generator=torch.Generator("cpu").manual_seed(5))
    ours = initial_noise(5, 64, 96)
    assert np.abs(np.array(ours) - Flux2KleinPipeline._pack_latents(expected).numpy()).max() <= 1e-6


def test_mlx_noise_depends_on_the_seed_alone():
    first = initial_noise(5, 64, 96, noise="mlx")
    mx.random.normal((7,))
    assert mx.array_equal(first, initial_noise(5, 64, 96, noise="mlx")).item()
    assert not mx.array_equal(first, initial_noise(6, 64, 96, noise="mlx")).item()
    assert first.shape == (1, 24, 128)
    assert abs(first.mean().item()) < 0.1
    assert first.std().item() == pytest.approx(1, abs=0.1)
