"""Attention in parts: the same numbers, each call within its bounds, and no large call that goes another way."""

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx import FluxKlein, FluxKleinParams, Qwen3Config, Qwen3TextEncoder
from flux2_mlx.models import attention as module
from flux2_mlx.models import autoencoder
from flux2_mlx.models.attention import FLOP_AT_ONCE, SCORES_AT_ONCE, attention, queries_at_once
from flux2_mlx.models.config import AutoEncoderConfig
from flux2_mlx.models.kv_cache import FrozenKV, KVReader
from flux2_mlx.training.recompute import checkpoint_block
from tests.test_reuse import step

KLEIN_9B = {"hidden_size": 4096, "num_heads": 32, "txt_embed_dim": 12288}


def qkv(batch, heads, queries, keys, dims, dtype=mx.float32, kv_heads=None):
    shapes = [(batch, queries, heads, dims), *[(batch, keys, kv_heads or heads, dims)] * 2]
    arrays = [mx.random.normal(shape, key=mx.random.key(k)).astype(dtype) for k, shape in enumerate(shapes)]
    return [array.transpose(0, 2, 1, 3) for array in arrays]


@pytest.fixture
def calls(monkeypatch):
    """(FLOP, elements of scores) of every fused attention call from here on, which is recorded and not computed."""
    recorded = []

    def record(q, k, v, *, scale, mask=None):
        batch, heads, queries, dims = q.shape
        recorded.append((4 * batch * heads * queries * k.shape[2] * dims, batch * heads * queries * k.shape[2]))
        assert mask is None or mask.shape[2:] == (queries, k.shape[2])
        return mx.zeros(q.shape, q.dtype)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", record)
    return recorded


@pytest.fixture
def on_metal(monkeypatch):
    monkeypatch.setattr("flux2_mlx.device.on_gpu", lambda: True)


@pytest.mark.parametrize(
    ("bound", "value"), [("FLOP_AT_ONCE", 4 * 6 * 512 * 64 * 300), ("SCORES_AT_ONCE", 6 * 512 * 192)]
)
@pytest.mark.parametrize("queries", [7, 384, 501])
def test_parts_are_the_whole_to_the_bit(monkeypatch, bound, value, queries):
    """Where no product is so small that OpenBLAS takes another kernel for it."""
    q, k, v = qkv(2, 3, queries, 512, 64)
    whole = np.array(attention(q, k, v))
    monkeypatch.setattr(module, bound, value)
    assert queries_at_once(6, queries, 512, 64, mx.float32) == min(queries, 192)
    assert np.array_equal(np.array(attention(q, k, v)), whole)


def test_parts_have_the_one_row_of_a_bias(monkeypatch):
    """As float64 has it, of one call and of parts."""
    q, k, v = qkv(2, 3, 250, 130, 16)
    bias = np.log(np.linspace(0.05, 2, 130))
    scores = np.einsum("bhqd,bhkd->bhqk", *(np.array(x, np.float64) for x in (q, k))) / 4
    shares = np.exp(scores + bias)
    expected = np.einsum("bhqk,bhkd->bqhd", shares / shares.sum(-1, keepdims=True), np.array(v, np.float64))
    for rows in (250, 192):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 6 * 130 * rows)
        monkeypatch.setattr(module, "QUERIES", rows)
        ours = np.array(attention(q, k, v, mx.array(bias, mx.float32)[None, None, None]))
        assert np.allclose(ours, expected.reshape(2, 250, 48), rtol=0, atol=1e-6)


def test_parts_have_their_rows_of_the_mask(monkeypatch):
    """Grouped queries and a mask, as in the text encoder."""
    q, k, v = qkv(2, 4, 250, 250, 16, kv_heads=2)
    mask = mx.tril(mx.ones((250, 250), mx.bool_))[None, None] & (mx.arange(250) < 150)[None, None, None]
    whole = np.array(attention(q, k, v, mask))
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 8 * 250 * 100)
    assert queries_at_once(8, 250, 250, 16, mx.float32) == 100  # fewer than a tile
    assert np.allclose(np.array(attention(q, k, v, mask)), whole, rtol=0, atol=1e-6)


def test_the_scores_of_one_part_exist(monkeypatch, memory):
    q, k, v = qkv(1, 4, 768, 768, 16)
    mx.eval(q, k, v)
    scores, peaks = 4 * 768**2 * 4, []
    for bound in (SCORES_AT_ONCE, 2**18):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", bound)
        before = memory()
        limit = mx.set_memory_limit(before + 1)
        mx.reset_peak_memory()
        mx.eval(attention(q, k, v))
        mx.set_memory_limit(limit)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > scores > 2 * peaks[1]


def test_gradients_of_parts_are_those_of_the_whole(monkeypatch):
    arrays = qkv(1, 3, 300, 300, 16)
    gradients = mx.grad(lambda *qkv: (attention(*qkv) ** 2).sum(), argnums=(0, 1, 2))
    whole = gradients(*arrays)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 3 * 300 * 192)
    for part, expected in zip(gradients(*arrays), whole, strict=True):
        assert mx.allclose(part, expected, rtol=1e-5, atol=1e-5).item()


# ------------------------------------------------------------------------------------------------ counted


@pytest.mark.parametrize("own", [{}, KLEIN_9B], ids=["4b", "9b"])
@pytest.mark.parametrize("rows", [1, 4])
def test_no_call_of_a_large_image_passes_the_bound(calls, on_metal, own, rows):
    """2048 x 2048 pixels with two references of a megapixel, in bfloat16; nothing is evaluated."""
    params = FluxKleinParams(depth=1, depth_single=1, **own)
    model, tokens = FluxKlein(params), 512 + 16384 + 2 * 4096
    model.set_dtype(mx.bfloat16)
    img, txt = mx.zeros((rows, 16384 + 8192, 128)), mx.zeros((rows, 512, params.txt_embed_dim))
    rope = mx.zeros((1, tokens, params.head_dim // 2))
    given = img, txt, mx.array([0.5]), rope, rope
    whole = 4 * rows * params.num_heads * tokens**2 * params.head_dim
    assert model.forward_with_rope(*given).shape == (rows, 16384 + 8192, 128)
    assert max(flop for flop, _ in calls) <= FLOP_AT_ONCE
    left_out = 4 * rows * params.num_heads * 512 * tokens * params.head_dim  # the text's queries in the last block
    assert sum(flop for flop, _ in calls) == 2 * whole - left_out
    assert 2 * whole / FLOP_AT_ONCE <= len(calls) <= 1.2 * 2 * whole / FLOP_AT_ONCE


def test_no_call_passes_the_bound_in_any_way_of_keeping_kv(calls, on_metal):
    params = FluxKleinParams(depth=1, depth_single=1, num_heads=24)
    model = FluxKlein(params)
    model.set_dtype(mx.bfloat16)
    text, image, references = 512, 16384, 4 * 4096

    def rope(tokens):
        return [mx.zeros((1, tokens, params.head_dim // 2))] * 2

    img, txt, clean = mx.zeros((1, image, 128)), mx.zeros((1, text, 7680)), mx.zeros((1, references, 128))
    reference_kv = model.encode_reference_kv(clean, *rope(references))
    assert len(calls) >= 4 * 24 * references**2 * 128 / FLOP_AT_ONCE  # the second block has no queries of them
    model.forward_with_rope(img, txt, mx.array([0.5]), *rope(text + image), kv=[KVReader(kv) for kv in reference_kv])
    for tokens in ("text", "references"):
        frozen = FrozenKV(tokens, image)
        for _ in range(2):
            joined = mx.concatenate([img, clean], axis=1)
            step(model, frozen, joined, txt, mx.array([0.5]), rope(text + image + references), image)
    assert max(flop for flop, _ in calls) <= FLOP_AT_ONCE


def test_no_call_of_training_passes_the_bound(calls, on_metal):
    """A pass with gradients, whose blocks but the last are computed again in the backward pass."""
    params = FluxKleinParams(depth=1, depth_single=1)
    model, tokens = FluxKlein(params), 512 + 4 * 4096
    model.set_dtype(mx.bfloat16)
    model.block_runner = checkpoint_block
    rope = mx.zeros((1, tokens, params.head_dim // 2))
    img, txt = mx.zeros((1, tokens - 512, 128)), mx.zeros((1, 512, 7680))
    mx.grad(lambda x: model.forward_with_rope(x, txt, mx.array([0.5]), rope, rope).sum())(img)
    assert len(calls) == (2 + 1) * 4  # one block forward and again, and one, in four parts each
    assert max(flop for flop, _ in calls) <= FLOP_AT_ONCE


def test_what_is_small_is_one_call(calls, on_metal):
    model = Qwen3TextEncoder(Qwen3Config(tapped_layers=(1, 2, 3)))
    model(mx.zeros((1, 512), mx.int32), mx.ones((1, 512), mx.int32))
    assert len(calls) == 4
    assert SCORES_AT_ONCE >= 24 * 1536**2  # 512 x 512 pixels in klein-4b, on a CPU
    for heads in (24, 32):  # a megapixel, on a GPU
        assert queries_at_once(heads, 4608, 4608, 128, mx.bfloat16) == 4608


def test_the_autoencoder_stays_below_the_bound():
    channels = AutoEncoderConfig.flux2().block_out_channels[-1]
    assert 4 * autoencoder.SCORES_AT_ONCE * channels < FLOP_AT_ONCE
