"""Packed layers and models: what they compute, what they cost to load, and what is refused."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux2_mlx import (
    CheckpointError,
    Flux2Pipeline,
    FluxKlein,
    FluxKleinParams,
    InputError,
    Quantization,
    QuantizedFluxKlein,
    load_quantized_flux_klein,
    open_checkpoint,
)
from flux2_mlx.memory import weight_bytes, weights_of
from flux2_mlx.quantize import (
    AFFINE_BITS,
    DENSE_ROWS,
    FLOAT_MODES,
    QuantizedEmbedding,
    QuantizedLinear,
    options_of,
    pack,
    parse_options,
    unpack,
)
from flux2_mlx.weights import load_transformer, materialize
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
            weights[f"{path}.weight"] = unpack(*parts, layer.how).astype(mx.float32)
    model.load_weights(list(weights.items()))
    return model


def velocity(model: FluxKlein, tokens: int = 12) -> mx.array:
    mx.random.seed(1)
    img, txt = mx.random.normal((2, tokens, 128)), mx.random.normal((2, 5, PARAMS.txt_embed_dim))
    img_ids = mx.random.randint(0, 6, (tokens, 4))
    return model(img, txt, mx.array([0.3, 0.9]), img_ids, mx.zeros((5, 4)))


# ------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, DENSE_ROWS - 1, DENSE_ROWS])
def test_a_packed_layer_multiplies_by_what_it_holds(how, rows):
    """Few rows through the fused product and many through the unpacked weight give the same."""
    mx.random.seed(0)
    dense = nn.Linear(256, 48, bias=False)
    packed = QuantizedLinear(dense, how)
    x = mx.random.normal((rows, 256))
    weight = unpack(*(*pack(dense.weight, how), None)[:3], how).astype(mx.float32)
    expected = np.array(x) @ np.array(weight).T
    np.testing.assert_allclose(np.array(packed(x)), expected, atol=2e-4)
    np.testing.assert_allclose(np.array(packed(x.reshape(rows, 1, 256)))[:, 0], expected, atol=2e-4)


@pytest.mark.parametrize("how", WAYS[:3] + WAYS[-3:], ids=str)
def test_a_packed_embedding_gives_its_rows(how):
    dense = nn.Embedding(7, 128)
    packed = QuantizedEmbedding(dense, how)
    whole = unpack(*(*pack(dense.weight, how), None)[:3], how)
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
            parts = pack(array, Quantization(6, 32))
            written |= {f"{layer}.{k}": p for k, p in zip(("weight", "scales", "biases"), parts, strict=True)}
    loaded = load_quantized_flux_klein(written, PARAMS)
    assert type(loaded.proj_out) is nn.Linear
    assert loaded.context_embedder.how == Quantization(6, 32)
    np.testing.assert_allclose(np.array(velocity(loaded)), np.array(velocity(dense_copy(loaded))), atol=1e-4)
    del written["proj_out.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: proj_out\.weight"):
        load_quantized_flux_klein(written, PARAMS)


# ------------------------------------------------------------------------------------------------ the pipeline


def test_bits_of_each_component(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, quantize=4, quantize_text_encoder="8", group_size=32)
    layer = pipe.transformer.transformer_blocks[0].ff.linear_in
    assert layer.how == Quantization(4, 32)
    assert pipe.text_encoder.model.layers[3].mlp.up_proj.how == Quantization(8, 32)
    assert isinstance(pipe.text_encoder.model.embed_tokens, QuantizedEmbedding)
    assert not [m for m in pipe.autoencoder.modules() if isinstance(m, QuantizedLinear)]
    result = pipe("a red fox", height=64, width=64, num_steps=1, seed=0, max_sequence_length=16)
    assert (result.settings[0].quantize, result.settings[0].quantize_text_encoder) == (4, 8)
    pipe.unload()
    again = pipe("a red fox", height=64, width=64, num_steps=1, seed=0, max_sequence_length=16)
    assert result.images[0].tobytes() == again.images[0].tobytes()


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
    assert pipe.transformer.proj_out.how.bits == 4
    assert pipe.transformer.x_embedder.how.bits == 8


def test_a_gguf_file_is_packed_tensor_by_tensor(checkpoint, tmp_path):
    tensors = {name: t.detach() for name, t in tiny.transformer().state_dict().items()}
    expected = formats.write_gguf(tmp_path / "w.gguf", formats.bfl_transformer(tensors), "Q5_0")
    pipe = Flux2Pipeline.from_pretrained(
        checkpoint, transformer=tmp_path / "w.gguf", distilled=True, quantize=6, group_size=32
    )
    layer = pipe.transformer.single_transformer_blocks[1].attn.to_out
    for _ in materialize(pipe.transformer):
        pass
    dense = mx.array(expected["single_blocks.1.linear2.weight"].numpy())
    for found, packed in zip((layer.weight, layer.scales, layer.biases), pack(dense, layer.how), strict=True):
        assert mx.array_equal(found, packed).item()


@pytest.mark.parametrize("kind", ["diffusers", "Q5_0"])
def test_loading_holds_the_packed_model_and_little_more(checkpoint, tmp_path, memory, kind):
    """At most two more of its largest tensor: as it is read, and as it is converted."""
    model = tiny.transformer(depth_single=24)
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    if kind == "diffusers":
        file = formats.save(tensors, tmp_path / "w")
    else:
        file = tmp_path / "w"
        formats.write_gguf(file, formats.bfl_transformer(tensors), kind)
    opened = open_checkpoint(checkpoint, transformer=file, distilled=True)
    before = memory()
    packed = load_transformer(opened, mx.float32, lambda *_: Quantization(4, 32))
    mx.reset_peak_memory()
    total = sum(materialize(packed))
    largest = max(4 * t.numel() for t in tensors.values())
    assert mx.get_peak_memory() - before <= total + 2 * largest + 2**16
    assert total < 0.2 * sum(4 * t.numel() for t in tensors.values())
