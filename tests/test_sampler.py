"""Schedules and the Euler step."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from flux2_mlx import FluxSampler, FluxSamplerConfig, InputError
from flux2_mlx.sampling.guidance import apply_cfg
from flux2_mlx.sampling.schedules import (
    check_sigmas,
    comfy_sigmas,
    custom_sigmas,
    empirical_mu,
    flux2_sigmas,
    linear_sigmas,
    schedule_sigmas,
)


def diffusers_sigmas(sigmas, num_tokens, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(image_seq_len=num_tokens, num_steps=num_steps))
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize("num_tokens", [1, 24, 256, 1024, 4096, 4300, 4301, 4624, 16384])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 50, 200])
def test_official_schedule_equals_diffusers(num_tokens, num_steps):
    assert empirical_mu(num_tokens, num_steps) == pytest.approx(
        compute_empirical_mu(image_seq_len=num_tokens, num_steps=num_steps), rel=1e-12
    )
    expected = diffusers_sigmas(np.linspace(1.0, 1 / num_steps, num_steps), num_tokens, num_steps)
    ours = np.array(flux2_sigmas(num_steps, num_tokens))
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) <= 1e-6


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (256, [1, 0.9553908, 0.8771343, 0.7041117, 0]),
        (1024, [1, 0.9580854, 0.8839819, 0.7174966, 0]),
        (4096, [1, 0.9673840, 0.9081439, 0.7671999, 0]),
        (4624, [1, 0.9119743, 0.7754545, 0.5351318, 0]),
        (16384, [1, 0.9869856, 0.9619473, 0.8939154, 0]),
    ],
)
def test_official_schedule_equals_the_published_values(num_tokens, expected):
    assert flux2_sigmas(4, num_tokens) == pytest.approx(expected, abs=2e-7)


def test_custom_sigmas_are_shifted_as_in_diffusers():
    levels = [1.0, 0.6, 0.1]
    assert custom_sigmas(levels, 1024) == pytest.approx(diffusers_sigmas(levels, 1024, 3).tolist(), abs=1e-6)


@pytest.mark.parametrize("levels", [[], [1.0, 0.5, 0.5], [0.5, 1.0], [1.2, 0.5], [1.0, 0.0], [1.0, float("nan")]])
def test_custom_sigmas_that_do_not_fall_are_refused(levels):
    with pytest.raises(InputError, match="sigmas must fall"):
        check_sigmas(levels)


def test_other_schedules():
    assert linear_sigmas(4) == [1, 0.75, 0.5, 0.25, 0]
    assert comfy_sigmas(4) == pytest.approx([1, 0.957654, 0.882881, 0.715325, 0], abs=1e-6)
    assert schedule_sigmas("linear", 4, 1024) == linear_sigmas(4)
    assert schedule_sigmas("comfy", 4, 1024) == comfy_sigmas(4)
    assert schedule_sigmas("flux2", 4, 1024) == flux2_sigmas(4, 1024)
    assert schedule_sigmas("power", 4, 1024) == [1, 0.9375, 0.75, 0.4375, 0]  # flux2.c's --power
    with pytest.raises(InputError, match="schedule must be one of flux2, linear, comfy, power, got 'karras'"):
        schedule_sigmas("karras", 4, 1024)


def test_sampler_timesteps():
    assert FluxSampler.schnell().timesteps() == [1, 0.75, 0.5, 0.25, 0]
    assert FluxSampler(FluxSamplerConfig.klein()).timesteps(2) == [1, 0.5, 0]
    shifted = FluxSampler(FluxSamplerConfig(is_schnell=False, shift=3.0)).timesteps()
    assert shifted == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    with pytest.raises(InputError, match="at least 1, got 0"):
        FluxSampler.schnell().timesteps(0)


def test_sampler_step_equals_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=np.array([1.0, 0.75, 0.5, 0.25]))
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 2, 6, 128)).astype(np.float32)
    import torch

    expected = scheduler.step(torch.from_numpy(v), scheduler.timesteps[0], torch.from_numpy(x)).prev_sample
    ours = FluxSampler.schnell().step(mx.array(x), mx.array(v), 1.0, 0.75)
    assert np.allclose(np.array(ours), expected.numpy(), rtol=0, atol=1e-6)


def test_sampler_steps_in_float32_whatever_the_velocity():
    x = FluxSampler.schnell().step(mx.zeros((1, 2, 4)), mx.ones((1, 2, 4), mx.bfloat16), 1.0, 0.9)
    assert x.dtype == mx.float32


def test_sample_prior():
    key = mx.random.key(3)
    sampler = FluxSampler.schnell()
    x = sampler.sample_prior((1, 1024, 128), key=key)
    assert x.shape == (1, 1024, 128)
    assert abs(x.mean().item()) < 0.02
    assert x.std().item() == pytest.approx(1, abs=0.02)
    assert mx.array_equal(x, sampler.sample_prior((1, 1024, 128), key=key)).item()
    assert not mx.array_equal(sampler.sample_prior((4,)), sampler.sample_prior((4,))).item()


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_equals_diffusers(rescale):
    rng = np.random.default_rng(0)
    v, away = (rng.standard_normal((2, 5, 8)).astype(np.float32) for _ in range(2))
    guided = torch.tensor(away) + 4 * torch.tensor(v - away)
    expected = rescale_noise_cfg(guided, torch.tensor(v), rescale)
    assert np.array(apply_cfg(mx.array(v), mx.array(away), 4.0, rescale)) == pytest.approx(expected.numpy(), abs=1e-5)


def test_every_schedule_begins_at_one():
    """Exactly: a hair above it, the first step would be outside of all levels, 0 to 1, and go without guidance."""
    counts = range(1, 60)
    assert all(flux2_sigmas(steps, tokens)[0] == 1.0 for steps in counts for tokens in range(16, 4097, 16))
    assert all(comfy_sigmas(steps)[0] == 1.0 for steps in counts)
    assert all(schedule_sigmas("power", steps, 1024)[0] == 1.0 for steps in counts)
