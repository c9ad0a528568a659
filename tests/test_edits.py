"""Edits that leave the rest alone: colours and pixels of the reference where nothing changed."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageOps

from examples import edit_score
from examples.nano_score import unseen_edits
from flux2_mlx import Flux2Pipeline, InputError, read_metadata
from flux2_mlx.generate import main
from flux2_mlx.imaging.edits import Edit, latent_change, lay_over, pixel_change
from flux2_mlx.imaging.preprocess import reference_array
from flux2_mlx.inputs import Inputs
from flux2_mlx.options import GenerationOptions
from tests.test_inpaint import mask_of, random_picture
from tests.test_pipeline import count_keeping, kept_by

SMALL = {"num_steps": 2, "seed": 3, "max_sequence_length": 16}
NO_LATENTS = mx.zeros((1, 0, 0))


def levels(image):
    return np.asarray(image, np.float64)


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("seed", range(4))
def test_a_shifted_copy_gets_its_colours_back(seed):
    """Gain, offset, gamma and saturation are drawn by the example, and none of its code is the package's."""
    found = edit_score.match_copy(seed, side=128)
    assert found["before"] > 5
    assert found["error"] < 1.5
    assert found["edit"] < 0.5


def test_an_even_shift_is_taken_away_and_what_is_equal_stays():
    photo = edit_score.photo(np.random.default_rng(0), 96).clip(30, 220).astype(np.uint8)
    reference, darker = Image.fromarray(photo), Image.fromarray(photo - 12)
    image, mask = Edit(reference, True, None).finish(darker, NO_LATENTS)
    assert np.abs(levels(image) - photo).max() <= 1
    assert mask.getextrema() == (0, 0)
    assert np.array_equal(np.asarray(Edit(reference, True, None).finish(reference, NO_LATENTS)[0]), photo)


@pytest.mark.parametrize("match", [False, True])
def test_pixels_come_back_but_for_the_edit(match):
    rng = np.random.default_rng(1)
    photo = edit_score.photo(rng, 128).clip(0, 180)
    drawn = photo + rng.integers(-4, 5, photo.shape)
    drawn[40:80, 50:90] = [250, 20, 20]
    reference, edited = (Image.fromarray(one.clip(0, 255).astype(np.uint8)) for one in (photo, drawn))
    image, mask = Edit(reference, match, 0.1).finish(edited, NO_LATENTS)
    black = np.asarray(mask) == 0
    assert np.asarray(mask)[40:80, 50:90].min() >= 250
    assert np.asarray(mask)[44:76, 54:86].min() == 255
    assert all(part.all() for part in (black[:32], black[88:], black[:, :42], black[:, 98:]))
    assert np.array_equal(np.asarray(image)[black], np.asarray(reference)[black])
    assert np.abs(levels(image) - levels(edited))[60, 70].max() <= (1 if match else 0)
    assert edit_score.seams(image, reference, edited, mask).mean() < 2


def test_a_ground_of_another_colour_is_no_shift():
    white = np.full((64, 64, 3), 250, np.uint8)
    white[20:40, 20:40] = [220, 40, 40]
    blue = np.where((white == 250).all(-1)[..., None], np.uint8([40, 90, 215]), white)
    image, mask = Edit(Image.fromarray(white), True, None).finish(Image.fromarray(blue), NO_LATENTS)
    assert np.array_equal(np.asarray(image)[:14], blue[:14])
    assert np.asarray(mask)[:14].min() == 255


def test_pixels_that_moved_count_nothing_and_a_line_that_is_gone_does():
    plain = np.zeros((32, 32, 3), np.float32)
    half, moved, line = plain.copy(), plain.copy(), plain.copy()
    half[:, 16:], moved[:, 17:], line[:, 8] = 1, 1, 1
    assert pixel_change(half, moved, 1).max() == 0
    assert pixel_change(half, moved, 0).max() == 1
    for pair in ((plain, line), (line, plain)):
        assert (pixel_change(*pair, 1)[:, 8] == 1).all()


def test_latents_say_what_of_the_pixels_counts():
    """By hand: rows of tokens are 16 pixels, and four latent pixels of C / 4 channels each."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 1, 12, 128))
    b[0, :8] = a[0, :8]
    found = latent_change(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), (64, 48))
    assert found.shape == (48, 64)
    assert (found[:28] == 0).all()
    cells = (a - b)[0].reshape(3, 4, 32, 2, 2).transpose(0, 3, 1, 4, 2).reshape(6, 8, 32)
    rms = np.sqrt((cells**2).mean(-1))
    assert np.abs(found[44, 4::8] - np.minimum(rms[5] / 0.7, 1)).max() < 1e-6
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    plain = Image.new("RGB", (64, 48))
    edit = Edit(plain, False, 0.1, tokens=mx.array(a.astype(np.float32)))
    image = edit.finish(noise, mx.array(b.astype(np.float32)))[0]
    assert np.asarray(image)[:20].max() == 0
    assert np.array_equal(np.asarray(image)[36:], np.asarray(noise)[36:])


@pytest.mark.parametrize("size", [(96, 64), (107, 75), (1500, 1000)])
def test_a_reference_lies_as_the_transformer_sees_it(size):
    picture = random_picture(*size)
    seen = ((np.array(reference_array(picture))[0] + 1) / 2 * 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(lay_over(picture, seen.shape[:2])), seen)
    fitted = ImageOps.fit(Image.fromarray(seen), (80, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(lay_over(picture, (64, 80))), np.asarray(fitted))


# ------------------------------------------------------------------------------------------------ pipeline, command


@pytest.mark.parametrize(
    ("size", "options"), [((107, 75), {}), ((150, 100), {"width": 192}), ((96, 64), {"height": 96})]
)
def test_a_mask_says_what_comes_back(pipe, size, options):
    picture, options = random_picture(*size), {**SMALL, **options}
    plain = pipe("a red fox", image=picture, **options).images[0]
    mask = mask_of(*plain.size, (20, 10, 60, 50))
    result = pipe("a red fox", image=picture, mask=mask, edit_composite=0.1, **options)
    (image,), white = result.images, np.asarray(mask) == 255
    assert np.array_equal(np.asarray(result.masks[0]), np.asarray(mask))
    laid = np.asarray(lay_over(picture, plain.size[::-1]))
    assert np.array_equal(np.asarray(image), np.where(white[..., None], np.asarray(plain), laid))
    assert result.settings[0].inputs == ("image", "mask")


def test_finished_images_alone_are_brought_back(pipe):
    picture = random_picture(96, 64)
    given = {"image": picture, "color_match": True, "edit_composite": 1.0, **SMALL}
    plain = list(pipe.stream("a", image=picture, **SMALL))
    steps = list(pipe.stream("a", **given))
    assert np.array_equal(np.asarray(steps[0].picture()), np.asarray(plain[0].picture()))
    assert steps[0].picture_and_mask()[1] is None
    for before, after in zip(plain, steps, strict=True):
        assert np.array_equal(np.asarray(after.preview()), np.asarray(before.preview()))
        assert mx.array_equal(after.latents, before.latents)
    assert np.array_equal(np.asarray(steps[1].picture()), np.asarray(picture))  # nothing differs by more than all
    array = pipe("a", output_type="np", **given)
    assert np.array_equal(np.round(array.images[0] * 255).astype(np.uint8), np.asarray(picture))
    assert pipe("a", **given).masks[0].getextrema() == (0, 0)


def test_references_that_are_kept_are_brought_back_to_as_well(damaged, monkeypatch):
    """As klein-9b-kv keeps them: once, whichever option reads the reference besides."""
    kept, counted, picture = kept_by(damaged), count_keeping(monkeypatch), random_picture(96, 64)
    plain = kept("a", image=picture, **SMALL).images[0]
    whole = kept("a", image=picture, color_match=True, edit_composite=1.0, **SMALL)
    assert np.array_equal(np.asarray(whole.images[0]), np.asarray(picture))  # nothing differs by more than all
    mask = mask_of(96, 64, (20, 10, 60, 50))
    image = kept("a", image=picture, mask=mask, edit_composite=0.1, **SMALL).images[0]
    white = np.asarray(mask)[..., None] == 255
    assert np.array_equal(np.asarray(image), np.where(white, np.asarray(plain), np.asarray(picture)))
    assert counted == [64 * 96 // 16**2]


def test_the_command_writes_a_mask_and_takes_it_again(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_picture(96, 64).save("fox.png")
    begin = [
        "a hat",
        "--model",
        str(checkpoint),
        "--steps",
        "2",
        "--max-sequence-length",
        "16",
        "--seed",
        "4",
        "--quiet",
    ]
    found = ["--image", "fox.png", "--color-match", "--edit-composite"]
    assert main([*begin, *found, "--mask-output", "mask-{seed}.png", "--output", "one.png"]) == 0
    assert read_metadata("one.png")["edit_composite"] == 0.1
    assert main(["--from-image", "one.png", "--image", "fox.png", "--output", "again.png", "--quiet"]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    with Image.open("mask-4.png") as mask:
        assert (mask.mode, mask.size) == ("L", (96, 64))
    assert main([*begin, *found, "--mask", "mask-4.png", "--output", "given.png"]) == 0
    assert read_metadata("given.png")["inputs"] == ["image", "mask"]


PICTURE = random_picture(96, 64)
MASK = mask_of(96, 64, (10, 10, 60, 50))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"color_match": True}, r"color_match belongs to image \(--image\), and none is given"),
        ({"init_image": PICTURE}, {"edit_composite": 0.1}, r"edit_composite belongs to image \(--image\)"),
        (
            {"image": PICTURE, "init_image": PICTURE, "mask": MASK},
            {"edit_composite": 0.1},
            r"edit_composite is for edits of image \(--image\); inpainting and outpainting keep the rest",
        ),
        (
            {"image": PICTURE, "init_image": PICTURE},
            {"color_match": True, "expand": {"left": 16}},
            "color_match is for edits of image",
        ),
        ({"image": PICTURE, "mask": "alpha"}, {"color_match": True}, 'the mask "alpha" is for init_image'),
        ({"image": PICTURE, "mask": MASK}, {}, "mask belongs to init_image, and none is given"),
        ({"image": PICTURE, "mask": MASK}, {"color_match": True, "mask_blur": 2}, "mask_blur and mask_padding belong"),
    ],
)
def test_what_does_not_go_together_is_refused(given, options, message):
    with pytest.raises(InputError, match=message):
        Inputs(prompt="a", **given).inpaint(GenerationOptions(**options))


@pytest.mark.parametrize("threshold", [0, 1.5, True, "high"])
def test_thresholds_that_are_none_are_refused(threshold):
    with pytest.raises(InputError, match="edit_composite must be a number above 0, up to 1, got"):
        GenerationOptions(edit_composite=threshold)


def test_more_is_refused_where_the_size_is_known(pipe, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="the mask is 64 x 64 and the image 96 x 64"):
        pipe("a", image=PICTURE, mask=Image.new("L", (64, 64)), edit_composite=0.1, **SMALL)
    monkeypatch.chdir(tmp_path)
    assert main(["a", "--model", "no/such", "--mask-output", "mask.png"]) == 2
    assert "--mask-output belongs to --color-match or --edit-composite" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ nano


@pytest.mark.parametrize(("count", "share"), [(2, 0.2), pytest.param(60, 0.1, marks=pytest.mark.nightly)])
def test_nano_edits_leave_the_rest_alone(count, share):
    found = edit_score.score_edits(Flux2Pipeline.from_pretrained("nano", cache=False), unseen_edits(count))
    drawn, both = found["as drawn"], found["both"]
    assert both["error"] <= share * drawn["error"]
    assert both["right"] >= drawn["right"]
    assert both["worst"] < 2
