"""Whole pictures, from prompt and seed to pixels, against diffusers.Flux2KleinPipeline on the folder it wrote."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinKVPipeline
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.imaging.inpaint import Inpaint
from flux2_mlx.imaging.preprocess import init_array, reference_size
from tests import tiny
from tests.parity.compare import EXACT, assert_same_picture, relative_error, to_mlx
from tests.prompts import ACCENTS, CHINESE, EMOJI, FOX, LONG, SPECIAL

pytestmark = [
    pytest.mark.filterwarnings("ignore:the prompt has"),
    pytest.mark.filterwarnings("ignore:strength 0.8 of 4 steps is rounded"),
]


def generators(seed, count=1):
    return [torch.Generator("cpu").manual_seed(seed + k) for k in range(count)]


@pytest.mark.parametrize("prompt", [FOX, "", EMOJI, CHINESE, ACCENTS, SPECIAL, LONG], ids=lambda p: p[:8] or "empty")
def test_pictures_of_many_prompts(reference, pipe, prompt):
    """A short and a long one are padded and cut to the usual length; the others take no more than they need."""
    options = {"height": 64, "width": 96} | ({} if prompt in (FOX, LONG) else {"max_sequence_length": 64})
    options |= {"num_inference_steps": 2}
    theirs = reference[0](prompt=prompt, guidance_scale=1.0, generator=generators(3), **options)
    assert_same_picture(pipe(prompt, seed=3, **options).images[0], theirs.images[0])


@pytest.mark.parametrize(("steps", "height", "width"), [(1, 64, 64), (4, 128, 64), (50, 64, 112)])
def test_pictures_of_many_steps_and_sizes(reference, pipe, steps, height, width):
    options = {"height": height, "width": width, "num_inference_steps": steps, "max_sequence_length": 64}
    theirs = reference[0](prompt=FOX, guidance_scale=1.0, generator=generators(11), **options)
    assert_same_picture(pipe(FOX, seed=11, **options).images[0], theirs.images[0])


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_pictures_of_both_head_layouts(tmp_path, layout):
    reference = tiny.pipeline(**tiny.LAYOUTS[layout], seed=8)
    reference.save_pretrained(tmp_path / layout)
    theirs = reference(
        prompt=FOX,
        height=64,
        width=80,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=generators(5),
        max_sequence_length=64,
    )
    ours = Flux2Pipeline.from_pretrained(tmp_path / layout)(FOX, height=64, width=80, seed=5, max_sequence_length=64)
    assert_same_picture(ours.images[0], theirs.images[0])


def test_prompts_and_images_in_a_batch(reference, pipe):
    theirs = reference[0](
        prompt=[FOX, CHINESE],
        height=64,
        width=96,
        num_inference_steps=2,
        guidance_scale=1.0,
        num_images_per_prompt=2,
        generator=generators(20, 4),
        max_sequence_length=64,
    )
    ours = pipe(
        [FOX, CHINESE],
        height=64,
        width=96,
        num_inference_steps=2,
        num_images_per_prompt=2,
        seed=20,
        max_sequence_length=64,
    )
    assert ours.seeds == [20, 21, 22, 23]
    assert len(ours.images) == len(theirs.images) == 4
    for mine, other in zip(ours.images, theirs.images, strict=True):
        assert_same_picture(mine, other)


def test_guidance_of_a_base_model(base_reference):
    reference, folder = base_reference
    options = {"height": 64, "width": 96, "guidance_scale": 4.0, "max_sequence_length": 64}
    theirs = reference(prompt=FOX, num_inference_steps=6, generator=generators(2), **options)
    ours = Flux2Pipeline.from_pretrained(folder)(FOX, num_inference_steps=6, seed=2, **options)
    assert_same_picture(ours.images[0], theirs.images[0])


def test_guidance_with_a_reference(base_reference):
    reference, folder = base_reference
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8))
    options = {"image": image, "guidance_scale": 4.0, "num_inference_steps": 3, "max_sequence_length": 64}
    theirs = reference(prompt=FOX, generator=generators(2), **options)
    assert_same_picture(Flux2Pipeline.from_pretrained(folder)(FOX, seed=2, **options).images[0], theirs.images[0])


def test_reference_pictures(reference, pipe):
    """Two references of odd sizes, one with alpha: cropped, encoded, normalized and placed as diffusers does."""
    rng = np.random.default_rng(1)
    first = Image.fromarray(rng.integers(0, 256, (70, 103, 3), np.uint8))
    second = Image.fromarray(rng.integers(0, 256, (90, 65, 4), np.uint8), "RGBA")
    theirs = reference[0](
        image=[first, second],
        prompt=FOX,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=generators(9),
        max_sequence_length=64,
    )
    ours = pipe(FOX, image=[first, second], seed=9, max_sequence_length=64)
    assert ours.images[0].size == (96, 64)
    assert_same_picture(ours.images[0], theirs.images[0])


def test_ten_references_of_ten_sizes(reference, pipe):
    rng = np.random.default_rng(2)
    images = [Image.fromarray(rng.integers(0, 256, (64 + 5 * k, 110 - 4 * k, 3), np.uint8)) for k in range(10)]
    options = {"image": images, "height": 64, "width": 80, "max_sequence_length": 16}
    theirs = reference[0](prompt=FOX, num_inference_steps=2, guidance_scale=1.0, generator=generators(3), **options)
    assert_same_picture(pipe(FOX, num_steps=2, seed=3, **options).images[0], theirs.images[0])


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
def test_a_picture_is_drawn_anew(reference, pipe, strength):
    """diffusers draws anew what its mask shows, and always shows the picture as a reference too."""
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 96, 3), np.uint8))
    theirs = Flux2KleinInpaintPipeline(**reference[0].components)(
        image=image,
        mask_image=Image.new("L", image.size, "white"),
        prompt=FOX,
        strength=strength,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=generators(6),
        max_sequence_length=64,
    )
    ours = pipe(FOX, image=image, init_image=image, strength=strength, num_steps=4, seed=6, max_sequence_length=64)
    assert_same_picture(ours.images[0], theirs.images[0])


MASK = Image.fromarray(np.pad(np.full((40, 42), 255, np.uint8), ((12, 12), (30, 24))))


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("extra", [False, True], ids=["alone", "with a reference"])
def test_a_part_is_repainted(reference, pipe, strength, extra):
    """The latents whole, and of the picture what the mask shows; the rest is the picture that was given."""
    rng = np.random.default_rng(5)
    image, other = (Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((64, 96), (70, 80)))
    inpaint = Flux2KleinInpaintPipeline(**reference[0].components)
    options = {"prompt": FOX, "strength": strength, "num_inference_steps": 4, "max_sequence_length": 64}

    def theirs(kind):
        given = {"image": image, "mask_image": MASK, "image_reference": other if extra else None}
        generator = generators(6)
        return inpaint(**given, guidance_scale=1.0, generator=generator, output_type=kind, **options).images

    options_of_ours = {"image": other if extra else None, "init_image": image, "mask": MASK, "seed": 6, **options}
    ours = pipe(**options_of_ours, output_type="latent").images
    assert relative_error(ours, theirs("latent").permute(0, 2, 3, 1)) <= 2 * EXACT
    assert_same_picture(pipe(**options_of_ours).images[0], Image.composite(theirs("pil")[0], image, MASK))


def test_a_padded_part_is_repainted_at_full_size(reference, pipe):
    """The box is as wide to its height as the picture, so diffusers has nothing to fill. It pastes the middle of what
    it drew, where it should scale it down (its processor for FLUX.2 makes another thing of "crop"), so what is
    compared is what it pastes from.
    """
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (128, 192, 3), np.uint8))
    mask = Image.fromarray(np.pad(np.full((28, 36), 255, np.uint8), ((50, 50), (20, 136))))
    options = {"prompt": FOX, "strength": 0.8, "num_inference_steps": 4, "max_sequence_length": 64}
    inpaint = Flux2KleinInpaintPipeline(**reference[0].components)
    repainting = Inpaint.prepare(image, mask, padding=12)

    def paste(shown, whole, drawn, box):
        assert (shown, whole, box) == (mask, image, repainting.box) == (mask, image, (0, 38, 78, 90))
        return repainting.composite(drawn)

    inpaint.image_processor.apply_overlay = paste
    theirs = inpaint(
        image=image, mask_image=mask, padding_mask_crop=12, guidance_scale=1.0, generator=generators(6), **options
    )
    ours = pipe(init_image=image, mask=mask, mask_padding=12, seed=6, **options)
    assert_same_picture(ours.images[0], theirs.images[0])


def test_a_mask_is_blurred_and_shapes_the_latents_as_in_diffusers(reference, pipe):
    """A soft mask of a size that is no multiple of 16, on a base model's number of steps."""
    rng = np.random.default_rng(8)
    image = Image.fromarray(rng.integers(0, 256, (75, 107, 3), np.uint8))
    mask = Image.fromarray(rng.integers(0, 256, (75, 107), np.uint8))
    inpaint = Flux2KleinInpaintPipeline(**reference[0].components)
    options = {"prompt": FOX, "num_inference_steps": 6, "max_sequence_length": 64, "output_type": "latent"}
    theirs = inpaint(
        image=image,
        mask_image=inpaint.mask_processor.blur(mask, 2),
        strength=0.7,
        guidance_scale=1.0,
        generator=generators(4),
        **options,
    )
    ours = pipe(init_image=image, mask=mask, mask_blur=2, strength=0.7, seed=4, **options)
    assert relative_error(ours.images, theirs.images.permute(0, 2, 3, 1)) <= 2 * EXACT


def test_a_part_is_repainted_with_guidance(base_reference):
    reference, folder = base_reference
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 96, 3), np.uint8))
    options = {"prompt": FOX, "guidance_scale": 4.0, "num_inference_steps": 3, "max_sequence_length": 64}
    theirs = Flux2KleinInpaintPipeline(**reference.components)(
        image=image, mask_image=MASK, strength=1.0, generator=generators(2), **options
    )
    ours = Flux2Pipeline.from_pretrained(folder)(init_image=image, mask=MASK, seed=2, **options)
    assert_same_picture(ours.images[0], Image.composite(theirs.images[0], image, MASK))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_kept_references(tmp_path, layout):
    """One and two references, then another prompt and size, which here compute nothing of them again."""
    own = tiny.pipeline(**tiny.LAYOUTS[layout], seed=8)
    reference = Flux2KleinKVPipeline(**own.components)
    reference.save_pretrained(tmp_path / layout)
    pipe = Flux2Pipeline.from_pretrained(tmp_path / layout)
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((70, 103), (90, 65))]
    other = {"height": 80, "width": 64}
    for prompt, given, size in ((FOX, images[:1], {}), (FOX, images, {}), (CHINESE, images, other)):
        options = {"image": given, "num_inference_steps": 4, "max_sequence_length": 64, **size}
        theirs = reference(prompt=prompt, generator=generators(9), **options)
        assert_same_picture(pipe(prompt, seed=9, **options).images[0], theirs.images[0])


def test_a_picture_to_begin_from_is_scaled_as_in_diffusers(reference):
    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (1100, 1300, 3), np.uint8))
    processor = Flux2KleinInpaintPipeline(**reference[0].components).image_processor
    size = reference_size(image)
    scale = math.sqrt(1024 * 1024 / (1100 * 1300))
    expected = processor.preprocess(processor.resize(image, int(1100 * scale), int(1300 * scale)), *size)
    assert np.array_equal(np.array(init_array(image, size)), expected.permute(0, 2, 3, 1).numpy())


def test_a_large_reference_is_scaled_down():
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    from flux2_mlx.imaging.preprocess import reference_array

    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (1100, 1300, 3), np.uint8))
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    small = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // 16 * 16 for side in small.size)
    expected = processor.preprocess(small, height=height, width=width, resize_mode="crop")
    ours = reference_array(image)
    assert ours.shape == (1, height, width, 3)
    assert np.array_equal(np.array(ours), expected.permute(0, 2, 3, 1).numpy())


def test_custom_sigmas(reference, pipe):
    sigmas = [1.0, 0.7, 0.2]
    options = {"height": 64, "width": 96, "sigmas": sigmas, "num_inference_steps": 3, "max_sequence_length": 64}
    theirs = reference[0](prompt=FOX, guidance_scale=1.0, generator=generators(1), **options)
    assert_same_picture(pipe(FOX, seed=1, **options).images[0], theirs.images[0])


def test_given_embeddings_and_latents(reference, pipe):
    """Two prompts' embeddings and two pictures each, in diffusers' order."""
    embeds, _ = reference[0].encode_prompt([FOX, CHINESE], max_sequence_length=64)
    latents = torch.randn(4, 128, 4, 6, generator=generators(0)[0])
    options = {"height": 64, "width": 96, "num_inference_steps": 2, "num_images_per_prompt": 2}
    theirs = reference[0](prompt_embeds=embeds, latents=latents, guidance_scale=1.0, **options).images
    ours = pipe(prompt_embeds=to_mlx(embeds), latents=latents.numpy(), **options)
    for mine, other in zip(ours.images, theirs, strict=True):
        assert_same_picture(mine, other)
    packed = latents.flatten(2).transpose(1, 2).numpy()
    again = pipe(prompt_embeds=to_mlx(embeds), latents=packed, **options)
    assert np.array_equal(np.asarray(again.images[3]), np.asarray(ours.images[3]))


def test_output_types(reference, pipe):
    options = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 64}
    for kind, tolerance in (("np", 2 * EXACT), ("latent", 2 * EXACT)):
        theirs = reference[0](
            prompt=FOX, guidance_scale=1.0, generator=generators(6), output_type=kind, **options
        ).images
        theirs = torch.as_tensor(theirs)
        ours = mx.array(pipe(FOX, seed=6, output_type=kind, **options).images)
        assert relative_error(ours, theirs.permute(0, 2, 3, 1) if kind == "latent" else theirs) <= tolerance


def test_bfloat16_picture_is_close(reference, checkpoint):
    """bfloat16 rounds every activation, so pictures agree statistically only."""
    options = {"height": 64, "width": 96, "num_inference_steps": 4, "max_sequence_length": 64}
    theirs = reference[0](prompt=FOX, guidance_scale=1.0, generator=generators(0), **options)
    ours = Flux2Pipeline.from_pretrained(checkpoint, dtype="bfloat16")(FOX, seed=0, **options)
    difference = np.asarray(ours.images[0], np.float32) - np.asarray(theirs.images[0], np.float32)
    assert 0 < np.abs(difference).mean() < 3
