"""The public names, and the loop that users write by hand."""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import pytest

import flux2_mlx
from flux2_mlx import (
    AutoEncoder,
    AutoEncoderConfig,
    Decoder,
    Encoder,
    FluxKlein,
    FluxKleinParams,
    FluxSampler,
    FluxSamplerConfig,
    InputError,
    QuantizedFluxKlein,
    Qwen3Config,
    Qwen3TextEncoder,
    image_ids,
    text_ids,
    unpack_latents,
)
from flux2_mlx.models.taef2 import TinyDecoder


def test_every_public_name_exists():
    assert len(set(flux2_mlx.__all__)) == len(flux2_mlx.__all__)
    assert all(hasattr(flux2_mlx, name) for name in flux2_mlx.__all__)


def test_defaults_are_klein_4b():
    params = FluxKleinParams()
    assert params == FluxKleinParams.klein_4b()
    assert (params.in_channels, params.hidden_size, params.txt_embed_dim, params.num_heads) == (128, 3072, 7680, 24)
    assert (params.mlp_ratio, params.mlp_hidden, params.depth, params.depth_single) == (3.0, 9216, 5, 20)
    assert (params.head_dim, params.axes_dims_rope, params.rope_theta, params.eps) == (
        128,
        (32, 32, 32, 32),
        2000,
        1e-6,
    )
    with pytest.raises(AttributeError):
        params.depth = 6
    assert (
        FluxSamplerConfig() == FluxSamplerConfig(num_steps=4, is_schnell=True, shift=1.0) == FluxSamplerConfig.klein()
    )


def test_the_loop_is_constructed_as_written(memory):
    before = memory()
    text_encoder = Qwen3TextEncoder(Qwen3Config())
    transformer = FluxKlein(FluxKleinParams())
    vae = Decoder(AutoEncoderConfig.flux2())
    assert len(text_encoder.model.layers) == 27
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (5, 20)
    assert vae.conv_in.weight.shape == (512, 3, 3, 32)
    assert memory() - before < 2**20


def test_the_loop():
    """Small widths, real token counts: a picture of 512 x 512 from 512 text tokens."""
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    text_encoder = Qwen3TextEncoder(Qwen3Config(vocab_size=200, head_dim=8, **width))
    transformer = FluxKlein(
        FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=48, mlp_ratio=0.25, depth=1, depth_single=1)
    )
    vae = Decoder(AutoEncoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4))
    input_ids = mx.random.randint(0, 200, (1, 512))
    txt_ids, img_ids = text_ids(512), image_ids(512, 512)

    sampler = FluxSampler.schnell()

    text_embed = text_encoder(input_ids)
    latents = sampler.sample_prior((1, 1024, 128))
    rope_cos, rope_sin = FluxKlein.compute_rope(txt_ids, img_ids)
    for t, t_prev in pairwise(sampler.timesteps()):
        v = transformer.forward_with_rope(latents, text_embed, mx.array([t]), rope_cos, rope_sin)
        latents = sampler.step(latents, v, t, t_prev)
    image = vae(unpack_latents(latents, height=512, width=512))

    assert text_embed.shape == (1, 512, 48)
    assert v.shape == (1, 1024, 128)
    assert rope_cos.shape == (1, 1536, 64)
    assert image.shape == (1, 512, 512, 3)
    assert mx.isfinite(image).all().item()


def test_the_encoder_goes_the_way_back():
    encoder = Encoder(AutoEncoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4))
    assert encoder(mx.zeros((2, 64, 96, 3))).shape == (2, 8, 12, 32)


def test_position_ids_without_a_batch_axis_serve_every_row():
    cos, _ = FluxKlein.compute_rope(text_ids(3)[0], image_ids(32, 32)[0])
    assert cos.shape == (1, 7, 64)
    batched, _ = FluxKlein.compute_rope(text_ids(3), mx.concatenate([image_ids(32, 32)] * 2))
    assert batched.shape == (2, 7, 64)
    assert mx.array_equal(batched[1], cos[0]).item()


@pytest.mark.parametrize("shape", [(3,), (1, 2, 5), (1, 1, 2, 4)])
def test_other_position_ids_are_refused(shape):
    with pytest.raises(InputError, match="position ids must be"):
        FluxKlein.compute_rope(mx.zeros(shape, mx.int32), image_ids(32, 32))


def test_params_that_do_not_fit_together():
    with pytest.raises(InputError, match=r"hidden_size must be num_heads \* head_dim = 3072, got 3000"):
        FluxKleinParams(hidden_size=3000)
    with pytest.raises(InputError, match="axes_dims_rope must be four even sizes that sum to head_dim 128"):
        FluxKleinParams(axes_dims_rope=(16, 56, 56))


SHALLOW = FluxKleinParams(depth=1, depth_single=1)
BUILT = {
    Qwen3TextEncoder: lambda: Qwen3TextEncoder(Qwen3Config(vocab_size=64, tapped_layers=(1, 2, 3))),
    FluxKlein: lambda: FluxKlein(SHALLOW),
    QuantizedFluxKlein: lambda: QuantizedFluxKlein(SHALLOW),
    AutoEncoder: lambda: AutoEncoder(AutoEncoderConfig.flux2()),
    Encoder: lambda: Encoder(AutoEncoderConfig.flux2()),
    Decoder: lambda: Decoder(AutoEncoderConfig.flux2()),
    TinyDecoder: TinyDecoder,
}


def test_every_module_of_the_package_is_built_below():
    public = {value for name in flux2_mlx.__all__ if isinstance(value := getattr(flux2_mlx, name), type)}
    assert {cls for cls in public if issubclass(cls, nn.Module)} | {TinyDecoder} == set(BUILT)


@pytest.mark.parametrize("module", BUILT)
def test_building_a_module_leaves_the_random_numbers_of_the_caller(module, memory):
    """Nor does MLX's random state grow, by 2 kB a layer that is drawn and never evaluated."""
    mx.random.seed(2**63 + 5)
    expected = [mx.random.uniform().item() for _ in range(3)]
    mx.random.seed(2**63 + 5)
    drawn, before = [], memory()
    for _ in range(3):
        BUILT[module]()
        drawn.append(mx.random.uniform().item())
    assert drawn == expected
    assert memory() - before < 2000
