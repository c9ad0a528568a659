"""The autoencoder against diffusers' AutoencoderKLFlux2."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from benchmarks.kernels import count_kernels
from flux2_mlx import AutoEncoder, AutoEncoderConfig, sanitize_vae_weights
from flux2_mlx.checkpoints.load import assign
from flux2_mlx.device import memory_limit
from flux2_mlx.models import autoencoder as module
from tests import tiny
from tests.parity.compare import EXACT, relative_error, to_mlx, to_torch


def ported(model, dtype=mx.float32) -> AutoEncoder:
    weights = sanitize_vae_weights({name: to_mlx(value) for name, value in model.state_dict().items()})
    return assign(AutoEncoder(AutoEncoderConfig.from_config(model.config)), weights, dtype, "test")


@pytest.fixture(scope="module", params=["full", "small decoder"])
def model(request):
    torch.manual_seed(6)
    extra = {"decoder_block_out_channels": (8, 16, 24, 24)} if request.param == "small decoder" else {}
    return tiny.autoencoder(**extra)


def random(shape, low=-1.0, high=1.0):
    return mx.array(np.random.default_rng(2).uniform(low, high, shape).astype(np.float32))


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def nchw(x: mx.array) -> torch.Tensor:
    return to_torch(x).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 96), (2, 48, 32), (1, 16, 80)])
def test_decoder_equals_diffusers(model, batch, height, width):
    z = random((batch, height // 8, width // 8, 32), -2, 2)
    with torch.no_grad():
        expected = model.decode(nchw(z), return_dict=False)[0]
    ours = ported(model).decoder(z)
    assert ours.shape == (batch, height, width, 3)
    assert relative_error(ours, nhwc(expected)) <= EXACT


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 96), (2, 48, 32)])
def test_encoder_equals_diffusers(model, batch, height, width):
    image = random((batch, height, width, 3))
    with torch.no_grad():
        expected = model.encode(nchw(image)).latent_dist.mode()
    ours = ported(model).encoder(image)
    assert ours.shape == (batch, height // 8, width // 8, 32)
    assert relative_error(ours, nhwc(expected)) <= EXACT


def test_attention_in_chunks_equals_attention_at_once(model, monkeypatch):
    ours, z = ported(model), random((1, 6, 10, 32), -2, 2)
    layer = ours.decoder.mid_block.attentions[0]
    x = random((1, 6, 10, layer.to_q.weight.shape[0]))
    (whole,) = layer([x])
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 7 * 60)  # 60 positions, 7 rows at a time
    assert mx.allclose(layer([x])[0], whole, rtol=0, atol=1e-6).item()
    with torch.no_grad():
        expected = model.decode(nchw(z), return_dict=False)[0]
    assert relative_error(ours.decoder(z), nhwc(expected)) <= EXACT


@pytest.mark.parametrize("size", [(144, 96), (208, 64), (16, 80)])
def test_tiles_equal_the_undivided_picture(model, monkeypatch, size):
    """Statistics are those of the whole picture, and rows meet their neighbours: no seam, at any size."""
    height, width = size
    ours, image = ported(model), random((2, height, width, 3))
    z = random((2, height // 8, width // 8, 32), -2, 2)
    latents, picture = ours.encoder(image), ours.decoder(z)
    monkeypatch.setattr(module, "TILE_BYTES", 1)
    assert relative_error(ours.encoder(image), to_torch(latents)) <= EXACT
    assert relative_error(ours.decoder(z), to_torch(picture)) <= EXACT
    with torch.no_grad():
        expected = model.decode(nchw(z), return_dict=False)[0]
    assert relative_error(ours.decoder(z), nhwc(expected)) <= EXACT


@pytest.mark.usefixtures("cpu_order")
def test_tiles_keep_to_one_activation():
    """The widest activation is the last but one, at the picture's size. The CPU backend also unfolds what it convolves,
    nine times its size, so undivided it takes much more. Within a memory limit, as stages are lent, one tile is at
    work, without one two.
    """
    torch.manual_seed(6)
    decoder = ported(tiny.autoencoder(channels=(32, 64, 64, 64))).decoder
    z = mx.zeros((1, 32, 8, 32))
    mx.eval(decoder.parameters(), z)
    peaks = {}
    before = mx.get_active_memory()
    for tile_bytes, limit in ((2**30, 2**40), (2**18, 2**40), (2**18, before)):
        with memory_limit(limit, 0):
            mx.reset_peak_memory()
            mx.eval(decoder(z, tile_bytes))
        peaks[tile_bytes, limit] = mx.get_peak_memory() - before
    widest = 256 * 64 * 64 * 4
    assert peaks[2**30, 2**40] > 20 * widest
    assert peaks[2**18, 2**40] < 6 * widest
    assert peaks[2**18, before] < 3 * widest


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_no_wait_leaves_the_device_without_work(model, monkeypatch, part):
    """What is waited for was begun, and so was something after it. The statistics of tiles are no evaluation."""
    ours = ported(model)
    x = random((1, 144, 96, 3)) if part == "encoder" else random((1, 18, 12, 32))
    expected = getattr(ours, part)(x)
    mx.eval(expected, ours.parameters())
    monkeypatch.setattr(module, "TILE_BYTES", 1)
    begun, convolutions, waits = [], [], []
    begin, wait, convolve = mx.async_eval, mx.eval, mx.conv2d

    def wait_for(*arrays):
        waits.append(len(arrays))
        assert all(id(array) in begun[:-1] for array in arrays)
        wait(*arrays)

    monkeypatch.setattr(mx, "async_eval", lambda *arrays: begun.extend(map(id, arrays)) or begin(*arrays))
    monkeypatch.setattr(mx, "eval", wait_for)
    monkeypatch.setattr(mx, "conv2d", lambda *given, **options: convolutions.append(1) or convolve(*given, **options))
    out = getattr(ours, part)(x)
    assert 20 < len(waits) < len(begun) <= len(convolutions)
    monkeypatch.undo()
    assert relative_error(out, to_torch(expected)) <= 1e-5


@pytest.mark.usefixtures("cpu_order")
def test_statistics_keep_no_tile_in_float32():
    ours = module.GroupNorm(AutoEncoderConfig(norm_num_groups=8), 64, silu=False)
    tiles = [mx.full((1, 16, 64, 64), k, mx.bfloat16) for k in range(16)]
    mx.eval(ours.parameters(), tiles)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with memory_limit(before, 0):  # in order
        norm = ours.over(tiles)
        first = norm(tiles[0])
        mx.eval(first)
    assert mx.get_active_memory() - before < 2 * tiles[0].nbytes
    assert mx.get_peak_memory() - before < 6 * tiles[0].nbytes  # a tile in float32, and what its statistics need
    assert mx.allclose(first, mx.array(-1.627), atol=1e-2).item()  # -7.5 / sqrt(21.25)


def test_norms_of_faint_inputs(model):
    """GroupNorm's epsilon only shows where the variance is small."""
    ours = ported(model).encoder.down_blocks[0].resnets[0].norm1
    theirs = model.encoder.down_blocks[0].resnets[0].norm1
    x = 1e-3 * random((1, 4, 4, 8))
    assert relative_error(ours.over([x])(x), torch.nn.functional.silu(nhwc(theirs(nchw(x))))) <= EXACT


def in_float64(x: np.ndarray, groups: int) -> np.ndarray:
    """GroupNorm without weights and epsilon."""
    batch, height, width, channels = x.shape
    grouped = x.astype(np.float64).reshape(batch, height * width, groups, channels // groups)
    mean, std = grouped.mean((1, 3), keepdims=True), grouped.std((1, 3), keepdims=True)
    return ((grouped - mean) / std).reshape(x.shape)


@pytest.mark.parametrize(("dtype", "size"), [(mx.float32, (1, 5)), (mx.float32, (12, 8)), (mx.bfloat16, (12, 8))])
def test_norms_of_a_large_mean_are_those_of_float64(dtype, size):
    """A mean of 1e3 beside a deviation of 1, in tiles that differ, with a bias that is still to be added."""
    norm = module.GroupNorm(AutoEncoderConfig(norm_num_groups=4, norm_eps=1e-30), 16, silu=False)
    rng = np.random.default_rng(4)
    tiles = [mx.array(rng.normal(1e3 + k, 1, (2, *size, 16))).astype(dtype) for k in range(3)]
    bias = mx.array(rng.normal(0, 1, 16)).astype(dtype)
    whole = np.concatenate([np.array(tile.astype(mx.float32), np.float64) for tile in tiles], 1)
    expected = in_float64(whole + np.array(bias.astype(mx.float32)), 4)
    apply = norm.over(tiles, bias)
    ours = np.concatenate([np.array(apply(tile.astype(mx.float32))) for tile in tiles], 1)
    assert np.abs(ours - expected).max() < 2e-3  # scale * 1e3 in float32 is rounded so


@pytest.mark.parametrize(("value", "finite"), [(3e4, True), (1e38, False), (np.inf, False), (np.nan, False)])
def test_norms_sum_in_float32(value, finite):
    """Sums of large numbers in bfloat16 are exact; what passes float32's, is infinite or is no number shows."""
    norm = module.GroupNorm(AutoEncoderConfig(norm_num_groups=1), 1, silu=False)
    x = value * mx.array([1, -1], mx.bfloat16).reshape(1, 1, 2, 1) * mx.ones((1, 16, 1, 1), mx.bfloat16)
    x = mx.concatenate([x[:, :, :1]] * 32 + [x[:, :, 1:]] * 32, axis=2)
    out = norm.over([x])(x)
    assert mx.isfinite(out).all().item() == finite
    if finite:
        assert mx.array_equal(mx.abs(out), mx.ones_like(out)).item()


def test_statistics_are_two_kernels():
    """Sixteen parts would pass the depth to which MLX fuses, and be written out in float32."""
    x = mx.zeros((1, 16, 32, 64), mx.bfloat16)
    parts = module.in_parts(x)
    assert len(parts) == module.PARTS == 8
    mean = mx.zeros((1, 1, 1, 64))
    mx.eval(parts, mean)
    assert count_kernels([module.add(*parts)]) == count_kernels([module.add_squared_deviations(mean, *parts)]) == 1
    assert count_kernels([module.add_residual(x, x, mx.zeros((64,)))]) == 1


def test_latent_statistics_equal_diffusers(model):
    ours, x = ported(model).bn, random((2, 4, 6, 128), -3, 3)
    mean = model.bn.running_mean.view(1, 1, 1, -1)
    std = torch.sqrt(model.bn.running_var.view(1, 1, 1, -1) + model.config.batch_norm_eps)
    assert relative_error(ours.normalize(x), (to_torch(x) - mean) / std) <= EXACT / 10
    assert relative_error(ours.denormalize(x), to_torch(x) * std + mean) <= EXACT / 10


def test_statistics_stay_in_float32(model):
    ours = ported(model, mx.bfloat16)
    assert ours.bn.running_var.dtype == mx.float32
    assert ours.decoder.conv_in.weight.dtype == mx.bfloat16


def test_sanitizing_twice_changes_nothing(model):
    once = sanitize_vae_weights({name: to_mlx(value) for name, value in model.state_dict().items()})
    twice = sanitize_vae_weights(once)
    assert once.keys() == twice.keys()
    assert all(mx.array_equal(once[name], twice[name]).item() for name in once)
