"""Names, shapes and counts of the full-size models, against diffusers and transformers built without memory, and
against the published tables. Nothing here allocates a weight.
"""

import mlx.core as mx
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from mlx.utils import tree_flatten
from transformers import Qwen3Config as Theirs
from transformers import Qwen3ForCausalLM

from flux2_mlx import AutoEncoder, AutoEncoderConfig, FluxKlein, FluxKleinParams, Qwen3Config, Qwen3TextEncoder
from flux2_mlx.checkpoints.sanitize import sanitize_vae_weights
from flux2_mlx.models.names.qwen3 import is_read_by_klein

TRANSFORMERS = {
    "4b": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "9b": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
}
TEXT_ENCODERS = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728},
    "9b": {"hidden_size": 4096, "intermediate_size": 12288},
}


def shapes(module) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(module.parameters())}


def count(module) -> int:
    return sum(array.size for _, array in tree_flatten(module.parameters()))


def on_paper(build) -> dict[str, tuple[int, ...]]:
    """State of a torch module that is built on the meta device."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build().state_dict().items()}


@pytest.fixture(autouse=True)
def nothing_allocated(memory):
    before = memory()
    yield
    assert memory() - before < 2**20


@pytest.mark.parametrize(
    ("size", "params", "parameters", "tensors"),
    [
        ("4b", FluxKleinParams.klein_4b(), 3_875_544_576, 169),
        ("9b", FluxKleinParams.klein_9b(), 9_078_581_248, 233),
    ],
)
def test_transformer(size, params, parameters, tensors):
    config = {**TRANSFORMERS[size], "attention_head_dim": 128, "guidance_embeds": False}
    assert FluxKleinParams.from_config(config) == params
    ours = FluxKlein(params)
    assert shapes(ours) == on_paper(lambda: Flux2Transformer2DModel(in_channels=128, mlp_ratio=3.0, **config))
    assert count(ours) == parameters
    assert len(shapes(ours)) == tensors
    assert (params.mlp_hidden, params.head_dim) == (3 * params.hidden_size, 128)


@pytest.mark.parametrize(
    ("size", "config", "parameters"),
    [("4b", Qwen3Config(), 3_114_088_192), ("9b", Qwen3Config.qwen3_8b(), 5_831_883_520)],
)
def test_text_encoder(size, config, parameters):
    written = Theirs(
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_theta=1e6,
        **TEXT_ENCODERS[size],
    )
    assert Qwen3Config.from_config(written.to_dict()) == config
    ours = Qwen3TextEncoder(config)
    needed = {
        name: shape for name, shape in on_paper(lambda: Qwen3ForCausalLM(written)).items() if is_read_by_klein(name)
    }
    assert shapes(ours) == needed
    assert count(ours) == parameters
    assert len(ours.model.layers) == 27


@pytest.mark.parametrize(
    ("config", "options", "parameters"),
    [
        (AutoEncoderConfig.flux2(), {}, 84_046_115),
        (AutoEncoderConfig.flux2_small_decoder(), {"decoder_block_out_channels": (96, 192, 384, 384)}, 62_373_091),
    ],
)
def test_autoencoder(config, options, parameters):
    options = {"block_out_channels": (128, 256, 512, 512), **options}
    theirs = on_paper(lambda: AutoencoderKLFlux2(**options))
    assert AutoEncoderConfig.from_config({**options, "latent_channels": 32}) == config
    ours = AutoEncoder(config)
    renamed = sanitize_vae_weights({name: mx.zeros(shape) for name, shape in theirs.items()})
    assert len(theirs) == 251
    assert shapes(ours) == {name: weight.shape for name, weight in renamed.items()}
    statistics = 2 * config.packed_channels
    assert count(ours) == parameters + statistics
