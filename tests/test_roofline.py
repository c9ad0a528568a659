"""FLOP of every stage, as counted in the references' modules and in ours, and what becomes of them."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flux2_mlx import AutoEncoderConfig, Flux2Pipeline, FluxKleinParams, Quantization, Qwen3Config
from flux2_mlx.device import weight_bytes
from flux2_mlx.disk_cache import read_table, write_table
from flux2_mlx.generate import main
from flux2_mlx.models.autoencoder import AutoEncoder
from flux2_mlx.models.flux2 import FluxKlein
from flux2_mlx.models.kv_cache import FrozenKV, KVReader
from flux2_mlx.models.layers import Linear
from flux2_mlx.runtime import roofline
from flux2_mlx.runtime.activations import Pass, Workload
from flux2_mlx.runtime.plan import Plan, Stage, format_range, make_plan
from flux2_mlx.runtime.released import released_modules
from flux2_mlx.runtime.roofline import (
    Speeds,
    Work,
    decoder_work,
    encoder_work,
    image_work,
    known_speeds,
    measure,
    reference_kv_work,
    text_encoder_work,
    transformer_work,
    work_after_first,
)
from tests import tiny
from tests.test_reuse import step

ROOT = Path(__file__).parents[1]
TERA = 1e12
SPEEDS = Speeds(matmul=4e12, attention=2e12, convolution=1e12, copy=1e11)


def counted(compute) -> Work:
    """FLOP that torch counts: attention's products are bmm, as no other product here is."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        compute()
    flops = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    work = Work(flops.get("aten.mm", 0) + flops.get("aten.addmm", 0), flops.get("aten.bmm", 0))
    work += Work(convolution=flops.get("aten.convolution", 0))
    assert work.flops == counter.get_total_flops()
    return work


def kinds(work: Work) -> tuple[int, int, int]:
    return work.matmul, work.attention, work.convolution


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_flop_of_the_transformer_are_those_of_diffusers(layout):
    shape = {name: tiny.LAYOUTS[layout][name] for name in ("heads", "depth", "depth_single", "text_hidden")}
    model = tiny.transformer(**shape)
    params = FluxKleinParams.from_config(model.config)
    given = {
        "hidden_states": torch.zeros(1, 24, 128),
        "encoder_hidden_states": torch.zeros(1, 7, 3 * shape["text_hidden"]),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(24, 4),
        "txt_ids": torch.zeros(7, 4),
    }
    whole = counted(lambda: model(**given))
    for one in (Pass(7, 24), Pass(7, 16, 8)):
        unread = counted(lambda one=one: last_block_of_unread_tokens(model, one))
        assert kinds(whole) == kinds(transformer_work(params, one, mx.float32) + unread)


def last_block_of_unread_tokens(model, one: Pass):
    """What diffusers computes in its last block, and behind it, of tokens that nobody reads but for keys and values."""
    attention, unread = model.single_transformer_blocks[-1].attn, one.text + one.references
    x, dims = torch.zeros(unread, attention.inner_dim), attention.inner_dim
    weight = attention.to_qkv_mlp_proj.weight
    query, gate_and_up = x @ weight[:dims].T, x @ weight[3 * dims :].T
    keys = torch.zeros(attention.heads, one.tokens, attention.head_dim)
    scores = query.reshape(unread, attention.heads, -1).transpose(0, 1) @ keys.transpose(1, 2)
    out = (scores @ keys).transpose(0, 1).reshape(unread, dims)
    x = torch.cat([out, gate_and_up[:, : gate_and_up.shape[1] // 2]], dim=1) @ attention.to_out.weight.T
    model.proj_out(x[: one.references])


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_flop_of_the_text_encoder_are_those_of_transformers(layout):
    shape = {name: tiny.LAYOUTS[layout][name] for name in ("text_hidden", "text_heads", "text_kv_heads")}
    model = tiny.text_encoder(**shape, layers=27, vocab=100).model
    config = replace(Qwen3Config.from_config(model.config.to_dict() | {"num_hidden_layers": 36}), vocab_size=100)
    work = counted(lambda: model(torch.zeros(1, 20, dtype=torch.long)))
    assert kinds(work) == kinds(text_encoder_work(config, 20, 20, mx.float32))
    x, layer = torch.zeros(15, config.hidden_size), model.layers[0].self_attn
    queries, keys = (torch.zeros(config.num_attention_heads, tokens, config.head_dim) for tokens in (20, 15))

    def of_padding():
        """What transformers computes in a layer of keys and values that are masked for everybody."""
        _ = layer.k_proj(x), layer.v_proj(x), queries @ keys.transpose(1, 2) @ keys

    padding = counted(of_padding) * config.num_layers
    assert kinds(work) == kinds(text_encoder_work(config, 20, 5, mx.float32) + padding)


@pytest.mark.parametrize("decoder", [None, (8, 16, 24, 32)])
def test_flop_of_the_autoencoder_are_those_of_diffusers(decoder):
    shape = {} if decoder is None else {"decoder_block_out_channels": decoder}
    model = tiny.autoencoder(channels=(16, 24, 32, 40), **shape)
    config = AutoEncoderConfig.from_config(model.config)
    encoding = counted(lambda: model.encode(torch.zeros(1, 3, 64, 48)))
    assert kinds(encoding) == kinds(encoder_work(config, 64, 48, mx.float32))
    decoding = counted(lambda: model.decode(torch.zeros(1, 32, 8, 6)))
    assert kinds(decoding) == kinds(decoder_work(config, 64, 48, mx.float32))


@pytest.fixture
def done(monkeypatch) -> dict[str, int]:
    """FLOP of our own modules by kind, as their operations are called; nothing of it needs to be computed."""
    done = {"matmul": 0, "attention": 0, "convolution": 0}

    def watch(owner, name, kind, flops):
        function = getattr(owner, name)

        def called(*arguments, **options):
            out = function(*arguments, **options)
            done[kind] += flops(out, *arguments)
            return out

        monkeypatch.setattr(owner, name, called)

    for layer in (Linear, nn.Linear):
        watch(layer, "__call__", "matmul", lambda out, layer, x: 2 * out.size * x.shape[-1])
    watch(Linear, "outputs", "matmul", lambda out, layer, x, *_: 2 * out.size * x.shape[-1])
    attention = "scaled_dot_product_attention"
    watch(mx.fast, attention, "attention", lambda out, q, k, v: 4 * q.size * k.shape[2])
    watch(mx, "conv2d", "convolution", lambda out, x, weight, *_: 2 * out.size * weight[0].size)
    return done


@pytest.mark.parametrize("name", ["klein-4b", "klein-9b"])
def test_flop_of_our_own_modules(done, name):
    """At full size, since nothing is evaluated."""
    text_encoder, transformer, _ = released_modules(name, mx.float32, {})
    config, params, level = text_encoder.config, transformer.params, mx.array([0.5])

    def check(work: Work):
        assert tuple(done.values()) == kinds(work)
        done.update(dict.fromkeys(done, 0))

    ids = mx.zeros((1, 512), mx.int32)
    for prompt in (20, 512):
        txt = text_encoder(ids, mx.arange(512)[None] < prompt)
        check(text_encoder_work(config, 512, prompt, mx.float32))
    text_encoder(mx.zeros((2, 512), mx.int32), mx.arange(512)[None] < mx.array([[20], [60]]))
    check(text_encoder_work(config, 512, 60, mx.float32) * 2)
    img, rope = mx.zeros((1, 4096, 128)), FluxKlein.compute_rope(mx.zeros((1, 512, 4)), mx.zeros((1, 4096, 4)))
    for image in (4096, 1024):
        transformer.forward_with_rope(img, txt, level, *rope, image_tokens=image)
        check(transformer_work(params, Pass(512, image, 4096 - image), mx.float32))
    kept = transformer.encode_reference_kv(img, *FluxKlein.compute_rope(mx.zeros((1, 0, 4)), mx.zeros((1, 4096, 4))))
    check(reference_kv_work(params, 4096, mx.float32))
    transformer.forward_with_rope(img, txt, level, *rope, kv=[KVReader(kv) for kv in kept])
    check(transformer_work(params, Pass(512, 4096, kv=4096), mx.float32))
    for what in ("text", "references"):
        reuse, one = FrozenKV(what, 3072), Pass(512, 3072, 1024, frozen=what)
        for own in (one.first, one.after_first):
            step(transformer, reuse, img, txt, level, rope, 3072)
            check(transformer_work(params, own, mx.float32))


def test_flop_of_tiles(done, monkeypatch):
    monkeypatch.setattr("flux2_mlx.models.autoencoder.TILE_BYTES", 2**14)
    config = AutoEncoderConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
    autoencoder = AutoEncoder(config)
    autoencoder.decoder(mx.zeros((1, 16, 8, 32)))
    assert tuple(done.values()) == kinds(decoder_work(config, 128, 64, mx.float32))
    done |= dict.fromkeys(done, 0)
    autoencoder.encoder(mx.zeros((1, 128, 64, 3)))
    assert tuple(done.values()) == kinds(encoder_work(config, 128, 64, mx.float32))


@pytest.mark.parametrize(
    ("params", "step", "edit"),
    [
        (FluxKleinParams.klein_4b(), (4.917, 10.173, 34.820), (6.629, 17.744, 76.703)),
        (FluxKleinParams.klein_9b(), (11.082, 22.732, 75.515), (14.897, 39.227, 161.285)),
    ],
)
def test_the_table_of_steps(params, step, edit):
    """Of 256, 512 and 1024 squared, alone and with a reference of the picture's size: what diffusers computes, but for
    queries, gate, up and output of unread tokens in the last block, and their velocity.
    """
    dims, hidden = params.hidden_size, params.mlp_hidden
    for side, alone, both in zip((256, 512, 1024), step, edit, strict=True):
        tokens = (side // 16) ** 2
        for one, expected in ((Pass(512, tokens), alone), (Pass(512, tokens, tokens), both)):
            unread = (512 + one.references) * (4 * dims**2 + 6 * dims * hidden + 4 * one.tokens * dims)
            unread += 2 * one.references * dims * 128
            assert (transformer_work(params, one, mx.bfloat16).flops + unread) / TERA == pytest.approx(
                expected, abs=6e-4
            )


@pytest.mark.parametrize(("side", "extract", "cached"), [(512, 38.3, 23.5), (1024, 151.3, 85.3)])
def test_the_table_of_kept_references(side, extract, cached):
    """Of whole blocks. diffusers keeps references in the first step, which is ours and the pass before it."""
    params, tokens = FluxKleinParams.klein_9b(), (side // 16) ** 2
    step = roofline._blocks(params, 512 + tokens, 512 + 2 * tokens, 512 + tokens, mx.bfloat16).flops / TERA
    keeping = roofline._blocks(params, tokens, tokens, tokens, mx.bfloat16).flops / TERA
    assert step == pytest.approx(cached, abs=0.05)
    assert step + keeping == pytest.approx(extract, abs=0.05)


def test_the_table_of_the_other_stages():
    for config, expected in ((Qwen3Config(), 2.906), (Qwen3Config.qwen3_8b(), 5.450)):
        assert text_encoder_work(config, 512, 512, mx.bfloat16).flops / TERA == pytest.approx(expected, abs=6e-4)
    full, small = AutoEncoderConfig.flux2(), AutoEncoderConfig.flux2_small_decoder()
    for side, *expected in ((256, 0.622, 0.351, 0.273), (512, 2.516, 1.422, 1.119), (1024, 10.475, 5.997, 4.888)):
        work = [decoder_work(full, side, side, mx.bfloat16), decoder_work(small, side, side, mx.bfloat16)]
        work.append(encoder_work(full, side, side, mx.bfloat16))
        assert [own.flops / TERA for own in work] == pytest.approx(expected, abs=6e-4)


@pytest.fixture
def metal(monkeypatch):
    monkeypatch.setattr(roofline, "on_metal", lambda: True)


def test_winograd_is_counted_as_metal_computes_it(metal):
    """Of diffusers' own convolutions, tile by tile; of sizes that are multiples of 6 at every depth."""
    model = tiny.autoencoder(channels=(128, 128, 160, 96))
    config = AutoEncoderConfig.from_config(model.config)
    products = direct = 0

    def count(conv, given, out):
        nonlocal products, direct
        (height, width), (outputs, inputs, side, _) = out.shape[2:], conv.weight.shape
        large = inputs % 32 == outputs % 32 == 0 and inputs + outputs >= 256 and height * width >= 4096
        if large and side == 3 and conv.stride == (1, 1):
            products += 2 * 64 * math.ceil(height / 6) * math.ceil(width / 6) * inputs * outputs
        else:
            direct += 2 * out.numel() * inputs * side**2

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    height, width = 192, 144
    work = (lambda: model.encode(torch.zeros(1, 3, height, width))), encoder_work
    for compute, ours in (work, ((lambda: model.decode(torch.zeros(1, 32, height // 8, width // 8))), decoder_work)):
        products = direct = 0
        with torch.no_grad():
            compute()
        attention = 8 * (height * width // 64) * 96**2
        found = ours(config, height, width, mx.float32)
        assert products > 0
        assert (found.matmul, found.convolution) == (products + attention, direct)


def test_winograd_of_the_released_decoder(metal):
    """2.1 TFLOP for 9.9, and more bytes than the rest of it together: each way 64 numbers for 36."""
    config = AutoEncoderConfig.flux2()
    work = decoder_work(config, 1024, 1024, mx.bfloat16)
    assert (work.flops - work.attention) / TERA == pytest.approx(2.1, abs=0.03)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "on_metal", lambda: False)
        direct = decoder_work(config, 1024, 1024, mx.bfloat16)
    assert direct.convolution / TERA == pytest.approx(9.9, abs=0.03)
    assert direct.intermediates < work.intermediates < 2.1 * direct.intermediates


@pytest.mark.parametrize(
    ("pixels", "inputs", "outputs", "expected"),
    [
        (4096, 128, 128, True),
        (4095, 128, 128, False),
        (4096, 96, 128, False),
        (4096, 224, 32, True),
        (4096, 240, 32, False),
        (4096, 512, 3, False),
    ],
)
def test_when_metal_computes_winograd(pixels, inputs, outputs, expected):
    assert roofline.is_winograd(pixels, inputs, outputs) == expected


# ------------------------------------------------------------------------------------------------ bytes and seconds


def test_weights_are_read_once_and_packed_ones_are_unpacked():
    workload = Workload(256, 256, 512)
    dense = image_work(*released_modules("klein-4b", mx.bfloat16, {}), workload, mx.bfloat16)
    assert dense["transformer"].weights == 7_751_089_152
    assert dense["text encoder"].weights == 6_228_176_384 - 2 * 151936 * 2560  # of the embedding few rows are read
    how = {"transformer": Quantization(4), "text_encoder": Quantization(4)}
    modules = released_modules("klein-4b", mx.bfloat16, how)
    packed = image_work(*modules, workload, mx.bfloat16)
    assert packed["transformer"].weights == weight_bytes(modules[1])
    blocks, ends = (2 * 5 + 20) * 13 * 3072**2, (128 + 128 + 7680) * 3072
    layers = 27 * (2560 * 6144 + 4096 * 2560 + 3 * 2560 * 9728)
    for name, numbers in (("transformer", blocks + ends), ("text encoder", layers)):
        assert packed[name].intermediates - dense[name].intermediates == 2 * 2 * numbers  # written and read
        assert packed[name].flops == dense[name].flops


def test_references_are_work():
    modules = released_modules("klein-9b", mx.bfloat16, {})
    params, config = modules[1].params, modules[2].config
    work, kept = (
        image_work(*modules, Workload(256, 256, 512, [(512, 512), (256, 512)], has_kv_cache), mx.bfloat16)
        for has_kv_cache in (False, True)
    )
    encoding = encoder_work(config, 512, 512, mx.bfloat16) + encoder_work(config, 256, 512, mx.bfloat16)
    assert work["references"].flops == encoding.flops
    assert kept["references"].flops == encoding.flops + reference_kv_work(params, 1536, mx.bfloat16).flops
    assert work["transformer"].flops == transformer_work(params, Pass(512, 256, 1536), mx.bfloat16).flops
    assert kept["transformer"].flops == transformer_work(params, Pass(512, 256, kv=1536), mx.bfloat16).flops


def test_frozen_tokens_are_work_of_the_first_pass_alone():
    modules = released_modules("klein-4b", mx.bfloat16, {})
    params, sizes = modules[1].params, [(512, 512)]
    plain, text, references = (Workload(256, 256, 512, sizes, frozen=what) for what in (None, "text", "references"))
    works = [image_work(*modules, workload, mx.bfloat16)["transformer"] for workload in (plain, text, references)]
    assert works[0] == works[1] == works[2]
    assert work_after_first(modules[1], plain, mx.bfloat16) is None
    expected = transformer_work(params, Pass(0, 256, 1024, kv=512), mx.bfloat16).flops
    assert work_after_first(modules[1], text, mx.bfloat16).flops == expected
    expected = transformer_work(params, Pass(512, 256, kv=1024), mx.bfloat16).flops
    assert work_after_first(modules[1], references, mx.bfloat16).flops == expected


def test_seconds_lie_between_all_at_once_and_all_in_turn():
    computing = Work(matmul=4 * 10**12, attention=10**12, convolution=10**12, weights=10**10, intermediates=4 * 10**10)
    assert computing.seconds(SPEEDS) == (2.5, 3.0)
    moving = Work(matmul=10**12, weights=3 * 10**11)
    assert moving.seconds(SPEEDS) == (3.0, 3.25)


def test_what_two_durations_look_like():
    assert [format_range(*ends) for ends in ((0.123, 0.456), (2.61, 2.94), (9.94, 123.4), (12.31, 12.34))] == [
        "0.12-0.46",
        "2.6-2.9",
        "9.9-123",
        "12.3",
    ]


def test_a_picture_takes_its_passes():
    stages = [Stage(name, 1, 1, 1, (1.0, 2.0)) for name in ("text encoder", "references", "transformer", "decoder")]
    assert Plan(tuple(stages), 1).seconds(2, 8) == (12.0, 24.0)
    faster = replace(stages[2], seconds_after_first=(0.5, 1.25))
    assert Plan((*stages[:2], faster, stages[3]), 1).seconds(2, 8) == (8.5, 18.75)
    assert "seconds" in str(Plan(tuple(stages), 1))
    stages[1] = replace(stages[1], seconds=None)
    assert Plan(tuple(stages), 1).seconds(2, 8) is None
    assert "seconds" not in str(Plan(tuple(stages), 1))


# ------------------------------------------------------------------------------------------------ the machine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path))
    return tmp_path


def test_a_speed_is_an_amount_over_the_shortest_time(monkeypatch):
    taken = iter([0.01, 0.2])
    asked = []

    def shortest_seconds(function, *arrays):
        asked.append(arrays[0].size)
        return next(taken)

    monkeypatch.setattr(roofline, "shortest_seconds", shortest_seconds)
    assert roofline._speed(lambda scale: (1000 * scale, mx.negative, [mx.zeros((scale,))])) == 4000 / 0.2
    assert asked == [1, 4]
    monkeypatch.setattr(roofline, "shortest_seconds", lambda *_: 0.001)
    assert roofline._speed(lambda scale: (1000 * scale, mx.negative, [mx.zeros((scale,))])) == 64000 / 0.001


def test_what_is_measured_is_what_is_counted(monkeypatch, done):
    """The amounts of a measurement, against what its operations do."""
    amounts = {}

    def speed(kind):
        amount, function, arrays = kind(1)
        amounts[kind.__name__] = amount
        out = function(*arrays)
        if kind.__name__ == "matmul":
            assert amount == 2 * out.size * arrays[0].shape[-1]
        if kind.__name__ == "copy":
            assert amount == out.nbytes + arrays[0].nbytes
        return 1.0

    monkeypatch.setattr(roofline, "_speed", speed)
    roofline.measure_speeds(mx.bfloat16)
    assert len(amounts) == 4
    assert (amounts["attention"], amounts["convolution"]) == (done["attention"], done["convolution"])


def test_speeds_are_kept_for_each_dtype(folder, monkeypatch):
    assert known_speeds(mx.float16) is None
    monkeypatch.setattr(roofline, "measure_speeds", lambda dtype: replace(SPEEDS, copy=float(dtype.size)))
    assert measure(mx.float16).keys() == {mx.float16, mx.bfloat16}  # the autoencoder's
    monkeypatch.setattr(roofline, "measure_speeds", lambda dtype: SPEEDS)
    measure(mx.float32)
    assert known_speeds(mx.float16).copy == 2.0
    assert known_speeds(mx.float32) == SPEEDS
    monkeypatch.setattr(roofline, "machine_name", lambda: "another chip")
    assert known_speeds(mx.float32) is None


@pytest.mark.parametrize("damage", [3, {}, {"copy": "fast"}, {"copy": 0.0}])
def test_a_damaged_table_is_none(folder, monkeypatch, damage):
    monkeypatch.setattr(roofline, "measure_speeds", lambda dtype: SPEEDS)
    measure(mx.float32)
    table = read_table("speeds")
    (key,) = table
    write_table("speeds", {key: damage if damage in (3, {}) else table[key] | damage})
    assert known_speeds(mx.float32) is None


def test_work_is_counted_where_speeds_are_known_alone(folder, pipe, monkeypatch):
    monkeypatch.setattr("flux2_mlx.runtime.plan.image_work", None)
    assert pipe.plan(64, 64).seconds() is None


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def measured(folder, monkeypatch):
    """A machine whose speed is known once it is measured."""
    monkeypatch.setattr(roofline, "measure_speeds", lambda dtype: SPEEDS)


def test_a_plan_tells_seconds_once_the_machine_is_measured(measured, checkpoint, capsys):
    arguments = ["--model", str(checkpoint), "--height", "64", "--width", "64", "--memory-limit", "5"]

    def told(option):
        assert main([option, *arguments]) == 0
        return capsys.readouterr().out

    before = told("--plan")
    assert "seconds" not in before.splitlines()[0]
    assert "time: not known; --measure measures this machine" in before
    after = told("--measure")
    assert "seconds" in after.splitlines()[0]
    assert "s an image, 4 passes of the transformer, without loading it" in after
    assert told("--plan") == after
    plan = Flux2Pipeline.from_pretrained(checkpoint).plan(64, 64)
    work = transformer_work(FluxKleinParams.from_config(tiny.transformer().config), Pass(512, 16), mx.float32)
    least = work.computing(SPEEDS)
    assert least < plan.stages[1].seconds[0] < plan.stages[1].seconds[1]


def test_seconds_of_a_released_model(measured, capsys):
    measure(mx.bfloat16)
    plan = make_plan(
        *released_modules("klein-4b", mx.bfloat16, {}), Workload(256, 256, 512), dtype=mx.bfloat16, limit=0
    )
    unread = 512 * 3072 * (4 * 3072 + 6 * 9216), 4 * 512 * 768 * 3072  # of the text, in the last block
    by_hand = (4.917e12 - 0.181e12 - unread[0]) / SPEEDS.matmul + (0.181e12 - unread[1]) / SPEEDS.attention
    assert plan.stages[1].seconds[0] == pytest.approx(by_hand, rel=1e-3)
    assert main(["--plan", "--dtype", "bfloat16", "--width", "256", "--height", "256"]) == 0
    assert f"time: about {format_range(*plan.seconds(1, 4))} s an image, 4 passes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--guidance", "1"],
        ["--guidance-interval", "0.5,0.9"],
        ["--sigmas", "1,0.8,0.3"],
        ["--init-image", "fox.png"],
        ["--init-image", "fox.png", "--strength", "0.5", "--guidance", "2"],
        ["--init-image", "fox.png", "--expand", "left=16"],
        ["--distilled", "--guidance", "2", "--force-guidance"],
    ],
)
def test_the_passes_that_are_told_are_made(measured, base_reference, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("fox.png")
    given = ["a fox", "--model", str(base_reference[1]), "--height", "64", "--max-sequence-length", "16", *options]
    given += [] if "--expand" in options else ["--width", "64"]
    given += [] if "--sigmas" in options else ["--steps", "4"]
    assert main([*given, "--measure"]) == 0
    told = re.search(r"(\d+) passes", capsys.readouterr().out)[1]
    passes = []
    compute = FluxKlein.forward_with_rope

    def forward_with_rope(self, img, *arguments, **options):
        passes.append(len(img))
        return compute(self, img, *arguments, **options)

    monkeypatch.setattr(FluxKlein, "forward_with_rope", forward_with_rope)
    assert main([*given, "--no-cache", "--quiet"]) == 0
    assert int(told) == sum(passes)


def test_a_plan_measures_nothing(measured, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "measure_speeds", None)
    assert main(["--plan", "--model", str(checkpoint)]) == 0


@pytest.mark.parametrize(("depth", "single", "references"), [(2, 1, 0), (1, 2, 0), (1, 1, 1)])
def test_intermediates_of_blocks_are_those_that_are_counted(depth, single, references):
    """By the graph of a step with one block more, see benchmarks/kernels.py; in its own process, for it reloads. Or
    with a reference more, which is embedded, joined to the text, and keys and values alone in the last block.
    """
    script = f"""
from dataclasses import replace
import mlx.core as mx
from benchmarks.kernels import FluxKleinParams, Recorder, own_step
params, moved = FluxKleinParams.klein_4b(), []
for depth, single, references in ((1, 1, 0), ({depth}, {single}, {references})):
    deep = replace(params, depth=depth, depth_single=single)
    moved.append(own_step(Recorder(), deep, mx.bfloat16, 1024, 512, references).kernels(fuse=False)[1])
print((moved[1] - moved[0]) / ({4096 if references else 4608} * params.hidden_size * 2))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    ends = 1 + 128 / 3072 + 2
    expected = roofline.BLOCK + roofline.KV_BLOCK + ends if references else roofline.BLOCK
    assert float(done.stdout) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("part", "work"), [("Decoder", decoder_work), ("Encoder", encoder_work)])
def test_intermediates_of_the_autoencoder_are_those_that_are_counted(part, work):
    script = f"""
import mlx.core as mx
from benchmarks.kernels import Recorder, own_half
print(own_half(Recorder(), "{part}", mx.bfloat16, 512).kernels(fuse=False)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    moved = work(AutoEncoderConfig.flux2(), 512, 512, mx.bfloat16).intermediates
    assert float(done.stdout) == pytest.approx(moved, rel=0.05)
