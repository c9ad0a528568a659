"""Hires fix, and starting from latents: the large image is begun from the small one's latents."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image, ImageOps

from flux2_mlx import Flux2Pipeline, InputError, Settings
from flux2_mlx import generation as flux2_generation
from flux2_mlx.generate import main
from flux2_mlx.imaging.files import read_metadata
from flux2_mlx.options import GenerationOptions
from flux2_mlx.runtime.plan import Plan, Stage
from flux2_mlx.sampling.latents import resize_latents
from flux2_mlx.samplings import resolve_samplings
from tests.test_pipeline import close, count_keeping, kept_by, same

SMALL = {"height": 64, "width": 80, "num_steps": 4, "max_sequence_length": 16}
LARGE = {**SMALL, "height": 128, "width": 160}
PICTURE = Image.new("RGB", (80, 64), "red")
LATENTS = np.random.default_rng(0).standard_normal((1, 8, 10, 32), np.float32)


# ------------------------------------------------------------------------------------------------ enlarging


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((8, 10), (16, 20)),
        ((8, 10), (8, 10)),
        ((8, 10), (24, 16)),
        ((9, 7), (31, 22)),
        ((16, 12), (8, 6)),
        ((1, 1), (4, 6)),
    ],
)
def test_latents_are_scaled_as_pillow_scales_each_channel(source, target):
    """Bicubic, covering the new size and cropped around the centre, smaller and larger."""
    z = np.random.default_rng(1).standard_normal((2, *source, 3)).astype(np.float32)
    expected = np.zeros((2, *target, 3), np.float32)
    for b in range(2):
        for c in range(3):
            channel = Image.fromarray(z[b, ..., c])
            expected[b, ..., c] = np.asarray(ImageOps.fit(channel, target[::-1], Image.Resampling.BICUBIC))
    scaled = np.array(resize_latents(mx.array(z), *target))
    assert np.abs(scaled - expected).max() < 1e-5


def test_what_is_started_from_is_scaled_before_it_is_normalized(reference, pipe, monkeypatch):
    """As diffusers would: torch enlarges the 32 channels, which are patched and normalized then; the statistics of a
    channel differ among its four places, so another order would not do.
    """
    vae, taken = reference[0].vae, []
    add_noise = flux2_generation.add_noise
    monkeypatch.setattr(
        flux2_generation, "add_noise", lambda clean, *more: taken.append(clean) or add_noise(clean, *more)
    )
    pipe("a fox", seed=1, init_latents=LATENTS, strength=0.5, **LARGE)
    z = torch.from_numpy(LATENTS).permute(0, 3, 1, 2)
    z = torch.nn.functional.interpolate(z, (16, 20), mode="bicubic", antialias=True)
    patched = Flux2KleinPipeline._patchify_latents(z)
    mean, var = (stat.view(1, -1, 1, 1) for stat in (vae.bn.running_mean, vae.bn.running_var))
    expected = Flux2KleinPipeline._pack_latents((patched - mean) / torch.sqrt(var + vae.config.batch_norm_eps))
    assert np.abs(np.array(taken[0]) - expected.numpy()).max() < 1e-4


# ------------------------------------------------------------------------------------------------ starting from latents


def test_latents_of_an_image_are_as_good_as_the_image(pipe, reference):
    """What the encoder gives of an image, in place of the image; no encoder is run for it."""
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 80, 3), np.uint8))
    pixels = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        z = reference[0].vae.encode(pixels).latent_dist.mode()
    options = {"seed": 1, "strength": 0.5, "num_steps": 4, "max_sequence_length": 16}
    expected = pipe("a fox", init_image=picture, **options)
    result = pipe("a fox", init_latents=z.permute(0, 2, 3, 1).numpy(), **options)
    assert close(result.images[0], expected.images[0])
    assert "references" in expected.seconds
    assert "references" not in result.seconds
    assert result.settings[0].inputs == ("init_latents",)
    assert (result.settings[0].height, result.settings[0].width, result.settings[0].strength) == (64, 80, 0.5)


def test_each_image_has_latents_of_its_own_or_all_the_same(pipe):
    options = {**SMALL, "strength": 0.5, "seed": 7}
    other = LATENTS[:, ::-1].copy()
    both = pipe("a fox", num_images=2, init_latents=mx.array(np.concatenate([LATENTS, other])), **options)
    assert same(both.images[0], pipe("a fox", init_latents=LATENTS, **options).images[0])
    alone = pipe("a fox", init_latents=other, **options | {"seed": 8}).images[0]
    assert same(both.images[1], alone)
    shared = pipe("a fox", num_images=2, init_latents=LATENTS, batch_size=2, **options)
    assert close(shared.images[1], pipe("a fox", init_latents=LATENTS, **options | {"seed": 8}).images[0])
    assert not close(shared.images[1], alone)


def test_latents_that_cannot_be_started_from(pipe):
    for options, message in (
        ({"init_latents": LATENTS, "init_image": PICTURE}, "init_image and init_latents are both what to start from"),
        ({"init_latents": LATENTS[0]}, r'must be \(B, H/8, W/8, 32\), as output_type="latent" gives them, got \(8, 10'),
        ({"init_latents": LATENTS[:, :7]}, r"got \(1, 7, 10, 32\)"),
        ({"init_latents": LATENTS[..., :16]}, r"must be \(1 or 1, H/8, W/8, 32\), got \(1, 8, 10, 16\)"),
        ({"init_latents": np.repeat(LATENTS, 3, 0), "num_images": 2}, r"must be \(1 or 2, H/8, W/8, 32\), got \(3, 8"),
        ({"init_latents": LATENTS, "mask": PICTURE}, "mask belongs to init_image, and none is given"),
        ({"init_latents": "a.png"}, r"init_latents must be .*, got \(\)"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.stream("a fox", **{**SMALL, **options})


# ------------------------------------------------------------------------------------------------ both passes


@pytest.mark.parametrize(
    "options", [{}, {"noise": "mlx"}, {"image": PICTURE}, {"guidance": 2.0, "force_guidance": True}]
)
def test_it_is_two_calls_by_hand(pipe, options):
    check_by_hand(pipe, options)


def test_references_are_kept_once_for_both_passes(damaged, monkeypatch):
    """As klein-9b-kv keeps them."""
    kept, counted = kept_by(damaged), count_keeping(monkeypatch)
    check_by_hand(kept, {"image": PICTURE})
    assert counted == [PICTURE.width * PICTURE.height // 16**2]


def check_by_hand(pipe, options):
    options = {"seed": 5, **options}
    small = pipe("a fox", output_type="latent", **{**LARGE, **SMALL}, **options)
    assert small.images.shape == (1, 8, 10, 32)
    expected = pipe("a fox", init_latents=small.images, strength=0.25, **LARGE, **options)
    result = pipe("a fox", hires=2.0, hires_strength=0.25, **LARGE, **options)
    assert same(result.images[0], expected.images[0])
    assert result.steps["computed"] == small.steps["computed"] + expected.steps["computed"] == 5


def test_images_of_a_batch_have_noise_of_their_own(pipe):
    """Image k is the single one with seed + k, in a pass of its own and in a common one."""
    options = {**LARGE, "hires": 2, "hires_strength": 0.75}
    several = pipe(["a fox", "a hat"], seed=7, **options)
    shared = pipe(["a fox", "a hat"], seed=7, batch_size=2, **options)
    for k, prompt in enumerate(("a fox", "a hat")):
        alone = pipe(prompt, seed=7 + k, **options).images[0]
        assert same(several.images[k], alone)
        assert close(shared.images[k], alone)
    again = pipe("a fox", seed=8, **options).images[0]
    assert not close(again, several.images[0])


def test_steps_of_both_passes_are_counted(pipe):
    steps = list(pipe.stream("a fox", seed=1, hires=2, **LARGE))
    assert [(step.index, step.steps) for step in steps] == [(k, 6) for k in range(1, 7)]
    assert [step.is_last for step in steps] == [False] * 5 + [True]
    assert [step.size for step in steps] == [(64, 80)] * 4 + [(128, 160)] * 2
    assert [step.sigma == 0 for step in steps] == [False] * 3 + [True, False, True]
    for step in (steps[3], steps[5]):
        shape = step.size
        assert step.array().shape == (*shape, 3)
        assert step.preview().size == step.picture().size == shape[::-1]
        assert step.unpacked().shape == (1, shape[0] // 8, shape[1] // 8, 32)
    settings = steps[0].settings
    assert (settings.height, settings.width, settings.num_steps) == (128, 160, 4)
    assert (settings.hires, settings.hires_strength, settings.strength) == (2.0, 0.5, None)


@pytest.mark.parametrize(
    ("size", "scale", "small"),
    [
        ((1024, 1024), 2, (512, 512)),
        ((1024, 768), 1.5, (688, 512)),
        ((96, 112), 1.5, (64, 80)),
        ((2048, 1040), 4, (512, 256)),
    ],
)
def test_the_small_image_has_sides_that_can_be_generated(size, scale, small):
    options = GenerationOptions(hires=scale, num_steps=8)
    first, second = resolve_samplings(options, True, size, 1024, has_init=False, inpaints=False)
    assert (first.size, second.size) == (small, size)
    assert [step.index for step in (*first.steps, *second.steps)] == list(range(1, 13))
    assert second.steps[0].sigma == second.steps[0].sigma_next or second.steps[0].restarts


def test_what_it_does_not_go_with(pipe):
    for options, message in (
        ({"hires": 1}, "hires must be a number above 1, up to 4, got 1"),
        ({"hires": 4.5}, "hires must be a number above 1, up to 4, got 4.5"),
        ({"hires_strength": 0.5}, r"hires_strength belongs to hires \(--hires SCALE\), and none is given"),
        ({"hires": 2, "hires_strength": 0}, "hires_strength must be a number above 0, up to 1, got 0"),
        (
            {"hires": 2.5},
            "hires 2.5 would begin 160 x 128 with a side below 64 pixels; give a larger image, or less of it",
        ),
        ({"hires": 2, "latents": np.zeros((1, 80, 128))}, "and latents is given"),
        ({"hires": 2, "strength": 0.5}, "strength belongs to init_image"),
        ({"hires": 2, "mask": PICTURE}, "mask belongs to init_image"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.stream("a fox", **{**LARGE, **options})


# ------------------------------------------------------------------------------------------------ nano, the command


def test_the_composition_stays():
    """nano's large image is nearer to its small one than one that is generated anew from the same seed."""
    pipe = Flux2Pipeline.from_pretrained("nano", cache=False)
    for prompt in ("a star", "a red circle and a blue square"):
        draft = pipe(prompt, seed=0, height=128, width=128).images[0].resize((192, 192), Image.Resampling.BICUBIC)
        off = []
        for options in ({"hires": 1.5, "hires_strength": 0.25}, {}):
            image = pipe(prompt, seed=0, height=192, width=192, **options).images[0]
            off.append(np.abs(np.asarray(image, float) - np.asarray(draft)).mean())
        assert off[0] < 0.9 * off[1], prompt


def test_the_command_its_plan_and_its_file(tmp_path, capsys, monkeypatch):
    words = ["a star", "--model", "nano", "--size", "128x128", "--steps", "2", "--hires", "2", "--quiet", "--no-cache"]
    assert main([*words, "--seed", "3", "--output", str(tmp_path / "a.png")]) == 0
    settings = Settings.from_metadata(read_metadata(tmp_path / "a.png"))
    assert (settings.hires, settings.hires_strength, settings.inputs) == (2.0, 0.5, ())
    assert main(["--from-image", str(tmp_path / "a.png"), "--quiet", "--output", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()

    def timed(*_, **size):
        """Ten seconds a stage at the full size, one at the small."""
        seconds = 10.0 if size["height"] == 128 else 1.0
        stages = [Stage(name, 1, 1, 1, (seconds, seconds)) for name in ("text encoder", "transformer", "decoder")]
        return Plan(tuple(stages), 10**9)

    monkeypatch.setattr(Flux2Pipeline, "plan", timed)
    assert main([*words, "--plan"]) == 0
    # Two steps at the small size, one at the full, with the text encoder and the decoder once.
    assert "time: about 32.0 s an image, 2 and 1 passes of the transformer" in capsys.readouterr().out
