"""TAEF2's decoder against its layers in torch, in random weights under every name that they come in."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flux2_mlx import CheckpointError, Flux2Pipeline
from flux2_mlx.checkpoints.files import load_safetensors
from flux2_mlx.checkpoints.load import load_preview_decoder
from flux2_mlx.generate import main
from flux2_mlx.models.names.autoencoder import sanitize_taef2_weights
from flux2_mlx.sampling.latents import unpack_latents
from tests.parity.compare import EXACT, relative_error

CONVOLUTION = {"kernel_size": 3, "padding": 1}


class Block(nn.Module):
    def __init__(self, pools):
        super().__init__()
        layers = [nn.Conv2d(64, 64, **CONVOLUTION) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        if pools:
            ends = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(ends[0], nn.GroupNorm(4, 256), nn.ReLU(), ends[1])
        self.pools = pools

    def forward(self, x):
        x = x + self.pool(x) if self.pools else x
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(x / 3)


def reference():
    torch.manual_seed(0)
    layers = [Clamp(), nn.Conv2d(32, 64, **CONVOLUTION), nn.ReLU()]
    for pools in (True, False, False):
        layers += [*(Block(pools) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(64, 64, **CONVOLUTION, bias=False)]
    return nn.Sequential(*layers, Block(False), nn.Conv2d(64, 3, **CONVOLUTION)).eval()


@pytest.fixture(scope="module")
def theirs():
    return reference()


@pytest.fixture
def file(theirs, tmp_path):
    save_file(theirs.state_dict(), tmp_path / "taef2.safetensors")
    return tmp_path / "taef2.safetensors"


NAMES = {
    "taesd's": lambda name: name,
    "taesd's whole": lambda name: f"decoder.{name}",
    "ComfyUI's": lambda name: f"taesd_decoder.{name}",
    "diffusers'": lambda name: f"decoder.layers.{int(name.partition('.')[0]) - 1}.{name.partition('.')[2]}",
}


@pytest.mark.parametrize("named", NAMES)
def test_decoder(theirs, tmp_path, named):
    weights = {NAMES[named](name): weight for name, weight in theirs.state_dict().items()}
    path = tmp_path / "taef2.safetensors"
    save_file({**weights, "encoder.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    z = torch.randn(2, 32, 5, 7, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        expected = theirs(z).permute(0, 2, 3, 1)
    ours = load_preview_decoder(path, mx.float32)(mx.array(z.permute(0, 2, 3, 1).numpy()))
    assert ours.shape == (2, 40, 56, 3)
    assert relative_error(ours, expected) <= EXACT


def test_sanitizing_twice_changes_nothing(file):
    once = sanitize_taef2_weights(load_safetensors(file))
    twice = sanitize_taef2_weights(once)
    assert once.keys() == twice.keys()
    assert all(once[name] is twice[name] for name in once)


def test_it_draws_previews(theirs, file, checkpoint):
    """Of latents whose statistics are not undone."""
    pipe = Flux2Pipeline.from_pretrained(checkpoint, preview_decoder=file)
    step = next(pipe.stream("a", height=64, width=80, num_steps=2, max_sequence_length=16, seed=1))
    z = torch.from_numpy(np.array(unpack_latents(step.denoised, 64, 80))).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = (theirs(z)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(step.preview(), np.float32) - expected).max() <= 1


def test_what_is_no_preview_decoder_is_refused(checkpoint, tmp_path, file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--width", "80", "--height", "64", "--steps", "1", "--max-sequence-length", "16", "--quiet"]
    command = ["a", "--model", str(checkpoint), *small, "--preview", "now.png", "--preview-decoder"]
    other = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    for name, expected in (("nowhere.safetensors", "no preview decoder 'nowhere"), (str(other), "as TAEF2's decoder")):
        assert main([*command, name]) == 2
        assert expected in capsys.readouterr().err
    assert main([*command, str(file)]) == 0
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_preview_decoder(tmp_path, mx.float32)
