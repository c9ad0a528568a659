"""nano, whose weights are trained, against diffusers on the folder in the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

import flux2_mlx
from examples.nano_world import Scene, Thing, judge, render
from flux2_mlx import Flux2Pipeline
from tests.parity.compare import assert_same_picture

RED, BLUE = Thing("circle", "red", "large", "left"), Thing("square", "blue", "small", "top right")
PICTURES = {
    "a large red circle on the left, white background": (),
    "a small green star above a purple square on grey": (),
    "yellow triangle in the bottom right corner, black background": (),
    "a blue cross": (),
    "A large white diamond next to a small black circle against a red backdrop.": (),
    "make the circle yellow": (Scene("white", (RED, BLUE)),),
    "remove the blue square": (Scene("yellow", (RED, BLUE)),),
}


@pytest.fixture(scope="module")
def reference() -> Flux2KleinPipeline:
    folder = Path(flux2_mlx.__file__).with_name("nano")
    pipe = Flux2KleinPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("nano", dtype="float32")


@pytest.mark.parametrize("prompt", PICTURES)
def test_pictures_equal_those_of_diffusers(reference, pipe, prompt):
    pictures = [Image.fromarray(render(scene, 128, 128)) for scene in PICTURES[prompt]]
    theirs = reference(
        prompt=prompt,
        image=pictures or None,
        height=128,
        width=128,
        num_inference_steps=4,
        max_sequence_length=pipe.tokenizer.default_length,
        generator=torch.Generator("cpu").manual_seed(1),
    )
    assert_same_picture(pipe(prompt, image=pictures or None, seed=1).images[0], theirs.images[0])


def test_the_first_picture_is_the_one_asked_for(pipe):
    (picture,) = pipe(next(iter(PICTURES)), seed=1).images
    verdict = judge(np.array(picture), Scene("white", (RED,)))
    assert all(all(right) for right in verdict.values())
