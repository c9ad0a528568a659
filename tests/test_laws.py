"""What holds for every way of sampling: plain, with CFG, with caches, from an image, of a part of one.

A new way is one entry of WAYS; a law is a test over all of them, through the public API alone.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.generate import main
from tests import tiny
from tests.test_pipeline import close, same

SMALL = {"height": 64, "width": 80, "num_steps": 3, "max_sequence_length": 16, "seed": 3}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
REFERENCE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 64, 3), np.uint8))
WHITE, MASK = Image.new("L", IMAGE.size, 255), Image.new("L", IMAGE.size)
MASK.paste(255, (20, 0, 60, 64))
CFG = {"guidance": 3.0, "force_guidance": True, "negative_prompt": "rain"}
NO_CFG = {"guidance": None, "force_guidance": False}
CACHED = {**CFG, "num_steps": 12, "step_cache": 1.0}  # of a random model, whose steps differ much
INPAINT = {"init_image": IMAGE, "mask": MASK}
REGIONS = ["a hat@0,0,0.5,1", "rain@0.3,0.5,1,1"]
KV = "kv"  # the checkpoint whose transformer keeps its references


@dataclass(frozen=True)
class Way:
    """One way of sampling.

    Attributes:
        options: of Flux2Pipeline's call.
        none: options, besides these, where it does nothing; and those of the plain way that draw the same.
        refused: options that it does not go with, and what is said then.
        opened: how its pipeline is opened.
        checkpoint: "distilled" or KV.
        references: (height, width) of what the transformer sees besides the image.
        decided: options with which the images of a pass, which decide together, decide as each would alone.
    """

    options: dict[str, Any]
    none: tuple[dict[str, Any], dict[str, Any]]
    refused: tuple[dict[str, Any], str]
    opened: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "distilled"
    references: tuple[tuple[int, int], ...] = ()
    decided: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "plain": Way({}, ({"guidance": 1.0}, {}), ({"num_steps": 0}, "num_steps must be")),
    "cfg": Way(CFG, ({"guidance": 1.0}, NO_CFG), ({"guidance": -1.0}, "guidance must be")),
    # There is never room for both passes at once.
    "cfg-in-turn": Way(
        CFG,
        ({"guidance": 1.0}, NO_CFG),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval"),
        {"memory_limit": 10**6},
    ),
    "cached": Way(
        CACHED,
        ({"step_cache": 0.0}, {"step_cache": None}),
        ({"step_cache": -0.1}, "step_cache must be"),
        decided={"step_cache": 1e9},
    ),
    "frozen-text": Way(
        {"reuse": "text"},
        ({"num_steps": 1}, {"num_steps": 1, "reuse": None}),
        (CFG, "models without CFG, and guidance is 3"),
    ),
    "frozen-references": Way(
        {"reuse": "references", "image": REFERENCE},
        ({"num_steps": 1}, {"num_steps": 1, "reuse": None}),
        ({"image": None}, r"reuse of references belongs to image \(--image\), and none is given"),
        references=(REFERENCE.size[::-1],),
    ),
    "kv": Way(
        {"image": REFERENCE},
        ({"image": None}, {"image": None}),
        ({"reuse": "references"}, r"caches its references already \(KV cache\), as klein-9b-kv does$"),
        checkpoint=KV,
        references=(REFERENCE.size[::-1],),
    ),
    "strength": Way(
        {**CFG, "image": REFERENCE, "reference_strength": [0.5]},
        ({"reference_strength": [0.0], **NO_CFG}, {"image": None, "reference_strength": [], **NO_CFG}),
        ({"reference_strength": [2.1]}, "reference_strength must be numbers from 0 to 2"),
        references=(REFERENCE.size[::-1],),
    ),
    "strength-kv": Way(
        {"image": REFERENCE, "reference_strength": [1.5]},
        ({"reference_strength": [0.0]}, {"image": None, "reference_strength": []}),
        (
            {"image": None},
            r"reference_strength has 1 numbers, one for each reference image \(--image\), and of these there",
        ),
        checkpoint=KV,
        references=(REFERENCE.size[::-1],),
    ),
    "regions": Way(
        {**CFG, "image": REFERENCE, "reference_strength": [0.5], "region": REGIONS},
        ({"region": [], **NO_CFG}, {"region": [], **NO_CFG}),
        ({"region": ["a fox@0,0,0,1"]}, 'region must be "PROMPT@left,top,right,bottom" in shares of the image'),
        references=(REFERENCE.size[::-1],),
    ),
    "img2img": Way(
        {"init_image": IMAGE, "strength": 0.5, "num_steps": 4},
        ({"strength": 1.0}, {"init_image": None, "strength": None}),
        ({"init_image": None}, r"strength belongs to init_image \(--init-image\), and none is given"),
    ),
    "hires": Way(
        {"hires": 2.0, "hires_strength": 0.5, "height": 128, "width": 160},
        ({"hires_strength": 1.0}, {"hires": None, "hires_strength": None}),
        ({"latents": np.zeros((1, 80, 128))}, "hires draws noise of its own for each size, and latents is given"),
    ),
    "enlarge": Way(
        {"init_image": IMAGE, "image": REFERENCE, "hires": 2.0, "hires_tile": 96, "height": 128, "width": 160},
        ({"hires_tile": 160}, {"hires_tile": None}),
        ({"strength": 0.5}, r"strength is hires_strength \(--hires-strength\) where hires enlarges the init_image"),
        references=(REFERENCE.size[::-1],),
    ),
    "inpaint": Way(
        INPAINT,
        ({"mask": WHITE}, {"init_image": None, "mask": None, "image": IMAGE}),
        ({"init_image": None}, "mask"),
        references=(IMAGE.size[::-1],),
    ),
}
pytestmark = [
    pytest.mark.parametrize("way", WAYS.values(), ids=WAYS),
    pytest.mark.filterwarnings("ignore:the .* needs about"),  # where memory_limit is 1
    pytest.mark.filterwarnings("ignore:.*negative_prompt is ignored"),  # where guidance is 1
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Of two double and two single blocks."""
    folder = tmp_path_factory.mktemp("laws")
    pipe = tiny.pipeline(depth=2, depth_single=2, seed=5)
    pipe.save_pretrained(folder / "distilled")
    index = json.loads((folder / "distilled" / "model_index.json").read_text())
    tiny.rewrite(
        tiny.copy(folder / "distilled", folder / KV) / "model_index.json",
        json.dumps({**index, "_class_name": "Flux2KleinKVPipeline"}),
    )
    return {name: folder / name for name in ("distilled", KV)}


@pytest.fixture(scope="module")
def opened(checkpoints):
    """A function that opens a way's pipeline, each but once."""
    pipelines: dict[str, Flux2Pipeline] = {}

    def open_pipeline(way: Way, **options: Any) -> Flux2Pipeline:
        options = {"memory": "resident", **way.opened, **options}
        key = repr((way.checkpoint, sorted(options.items())))
        if key not in pipelines:
            pipelines[key] = Flux2Pipeline.from_pretrained(checkpoints[way.checkpoint], cache=False, **options)
        return pipelines[key]

    return open_pipeline


def image(pipe: Flux2Pipeline, way: Way, prompt: str = "a fox", **options: Any) -> Image.Image:
    return pipe(prompt, **{**SMALL, **way.options, **options}).images[0]


@pytest.fixture(scope="module")
def images() -> dict[int, Image.Image]:
    return {}


@pytest.fixture
def resident(opened, way, images) -> Image.Image:
    """The image that the way draws with all stages loaded, drawn once for all laws."""
    if id(way) not in images:
        images[id(way)] = image(opened(way), way)
    return images[id(way)]


@pytest.mark.parametrize("memory", ["staged", "streamed"])
def test_every_mode_draws_the_resident_image(opened, way, memory, resident):
    assert same(image(opened(way, memory=memory), way), resident)


def test_an_image_takes_nothing_from_the_one_before(opened, way):
    several = opened(way)(["a fox", "a hat"], **{**SMALL, **way.options}).images
    assert same(several[1], image(opened(way), way, "a hat", seed=SMALL["seed"] + 1))
    assert same(several[0], image(opened(way), way))


def test_images_that_share_a_pass_are_their_single_ones(opened, way):
    """To rounding."""
    pipe, options = opened(way), {**SMALL, **way.options, **way.decided}
    several = pipe(["a fox", "a hat"], batch_size=2, **options).images
    for k, prompt in enumerate(("a fox", "a hat")):
        assert close(several[k], pipe(prompt, **{**options, "seed": SMALL["seed"] + k}).images[0])


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.nightly), "bfloat16"])
def test_half_precision_draws_about_the_same(opened, way, dtype, resident):
    exact, half = (np.asarray(picture, int) for picture in (resident, image(opened(way, dtype=dtype), way)))
    assert 0 < np.abs(exact - half).mean() < 25


def test_where_it_does_nothing_it_changes_nothing(opened, way, resident):
    nothing, without = way.none
    plain = image(opened(WAYS["plain"]), way, **without)
    assert same(image(opened(way), way, **nothing), plain)
    assert way is WAYS["plain"] or not same(resident, plain)


def test_what_does_not_go_with_it_is_refused(opened, way):
    options, message = way.refused
    with pytest.raises(InputError, match=message):
        opened(way).stream("a fox", **{**SMALL, **way.options, **options})


def flags(options: dict[str, Any], folder: Path) -> list[str]:
    """The command's, for options of Flux2Pipeline; images as files."""
    words = []
    for name, value in options.items():
        if isinstance(value, Image.Image):
            value.save(folder / f"{name}.png")
            value = folder / f"{name}.png"
        flag = "--steps" if name == "num_steps" else f"--{name.replace('_', '-')}"
        if name == "region":
            words += [word for text in value for word in (flag, text)]
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [flag] if value is True else [flag, text]
    return words


def test_its_file_repeats_it(way, checkpoints, tmp_path, resident):
    options = {**SMALL, **way.options}
    images = {name: value for name, value in options.items() if isinstance(value, Image.Image)}
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    model = ["--model", str(checkpoints[way.checkpoint]), "--no-cache", "--quiet"]
    assert main(["a fox", *model, *flags(options, tmp_path), "--output", str(first)]) == 0
    with Image.open(first) as drawn:
        assert close(drawn, resident)
    assert main(["--from-image", str(first), *flags(images, tmp_path), "--quiet", "--output", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("memory", ["staged", "streamed"])
def test_the_memory_that_is_planned_is_enough(opened, way, memory, resident, monkeypatch):
    """No stage says that it needs more, and what is drawn is the same."""
    pipe = opened(way, memory=memory)
    planned = ("step_cache", "reuse", "hires", "hires_tile", "region")
    caches = {name: way.options[name] for name in planned if name in way.options}
    options = {**SMALL, **way.options}
    sizes = options["height"], options["width"], options["max_sequence_length"]
    monkeypatch.setattr(pipe, "memory_limit", pipe.plan(*sizes, way.references, **caches).peak)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated = image(pipe, way)
    assert close(generated, resident)
