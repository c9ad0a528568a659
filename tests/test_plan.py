"""The memory plan, its modes, and streaming."""

import contextlib
import re

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx import AutoEncoderConfig, Flux2Pipeline, FluxKleinParams, InputError, Quantization, Qwen3Config, pipeline
from flux2_mlx.convert import main as convert
from flux2_mlx.generate import main
from flux2_mlx.memory import free_in_meminfo, free_in_vm_stat, machine_memory, weight_bytes, within
from flux2_mlx.models.autoencoder import AutoEncoder
from flux2_mlx.models.text_encoder import Qwen3TextEncoder
from flux2_mlx.models.transformer import FluxKlein
from flux2_mlx.pipeline import STAGES
from flux2_mlx.plan import MODES, Plan, Stage, download_bytes, make_plan, released_modules
from flux2_mlx.streaming import block_paths, stream, streamed_bytes
from tests import formats, tiny

SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16}
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               41250.
Pages active:                            310012.
Pages inactive:                          300000.
Pages speculative:                         8750.
Pages throttled:                              0.
Pages wired down:                        160000.
Pages purgeable:                           1200.
"Translation faults":                 123456789.
"""


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """The checkpoint converted to 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "checkpoint"
    assert convert([str(checkpoint), str(folder), "--quantize", "4", "--group-size", "32"]) == 0
    return folder


def picture(pipe):
    return np.asarray(pipe("a red fox", seed=3, **SMALL).images[0])


def loaded(pipe) -> set[str]:
    return {stage for stage, modules in pipe._loaded.items() if modules}


# ------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_streamed_picture_is_the_resident_one(checkpoint, packed, kind):
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
    work = pipe.plan(64, 80, 16).stages[1].working
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


# ------------------------------------------------------------------------------------------------ modes


def test_each_mode_keeps_what_it_says(checkpoint):
    kept = {}
    for mode in MODES:
        pipe = Flux2Pipeline.from_pretrained(checkpoint, memory=mode, cache=False)
        picture(pipe)
        kept[mode] = loaded(pipe)
    assert kept == {"resident": set(STAGES), "staged": {"autoencoder"}, "streamed": {"autoencoder"}}


def test_auto_streams_what_does_not_fit_alone(checkpoint, monkeypatch):
    streamed = []
    monkeypatch.setattr(pipeline, "stream", lambda model, *rest: (streamed.append(type(model)), stream(model, *rest)))
    expected = Flux2Pipeline.from_pretrained(checkpoint)
    plan = expected.plan(64, 80, 16)
    assert plan.mode == "resident"
    limit = plan.peak("streamed") + mx.get_active_memory()
    assert limit < plan.peak("staged") + mx.get_active_memory()
    short = Flux2Pipeline.from_pretrained(checkpoint, memory_limit=limit, cache=False)
    assert np.array_equal(picture(short), picture(expected))
    assert Qwen3TextEncoder in streamed


def test_an_unknown_mode_is_refused(checkpoint):
    with pytest.raises(InputError, match="memory must be one of auto, resident, staged, streamed, got 'tiny'"):
        Flux2Pipeline.from_pretrained(checkpoint, memory="tiny")


def test_the_fastest_mode_that_fits_is_picked():
    stages = (Stage("a", 100, 10, 5), Stage("b", 60, 20, 50))
    peaks = {mode: Plan(stages, 0).peak(mode) for mode in MODES}
    assert peaks == {"resident": 210, "staged": 110, "streamed": 70}
    for limit, mode, fits in (
        (210, "resident", True),
        (209, "staged", True),
        (109, "streamed", True),
        (69, "streamed", False),
    ):
        assert (Plan(stages, limit).mode, Plan(stages, limit).fits) == (mode, fits)
    assert "none fits" in str(Plan(stages, 69))


# ------------------------------------------------------------------------------------------------ predictions


def peak_of(module, compute, working) -> int:
    """Bytes at the most, the module's weights among them, where there is room for them and the intermediates alone."""
    mx.eval(module.parameters())
    before = mx.get_active_memory() - weight_bytes(module)
    with within(mx.get_active_memory() + working, working):
        mx.reset_peak_memory()
        mx.eval(compute())
        return mx.get_peak_memory() - before


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("side", [128, 192])
def test_a_stage_needs_what_the_plan_says(side, dtype, memory):
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
    plan = make_plan(text, transformer, autoencoder, dtype=dtype, height=side, width=side, length=128, limit=0)
    ids = mx.zeros((1, 128), mx.int32)
    img, txt = mx.zeros((1, side * side // 256, 128)), mx.zeros((1, 128, 960))
    rope = FluxKlein.compute_rope(mx.zeros((1, 128, 4)), mx.zeros((1, side * side // 256, 4)))
    latents = mx.zeros((1, side // 8, side // 8, 32))
    mx.eval(ids, img, txt, *rope, latents)
    memory()
    work = {
        "text encoder": (text, lambda: text(ids, mx.ones_like(ids))),
        "transformer": (transformer, lambda: transformer.forward_with_rope(img, txt, mx.array([0.5]), *rope)),
        "decoder": (autoencoder.decoder, lambda: autoencoder.decoder(latents)),
    }
    for stage in plan.stages:
        peak = peak_of(*work[stage.name], stage.working)
        assert peak == pytest.approx(stage.weights + stage.working, rel=0.1), stage.name


def test_references_are_planned(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    alone, edit = pipe.plan(64, 64), pipe.plan(64, 64, references=[(128, 128), (64, 64)])
    assert [stage.name for stage in edit.stages] == ["text encoder", "references", "transformer", "decoder"]
    assert edit.stages[2].working > alone.stages[1].working


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoder"),
    [("klein-4b", 7_751_089_152, 6_228_176_384), ("klein-base-9b", 18_157_162_496, 11_663_767_040)],
)
def test_released_models_are_planned_from_their_known_shapes(name, transformer, text_encoder):
    modules = released_modules(name, mx.bfloat16, {})
    plan = make_plan(*modules, dtype=mx.bfloat16, height=1024, width=1024, length=512, limit=0)
    text, denoise, decoder = plan.stages
    assert denoise.weights == transformer
    assert text.weights == text_encoder
    assert decoder.weights < 200e6
    packed = released_modules(name, mx.bfloat16, {"transformer": Quantization(4)})
    assert weight_bytes(packed[1]) < 5.0 / 16 * transformer
    assert download_bytes(name) > transformer + text_encoder


def limits():
    """MLX's memory and wired limits."""
    memory, wired = mx.set_memory_limit(1), mx.set_wired_limit(0)
    mx.set_memory_limit(memory)
    mx.set_wired_limit(wired)
    return memory, wired


def test_earlier_limits_return():
    before, inside = limits(), None
    with contextlib.suppress(ZeroDivisionError), within(12345, 345):
        inside = limits()
        raise ZeroDivisionError
    assert inside[0] == 12000
    assert limits() == before


# ------------------------------------------------------------------------------------------------ the machine


def test_free_memory_is_read_from_what_the_systems_say():
    assert free_in_vm_stat(VM_STAT) == (41250 + 300000 + 8750) * 16384
    assert free_in_vm_stat("vm_stat: no permission") is None
    assert free_in_meminfo("MemTotal:  24000000 kB\nMemAvailable:   20000000 kB\n") == 20_480_000_000
    assert free_in_meminfo("") is None


def test_the_machine_gives_what_others_leave(monkeypatch):
    monkeypatch.setattr("flux2_mlx.memory.free_memory", lambda: 10**9)
    assert machine_memory() == 10**9 + mx.get_active_memory() + mx.get_cache_memory()
    monkeypatch.setattr("flux2_mlx.memory.free_memory", lambda: 2**60)
    most = machine_memory()
    monkeypatch.setattr("flux2_mlx.memory.free_memory", lambda: None)
    assert machine_memory() == most < 2**60


# ------------------------------------------------------------------------------------------------ the command


def test_the_plan_of_a_released_model_downloads_nothing(capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert main(["--plan", "--model", "klein-4b", "--quantize", "4", "--memory-limit", "5.3"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^transformer +2\.\d\d", out, re.MULTILINE)
    assert "memory: s" in out
    assert "there are 5.30" in out
    assert re.search(r"download: up to 1\d\.\d GB", out)


def test_the_plan_of_a_folder_reads_its_headers(checkpoint, capsys):
    arguments = ["--plan", "--model", str(checkpoint), "--height", "64", "--width", "64"]
    assert main(arguments) == 0
    assert "memory: resident" in capsys.readouterr().out
    assert main([*arguments, "--memory-limit", "0.00001"]) == 0
    assert "none fits" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["0", "-1", "much", "nan"])
def test_a_limit_that_is_none_is_refused(limit, capsys):
    assert main(["a", f"--memory-limit={limit}"]) == 2
    assert "--memory-limit" in capsys.readouterr().err


def test_what_is_picked_is_told(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--width", "64", "--height", "64", "--steps", "1", "--max-sequence-length", "16"]
    assert main(["a", "--model", str(checkpoint), "--memory", "staged", *small]) == 0
    assert re.search(r"memory: staged, needs about \d\.\d\d of \d+\.\d\d GB", capsys.readouterr().err)
