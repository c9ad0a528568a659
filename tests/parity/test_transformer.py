"""The transformer against diffusers' Flux2Transformer2DModel."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from flux2_mlx import FluxKlein, FluxKleinParams, image_ids, sanitize_flux2_klein_weights, text_ids
from flux2_mlx.checkpoints.load import assign
from flux2_mlx.models.flux2 import timestep_embedding
from tests import tiny
from tests.parity.compare import EXACT, relative_error, to_mlx, to_torch

SIZES = [(64, 96), (112, 64)]


def ported(model, dtype=mx.float32) -> FluxKlein:
    weights = sanitize_flux2_klein_weights({name: to_mlx(value) for name, value in model.state_dict().items()})
    return assign(FluxKlein(FluxKleinParams.from_config(model.config)), weights, dtype, "test")


def inputs(model, height, width, batch=1, length=24, references=()):
    rng = np.random.default_rng(7)
    grids = [image_ids(height, width)] + [image_ids(h, w, reference=k) for k, (h, w) in enumerate(references)]
    img_ids = mx.concatenate(grids, axis=1)
    img = rng.standard_normal((batch, img_ids.shape[1], 128)).astype(np.float32)
    txt = 0.5 * rng.standard_normal((batch, length, model.config.joint_attention_dim)).astype(np.float32)
    timesteps = np.linspace(0.7, 0.3, batch, dtype=np.float32)
    return mx.array(img), mx.array(txt), mx.array(timesteps), img_ids, text_ids(length)


def theirs(model, img, txt, timesteps, img_ids, txt_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(
            hidden_states=to_torch(img),
            encoder_hidden_states=to_torch(txt),
            timestep=to_torch(timesteps),
            img_ids=to_torch(img_ids)[0],
            txt_ids=to_torch(txt_ids)[0],
            guidance=None,
            return_dict=False,
        )[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_velocity_equals_diffusers(model, size, batch):
    args = inputs(model, *size, batch=batch)
    assert relative_error(ported(model)(*args), theirs(model, *args)) <= EXACT


def test_references_of_other_sizes_follow_the_picture(model):
    args = inputs(model, 64, 80, references=[(64, 96), (96, 64)])
    assert relative_error(ported(model)(*args), theirs(model, *args)) <= EXACT


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 20, 44, 68])
def test_velocity_of_the_first_tokens_is_theirs(model, tokens, batch):
    """Of a picture's, without its references'; of fewer, and of some references'."""
    args = inputs(model, 64, 80, batch, references=[(64, 96), (96, 64)])
    rope = FluxKlein.compute_rope(args[4], args[3], tuple(model.config.axes_dims_rope), model.config.rope_theta)
    velocity = ported(model).forward_with_rope(*args[:3], *rope, image_tokens=tokens)
    assert velocity.shape == (batch, tokens, 128)
    assert relative_error(velocity, theirs(model, *args)[:, :tokens]) <= EXACT


def test_bfloat16_stays_close_to_float32(model):
    args = inputs(model, 64, 96, batch=2)
    velocity = ported(model, mx.bfloat16)(*args)
    assert velocity.dtype == mx.bfloat16
    assert relative_error(velocity, theirs(model, *args)) <= 3e-2


@pytest.mark.parametrize("part", ["ff_context", "single"])
def test_float16_where_residuals_leave_its_range(part):
    """As the text stream of FLUX does, which diffusers clips at 65504; here it is what float32 makes of it."""
    torch.manual_seed(3)
    model = tiny.transformer()
    args = inputs(model, 64, 64)
    with torch.no_grad():
        if part == "ff_context":
            model.transformer_blocks[0].ff_context.linear_out.weight.mul_(3e4)
            model.double_stream_modulation_txt.linear.weight.mul_(100)
        else:
            model.single_transformer_blocks[0].attn.to_out.weight.mul_(3e4)
            model.single_stream_modulation.linear.weight.mul_(40)
    velocity = ported(model, mx.float16)(*args)
    largest = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_hook(
            lambda *given: largest.extend(out.abs().max().item() for out in given[2] if out is not None)
        )
    expected = theirs(model, *args)
    assert max(largest) > 65504
    assert relative_error(velocity, expected) <= 3e-2


def test_float16_products_that_overflow_end_in_no_nan():
    torch.manual_seed(3)
    model = tiny.transformer()
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.ff_context.linear_in.weight.mul_(30)
            block.ff_context.linear_out.weight.mul_(1e5)
        for block in model.single_transformer_blocks:
            block.attn.to_qkv_mlp_proj.weight.mul_(30)
            block.attn.to_out.weight.mul_(1e5)
    assert mx.isfinite(ported(model, mx.float16)(*inputs(model, 64, 64))).all().item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_float16_clips_prompt_embeddings_of_1e5(model, dtype):
    """Attention sinks of the text encoder come near; cast as they are they would be infinite, and the velocity NaN.
    The bound 65504 is 65536 in bfloat16.
    """
    img, txt, *rest = inputs(model, 64, 64)
    sinks = txt.at[:, 0, :3].add(mx.array([1e5, -1e5, 65504.0])).astype(dtype)
    velocity = ported(model, mx.float16)(img, sinks, *rest)
    clipped = mx.clip(sinks.astype(mx.float32), -65504, 65504)
    assert relative_error(velocity, theirs(model, img, clipped, *rest)) <= 3e-2


def test_float16_clips_what_the_embedding_of_the_text_makes():
    torch.manual_seed(3)
    model = tiny.transformer()
    with torch.no_grad():
        model.context_embedder.weight.fill_(0.5)
    img, txt, *rest = inputs(model, 64, 64)
    assert mx.isfinite(ported(model, mx.float16)(img, 1e5 * mx.ones_like(txt), *rest)).all().item()


@pytest.mark.parametrize("part", ["double", "single"])
def test_float16_feed_forward_that_overflows_ends_in_no_nan(part):
    """Of infinite values of both signs a product makes NaN, which no clip of its outputs takes back."""
    torch.manual_seed(3)
    model = tiny.transformer()
    with torch.no_grad():
        for block in model.transformer_blocks if part == "double" else model.single_transformer_blocks:
            (block.ff.linear_in if part == "double" else block.attn.to_qkv_mlp_proj).weight.mul_(2e3)
    assert mx.isfinite(ported(model, mx.float16)(*inputs(model, 64, 64))).all().item()


def test_tables_made_once_give_the_same_velocity(model):
    ours, args = ported(model), inputs(model, 64, 96)
    cos, sin = FluxKlein.compute_rope(args[4], args[3], ours.params.axes_dims_rope, ours.params.rope_theta)
    assert mx.array_equal(ours.forward_with_rope(*args[:3], cos, sin), ours(*args)).item()


def test_rope_tables_equal_diffusers(model):
    """At the far end of the text and of a 2048 x 2048 picture, where float32 angles would be off."""
    ids = mx.array([[[0, 0, 0, 511], [0, 127, 126, 0], [40, 5, 3, 0]]])
    cos, sin = FluxKlein.compute_rope(ids[:, :1], ids[:, 1:], tuple(model.config.axes_dims_rope))
    expected_cos, expected_sin = model.pos_embed(to_torch(ids)[0])
    assert relative_error(cos[0], expected_cos[:, ::2]) <= 1e-7
    assert relative_error(sin[0], expected_sin[:, ::2]) <= 1e-7


@pytest.mark.parametrize("text_values", [0, 1])
def test_three_columns_are_completed(model, text_values):
    ours = ported(model)
    img, txt, timesteps, img_ids, txt_ids = inputs(model, 64, 96)
    four_text = mx.concatenate([mx.full((1, 24, 3), text_values, mx.int32), txt_ids[..., 3:]], axis=-1)
    short = ours(img, txt, timesteps, img_ids[..., :3], four_text[..., :3])
    assert mx.array_equal(short, ours(img, txt, timesteps, img_ids, four_text)).item()


def test_query_and_key_norms_take_epsilon_from_the_config(model):
    """At ordinary activations 1e-5 and 1e-6 look alike; at tiny ones they do not."""
    small = to_mlx(
        1e-3 * torch.randn(1, 5, model.config.attention_head_dim, generator=torch.Generator().manual_seed(0))
    )
    ours = ported(model)
    pairs = [(ours.transformer_blocks[0].attn, model.transformer_blocks[0].attn, ("q", "k", "added_q", "added_k"))]
    pairs += [(ours.single_transformer_blocks[0].attn, model.single_transformer_blocks[0].attn, ("q", "k"))]
    for mine, reference, norms in pairs:
        for norm in norms:
            expected = getattr(reference, f"norm_{norm}")(to_torch(small))
            assert relative_error(mine[f"norm_{norm}"](small), expected) <= EXACT, norm


def test_timestep_embedding_table():
    """Values computed from the published formula; cosines first, 1000 t inside."""
    e = timestep_embedding(mx.array([1.0, 0.95808539]), 256)
    expected = {(0, 0): 0.562379, (0, 1): 0.789615, (0, 127): 0.994232, (0, 128): 0.826880, (0, 255): 0.107254}
    expected |= {(1, 0): -0.994967, (1, 1): 0.799197, (1, 128): 0.100203}
    for (row, column), value in expected.items():
        assert e[row, column].item() == pytest.approx(value, abs=2e-4 if row else 2e-5)


def test_blocks_at_the_width_of_4b():
    """One double and one single block of 3072 features in 24 heads of 128."""
    torch.manual_seed(5)
    model = tiny.transformer(24, 1, 1, text_hidden=64, head_dim=128)
    args = inputs(model, 64, 48, length=8)
    ours = ported(model)
    assert ours.params.hidden_size == 3072
    assert relative_error(ours(*args), theirs(model, *args)) <= EXACT
