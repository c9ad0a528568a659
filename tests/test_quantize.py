"""Packed layers and models: what they compute, what they cost to load, and what is refused."""

import json
import platform
import warnings
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.kernels import count_kernels, packing_kernels
from flux2_mlx import (
    CheckpointError,
    Flux2Pipeline,
    FluxKlein,
    FluxKleinParams,
    InputError,
    Quantization,
    QuantizedFluxKlein,
    Qwen3Config,
    Qwen3TextEncoder,
    load_quantized_flux_klein,
    open_checkpoint,
)
from flux2_mlx.checkpoints.load import load_transformer, load_weights
from flux2_mlx.device import weight_bytes, weights_of
from flux2_mlx.models.layers import Linear
from flux2_mlx.quantization import layers as quantize
from flux2_mlx.quantization import packing, recipes
from flux2_mlx.quantization.layers import DENSE_ROWS, QuantizedEmbedding, QuantizedLinear
from flux2_mlx.quantization.packing import FITTED_BITS, dequantize, quantize_weight
from flux2_mlx.quantization.spec import AFFINE_BITS, FLOAT_MODES, options_of, parse_options
from flux2_mlx.runtime import residency
from tests import formats, tiny

WAYS = [Quantization(bits, group) for bits in AFFINE_BITS for group in (32, 64, 128)]
WAYS += [Quantization(bits, group, mode) for mode, (bits, group) in FLOAT_MODES.items()]
PARAMS = FluxKleinParams(
    hidden_size=64, txt_embed_dim=96, num_heads=2, head_dim=32, depth=1, depth_single=2, axes_dims_rope=(8, 8, 8, 8)
)


def dense_copy(packed: FluxKlein) -> FluxKlein:
    """The same model with its packed weights as floats."""
    model = FluxKlein(packed.params)
    weights = weights_of(packed)
    for path, layer in packed.named_modules():
        if isinstance(layer, QuantizedLinear):
            parts = [weights.pop(f"{path}.{name}", None) for name in ("weight", "scales", "biases")]
            weights[f"{path}.weight"] = dequantize(*parts, layer.spec).astype(mx.float32)
    model.load_weights(list(weights.items()))
    return model


def velocity(model: FluxKlein, tokens: int = 12) -> mx.array:
    mx.random.seed(1)
    img, txt = mx.random.normal((2, tokens, 128)), mx.random.normal((2, 5, PARAMS.txt_embed_dim))
    img_ids = mx.random.randint(0, 6, (tokens, 4))
    return model(img, txt, mx.array([0.3, 0.9]), img_ids, mx.zeros((5, 4)))


# ------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_unpacking_is_that_of_mlx(bits, group_size, dtype):
    """In whatever way this backend does it: a matrix, rows of one by number, and a part of one."""
    how = Quantization(bits, group_size)
    packed = mx.quantize(mx.random.normal((24, 256), key=mx.random.key(bits)).astype(dtype), group_size, bits)
    expected = mx.dequantize(*packed, group_size=group_size, bits=bits)
    assert dequantize(*packed, how).dtype == expected.dtype == dtype
    assert mx.array_equal(dequantize(*packed, how), expected)
    ids = mx.array([[3, 5], [23, 3]])
    assert mx.array_equal(dequantize(*(array[ids] for array in packed), how), expected[ids])
    assert mx.array_equal(dequantize(*(array[5:17] for array in packed), how), expected[5:17])


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, DENSE_ROWS - 1, DENSE_ROWS])
def test_a_packed_layer_multiplies_by_what_it_holds(how, rows):
    """Few rows through the fused product and many through the unpacked weight give the same."""
    mx.random.seed(0)
    dense = nn.Linear(256, 48, bias=False)
    packed = QuantizedLinear(dense, how)
    x = mx.random.normal((rows, 256))
    weight = dequantize(*(*quantize_weight(dense.weight, how), None)[:3], how).astype(mx.float32)
    expected = np.array(x) @ np.array(weight).T
    np.testing.assert_allclose(np.array(packed(x)), expected, atol=2e-4)
    np.testing.assert_allclose(np.array(packed(x.reshape(rows, 1, 256)))[:, 0], expected, atol=2e-4)


@pytest.mark.parametrize("how", WAYS[:3] + WAYS[-3:], ids=str)
def test_a_packed_embedding_gives_its_rows(how):
    dense = nn.Embedding(7, 128)
    packed = QuantizedEmbedding(dense, how)
    whole = dequantize(*(*quantize_weight(dense.weight, how), None)[:3], how)
    ids = mx.array([[3, 0], [6, 3]])
    assert mx.array_equal(packed(ids), whole[ids]).item()


@pytest.mark.parametrize(
    ("value", "group_size", "expected"),
    [
        (4, None, Quantization(4, 64)),
        ("8", 32, Quantization(8, 32)),
        ("mxfp4", None, Quantization(4, 32, "mxfp4")),
        ("nvfp4", 32, Quantization(4, 16, "nvfp4")),  # the group size is for bits
        (None, None, None),
        ("none", None, None),
    ],
)
def test_what_an_option_means(value, group_size, expected):
    assert Quantization.parse(value, group_size) == expected


@pytest.mark.parametrize(
    ("value", "group_size", "says"),
    [
        (7, None, "2, 3, 4, 5, 6, 8 bits in groups of 32, 64, 128, got 7 in 64"),
        ("4", 48, "got 4 in 48"),
        ("int4", None, "mxfp4, mxfp8, nvfp4, got 'int4'"),
        (4.7, None, "got 4.7"),
        ("-4", None, "got '-4'"),
    ],
)
def test_what_no_option_means(value, group_size, says):
    with pytest.raises(InputError, match=says):
        Quantization.parse(value, group_size)
    with pytest.raises(InputError, match=says):  # before anything is looked for
        Flux2Pipeline.from_pretrained("no such model", quantize=value, group_size=group_size)


def test_ways_that_are_none():
    with pytest.raises(InputError, match="mxfp4 has 4 bits in groups of 32, got 4 in 64"):
        Quantization(4, 64, "mxfp4")
    with pytest.raises(InputError, match="group_size 32 belongs to quantize in bits, and none is given"):
        parse_options("mxfp4", None, 32)
    with pytest.raises(InputError, match="the mode must be affine, mxfp4, mxfp8, nvfp4, got 'int'"):
        Quantization(4, 64, "int")


@pytest.mark.parametrize(
    "options",
    [(None, None, None), (4, None, 64), ("mxfp4", 8, 32), (6, "none", 128), (None, 3, 64), ("nvfp4", None, None)],
)
def test_options_and_back(options):
    """As a picture's settings keep them."""
    assert tuple(options_of(parse_options(*options)).values()) == options


@pytest.mark.parametrize("how", [way for way in WAYS if way.mode == "affine" and way.bits < 8], ids=str)
def test_codes_are_in_the_order_that_mlx_reads(how):
    codes = np.random.default_rng(0).integers(0, 2**how.bits, (3, 256)).astype(np.uint32)
    groups = 256 // how.group_size
    words = packing.pack_codes(mx.array(codes), how.bits)
    restored = dequantize(words, mx.ones((3, groups)), mx.zeros((3, groups)), how)
    assert np.array_equal(np.array(restored), codes)


@pytest.mark.parametrize("how", [way for way in WAYS if way.mode == "affine" and way.bits <= FITTED_BITS], ids=str)
def test_fitted_packing_is_nearer_to_the_weight(how, monkeypatch):
    mx.random.seed(0)
    weight = mx.random.normal((40, 256)).astype(mx.bfloat16)

    def error(packed):
        return mx.square(dequantize(*packed, how).astype(mx.float32) - weight.astype(mx.float32)).mean().item()

    fitted = quantize_weight(weight, how)
    plain = mx.quantize(weight, group_size=how.group_size, bits=how.bits)
    assert [(part.shape, part.dtype) for part in fitted] == [(part.shape, part.dtype) for part in plain]
    assert error(fitted) < 0.93 * error(plain)
    monkeypatch.setattr(packing, "PACKED_AT_ONCE", 7 * 256)  # by rows, the last few fewer
    assert all(mx.array_equal(a, b).item() for a, b in zip(quantize_weight(weight, how), fitted, strict=True))


def fitted_step_by_step(weight, bits, group_size):
    """(codes, scales, biases) of four rounds of the nearest codes and of their regression, written as it is told."""
    top = 2**bits - 1
    groups = weight.astype(mx.float32).reshape(weight.shape[0], -1, group_size)
    mean = groups.mean(-1, keepdims=True)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = mx.maximum((high - low) * (0.95 / top), 1e-12)
    bias = (high + low) / 2 - scale * (top / 2)
    for _ in range(4):
        codes = mx.clip(mx.round((groups - bias) / scale), 0, top)
        distance = codes - codes.mean(-1, keepdims=True)
        spread = mx.square(distance).sum(-1, keepdims=True)
        slope = (distance * (groups - mean)).sum(-1, keepdims=True) / mx.maximum(spread, 1e-12)
        scale = mx.where(spread > 0, mx.maximum(slope, 1e-12), scale)
        bias = mean - scale * codes.mean(-1, keepdims=True)
    scale, bias = scale.astype(weight.dtype), bias.astype(weight.dtype)
    codes = mx.clip(mx.round((groups - bias.astype(mx.float32)) / scale.astype(mx.float32)), 0, top)
    return codes.reshape(weight.shape).astype(mx.uint32), scale[..., 0], bias[..., 0]


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(2, 128, mx.float32), (3, 64, mx.bfloat16), (4, 64, mx.bfloat16), (4, 32, mx.float32), (5, 32, mx.bfloat16)],
)
def test_fitting_is_few_kernels_and_the_same_numbers(bits, group_size, dtype):
    """Not one bit differs from the formula, though it is written so that it compiles into few."""
    how = Quantization(bits, group_size)
    mx.random.seed(0)
    weight = 0.02 * mx.random.normal((24, 256))
    weight = mx.concatenate([weight, 1e-6 * weight, weight + 3, mx.zeros((1, 256)), mx.full((1, 256), -3.7)])
    codes, *expected = fitted_step_by_step(weight.astype(dtype), how.bits, how.group_size)
    words, *scales = quantize_weight(weight.astype(dtype), how)
    assert mx.array_equal(words, packing.pack_codes(codes, how.bits)).item()
    assert all(mx.array_equal(a, b).item() for a, b in zip(scales, expected, strict=True))
    assert packing_kernels(how.bits, how.group_size, dtype) <= 20


def test_it_is_compiled_on_a_gpu_alone(monkeypatch):
    for on_gpu, expected in ((True, range(21)), (False, range(100, 200))):
        monkeypatch.setattr(packing, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        weight = mx.zeros((32, 256), mx.bfloat16)
        assert count_kernels(packing._quantize_fitted(weight, Quantization(4, 64))) in expected


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_a_group_of_equal_weights_is_packed_exactly(value):
    weight = mx.full((2, 128), value, mx.bfloat16)
    for how in (Quantization(4, 64), Quantization(2, 32)):
        assert mx.array_equal(dequantize(*quantize_weight(weight, how), how), weight).item()


def bits_of(model):
    """(bits a weight on average, scales in 16 bits; bits of each layer)"""
    kinds = QuantizedLinear, QuantizedEmbedding
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, kinds)}
    counts = {path: layer.weight.size * 32 // layer.spec.bits for path, layer in layers.items()}
    stored = sum(counts[path] * (layer.spec.bits + 32 / layer.spec.group_size) for path, layer in layers.items())
    return stored / sum(counts.values()), {path: layer.spec.bits for path, layer in layers.items()}


@pytest.mark.parametrize("params", [FluxKleinParams.klein_4b(), FluxKleinParams.klein_9b()], ids=["4b", "9b"])
def test_the_most_sensitive_layers_keep_more_bits(params):
    model = FluxKlein(params)  # lazy: nothing of it is computed
    quantize.quantize(model, recipes.mixed_precision(model, Quantization(4, 64)))
    average, bits = bits_of(model)
    assert 4.8 < average <= 4.83
    assert bits["proj_out"] == bits["x_embedder"] == 8
    blocks = [bits[f"single_transformer_blocks.{k}.attn.to_out"] for k in range(params.depth_single)]
    assert blocks == sorted(blocks)
    assert {*blocks} == {4, 5}
    doubles = {path: own for path, own in bits.items() if path.startswith("transformer_blocks")}
    assert {path for path, own in doubles.items() if own == 5} == {path for path in doubles if ".to_out." in path}
    assert {*doubles.values()} == {4, 5}


@pytest.mark.parametrize("params", [Qwen3Config(), Qwen3Config.qwen3_8b()], ids=["4b", "8b"])
def test_the_first_layers_of_text_keep_more_bits(params):
    model = Qwen3TextEncoder(params)
    quantize.quantize(model, recipes.mixed_precision(model, Quantization(4, 64)))
    average, bits = bits_of(model)
    assert 4.78 < average <= 4.83
    projections = [bits[f"model.layers.{k}.mlp.down_proj"] for k in range(27)]
    assert projections == sorted(projections, reverse=True)
    assert {*bits.values()} == {4, 6}
    assert projections[3] == 6


@pytest.mark.parametrize("how", [Quantization(8, 32), Quantization(4, 32, "mxfp4")], ids=str)
def test_what_is_packed_alike(how):
    model = FluxKlein(PARAMS)
    assert {recipes.mixed_precision(model, how)(path, layer) for path, layer in model.named_modules()} == {how}


# ------------------------------------------------------------------------------------------------ fused or unpacked


class Clock:
    """Products that take as long as they are said to: the fused one by its rows, the other one longer by little with
    more of them; both slower by ``slowness`` of the number of the evaluation.
    """

    def __init__(self, unpacking=10, each=0.1):
        self.unpacking, self.each = unpacking, each
        self.rows = []  # of the evaluations so far
        self.slowness = lambda number: 1

    def __call__(self, multiply, x, calls=1):
        self.rows.append(len(x))
        fused = multiply.__name__ == "fused"
        seconds = len(x) if fused else self.unpacking + self.each * len(x)
        return calls * seconds * self.slowness(len(self.rows))

    def ratio(self, rows):
        """The exact one."""
        return rows / (self.unpacking + self.each * rows)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(quantize, "evaluation_seconds", clock)
    monkeypatch.setattr(quantize, "_measured", {})
    monkeypatch.delenv("FLUX2_MLX_DENSE_ROWS")
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path))
    return clock


@pytest.fixture
def gpu_clock(clock, monkeypatch):
    """A GPU on which unpacking pays from 1000 rows on."""
    monkeypatch.setattr(quantize, "on_gpu", lambda: True)
    clock.unpacking, clock.each = 300, 0.7
    return clock


def packed_layers() -> nn.Sequential:
    how = Quantization(4, 32)
    return nn.Sequential(*(QuantizedLinear(nn.Linear(64, rows, bias=False), how) for rows in (32, 96, 32)))


def tuned(dtype=mx.float32) -> list[int]:
    quantize.autotune(model := packed_layers(), dtype)
    return [layer.dense_rows for layer in model.layers]


def test_rows_are_measured_once_for_each_shape_and_kept(clock, monkeypatch):
    assert tuned() == [12, 12, 12]  # 11 take 11 and 11.1
    assert set(clock.rows) == {8, 16, 12, 10, 11}
    clock.rows.clear()
    monkeypatch.setattr(quantize, "_measured", {})  # another process
    assert tuned() == [12, 12, 12]
    assert clock.rows == []
    tuned(mx.bfloat16)
    assert len(clock.rows) > 0


def test_rows_are_measured_again_where_the_table_is_damaged(clock, tmp_path, monkeypatch):
    tuned()
    keys = json.loads((tmp_path / "dense_rows.json").read_text())
    damages = "b", 12.0, True, -12, 7, 5000
    for content in ("[1, 2]", "{", *(json.dumps(dict.fromkeys(keys, damage)) for damage in damages)):
        (tmp_path / "dense_rows.json").write_text(content)
        monkeypatch.setattr(quantize, "_measured", {})
        clock.rows.clear()
        assert tuned() == [12, 12, 12]
        assert len(clock.rows) > 0
    assert json.loads((tmp_path / "dense_rows.json").read_text()) == keys


def test_rows_are_measured_where_nothing_can_be_kept(clock, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "file" / "folder"))
    tuned()
    clock.rows.clear()
    assert tuned() == [12, 12, 12]  # after an unload
    assert clock.rows == []


def test_a_layer_stays_fused_where_that_always_wins(clock):
    clock.each = 1
    quantize.autotune(model := packed_layers(), mx.float32)
    layer = model.layers[0]
    layer.dense = None
    assert layer(mx.ones((5000, 64))).shape == (5000, 32)


def test_few_rows_are_always_fused_on_a_gpu(gpu_clock):
    gpu_clock.unpacking = 0
    assert tuned() == [256, 256, 256]
    assert set(gpu_clock.rows) == {256}
    assert QuantizedLinear(nn.Linear(64, 32, bias=False), Quantization(4, 32)).dense_rows == 256


@pytest.mark.parametrize(
    "slowness",
    [
        lambda number: 50 if number % 16 == 1 else 1,  # a kernel that is compiled, another program
        lambda number: 1 + 4 * 0.9**number,  # a clock that rises slowly
        lambda number: 1 + number / 100,  # a chip that grows hot
    ],
    ids=["noise", "rising clock", "heat"],
)
def test_what_disturbs_the_clock_changes_little(gpu_clock, slowness):
    gpu_clock.slowness = slowness
    assert all(1 / quantize.TOLERANCE <= gpu_clock.ratio(rows) <= quantize.TOLERANCE for rows in tuned())


@pytest.mark.parametrize("entry", [256, 600, 2000, 4096, quantize.ALWAYS_FUSED])
def test_an_entry_that_is_wrong_is_measured_again(gpu_clock, entry, tmp_path, monkeypatch):
    right = tuned()
    assert 1000 <= right[0] <= 1100
    file = tmp_path / "dense_rows.json"
    keys = json.loads(file.read_text())
    monkeypatch.setattr(quantize, "_measured", {})
    gpu_clock.rows.clear()
    assert tuned() == right
    assert set(gpu_clock.rows) == {right[0]}  # checked
    file.write_text(json.dumps(dict.fromkeys(keys, entry)))
    monkeypatch.setattr(quantize, "_measured", {})
    assert tuned() == right
    assert json.loads(file.read_text()) == keys


def test_an_entry_that_passes_costs_a_tenth_at_most(gpu_clock):
    """Whatever a product takes for unpacking and for each row, and whatever the entry."""
    passed = 0
    for unpacking in (0, 50, 300, 1000, 4000):
        for each in (0.2, 0.6, 0.9, 1.0, 1.2):
            gpu_clock.unpacking, gpu_clock.each = unpacking, each
            for entry in (256, 300, 500, 1000, 2500, 4096, quantize.ALWAYS_FUSED):
                if quantize._is_right(entry, gpu_clock.ratio):
                    passed += 1
                    for rows in range(256, 4097, 64):
                        ratio = gpu_clock.ratio(rows)
                        assert (ratio if rows < entry else 1 / ratio) <= 1.1 + 1e-9
    assert passed > 10


@pytest.mark.parametrize("name", ["machine_name", "system_name"])
def test_another_machine_or_version_measures_anew(gpu_clock, monkeypatch, name):
    tuned()
    gpu_clock.rows.clear()
    monkeypatch.setattr(quantize, name, lambda: "another one")
    tuned()
    assert len(set(gpu_clock.rows)) > 1


def test_rows_that_the_environment_says(clock, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_DENSE_ROWS", "3")
    assert tuned() == [3, 3, 3]
    assert clock.rows == []
    monkeypatch.setenv("FLUX2_MLX_DENSE_ROWS", "9" * 5000)
    with pytest.raises(InputError, match="FLUX2_MLX_DENSE_ROWS must be a number of rows, got '999"):
        tuned()
    monkeypatch.setenv("FLUX2_MLX_DENSE_ROWS", "many")
    with pytest.raises(InputError, match="FLUX2_MLX_DENSE_ROWS must be a number of rows, got 'many'"):
        tuned()


def test_what_is_really_measured(monkeypatch, tmp_path):
    monkeypatch.delenv("FLUX2_MLX_DENSE_ROWS")
    monkeypatch.setattr(quantize, "_measured", {})
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path))
    assert all(8 <= rows <= 2048 or rows == quantize.ALWAYS_FUSED for rows in tuned())
    table = quantize.read_table("dense_rows")
    assert len(table) == 2
    assert all(f"MLX {version('mlx')}, {platform.system()}" in key for key in table)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("how", [Quantization(4, 32), Quantization(8, 64), Quantization(8, 32, "mxfp8")], ids=str)
def test_from_unquantized(how):
    if how.group_size == 64:  # 96 text features are no multiple of it
        with pytest.raises(InputError, match=r"context_embedder has 96 inputs, .* group size 64"):
            QuantizedFluxKlein.from_unquantized(FluxKlein(PARAMS), how.group_size, how.bits, how.mode)
        return
    model = FluxKlein(PARAMS)
    before = {name: mx.array(array) for name, array in weights_of(model).items()}
    packed = QuantizedFluxKlein.from_unquantized(model, how.group_size, how.bits, how.mode)
    for tokens in (12, 2 * DENSE_ROWS):
        np.testing.assert_allclose(
            np.array(velocity(packed, tokens)), np.array(velocity(dense_copy(packed), tokens)), atol=1e-4
        )
    assert all(mx.array_equal(array, before[name]).item() for name, array in weights_of(model).items())
    assert weight_bytes(packed) < 0.4 * weight_bytes(model)


@pytest.mark.parametrize("mode", ["affine", *FLOAT_MODES])
def test_load_quantized(mode):
    bits, group_size = FLOAT_MODES.get(mode, (4, 32))
    model = QuantizedFluxKlein.from_unquantized(FluxKlein(PARAMS), group_size, bits, mode)
    loaded = load_quantized_flux_klein(weights_of(model), PARAMS)
    assert isinstance(loaded, QuantizedFluxKlein)
    assert mx.array_equal(velocity(loaded), velocity(model)).item()


def test_load_quantized_keeps_dense_layers_dense():
    tensors = weights_of(FluxKlein(PARAMS))
    skip = ("proj_out", "x_embedder", "norm_out.linear")
    written = {}
    for name, array in tensors.items():
        layer = name.removesuffix(".weight")
        if array.ndim == 1 or layer in skip:
            written[name] = array
        else:
            parts = quantize_weight(array, Quantization(6, 32))
            written |= {f"{layer}.{k}": p for k, p in zip(("weight", "scales", "biases"), parts, strict=True)}
    loaded = load_quantized_flux_klein(written, PARAMS)
    assert type(loaded.proj_out) is Linear
    assert loaded.context_embedder.spec == Quantization(6, 32)
    np.testing.assert_allclose(np.array(velocity(loaded)), np.array(velocity(dense_copy(loaded))), atol=1e-4)
    del written["proj_out.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: proj_out\.weight"):
        load_quantized_flux_klein(written, PARAMS)


# ------------------------------------------------------------------------------------------------ the pipeline


def test_bits_of_each_component(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, quantize=4, quantize_text_encoder="8", group_size=32)
    layer = pipe.transformer.transformer_blocks[0].ff.linear_in
    assert layer.spec == Quantization(4, 32)
    assert pipe.text_encoder.model.layers[3].mlp.up_proj.spec == Quantization(8, 32)
    assert isinstance(pipe.text_encoder.model.embed_tokens, QuantizedEmbedding)
    assert not [m for m in pipe.autoencoder.modules() if isinstance(m, QuantizedLinear)]
    result = pipe("a red fox", height=64, width=64, num_steps=1, seed=0, max_sequence_length=16)
    assert (result.settings[0].quantize, result.settings[0].quantize_text_encoder) == (4, 8)
    pipe.unload()
    again = pipe("a red fox", height=64, width=64, num_steps=1, seed=0, max_sequence_length=16)
    assert result.images[0].tobytes() == again.images[0].tobytes()


def test_packing_at_every_start_is_told_once(checkpoint, monkeypatch):
    """Of large models: tiny ones are packed in no time."""
    monkeypatch.setattr(residency, "LARGE", 10**5)
    small = {"height": 64, "width": 64, "num_steps": 1, "max_sequence_length": 16}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            Flux2Pipeline.from_pretrained(checkpoint, quantize=8, group_size=32)("a red fox", **small)
    (warning,) = told
    assert "flux2_mlx.convert with --quantize does it once" in str(warning.message)


@pytest.mark.parametrize(("quantize", "group_size"), [(8, 32), ("mxfp8", None)])
def test_eight_bits_draw_nearly_the_same(checkpoint, quantize, group_size):
    options = {"height": 64, "width": 96, "num_steps": 2, "seed": 3, "max_sequence_length": 16, "output_type": "np"}
    dense = Flux2Pipeline.from_pretrained(checkpoint)("a red fox", **options).images
    packed = Flux2Pipeline.from_pretrained(checkpoint, quantize=quantize, group_size=group_size)
    found = packed("a red fox", **options).images
    assert 0 < np.abs(dense - found).mean() < 0.02


def test_packed_layers_of_a_file_keep_their_bits(checkpoint, tmp_path):
    """Quantizing on load packs what is dense."""
    tensors = {name: t.detach() for name, t in tiny.transformer().state_dict().items()}
    written, _ = formats.packed(tensors, 8, 32, skip=("proj_out",))
    file = formats.save(written, tmp_path / "w.safetensors")
    pipe = Flux2Pipeline.from_pretrained(checkpoint, transformer=file, distilled=True, quantize=4, group_size=32)
    assert pipe.transformer.proj_out.spec.bits == 4
    assert pipe.transformer.x_embedder.spec.bits == 8


def test_a_gguf_file_is_packed_tensor_by_tensor(checkpoint, tmp_path):
    tensors = {name: t.detach() for name, t in tiny.transformer().state_dict().items()}
    expected = formats.write_gguf(tmp_path / "w.gguf", formats.bfl_transformer(tensors), "Q5_0")
    pipe = Flux2Pipeline.from_pretrained(
        checkpoint, transformer=tmp_path / "w.gguf", distilled=True, quantize=6, group_size=32
    )
    layer = pipe.transformer.single_transformer_blocks[1].attn.to_out
    for _ in load_weights(pipe.transformer):
        pass
    dense = mx.array(expected["single_blocks.1.linear2.weight"].numpy())
    for found, packed in zip(
        (layer.weight, layer.scales, layer.biases), quantize_weight(dense, layer.spec), strict=True
    ):
        assert mx.array_equal(found, packed).item()


@pytest.mark.parametrize("kind", ["diffusers", "bfloat16", "Q5_0"])
def test_loading_holds_the_packed_model_and_little_more(checkpoint, tmp_path, memory, kind, monkeypatch):
    """At most one more of its largest tensor, and the little that is fitted at once."""
    monkeypatch.setattr(packing, "PACKED_AT_ONCE", 2**11)  # a small part of a tensor, as it is of real ones
    model = tiny.transformer(depth_single=12)
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    size = 4  # bytes of a dense weight
    if kind == "bfloat16":  # packed from what is stored, in float32 by parts
        tensors, size = {name: t.bfloat16() for name, t in tensors.items()}, 2
    file = tmp_path / "w"
    if kind in ("diffusers", "bfloat16"):
        file = formats.save(tensors, file)
    else:
        formats.write_gguf(file, formats.bfl_transformer(tensors), kind)
    opened = open_checkpoint(checkpoint, transformer=file, distilled=True)
    before = memory()
    packed = load_transformer(opened, mx.float32, Quantization(4, 32))
    mx.reset_peak_memory()
    total = sum(load_weights(packed))
    largest = max(size * t.numel() for t in tensors.values())
    assert mx.get_peak_memory() - before <= total + largest + 2**19
    assert total < 0.21 * sum(4 * t.numel() for t in tensors.values())
