"""What of a picture is repainted, and that the rest comes back as it was."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.imaging.inpaint import Inpaint, _pad_box

SMALL = {"num_steps": 2, "seed": 3, "max_sequence_length": 16}


def random_picture(width, height, channels=3, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(levels if channels > 1 else levels[..., 0])


def mask_of(width, height, box):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    ("size", "box", "options"),
    [
        ((96, 64), (30, 12, 72, 52), {}),
        ((107, 75), (30, 12, 72, 52), {}),
        ((107, 75), (30, 12, 72, 52), {"mask_padding": 8}),
        ((107, 75), (100, 70, 107, 75), {"mask_padding": 0}),
        ((150, 100), (60, 20, 90, 80), {"width": 192}),
        ((1200, 1000), (200, 200, 500, 600), {"mask_padding": 32, "height": 64}),
    ],
)
def test_pixels_outside_the_mask_come_back_identical(pipe, size, box, options):
    picture, mask = random_picture(*size), mask_of(*size, box)
    result = pipe("a red fox", init_image=picture, mask=mask, **SMALL, **options).images[0]
    assert result.size == size
    changed = (np.asarray(result) != np.asarray(picture)).any(-1)
    shown = np.asarray(mask) > 0
    assert not changed[~shown].any()
    assert changed[shown].mean() > 0.9


def test_grey_is_blended(pipe):
    picture = random_picture(96, 64)
    black_and_white, grey = mask_of(96, 64, (0, 0, 48, 64)), mask_of(96, 64, (0, 0, 48, 64))
    grey.paste(128, (32, 0, 48, 64))
    whole, part = (
        np.asarray(pipe("a", init_image=picture, mask=mask, **SMALL).images[0], np.float64)
        for mask in (black_and_white, grey)
    )
    before = np.asarray(picture, np.float64)
    assert np.array_equal(whole[:, :32], part[:, :32])
    assert np.abs(part[:, 32:48] - (128 * whole + 127 * before)[:, 32:48] / 255).max() <= 1


def test_a_blur_softens_the_mask():
    mask = mask_of(96, 64, (30, 12, 72, 52))
    inpaint = Inpaint.prepare(random_picture(96, 64), mask, blur=3)
    assert np.array_equal(np.asarray(inpaint.mask), np.asarray(mask.filter(ImageFilter.GaussianBlur(3))))


def test_arrays_and_latents_go_with_the_picture(pipe):
    """output_type "np" is the same picture; "latent" what was drawn, at the size that it was drawn at."""
    options = {"init_image": random_picture(107, 75), "mask": mask_of(107, 75, (30, 12, 72, 52)), **SMALL}
    array = pipe("a", output_type="np", **options).images
    assert array.shape == (1, 75, 107, 3)
    assert np.array_equal(np.round(array[0] * 255).astype(np.uint8), np.asarray(pipe("a", **options).images[0]))
    assert pipe("a", output_type="latent", **options).images.shape == (1, 64 // 8, 96 // 8, 32)


def test_what_is_transparent_is_repainted(pipe):
    picture = random_picture(96, 64, channels=4)
    alpha = Image.new("L", (96, 64), 255)
    alpha.paste(0, (20, 20, 70, 50))
    picture.putalpha(alpha)
    result = pipe("a", init_image=picture, mask="alpha", **SMALL).images[0]
    outside = np.asarray(alpha) == 255
    assert np.array_equal(np.asarray(result)[outside], np.asarray(picture)[outside][:, :3])
    filled = Image.new("RGB", picture.size, "white")
    filled.paste(picture, mask=alpha)
    mask = mask_of(96, 64, (20, 20, 70, 50))
    assert np.array_equal(np.asarray(result), np.asarray(pipe("a", init_image=filled, mask=mask, **SMALL).images[0]))


def test_a_picture_is_painted_on(pipe):
    """Beyond its edges, and inside too with a mask; the edges are what the transformer sees there."""
    picture = random_picture(96, 64)
    expand = {"left": 20, "bottom": 12}
    result = pipe("a", init_image=picture, expand=expand, **SMALL)
    assert result.images[0].size == (116, 76)
    assert np.array_equal(np.asarray(result.images[0])[:64, 20:], np.asarray(picture))
    assert result.settings[0].expand == expand
    assert (result.settings[0].width, result.settings[0].height) == (112, 64)
    inpaint = Inpaint.prepare(picture, mask_of(96, 64, (0, 0, 9, 9)), expand=expand)
    levels = np.asarray(inpaint.image)
    assert np.array_equal(levels[:64, :20], np.repeat(np.asarray(picture)[:, :1], 20, axis=1))
    shown = np.asarray(inpaint.mask)
    assert shown[70, 100] == shown[5, 5] == shown[5, 25] == 255
    assert shown[30, 60] == 0


def test_a_mask_of_another_size_and_of_other_kinds():
    picture = random_picture(200, 120)
    small = mask_of(100, 60, (10, 10, 50, 40))
    scaled = np.asarray(Inpaint.prepare(picture, small).mask)
    assert scaled.shape == (120, 200)
    assert (scaled[22:78, 22:98] == 255).all()
    assert (scaled[82:] == 0).all()
    strokes = Image.new("RGBA", (200, 120), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (10, 10, 50, 40))
    for mask in (
        strokes,
        strokes.getchannel("A"),
        strokes.getchannel("A").convert("RGB"),
        strokes.getchannel("A").convert("1"),
    ):
        assert np.array_equal(np.asarray(Inpaint.prepare(picture, mask).mask), np.asarray(strokes.getchannel("A")))


@given(st.data())
def test_a_pad_box_box_holds_what_is_shown_and_has_the_pictures_shape(data):
    width, height = (data.draw(st.integers(64, 300)) for _ in range(2))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    padding = data.draw(st.integers(0, 80))
    box = _pad_box((left, top, right, bottom), padding, (width, height))
    assert 0 <= box[0] <= max(left - padding, 0)
    assert min(right + padding, width) <= box[2] <= width
    assert 0 <= box[1] <= max(top - padding, 0)
    assert min(bottom + padding, height) <= box[3] <= height
    wide, tall = box[2] - box[0], box[3] - box[1]
    assert min(abs(wide * height / width - tall), abs(tall * width / height - wide)) <= 1


def test_a_pad_box_part_is_drawn_as_large_as_the_whole(pipe):
    """The region's pixels are what the transformer begins from, enlarged."""
    picture, mask = random_picture(192, 128), mask_of(192, 128, (60, 50, 80, 62))
    inpaint = Inpaint.prepare(picture, mask, padding=10)
    assert inpaint.box == (46, 40, 94, 72) == (46, 40, 46 + 48, 40 + 32)
    enlarged = picture.crop(inpaint.box).resize((192, 128), Image.Resampling.LANCZOS)
    assert mx.array_equal(inpaint.array((128, 192)), mx.array(np.asarray(enlarged, np.float32)[None] / 255 * 2 - 1))
    settings = pipe("a", init_image=picture, mask=mask, mask_padding=10, **SMALL).settings[0]
    assert (settings.width, settings.height, settings.mask_padding) == (192, 128, 10)


PICTURE, MASK = random_picture(96, 64), mask_of(96, 64, (10, 10, 60, 50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": MASK}, "mask belongs to init_image, and none is given"),
        ({"expand": {"left": 16}}, "expand belongs to init_image, and none is given"),
        ({"init_image": PICTURE, "mask_blur": 2}, "mask_blur and mask_padding belong to mask, or expand"),
        ({"init_image": PICTURE, "mask_padding": 2}, "mask_blur and mask_padding belong to mask, or expand"),
        ({"init_image": PICTURE, "mask": Image.new("L", (96, 64))}, "the mask is black everywhere"),
        ({"init_image": PICTURE, "mask": mask_of(96, 64, (2, 2, 5, 5))}, r"too small, or too dark, .*--mask-padding"),
        ({"init_image": PICTURE, "mask": Image.new("L", (64, 64), 255)}, "the mask is 64 x 64 and the image 96 x 64"),
        ({"init_image": PICTURE, "mask": "alpha"}, "the image has no transparency"),
        ({"init_image": PICTURE, "mask": "mask.png"}, "mask.png: cannot be read: No such file"),
        ({"init_image": PICTURE, "mask": 5}, 'a mask must be a PIL.Image.Image or "alpha", got int'),
        ({"init_image": "a.png", "mask": MASK}, "a.png: cannot be read: No such file"),
        ({"init_image": PICTURE, "mask": MASK, "mask_blur": -1}, "mask_blur must be a number from 0 to 10000"),
        ({"init_image": PICTURE, "mask": MASK, "mask_blur": "soft"}, "mask_blur must be a number from 0 to 10000"),
        ({"init_image": PICTURE, "mask": MASK, "mask_padding": -1}, "mask_padding must be a whole number"),
        ({"init_image": PICTURE, "expand": {}}, "expand must give pixels, up to 10000, to add on some of left"),
        ({"init_image": PICTURE, "expand": {"up": 16}}, "expand must give pixels"),
        ({"init_image": PICTURE, "expand": {"left": -1}}, "expand must give pixels"),
        ({"init_image": PICTURE, "expand": {"left": 0}}, "expand must give pixels"),
        ({"init_image": PICTURE, "expand": 16}, "expand must give pixels"),
        ({"init_image": PICTURE, "expand": {"left": 1000}}, "an image of 1096 x 64 is too elongated"),
        ({"init_image": PICTURE, "mask": MASK, "height": 96, "width": 96}, "has another aspect than .* 96 x 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_repainted_is_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe("a", **options)


def test_the_picture_that_is_repainted_counts_as_a_reference(checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="staged", cache=False)
    picture, mask = random_picture(96, 64), mask_of(96, 64, (0, 0, 48, 64))
    other = Image.new("RGB", (256, 256))
    sizes = [(64, 96), *[(256, 256)] * 14]
    peaks = [pipe.plan(64, 96, 16, references=sizes[:count]).peak for count in range(15)]
    assert peaks[0] < peaks[11] < peaks[12]
    pipe.memory_limit = peaks[11]
    pipe.stream("a", init_image=picture, mask=mask, image=[other] * 10, **SMALL)
    with pytest.raises(InputError, match=r"13 references and an image of 96 x 64 need .*; the first 10 fit"):
        pipe.stream("a", init_image=picture, mask=mask, image=[other] * 13, **SMALL)
