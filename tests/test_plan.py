"""The memory plan, its modes, and streaming."""

import contextlib
import gc
import re
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from flux2_mlx import AutoEncoderConfig, Flux2Pipeline, FluxKleinParams, InputError, Quantization, Qwen3Config
from flux2_mlx.convert import main as convert
from flux2_mlx.device import (
    free_in_meminfo,
    machine_memory,
    memory_limit,
    recommended_memory,
    weight_bytes,
)
from flux2_mlx.generate import main
from flux2_mlx.models.autoencoder import MOST_TILE_BYTES, TILE_BYTES, AutoEncoder, Decoder, Encoder
from flux2_mlx.models.flux2 import FluxKlein
from flux2_mlx.models.qwen3 import Qwen3TextEncoder
from flux2_mlx.pipeline import STAGES
from flux2_mlx.quantization.layers import quantize
from flux2_mlx.quantization.packing import quantize_rtn
from flux2_mlx.runtime import activations
from flux2_mlx.runtime.activations import Pass, Workload, decoder_bytes, text_encoder_bytes, transformer_bytes
from flux2_mlx.runtime.plan import MODES, Plan, Stage, make_plan
from flux2_mlx.runtime.released import download_bytes, released_modules
from flux2_mlx.runtime.streaming import block_paths, is_streamed, streamed_bytes
from tests import formats, tiny

SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """The checkpoint converted to 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "checkpoint"
    assert convert([str(checkpoint), str(folder), "--quantize", "4", "--group-size", "32"]) == 0
    return folder


def picture(pipe):
    return np.asarray(pipe("a red fox", seed=3, **SMALL).images[0])


def loaded(pipe) -> set[str]:
    return pipe.stages.loaded()


# ------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_streamed_picture_is_the_resident_one(checkpoint, packed, kind, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_DENSE_ROWS", "1")  # other than the default, so that every layer is to be told
    folder = {"dense": checkpoint, "packed": packed}[kind]
    streamed = Flux2Pipeline.from_pretrained(folder, memory="streamed", cache=False)
    expected = picture(Flux2Pipeline.from_pretrained(folder, memory="resident", cache=False))
    assert np.array_equal(picture(streamed), expected)
    assert np.array_equal(picture(streamed), expected)  # with blocks that were read before


def test_streamed_guidance_passes_over_the_blocks_twice(base_reference):
    folder = base_reference[1]
    options = {"seed": 3, "guidance": 2.0, **SMALL}
    pictures = [
        np.asarray(Flux2Pipeline.from_pretrained(folder, memory=mode)("a red fox", **options).images[0])
        for mode in ("streamed", "resident")
    ]
    assert np.array_equal(*pictures)


@pytest.mark.filterwarnings("ignore:the .* is streamed and its weights are converted")
def test_what_is_converted_on_loading_streams_too(checkpoint, tmp_path):
    tensors = {name: t.detach() for name, t in tiny.transformer().state_dict().items()}
    file = tmp_path / "weights"
    formats.write_gguf(file, formats.bfl_transformer(tensors), "Q5_0")
    options = {"transformer": file, "distilled": True, "quantize": 8, "group_size": 32, "cache": False}
    streamed = Flux2Pipeline.from_pretrained(checkpoint, memory="streamed", **options)
    resident = Flux2Pipeline.from_pretrained(checkpoint, memory="resident", **options)
    assert np.array_equal(picture(streamed), picture(resident))


def test_converting_in_every_pass_is_told(checkpoint):
    options = {"quantize": 4, "quantize_text_encoder": "none", "group_size": 32, "cache": False}
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="streamed", **options)
    with pytest.warns(UserWarning, match=r"the transformer is streamed .* flux2_mlx\.convert does it once"):
        picture(pipe)


def test_streaming_holds_two_blocks(tmp_path, checkpoint, memory):
    """Of twenty-four; the transformer's weights outside of its blocks are few."""
    tensors = {name: t.detach() for name, t in tiny.transformer(depth_single=24, heads=4).state_dict().items()}
    file = formats.save(tensors, tmp_path / "weights")
    pipe = Flux2Pipeline.from_pretrained(checkpoint, transformer=file, distilled=True, memory="streamed", cache=False)
    whole, part = weight_bytes(pipe.transformer), streamed_bytes(pipe.transformer)
    assert part < whole / 4
    embeds = mx.zeros((1, 16, pipe.checkpoint.transformer.txt_embed_dim))
    before = memory()
    options = {name: value for name, value in SMALL.items() if name != "max_sequence_length"}
    step = list(pipe.stream(prompt_embeds=embeds, **options))[-1]
    work = pipe.plan(64, 80, 16).stages[1].activation_bytes
    assert step.stats.peak_bytes["denoise"] - before < part + 2 * work < whole


def test_blocks_are_those_of_the_two_models(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    params = pipe.checkpoint.transformer
    paths = block_paths(pipe.transformer)
    assert len(paths) == params.depth + params.depth_single
    assert (paths[0], paths[-1]) == ("transformer_blocks.0.", f"single_transformer_blocks.{params.depth_single - 1}.")
    assert block_paths(pipe.text_encoder) == [f"model.layers.{k}." for k in range(27)]
    assert block_paths(pipe.autoencoder) == []
    assert streamed_bytes(pipe.autoencoder) == weight_bytes(pipe.autoencoder)


def test_a_model_that_was_changed_is_not_streamed(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="streamed", cache=False)
    nn.quantize(pipe.text_encoder, 32, 4)
    with pytest.raises(InputError, match="Qwen3TextEncoder was changed after it was opened"):
        picture(pipe)


def test_a_dropped_pipeline_is_gone_at_once(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="streamed", cache=False)
    picture(pipe)
    gone = weakref.ref(pipe)
    gc.disable()
    del pipe
    gc.enable()
    assert gone() is None


# ------------------------------------------------------------------------------------------------ modes


def test_each_mode_keeps_what_it_says(checkpoint):
    kept = {}
    for mode in MODES[1:]:
        pipe = Flux2Pipeline.from_pretrained(checkpoint, memory=mode, cache=False)
        picture(pipe)
        kept[mode] = loaded(pipe)
    assert kept == {"resident": set(STAGES), "staged": {"autoencoder"}, "streamed": {"autoencoder"}}


@pytest.mark.filterwarnings("ignore:the .* needs about")
def test_auto_decides_for_each_picture_anew(checkpoint, packed):
    pipe = Flux2Pipeline.from_pretrained(packed, cache=False)
    small, large = pipe.plan(64, 64, 16), pipe.plan(128, 128, 16)
    transformer = small.stages[1]
    limit = transformer.weights + (transformer.activation_bytes + large.stages[1].activation_bytes) // 2
    pipe.memory_limit = limit
    streamed = []
    for side in (64, 128, 64):
        step = next(pipe.stream("a red fox", seed=3, height=side, width=side, num_steps=1, max_sequence_length=16))
        streamed.append(is_streamed(pipe.transformer))
        resident = Flux2Pipeline.from_pretrained(packed, memory="resident", cache=False)
        options = {"seed": 3, "height": side, "width": side, "num_steps": 1, "max_sequence_length": 16}
        assert np.array_equal(np.asarray(step.picture()), np.asarray(resident("a red fox", **options).images[0]))
    assert streamed == [False, True, False]
    for side, mode in ((64, False), (128, True)):
        assert pipe.plan(side, side, 16).stages[1].is_streamed("auto", limit) == mode


def test_resident_tells_when_all_together_do_not_fit(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="resident", cache=False)
    pipe.memory_limit = mx.get_active_memory() + pipe.plan(64, 80, 16).resident - 10**6
    with pytest.warns(UserWarning, match="the autoencoder needs about"):
        picture(pipe)


def test_what_cannot_be_is_refused(checkpoint):
    with pytest.raises(InputError, match="memory must be one of auto, resident, staged, streamed, got 'tiny'"):
        Flux2Pipeline.from_pretrained(checkpoint, memory="tiny")
    for limit in (0, -1, 8, 1e30, float("nan"), "5 GB"):
        with pytest.raises(InputError, match="memory_limit must be a number of bytes"):
            Flux2Pipeline.from_pretrained(checkpoint, memory_limit=limit)
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory_limit=5e9)
    assert pipe.memory_limit == 5_000_000_000
    with pytest.raises(InputError, match="max_sequence_length"):
        pipe.plan(64, 64, 0)


def test_what_auto_comes_to():
    stages = (Stage("a", 100, 10, 5), Stage("b", 60, 20, 50), Stage("c", 3, 3, 4))
    found = {limit: (Plan(stages, limit).mode, Plan(stages, limit).peak) for limit in (213, 212, 110, 109, 104)}
    assert found == {
        213: ("resident", 213),
        212: ("staged", 110),
        110: ("staged", 110),
        109: ("streamed", 105),  # b alone
        104: ("streamed", 70),
    }
    assert Plan(stages, 1000, "staged").peak == 110
    assert Plan(stages, 1000, "streamed").peak == 70
    assert Plan(stages, 1, "resident").peak == 213
    assert "memory: streamed (b), about 0.00 of 0.00 GB" in Plan(stages, 109).summary()
    assert "too much" not in str(Plan(stages, 109))
    assert "too much" in str(Plan(stages, 60))
    assert "--memory" not in str(Plan(stages, 60)).split("too much")[1]  # it is streamed already


# ------------------------------------------------------------------------------------------------ predictions


def peak_of(module, compute, working) -> int:
    """Bytes at the most, the module's weights among them, where there is room for them and the intermediates alone."""
    mx.eval(module.parameters())
    before = mx.get_active_memory() - weight_bytes(module)
    with memory_limit(mx.get_active_memory() + working, working):
        mx.reset_peak_memory()
        mx.eval(compute())
        return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("side", "length", "packed", "dtype"),
    [
        (128, 128, None, mx.float16),
        (192, 512, None, mx.float32),
        (128, 128, Quantization(8), mx.bfloat16),
        pytest.param(128, 640, Quantization(8), mx.bfloat16, marks=pytest.mark.nightly),  # which CPUs multiply slowly
    ],
)
def test_a_stage_needs_what_the_plan_says(side, length, packed, dtype, memory):
    """The released models' proportions at an eighth of their width."""
    text_config = Qwen3Config(
        vocab_size=1000,
        hidden_size=320,
        intermediate_size=1216,
        num_attention_heads=4,
        num_key_value_heads=1,
        tapped_layers=(1, 2, 3),
    )
    params = FluxKleinParams(hidden_size=384, num_heads=3, txt_embed_dim=960, depth=1, depth_single=2)
    text, transformer = Qwen3TextEncoder(text_config), FluxKlein(params)
    autoencoder = AutoEncoder(AutoEncoderConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=8))
    for module in (text, transformer, autoencoder):
        module.set_dtype(dtype)
    if packed is not None:
        for module in (text, transformer):
            quantize(module, lambda *_: packed, quantize_rtn)
    workload = Workload(side, side, length, [(side, side)])
    plan = make_plan(text, transformer, autoencoder, workload, dtype=dtype, limit=0)
    tokens = 2 * side * side // 256
    ids = mx.zeros((1, length), mx.int32)
    img, txt = mx.zeros((1, tokens, 128)), mx.zeros((1, length, 960))
    rope = FluxKlein.compute_rope(mx.zeros((1, length, 4)), mx.zeros((1, tokens, 4)))
    latents, pixels = mx.zeros((1, side // 8, side // 8, 32)), mx.zeros((1, side, side, 3))
    mx.eval(ids, img, txt, *rope, latents, pixels)
    memory()
    work = {
        "text encoder": (text, lambda: text(ids, mx.ones_like(ids))),
        "references": (autoencoder.encoder, lambda: autoencoder.encoder(pixels)),
        "transformer": (transformer, lambda: transformer.forward_with_rope(img, txt, mx.array([0.5]), *rope)),
        "decoder": (autoencoder.decoder, lambda: autoencoder.decoder(latents)),
    }
    for stage in plan.stages:
        share = peak_of(*work[stage.name], stage.activation_bytes) / (stage.weights + stage.activation_bytes)
        assert 0.85 <= share <= 1.1, stage.name  # how early MLX frees depends on how fast its products are


def test_attention_in_parts_needs_what_the_plan_says(monkeypatch, memory):
    """Parts of 192 queries: their scores for those of all, and their outputs beside the joined one."""
    params = FluxKleinParams(hidden_size=384, num_heads=3, txt_embed_dim=960, depth=1, depth_single=2)
    transformer, image = FluxKlein(params), 256
    one = Pass(512, image)
    whole = transformer_bytes(params, one, mx.float32)[1]
    monkeypatch.setattr("flux2_mlx.models.attention.SCORES_AT_ONCE", 3 * 768 * 192)
    need = max(transformer_bytes(params, one, mx.float32))
    assert need < 0.8 * whole
    img, txt = mx.zeros((1, image, 128)), mx.zeros((1, 512, 960))
    rope = FluxKlein.compute_rope(mx.zeros((1, 512, 4)), mx.zeros((1, image, 4)))
    mx.eval(img, txt, *rope)
    memory()
    taken = peak_of(transformer, lambda: transformer.forward_with_rope(img, txt, mx.array([0.5]), *rope), need)
    assert 0.85 <= taken / (weight_bytes(transformer) + need) <= 1.1


def test_on_cuda_the_scores_of_float32_are_planned(monkeypatch):
    """Its fused kernels are those of cuDNN, in 16 bits."""
    params, config, one = FluxKleinParams(), Qwen3Config(), Pass(512, 4096)
    assert transformer_bytes(params, one, mx.float32)[1] > 0
    monkeypatch.setattr("flux2_mlx.device.on_gpu", lambda: True)
    monkeypatch.setattr("flux2_mlx.runtime.activations.on_gpu", lambda: True)
    feed_forward = text_encoder_bytes(config, 512, mx.float32)
    assert transformer_bytes(params, one, mx.float32)[1] == 0
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    scores = transformer_bytes(params, one, mx.float32)[1]
    assert scores == (9 * 4608 * 3072 + 24 * 576 * 4608) * 4  # parts of 576 queries, within 256 MB
    assert text_encoder_bytes(config, 2048, mx.float32) > 4 * feed_forward
    assert transformer_bytes(params, one, mx.bfloat16)[1] == 0


def test_tiles_need_what_the_plan_says(memory):
    autoencoder = AutoEncoder(AutoEncoderConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=8))
    latents = mx.random.normal((1, 32, 16, 32))
    mx.eval(latents)
    memory()
    planned = decoder_bytes(autoencoder.config, 256, 128, mx.float32, 2**19)
    peak = peak_of(autoencoder.decoder, lambda: autoencoder.decoder(latents, 2**19), planned)
    assert 0.75 <= (peak - weight_bytes(autoencoder.decoder)) / planned <= 1.2


@pytest.mark.parametrize("memory", ["auto", "resident", "staged"])
def test_tiles_on_a_gpu_are_as_large_as_memory_allows(memory, monkeypatch):
    """They change no mode and stay within the limit, if the smallest do."""
    modules = released_modules("klein-4b", mx.bfloat16, {}, mx.float32)
    monkeypatch.setattr(activations, "on_gpu", lambda: True)
    workload, grown = Workload(1024, 1024, 512, [(1024, 1024)]), []

    def plan(limit):
        return make_plan(*modules, workload, dtype=mx.bfloat16, limit=limit, memory=memory)

    for limit in range(10**9, 26 * 10**9, 4 * 10**9):
        own = plan(limit)
        with monkeypatch.context() as patch:
            patch.setattr(activations, "MOST_TILE_BYTES", TILE_BYTES)
            smallest = plan(limit)
        assert (own.mode, own.stages[0], own.stages[2]) == (smallest.mode, smallest.stages[0], smallest.stages[2])
        assert own.peak <= max(limit, smallest.peak)
        grown.append([own.stages[k].activation_bytes / smallest.stages[k].activation_bytes for k in (1, 3)])
    assert grown[0] == [1, 1]
    assert min(grown[-1]) > 2


def test_a_tile_is_chosen_by_what_is_free(checkpoint, monkeypatch):
    """And MLX is kept to the limit with it. On the CPU it is always the same."""
    stages = Flux2Pipeline.from_pretrained(checkpoint).stages
    for gpu, room, expected in ((True, 10, 2**26), (True, 100, 2**27), (True, 1, 2**25), (False, 100, 2**25)):
        monkeypatch.setattr(activations, "on_gpu", lambda gpu=gpu: gpu)
        stages.memory_limit = mx.get_active_memory() + room * 2**25 + 10**6
        with stages.tiles(lambda tile_bytes: 4 * tile_bytes) as tile_bytes:
            assert (tile_bytes, current_limit()) == (expected, max(1, stages.memory_limit - 4 * expected))


def test_a_picture_is_decoded_in_the_tiles_that_fit(checkpoint, monkeypatch):
    pipe, given = Flux2Pipeline.from_pretrained(checkpoint, memory="resident"), []
    expected = picture(pipe)

    def watch(compute):
        return lambda self, x, tile_bytes: given.append(tile_bytes) or compute(self, x, tile_bytes)

    for part in (Encoder, Decoder):
        monkeypatch.setattr(part, "__call__", watch(part.__call__))
    monkeypatch.setattr(activations, "on_gpu", lambda: True)
    assert np.array_equal(picture(pipe), expected)
    pipe("a red fox", image=Image.new("RGB", (64, 64)), **SMALL)
    assert given == [MOST_TILE_BYTES] * 3


def test_float16_takes_an_input_more_than_bfloat16():
    """Its residuals are in float32."""
    params = FluxKleinParams()
    half, brain = (transformer_bytes(params, Pass(40, 60), dtype)[0] for dtype in (mx.float16, mx.bfloat16))
    assert half - brain == 100 * params.hidden_size * 2


def test_references_are_planned(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    alone, edit = pipe.plan(64, 64), pipe.plan(64, 64, references=[(128, 128), (64, 64)])
    assert [stage.name for stage in edit.stages] == ["text encoder", "references", "transformer", "decoder"]
    assert edit.stages[2].activation_bytes > alone.stages[1].activation_bytes


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoder"),
    [("klein-4b", 7_751_089_152, 6_228_176_384), ("klein-base-9b", 18_157_162_496, 11_663_767_040)],
)
def test_released_models_are_planned_from_their_known_shapes(name, transformer, text_encoder):
    modules = released_modules(name, mx.bfloat16, {})
    plan = make_plan(*modules, Workload(1024, 1024, 512), dtype=mx.bfloat16, limit=0)
    text, denoise, decoder = plan.stages
    assert denoise.weights == transformer
    assert text.weights == text_encoder
    assert decoder.weights < 200e6
    packed = released_modules(name, mx.bfloat16, {"transformer": Quantization(4)})
    assert weight_bytes(packed[1]) < 5.0 / 16 * transformer
    assert download_bytes(name) > transformer + text_encoder


def current_limit() -> int:
    limit = mx.set_memory_limit(1)
    mx.set_memory_limit(limit)
    return limit


def test_the_earlier_limit_returns():
    before, inside = current_limit(), None
    with contextlib.suppress(ZeroDivisionError), memory_limit(12345, 345):
        inside = current_limit()
        raise ZeroDivisionError
    assert (inside, current_limit()) == (12000, before)


def test_on_a_gpu_memory_is_wired_while_pictures_are_drawn(checkpoint, monkeypatch):
    """MLX's limit here is a stand-in that refuses what Metal refuses."""
    limits = [7]

    def set_wired_limit(limit):
        assert 0 <= limit <= recommended_memory()
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    pipe = Flux2Pipeline.from_pretrained(checkpoint, cache=False, memory_limit=2**60)
    steps = pipe.stream("a", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("flux2_mlx.device.on_gpu", lambda: True)
        next(steps)
        assert limits[1:] == [recommended_memory()]
        steps.close()
    assert limits[-1] == 7
    picture(pipe)
    assert len(limits) == 3


# ------------------------------------------------------------------------------------------------ the machine


def test_free_memory_of_linux():
    assert free_in_meminfo("MemTotal:  24000000 kB\nMemAvailable:   20000000 kB\n") == 20_480_000_000
    assert free_in_meminfo("") is None


def test_the_machine_gives_what_others_leave(monkeypatch):
    monkeypatch.setattr("flux2_mlx.device.free_memory", lambda: 10**9)
    assert machine_memory() == 10**9 + mx.get_active_memory() + mx.get_cache_memory()
    monkeypatch.setattr("flux2_mlx.device.free_memory", lambda: 2**60)
    most = machine_memory()
    monkeypatch.setattr("flux2_mlx.device.free_memory", lambda: None)
    assert machine_memory() == most < 2**60


# ------------------------------------------------------------------------------------------------ the command


def test_the_plan_of_a_released_model_downloads_nothing(capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    told = []
    for model in ("klein-4b", "black-forest-labs/FLUX.2-klein-4B"):
        assert main(["--plan", "--model", model, "--quantize", "4", "--memory-limit", "5.3"]) == 0
        told.append(capsys.readouterr().out)
    out = told[0]
    assert told[1] == out
    assert re.search(r"^transformer +2\.\d\d", out, re.MULTILINE)
    assert re.search(r"^memory: \w+.*, about \d\.\d\d of 5\.30 GB", out, re.MULTILINE)
    assert re.search(r"^download: up to 1\d\.\d GB", out, re.MULTILINE)
    assert main(["--plan", "--model", "klein-9b", "--memory", "streamed", "--memory-limit", "100"]) == 0
    assert "memory: streamed (text encoder, transformer), about" in capsys.readouterr().out
    assert main(["--plan", "--max-sequence-length", "-5"]) == 2
    assert "max_sequence_length must be" in capsys.readouterr().err


def test_the_plan_of_a_folder_reads_its_headers(checkpoint, capsys):
    arguments = ["--plan", "--model", str(checkpoint), "--height", "64", "--width", "64"]
    assert main(arguments) == 0
    assert "memory: resident" in capsys.readouterr().out
    assert main([*arguments, "--memory-limit", "0.001"]) == 0
    assert "which is too much" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["0", "-1", "much", "nan", "inf", "1e11"])
def test_a_limit_that_is_none_is_refused(limit, capsys):
    assert main(["a", f"--memory-limit={limit}"]) == 2
    assert "--memory-limit" in capsys.readouterr().err


def test_what_is_picked_is_told(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--width", "64", "--height", "64", "--steps", "1", "--max-sequence-length", "16"]
    assert main(["a", "--model", str(checkpoint), "--memory", "staged", *small]) == 0
    assert re.search(r"memory: staged, about \d\.\d\d of \d+\.\d\d GB", capsys.readouterr().err)
