"""The packaged miniature: diffusers loads the very folder and draws the same pictures."""

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from benchmarks.nano_score import unseen_edits, unseen_tasks
from benchmarks.nano_world import EDITS, render
from flux2_mlx import Flux2Pipeline
from flux2_mlx.weights import open_checkpoint
from tests.parity.compare import assert_same_picture

SIZES = [(128, 128), (96, 160), (128, 128), (192, 112), (128, 128)]


@pytest.fixture(scope="module")
def reference():
    pipe = Flux2KleinPipeline.from_pretrained(open_checkpoint("nano").folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def nano():
    return Flux2Pipeline.from_pretrained("nano", dtype="float32")


def drawn_by(reference, prompt, seed, **options):
    generator = torch.Generator("cpu").manual_seed(seed)
    length = reference.tokenizer.model_max_length
    return reference(
        prompt, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=length, generator=generator, **options
    ).images[0]


@pytest.mark.parametrize("number", range(5))
def test_five_prompts(reference, nano, number):
    task, (height, width) = unseen_tasks(5)[number], SIZES[number]
    theirs = drawn_by(reference, task.caption, number, height=height, width=width)
    assert_same_picture(nano(task.caption, height=height, width=width, seed=number).images[0], theirs)


@pytest.mark.parametrize("number", [0, len(EDITS)], ids=["one reference", "two references"])
def test_edits(reference, nano, number):
    task = unseen_edits(len(EDITS) + 1)[number]
    references = [Image.fromarray(render(scene, 128, 128)) for scene in task.references]
    theirs = drawn_by(reference, task.caption, 7, image=references)
    assert_same_picture(nano(task.caption, image=references, seed=7).images[0], theirs)


def test_a_prompt_padded_as_long_as_diffusers_does_unless_told(reference, nano):
    """512 tokens is diffusers' default whatever the tokenizer says."""
    prompt = "a small yellow star above a large blue square, black background"
    generator = torch.Generator("cpu").manual_seed(2)
    theirs = reference(
        prompt, height=128, width=128, num_inference_steps=4, guidance_scale=1.0, generator=generator
    ).images[0]
    assert_same_picture(nano(prompt, seed=2, max_sequence_length=512).images[0], theirs)
