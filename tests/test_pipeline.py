"""Flux2Pipeline: seeds, stages, steps and the arguments it refuses."""

import gc
import json
import re
import warnings

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from flux2_mlx import CheckpointError, Flux2Pipeline, InputError, Step
from flux2_mlx.checks import check_size
from flux2_mlx.device import default_dtype, machine_memory, weight_bytes, weights_of
from flux2_mlx.imaging.preprocess import init_array
from flux2_mlx.models.flux2 import FluxKlein
from flux2_mlx.models.qwen3 import Qwen3TextEncoder
from flux2_mlx.options import STRENGTH
from flux2_mlx.runtime.activations import Pass, decoder_bytes, kv_bytes, transformer_bytes
from flux2_mlx.runtime.plan import MODES
from flux2_mlx.runtime.residency import Need
from flux2_mlx.runtime.stats import Stats
from flux2_mlx.sampling.latents import image_ids, initial_noise, pack_latents, text_ids
from flux2_mlx.sampling.schedules import flux2_sigmas
from flux2_mlx.samplings import max_partial_strength, output_size, start_step
from tests import tiny
from tests.parity.compare import ROUNDED

SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16}


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def close(a, b) -> bool:
    """At most a level off, on ROUNDED of the values, as rounding differs between one row and several."""
    difference = np.abs(np.asarray(a, np.int16) - np.asarray(b))
    return bool(difference.max() <= 1 and (difference > 0).mean() <= ROUNDED)


def loaded(pipe) -> set[str]:
    return pipe.stages.loaded()


# ------------------------------------------------------------------------------------------------ seeds


@pytest.mark.parametrize("noise", ["torch", "mlx"])
def test_image_k_of_a_batch_is_the_single_image_with_seed_plus_k(pipe, noise):
    batch, in_turn = (
        pipe("a red fox", seed=7, num_images=3, noise=noise, batch_size=size, **SMALL) for size in (3, None)
    )
    assert batch.seeds == in_turn.seeds == [7, 8, 9]
    alone = pipe("a red fox", seed=9, noise=noise, **SMALL)
    assert same(in_turn.images[2], alone.images[0])
    assert close(batch.images[2], alone.images[0])
    assert not close(batch.images[1], alone.images[0])


def test_prompts_are_encoded_ahead(checkpoint, monkeypatch):
    """Those of several calls in one go, whatever comes between."""
    pipe = Flux2Pipeline.from_pretrained(checkpoint, cache=False)
    encode, encoded = Qwen3TextEncoder.__call__, []
    monkeypatch.setattr(Qwen3TextEncoder, "__call__", lambda *given: encoded.append(1) or encode(*given))
    pipe.encode(["a", "b", "a"], 16)
    assert len(encoded) == 2
    for prompt in ("a", "b", "a"):
        pipe(prompt, seed=1, **SMALL)
    assert len(encoded) == 2
    pipe("c", seed=1, **SMALL)
    pipe("a", seed=1, **SMALL)
    assert len(encoded) == 3
    pipe.encode(["c"], 16)
    assert len(encoded) == 4
    pipe("b", seed=1, **SMALL)
    assert len(encoded) == 5
    with pytest.raises(InputError, match="a prompt must be a string"):
        pipe.encode([5])
    with pytest.raises(InputError, match="max_sequence_length"):
        pipe.encode(["a"], 0)


def test_a_random_seed_is_told_and_repeats(pipe):
    first = pipe("a red fox", **SMALL)
    assert same(first.images[0], pipe("a red fox", seed=first.seeds[0], **SMALL).images[0])
    assert first.seeds != pipe("a red fox", **SMALL).seeds


def test_noise_of_torch_is_the_default(pipe):
    default = pipe("a red fox", seed=1, **SMALL).images[0]
    assert same(default, pipe("a red fox", seed=1, noise="torch", **SMALL).images[0])
    assert not same(default, pipe("a red fox", seed=1, noise="mlx", **SMALL).images[0])


# ------------------------------------------------------------------------------------------------ text encoding


@pytest.fixture
def encodings(monkeypatch):
    """Count of the text encoder's calls."""
    calls = []
    original = Qwen3TextEncoder.__call__

    def counted(self, *args):
        calls.append(args[0].shape)
        return original(self, *args)

    monkeypatch.setattr(Qwen3TextEncoder, "__call__", counted)
    return calls


def test_a_prompt_is_encoded_once(checkpoint, encodings):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    pipe(["a", "b", "a"], num_images=2, **SMALL)
    assert len(encodings) == 2
    pipe("b", seed=5, **SMALL)
    assert len(encodings) == 2
    pipe("a", **SMALL)  # the last call's alone are kept
    assert len(encodings) == 3
    pipe("a", **{**SMALL, "max_sequence_length": 17})
    assert len(encodings) == 4


def test_a_new_seed_needs_no_text_encoder(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    pipe("a", **SMALL)
    pipe.unload("text_encoder")
    assert "text_encoder" not in pipe("a", seed=3, **SMALL).seconds
    assert loaded(pipe) == {"transformer", "autoencoder"}


def test_guidance_encodes_the_negative_prompt(base_reference, encodings):
    pipe = Flux2Pipeline.from_pretrained(base_reference[1])
    plain = pipe("a", seed=1, **SMALL)
    assert len(encodings) == 2
    assert plain.settings[0].guidance == 4.0
    other = pipe("a", seed=1, negative_prompt="a red fox", **SMALL)
    assert not same(plain.images[0], other.images[0])
    pipe("a", seed=1, guidance=1.0, **SMALL)
    assert len(encodings) == 3


# ------------------------------------------------------------------------------------------------ defaults


@pytest.fixture
def passes(monkeypatch):
    """Rows of every pass through the transformer."""
    seen = []
    forward = FluxKlein.forward_with_rope

    def counted(model, img, *given, **options):
        seen.append(len(img))
        return forward(model, img, *given, **options)

    monkeypatch.setattr(FluxKlein, "forward_with_rope", counted)
    return seen


@pytest.mark.parametrize("memory", MODES)
def test_both_passes_of_guidance_are_one_where_memory_allows(base_reference, passes, memory):
    pipe = Flux2Pipeline.from_pretrained(base_reference[1], memory=memory, cache=False)
    options = {"seed": 3, "guidance": 3.0, "negative_prompt": "rain", **SMALL}
    together = pipe("a", **options).images[0]
    assert passes == [2, 2]
    passes.clear()
    plan = pipe.plan(64, 80, 16)
    text, transformer = plan.stages[:2]
    limit = plan.needed(transformer) + (text.weights if memory in ("auto", "resident") else 0)
    pipe = Flux2Pipeline.from_pretrained(base_reference[1], memory=memory, memory_limit=limit, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other stages' needs
        in_turn = pipe("a", **options).images[0]
    assert passes == [1] * 4
    assert close(together, in_turn)


def test_guidance_keeps_to_its_interval(base_reference, passes):
    pipe = Flux2Pipeline.from_pretrained(base_reference[1])
    options = {"seed": 3, "guidance": 3.0, **SMALL, "num_steps": 4}
    everywhere = pipe("a", **options).images[0]
    levels = flux2_sigmas(4, 20)
    passes.clear()
    part = pipe("a", guidance_interval=(levels[2], levels[1]), **options).images[0]
    assert passes == [1, 2, 2, 1]
    assert not same(part, everywhere)
    assert same(pipe("a", guidance_interval=(0, 1), **options).images[0], everywhere)
    with pytest.warns(
        UserWarning, match=r"no step's noise level \(sigma\) is in guidance_interval: 1, 0\.9.*; CFG is not applied"
    ):
        pipe("a", guidance_interval=(0, 0.1), **options)
    assert not same(pipe("a", guidance_rescale=0.7, **options).images[0], everywhere)


def test_steps_and_guidance_default_per_model(pipe, base_reference):
    base = Flux2Pipeline.from_pretrained(base_reference[1])
    for model, steps, guidance in ((pipe, 4, 1.0), (base, 50, 4.0)):
        settings = next(model.stream("a", height=64, width=64, max_sequence_length=16)).settings
        assert (settings.num_steps, settings.guidance) == (steps, guidance)


def test_the_default_size_is_1024(pipe):
    with pytest.raises(InputError, match=r"latents must be \(1, 128, 64, 64\) or \(1, 4096, 128\)"):
        pipe("a", latents=np.zeros((1, 2)))


def test_a_checkpoint_says_how_large_and_how_long(damaged):
    config = json.loads((damaged / "vae" / "config.json").read_text())
    tiny.rewrite(damaged / "vae" / "config.json", json.dumps({**config, "sample_size": 96}))
    config = json.loads((damaged / "tokenizer" / "tokenizer_config.json").read_text())
    tiny.rewrite(damaged / "tokenizer" / "tokenizer_config.json", json.dumps({**config, "model_max_length": 40}))
    result = Flux2Pipeline.from_pretrained(damaged)("a red fox", seed=0, num_steps=1, width=64)
    assert result.images[0].size == (64, 96)
    assert result.settings[0].max_sequence_length == 40


def test_guidance_of_a_distilled_model_is_ignored_with_a_warning(pipe):
    expected = pipe("a", seed=1, **SMALL)
    with pytest.warns(UserWarning, match="without CFG here, which a negative prompt needs; negative_prompt is ignored"):
        pipe("a", seed=1, negative_prompt="rain", **SMALL)
    with pytest.warns(UserWarning, match=r"distilled and generates without CFG; guidance 3\.5 is ignored"):
        ours = pipe("a", seed=1, guidance_scale=3.5, **SMALL)
    assert same(ours.images[0], expected.images[0])
    assert ours.settings[0].guidance == 1.0


def test_schedules_differ(pipe):
    pictures = [pipe("a", seed=1, schedule=schedule, **SMALL).images[0] for schedule in ("flux2", "linear", "comfy")]
    assert not same(pictures[0], pictures[1])
    assert not same(pictures[1], pictures[2])
    assert not same(pictures[0], pictures[2])


def test_dtype_follows_the_machine(monkeypatch):
    from flux2_mlx import device as memory

    assert default_dtype() in ([mx.float32] if mx.default_device() == mx.cpu else [mx.bfloat16, mx.float16])
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    for architecture, dtype in (
        ("applegpu_g13s", mx.float16),
        ("applegpu_g14d", mx.float16),
        ("applegpu_g15p", mx.bfloat16),
        ("applegpu_g17s", mx.bfloat16),
        ("sm_90", mx.bfloat16),
    ):
        monkeypatch.setattr(mx, "device_info", lambda architecture=architecture: {"architecture": architecture})
        assert default_dtype() == dtype


def test_float16_leaves_range_to_the_other_stages(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, dtype="float16")
    result = pipe("a", seed=1, **SMALL)
    assert result.settings[0].dtype == "float16"
    assert pipe.transformer.proj_out.weight.dtype == mx.float16
    assert pipe.text_encoder.model.embed_tokens.weight.dtype == mx.bfloat16
    assert pipe.autoencoder.decoder.conv_in.weight.dtype == mx.bfloat16


# ------------------------------------------------------------------------------------------------ steps


def test_stream_yields_every_step_of_every_picture(pipe):
    steps = list(pipe.stream("a", seed=4, num_images=2, **SMALL))
    assert [(step.image, step.index, step.is_last) for step in steps] == [
        (0, 1, False),
        (0, 2, True),
        (1, 1, False),
        (1, 2, True),
    ]
    assert all(isinstance(step, Step) and step.latents.shape == (1, 20, 128) for step in steps)
    assert [step.sigma == 0 for step in steps] == [False, True, False, True]
    assert mx.array_equal(steps[1].denoised, steps[1].latents).item()
    assert not mx.allclose(steps[0].denoised, steps[0].latents).item()
    assert same(steps[3].picture(), pipe("a", seed=5, **SMALL).images[0])


@pytest.mark.parametrize(("size", "expected"), [(None, [1] * 5), (1, [1] * 5), (3, [3, 2]), (9, [5])])
def test_pictures_share_a_pass(pipe, passes, size, expected):
    """As many as are said, yielded in turn."""
    steps = list(pipe.stream("a", seed=4, num_images=5, batch_size=size, **SMALL))
    assert passes == [rows for rows in expected for _ in range(2)]
    assert sorted((step.image, step.index) for step in steps) == [(k, i) for k in range(5) for i in (1, 2)]
    assert [step.image for step in steps[: 2 * expected[0]]] == [*range(expected[0])] * 2
    for k in (0, 4):
        last = next(step for step in steps if step.image == k and step.is_last)
        assert close(last.picture(), pipe("a", seed=4 + k, **SMALL).images[0])


def test_pictures_share_a_pass_where_memory_allows(checkpoint, passes):
    """With weights streamed as many as fit; otherwise none that would have a stage unloaded."""
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="streamed", cache=False)
    options = {"seed": 4, "num_images": 4, **SMALL}
    pipe("a", **options)
    assert passes == [4, 4]
    stage = pipe.stages.transformer_stage(Pass(16, 20, rows=3))
    passes.clear()
    pipe.memory_limit = stage.streamed + stage.activation_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other stages' needs
        pipe("a", **options)
    assert passes == [3, 3, 1, 1]
    passes.clear()
    pipe.memory_limit = machine_memory()
    pipe("a", batch_size=2, **options)
    assert passes == [2] * 4


def test_pictures_in_a_pass_have_their_own_prompts_noise_and_guidance(base_reference, pipe):
    """With references, guidance and a mask, as each alone."""
    pipe = Flux2Pipeline.from_pretrained(base_reference[1])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (20, 0, 60, 64))
    options = {"image": picture, "init_image": picture, "mask": mask, "guidance": 3.0, "num_steps": 2}
    options["max_sequence_length"] = 16
    together = pipe(["a", "b"], num_images=2, batch_size=4, seed=1, **options)
    for k, prompt in ((0, "a"), (3, "b")):
        assert close(together.images[k], pipe(prompt, seed=1 + k, **options).images[0])


def test_a_preview_changes_nothing(pipe):
    expected = pipe("a", seed=4, **SMALL).images[0]
    for step in pipe.stream("a", seed=4, **SMALL):
        preview = step.picture()
        assert preview.size == (80, 64)
    assert same(preview, expected)


def test_a_caller_may_stop(pipe):
    stream = pipe.stream("a", seed=4, num_images=100, **SMALL)
    assert next(stream).index == 1
    stream.close()
    assert same(pipe("a", seed=4, **SMALL).images[0], pipe("a", seed=4, **SMALL).images[0])


def test_the_result_tells_seconds_and_peaks(checkpoint):
    result = Flux2Pipeline.from_pretrained(checkpoint)("a", **SMALL)
    assert set(result.seconds) == set(result.peak_bytes) == {"load", "text_encoder", "denoise", "decode"}
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert all(peak > 1e6 for peak in result.peak_bytes.values())


def test_latents_that_are_not_finite(damaged):
    def change(tensors):
        tensors["proj_out.weight"][0, 0] = float("nan")

    tiny.edit_weights(damaged / "transformer" / "diffusion_pytorch_model.safetensors", change)
    pipe = Flux2Pipeline.from_pretrained(damaged)
    with pytest.raises(FloatingPointError, match="step 1 of 2: values are not finite in float32; check the checkpoint"):
        pipe("a", **SMALL)


def test_a_bfloat16_run_that_is_not_finite_names_the_wider_type(damaged):
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    tiny.edit_weights(path, lambda tensors: tensors["proj_out.weight"].fill_(float("inf")))
    for dtype, wider in (("bfloat16", "float32"), ("float16", "bfloat16")):
        with pytest.raises(FloatingPointError, match=f"not finite in {dtype}; try {wider}"):
            Flux2Pipeline.from_pretrained(damaged, dtype=dtype)("a", **SMALL)


def test_a_picture_that_is_not_finite_is_not_drawn(damaged):
    path = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    tiny.edit_weights(path, lambda tensors: tensors["decoder.conv_out.bias"].fill_(float("nan")))
    with pytest.raises(FloatingPointError, match="the decoder: values are not finite in float32"):
        Flux2Pipeline.from_pretrained(damaged)("a", **SMALL)


def test_a_tokenizer_of_another_vocabulary(damaged):
    config = damaged / "text_encoder" / "config.json"
    tiny.rewrite(config, json.dumps({**json.loads(config.read_text()), "vocab_size": 1000}))
    weights = damaged / "text_encoder" / "model.safetensors"

    def change(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000].clone()

    tiny.edit_weights(weights, change)
    with pytest.raises(CheckpointError, match="gives token 151668, but the text encoder knows 1000"):
        Flux2Pipeline.from_pretrained(damaged)("a", **SMALL)


def test_settings_name_what_no_file_carries(pipe):
    picture, latents = Image.new("RGB", (64, 64)), np.zeros((1, 128, 4, 5), np.float32)
    options = {**SMALL, "seed": 1}
    assert next(pipe.stream("a", **options)).settings.inputs == ()
    assert next(pipe.stream("a", image=picture, latents=latents, **options)).settings.inputs == ("image", "latents")


def test_references_are_encoded_once(pipe, monkeypatch):
    encoded = []
    encode = type(pipe.autoencoder.encoder).__call__

    def counted(encoder, pixels, tile_bytes):
        encoded.append(pixels.shape)
        return encode(encoder, pixels, tile_bytes)

    monkeypatch.setattr(type(pipe.autoencoder.encoder), "__call__", counted)
    first, second = (Image.new("RGB", (96, 64), colour) for colour in ("red", "blue"))
    for pictures, count in (([first, second, first.copy()], 2), ([second, first], 0), ([first], 0), ([second], 1)):
        encoded.clear()
        pipe("a", image=pictures, seed=1, **SMALL)
        assert len(encoded) == count


def test_a_side_that_is_not_given_keeps_the_first_references_aspect():
    references = [(512, 768), (64, 64)]
    assert output_size(None, None, references, 1024) == (512, 768)
    assert output_size(256, None, references, 1024) == (256, 384)
    assert output_size(None, 1024, references, 1024) == (688, 1024)  # 682.67, in sixteens
    assert output_size(None, 64, [(64, 512)], 1024) == (64, 64)
    assert output_size(128, 64, references, 1024) == (128, 64)
    assert output_size(None, 64, [], 1024) == (1024, 64)
    with pytest.raises(InputError, match="megapixels"):
        output_size(None, 2048, [(512, 64)], 1024)


def test_a_picture_is_begun_from(pipe):
    """The steps that are done, and what they begin from: the picture's tokens and noise, by the first noise level."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    embeds = mx.zeros((1, 16, pipe.checkpoint.transformer.txt_embed_dim))
    options = {"prompt_embeds": embeds, "num_steps": 4, "seed": 1, "init_image": picture}
    steps = list(pipe.stream(**options))
    assert [(step.index, step.is_last) for step in steps] == [(2, False), (3, False), (4, True)]
    assert steps[0].settings.strength == 0.75
    assert len(list(pipe.stream(**options, strength=0.5))) == 2
    with pytest.warns(UserWarning, match=r"rounded to all of them.*; 0.75 is the most that keeps some"):
        assert len(list(pipe.stream(**options, strength=0.8))) == 4
    tokens = pipe.autoencoder.bn.normalize(pack_latents(pipe.autoencoder.encoder(init_array(picture, (64, 80)))))
    sigma, following = flux2_sigmas(4, 20)[1:3]
    x = (1 - sigma) * tokens + sigma * initial_noise(1, 64, 80, 128, "torch")
    rope = FluxKlein.compute_rope(text_ids(16), image_ids(64, 80), pipe.checkpoint.transformer.axes_dims_rope)
    x = x + (following - sigma) * pipe.transformer.forward_with_rope(x, embeds, mx.array([sigma]), *rope)
    assert np.array(steps[0].latents) == pytest.approx(np.array(x), abs=1e-4)
    whole = list(pipe.stream(**options, strength=1))
    plain = list(pipe.stream(**{**options, "init_image": None}, height=64, width=80))
    assert mx.array_equal(whole[-1].latents, plain[-1].latents).item()
    again = steps[-1].latents.mean().item()
    assert list(pipe.stream(**options, image=picture))[-1].latents.mean().item() != again


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 29, 50, 1000])
def test_the_strength_that_is_advised_keeps_something(steps):
    assert start_step(max_partial_strength(steps), steps) >= 1
    assert start_step(min(STRENGTH, max_partial_strength(steps)), steps) >= 1


def test_a_picture_to_begin_from_is_never_stretched(pipe):
    """A circle in a wide picture stays one in a tall one."""
    picture = Image.new("RGB", (256, 128), "white")
    ImageDraw.Draw(picture).ellipse((98, 34, 158, 94), fill="black")
    dark = np.array(init_array(picture, (192, 128)))[0, ..., 0] < 0
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    assert len(rows) == pytest.approx(len(columns), abs=2)
    assert init_array(picture, (128, 256)).shape == (1, 128, 256, 3)


def test_more_references_than_memory_are_refused_with_the_number_that_fits(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="staged", cache=False)
    pictures = [Image.new("RGB", (256, 256))] * 14
    peaks = [pipe.plan(64, 80, 16, [(256, 256)] * count).peak for count in range(15)]
    assert peaks[0] < peaks[11] < peaks[12]
    pipe.memory_limit = peaks[11]
    pipe.stream("a", image=pictures[:11], **SMALL)
    with pytest.raises(InputError, match=r"14 references and an image of 80 x 64 need .* the first 11 fit"):
        pipe.stream("a", image=pictures, **SMALL)


# ------------------------------------------------------------------------------------------------ memory


def test_enough_memory_keeps_every_stage(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    pipe("a", **SMALL)
    assert loaded(pipe) == {"text_encoder", "transformer", "autoencoder"}
    assert pipe("b", **SMALL).seconds.get("load") is None


def test_drawing_from_text_leaves_the_picture_encoder_on_disk(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    pipe("a", **SMALL)
    assert not pipe.stages.is_loaded("autoencoder", "encoder")
    pipe("a", image=Image.new("RGB", (64, 64)), **SMALL)
    assert pipe.stages.is_loaded("autoencoder", "encoder")
    assert pipe.stages.is_loaded("autoencoder", "decoder")


def test_casting_holds_one_tensor_twice_and_no_more(damaged, memory):
    """float32 weights from a bfloat16 file: never the whole model in both."""
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    tiny.edit_weights(path, change)
    pipe = Flux2Pipeline.from_pretrained(damaged, dtype="float32")
    weights = weights_of(pipe.transformer)
    size, largest = weight_bytes(pipe.transformer), max(array.nbytes for array in weights.values())
    before, stats = memory(), Stats()
    pipe.stages.prepare("transformer", Need(0), stats)
    assert size <= stats.peak_bytes["load"] - before <= size + largest


def test_settings_are_plain_numbers(pipe):
    options = {**SMALL, "height": np.int64(64), "seed": np.uint32(7)}
    settings = next(pipe.stream("a", **options)).settings
    assert json.loads(json.dumps(settings.metadata()))["seed"] == 7


def test_a_stage_too_large_for_the_machine_warns_once(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory_limit=30_000_000)
    with pytest.warns(
        UserWarning, match=r"the text encoder needs about 0\.0 GB and this machine gives 0\.0 GB"
    ) as caught:
        pipe("a", **SMALL)
    assert len([warning for warning in caught if "text encoder" in str(warning.message)]) == 1


@pytest.mark.filterwarnings("ignore:the .* needs about")
def test_short_memory_unloads_what_is_not_needed(checkpoint, pipe, memory):
    short = Flux2Pipeline.from_pretrained(checkpoint, memory_limit=10**6)
    before = memory()
    for step in short.stream("a", seed=2, **SMALL):
        assert loaded(short) == {"transformer"}, step
    assert mx.get_active_memory() - before < 10e6  # the text encoder alone is 44 MB
    picture = step.picture()
    assert loaded(short) == {"autoencoder"}
    assert same(picture, pipe("a", seed=2, **SMALL).images[0])


def test_unload_gives_memory_back_and_the_next_call_draws_the_same(checkpoint, memory):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    before = memory()
    first = pipe("a", seed=2, **SMALL)
    assert mx.get_active_memory() - before > 40e6
    pipe.unload()
    assert mx.get_active_memory() - before < 1e6
    assert same(first.images[0], pipe("b", seed=2, **SMALL).images[0]) is False
    assert same(first.images[0], pipe("a", seed=2, **SMALL).images[0])
    with pytest.raises(InputError, match="stage must be one of"):
        pipe.unload("vae")


def test_estimates_grow_with_the_work(pipe):
    params, config = pipe.checkpoint.transformer, pipe.checkpoint.autoencoder
    small, large = (transformer_bytes(params, Pass(512, image), mx.bfloat16)[0] for image in (1024, 4096))
    assert large > small > 0
    assert decoder_bytes(config, 1024, 1024, mx.bfloat16) > decoder_bytes(config, 512, 512, mx.bfloat16) > 0
    assert 2**30 < machine_memory() < 2**50


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height must be a multiple of 16, got 100; the nearest are 96 and 112"),
        ({"width": 1030}, "width must be a multiple of 16, got 1030; the nearest are 1024 and 1040"),
        ({"height": 48}, "height must be a whole number of at least 64, got 48"),
        ({"width": -16}, "width must be a whole number of at least 64, got -16"),
        ({"width": 2048, "height": 2064}, r"2048 x 2064 is 4\.03 megapixels; at most 4 \(2048 x 2048\)"),
        ({"height": 64.0}, r"height must be a whole number of at least 64, got 64\.0"),
        ({"num_steps": 1001}, "num_steps must be a whole number from 1 to 1000, got 1001"),
        ({"num_steps": 0}, "num_steps must be a whole number from 1 to 1000, got 0"),
        ({"num_inference_steps": -3}, "num_steps must be a whole number from 1 to 1000, got -3"),
        ({"num_steps": 4, "num_inference_steps": 5}, r"num_steps \(4\) and num_inference_steps \(5\) are the same"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 10000, got 0"),
        ({"num_images": 0}, "num_images must be a whole number from 1 to 10000, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1; leave it out for a random one"),
        ({"guidance": -1.0}, "guidance must be a number from 0 to 100, got -1"),
        ({"guidance": "strong"}, "guidance must be a number from 0 to 100, got 'strong'"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval must be two noise levels, .* got \(0\.5, 0\.2\)"),
        ({"guidance_interval": (0, 0.5, 1)}, "guidance_interval must be two noise levels"),
        ({"guidance_interval": "ab"}, "guidance_interval must be two noise levels"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be a number from 0 to 1, got 1.5"),
        ({"step_cache": -0.1}, r"step_cache must be a number of at least 0, got -0\.1"),
        ({"step_cache": float("inf")}, "step_cache must be a number of at least 0, got inf"),
        ({"step_cache": float("nan")}, "step_cache must be a number of at least 0, got nan"),
        ({"step_cache": "much"}, "step_cache must be a number of at least 0, got 'much'"),
        ({"guidance": True}, "guidance must be a number from 0 to 100, got True"),
        ({"sigmas": [True]}, r"sigmas must be a list of numbers, got \[True\]"),
        ({"force_guidance": "no"}, "force_guidance must be true or false, got 'no'"),
        ({"guidance": float("nan")}, "guidance must be a number from 0 to 100, got nan"),
        ({"noise": "cuda"}, "noise must be one of torch, mlx, got 'cuda'"),
        ({"schedule": "karras"}, "schedule must be one of flux2, linear, comfy, power, got 'karras'"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number from 1 to 40960, got 0"),
        ({"sigmas": [0.5, 0.9]}, "sigmas must fall"),
        ({"sigmas": [1.0, 0.5], "num_steps": 3}, "num_steps is 3, but 2 sigmas are given"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt_embeds": mx.zeros((1, 8, 192))}, "give either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": mx.zeros((1, 8, 7680))}, r"prompt_embeds must be \(B, L, 192\), got"),
        ({"prompt": []}, "non-empty list of strings"),
        ({"prompt": [1]}, "a prompt must be a string, got 1"),
        ({"negative_prompt": None}, "a prompt must be a string, got None"),
        ({"prompt": 5}, "a prompt must be a string, got 5"),
        ({"prompt": "\ud800"}, "the prompt is not Unicode text"),
        ({"prompt": None, "prompt_embeds": "x"}, "prompt_embeds must be an array, got str"),
        ({"latents": object()}, "latents must be an array, got object"),
        ({"sigmas": 5}, "sigmas must be a list of numbers, got 5"),
        ({"guidance": 10**400}, "guidance must be a number from 0 to 100"),
        ({"image": "fox.png"}, r"fox\.png: cannot be read: No such file"),
        ({"image": np.zeros((64, 64, 3))}, r"an image must be a PIL\.Image\.Image, got ndarray"),
        ({"output_type": "pt"}, "output_type must be one of pil, np, latent, got 'pt'"),
        ({"image": Image.new("RGB", (20, 20))}, "too small"),
        ({"init_image": Image.new("RGB", (20, 20))}, "too small"),
        ({"init_image": "fox.png"}, r"fox\.png: cannot be read: No such file"),
        ({"strength": 0.5}, "strength belongs to init_image"),
        (
            {"init_image": Image.new("RGB", (64, 64)), "strength": 0},
            "strength must be a number above 0, up to 1, got 0",
        ),
        ({"init_image": Image.new("RGB", (64, 64)), "strength": 1.1}, "strength must be a number above 0"),
    ],
)
def test_bad_arguments_name_the_value_and_the_way_out(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "a", **options})


@given(st.integers(-50, 5000), st.integers(-50, 5000))
def test_every_size_is_drawable_or_refused_with_drawable_neighbours(height, width):
    drawable = all(side >= 64 and side % 16 == 0 for side in (height, width)) and height * width <= 2048 * 2048
    if drawable:
        check_size(height, width)
        return
    with pytest.raises(InputError) as caught:
        check_size(height, width)
    message = str(caught.value)
    assert str(height) in message or str(width) in message
    nearest = re.search(r"the nearest are (\d+) and (\d+)", message)
    if nearest:
        low, high = int(nearest[1]), int(nearest[2])
        assert high - low == 16
        assert low % 16 == 0
        assert any(low < side < high for side in (height, width))


def test_stream_refuses_at_once(pipe):
    with pytest.raises(InputError, match="num_steps"):
        pipe.stream("a", num_steps=0)


@pytest.mark.parametrize("dtype", ["float64", "int8", mx.int8])
def test_an_unknown_dtype(checkpoint, dtype):
    with pytest.raises(InputError, match="dtype must be one of float32, float16, bfloat16"):
        Flux2Pipeline.from_pretrained(checkpoint, dtype=dtype)


def kept_by(folder, **options) -> Flux2Pipeline:
    """A pipeline whose transformer is said to keep its references."""
    index = json.loads((folder / "model_index.json").read_text())
    tiny.rewrite(folder / "model_index.json", json.dumps({**index, "_class_name": "Flux2KleinKVPipeline"}))
    return Flux2Pipeline.from_pretrained(folder, **options)


def count_keeping(monkeypatch) -> list[int]:
    """Tokens of each pass over references alone, as they are made."""
    counted: list[int] = []
    keep = FluxKlein.encode_reference_kv
    monkeypatch.setattr(
        FluxKlein, "encode_reference_kv", lambda *given: counted.append(given[1].shape[1]) or keep(*given)
    )
    return counted


def test_references_are_kept_across_prompts_seeds_and_sizes(damaged, monkeypatch):
    pipe = kept_by(damaged)
    counted = count_keeping(monkeypatch)
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)) for _ in range(2))
    red = {"prompt": "a red fox", "seed": 1, "num_steps": 2, "max_sequence_length": 24}
    blue = {**red, "prompt": "a blue fox", "seed": 2, "height": 96, "width": 64}
    a = pipe(image=[first, second], **red)
    b = pipe(image=[first, second], **blue)
    pipe(**blue)
    assert same(pipe(image=[first, second], **red).images[0], a.images[0])
    assert counted == [40]
    pipe(image=[second, first], **red)
    assert counted == [40] * 2
    pipe.unload("transformer")
    pipe(image=[second, first], **red)
    assert counted == [40] * 3
    fresh = Flux2Pipeline.from_pretrained(damaged)(image=[first, second], **blue)
    assert same(b.images[0], fresh.images[0])


def test_kept_references_take_the_memory_that_is_planned(damaged):
    """The values are no views of a single block's fused projection."""
    pipe = kept_by(damaged, cache=False)
    options = {"num_steps": 1, "max_sequence_length": 16, "seed": 1}
    pipe("a", **options, image=Image.new("RGB", (64, 64)))
    pipe.stages.evict()
    pipe("a", **options, height=64, width=64)
    gc.collect()
    before = mx.get_active_memory()
    pipe("a", **options, image=Image.new("RGB", (256, 256)), height=64, width=64)
    gc.collect()
    held = kv_bytes(pipe.checkpoint.transformer, 256, pipe.dtype)
    tokens = 256 * 128 * 4
    assert held <= mx.get_active_memory() - before <= 1.1 * held + 2 * tokens


def test_kept_references_are_forgotten_where_memory_is_short(damaged, monkeypatch):
    pipe = kept_by(damaged, cache=False)
    counted = count_keeping(monkeypatch)
    options = {"image": Image.new("RGB", (64, 80)), "num_steps": 1, "max_sequence_length": 16}
    pipe("a", seed=1, **options)
    pipe.memory_limit = 1000
    with pytest.warns(UserWarning, match="needs about"):
        pipe("another", seed=1, **options)
    assert len(counted) == 2


@pytest.mark.parametrize("memory", ["staged", "streamed"])
def test_references_are_kept_in_every_mode(damaged, memory):
    options = {"image": Image.new("RGB", (64, 80), "red"), "num_steps": 2, "max_sequence_length": 16, "seed": 1}
    expected = kept_by(damaged)("a", **options)
    assert same(kept_by(damaged, memory=memory)("a", **options).images[0], expected.images[0])


@pytest.mark.filterwarnings("ignore:the .* needs about")
def test_references_are_kept_for_both_passes_of_guidance(damaged):
    """Whether they are one or come in turn."""
    pipe = kept_by(damaged)
    options = {"image": Image.new("RGB", (64, 80), "red"), "num_steps": 2, "max_sequence_length": 16, "seed": 1}
    both = pipe("a", guidance=3.0, force_guidance=True, **options)
    pipe.memory_limit = 10**6  # for one pass at a time
    in_turn = pipe("a", guidance=3.0, force_guidance=True, **options)
    assert close(both.images[0], in_turn.images[0])
    assert not same(both.images[0], pipe("a", **options).images[0])


def test_a_checkpoint_that_keeps_its_references_is_planned(damaged, checkpoint):
    """Keys and values of the references are there beside the step and the decoder; their tokens are not in the step."""
    own, plain = kept_by(damaged), Flux2Pipeline.from_pretrained(checkpoint)
    params = own.checkpoint.transformer
    kept, in_place = (
        {stage.name: stage.activation_bytes for stage in pipe.plan(64, 64, 16, [(512, 512)]).stages}
        for pipe in (own, plain)
    )
    held = kv_bytes(params, 1024, own.dtype)
    assert held == 2 * (params.depth + params.depth_single) * 1024 * params.hidden_size * own.dtype.size
    assert kept["decoder"] == in_place["decoder"] + held
    assert kept["transformer"] > held
    assert own.plan(64, 64, 16).stages == plain.plan(64, 64, 16).stages


def test_keeping_references_is_refused_where_it_was_not_trained(checkpoint, damaged):
    for model in (checkpoint, "klein-9b", "black-forest-labs/FLUX.2-klein-4B"):
        with pytest.raises(CheckpointError, match=r"was not trained to cache its references.*klein-9b-kv was"):
            Flux2Pipeline.from_pretrained(model, kv_cache=True)
    file = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    said = Flux2Pipeline.from_pretrained(checkpoint, transformer=file, distilled=True, kv_cache=True)
    assert said.checkpoint.has_kv_cache
    assert said("a", **SMALL).settings[0].kv_cache is True
    assert not kept_by(damaged, kv_cache=False).checkpoint.has_kv_cache
