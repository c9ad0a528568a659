"""A pipeline that is opened in one thread generates in any other, and threads that come at once take turns.

MLX's streams belong to threads: a lazy array is evaluated only in the thread that made it. The image of each order of
opening and use is that of one thread alone.
"""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from flux2_mlx import Flux2Pipeline
from tests import loras

SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16, "seed": 1}
MODES = ("resident", "staged", "streamed")
IMAGE = Image.new("RGB", (80, 64), "red")


def pixels(pipe, **options):
    return np.asarray(pipe("a red fox", **SMALL, **options).images[0])


def elsewhere(function, *arguments, **options):
    """What a function gives in a thread of its own, which ends then."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments, **options).result()


def opened(checkpoint, **options):
    return Flux2Pipeline.from_pretrained(checkpoint, cache=False, **options)


@pytest.fixture(scope="module")
def expected(checkpoint):
    return pixels(opened(checkpoint))


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("order", ["there", "here, there", "there, here", "there, there", "here, unload, there"])
def test_a_pipeline_generates_in_any_thread(checkpoint, expected, memory, order):
    pipe = opened(checkpoint, memory=memory)
    for place in order.split(", "):
        if place == "unload":
            pipe.unload()
        else:
            found = pixels(pipe) if place == "here" else elsewhere(pixels, pipe)
            assert np.array_equal(found, expected), place


@pytest.mark.parametrize("memory", MODES)
def test_the_thread_that_opened_it_may_be_gone(checkpoint, expected, memory):
    pipe = elsewhere(opened, checkpoint, memory=memory)
    assert np.array_equal(pixels(pipe), expected)


def test_a_quantized_pipeline_generates_in_any_thread(checkpoint):
    here = pixels(opened(checkpoint, quantize=4, group_size=32))
    assert np.array_equal(elsewhere(pixels, opened(checkpoint, quantize=4, group_size=32)), here)


@pytest.mark.parametrize("memory", MODES)
def test_a_first_reference_comes_in_another_thread(checkpoint, memory):
    """The encoder of the autoencoder is not in memory then, though its decoder is."""
    there = opened(checkpoint, memory=memory)
    pixels(there)
    assert np.array_equal(elsewhere(pixels, there, image=IMAGE), pixels(opened(checkpoint), image=IMAGE))


@pytest.mark.filterwarnings("ignore:the transformer is streamed and its weights are converted")
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("merge", [False, True])
def test_loras_change_in_any_thread(checkpoint, tmp_path, memory, merge):
    file = tmp_path / "lora.safetensors"
    loras.write(file, load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"))
    here = opened(checkpoint)
    plain = pixels(here)
    here.load_lora(file, name="fox", merge=merge)
    full = pixels(here)
    here.set_lora("fox", 0.5)
    half = pixels(here)
    assert not np.array_equal(plain, full)
    pipe = opened(checkpoint, memory=memory)
    elsewhere(pipe.load_lora, file, name="fox", merge=merge)
    assert np.array_equal(pixels(pipe), full)
    elsewhere(pipe.set_lora, "fox", 0.5)
    assert np.array_equal(elsewhere(pixels, pipe), half)
    pipe.unload_lora()
    assert np.array_equal(elsewhere(pixels, pipe), plain)


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_threads_advance_a_stream_in_turn(base_reference, memory):
    """As a web server's workers do; a third looks at what the steps foresee. CFG begins in the second step."""
    options = {**SMALL, "num_steps": 3, "num_images": 2, "batch_size": 2, "negative_prompt": "blue"}
    options["guidance_interval"] = (0.0, 0.95)
    here = [np.asarray(step.picture()) for step in opened(base_reference[1]).stream("a", **options)]
    found = []
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second, ThreadPoolExecutor(1) as third:
        steps = opened(base_reference[1], memory=memory).stream("a", **options)
        for k in range(len(here)):
            step = (first if k % 2 else second).submit(next, steps).result()
            found.append(third.submit(lambda step=step: np.asarray(step.picture())).result())
            third.submit(step.preview).result()
    assert all(np.array_equal(*pair) for pair in zip(found, here, strict=True))


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_latents_are_given_to_any_thread(checkpoint, memory):
    """Nothing is decoded then, so that nothing of the autoencoder is in memory."""

    def latents(pipe):
        return pipe("a red fox", output_type="latent", num_images=2, **SMALL).images

    expected = np.array(latents(opened(checkpoint)))
    assert np.array_equal(np.array(elsewhere(latents, opened(checkpoint, memory=memory))), expected)


def test_prompts_are_encoded_ahead_in_another_thread(checkpoint, expected):
    pipe = opened(checkpoint)
    elsewhere(pipe.encode, ["a red fox"], 16)
    assert np.array_equal(pixels(pipe), expected)


@pytest.mark.parametrize("memory", MODES)
def test_threads_that_come_at_once_take_turns(checkpoint, memory):
    seeds = (1, 2, 3, 1)
    pipe = opened(checkpoint, memory=memory)
    barrier = threading.Barrier(len(seeds))

    def generate(seed):
        barrier.wait()
        return np.asarray(pipe("a red fox", **{**SMALL, "seed": seed}).images[0])

    with ThreadPoolExecutor(len(seeds)) as threads:
        found = list(threads.map(generate, seeds))
    alone = opened(checkpoint)
    for seed, image in zip(seeds, found, strict=True):
        assert np.array_equal(image, np.asarray(alone("a red fox", **{**SMALL, "seed": seed}).images[0])), seed


SCRIPT = """
import sys, threading
import mlx.core as mx
mx.set_default_device(mx.cpu)
from flux2_mlx import Flux2Pipeline

pipe = Flux2Pipeline.from_pretrained(sys.argv[1], cache=False, memory=sys.argv[2])

def work():
    pipe("a", height=64, width=64, num_steps=1, max_sequence_length=16, seed=1)
    if sys.argv[3] == "dies":
        raise SystemExit  # as a worker that is told to end

def generate():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

generate()
if sys.argv[3] == "both":
    work()
    generate()
"""


@pytest.mark.parametrize(("memory", "end"), [("resident", "ends"), ("staged", "dies"), ("streamed", "both")])
def test_the_process_ends_cleanly(checkpoint, memory, end):
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), memory, end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
