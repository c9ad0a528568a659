"""Strengths of references, beside the laws: the mathematics, what 0 and 1 do, and what is refused."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.common import TINY
from benchmarks.kernels import Recorder, own_step
from flux2_mlx import FluxKlein, InputError
from flux2_mlx.cli.arguments import build_parser, complete
from flux2_mlx.cli.jobs import Job
from flux2_mlx.cli.session import Session
from flux2_mlx.inputs import Inputs
from flux2_mlx.models.kv_cache import FrozenKV, MaskedKV
from flux2_mlx.sampling.denoiser import Denoiser, strength_bias
from flux2_mlx.sampling.schedules import plan_steps
from tests.parity.compare import EXACT, relative_error, to_torch
from tests.parity.test_transformer import inputs, ported
from tests.test_pipeline import count_keeping, kept_by, same

LENGTH, IMAGE = 24, 24  # tokens of the text, and of an image of 64 x 96
SIZES = [(64, 80), (80, 64)]
SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16, "seed": 3}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)) for _ in range(2)]


# ------------------------------------------------------------------------------------------------ one pass


@pytest.mark.parametrize("batch", [1, 2])
def test_the_velocity_is_that_of_diffusers_with_an_attention_mask(model, batch):
    img, txt, timesteps, img_ids, txt_ids = inputs(model, 64, 96, batch, LENGTH, SIZES)
    strengths, ours = (0.3, 1.7), ported(model)
    rope = ours.compute_rope(txt_ids, img_ids, ours.params.axes_dims_rope, ours.params.rope_theta)
    bias = strength_bias(LENGTH + IMAGE, [20, 20], strengths)
    kv = [MaskedKV(bias)] * ours.params.blocks
    velocity = ours.forward_with_rope(img, txt, timesteps, *rope, image_tokens=IMAGE, kv=kv)
    mask = np.concatenate([np.ones(LENGTH + IMAGE), *(np.full(20, strength) for strength in strengths)])
    with torch.no_grad():
        expected = model(
            hidden_states=to_torch(img),
            encoder_hidden_states=to_torch(txt),
            timestep=to_torch(timesteps),
            img_ids=to_torch(img_ids)[0],
            txt_ids=to_torch(txt_ids)[0],
            joint_attention_kwargs={"attention_mask": torch.from_numpy(np.log(mask)).float()[None, None, None]},
            return_dict=False,
        )[0]
    assert relative_error(velocity, expected[:, :IMAGE]) <= EXACT
    plain = ours.forward_with_rope(img, txt, timesteps, *rope, image_tokens=IMAGE)
    assert relative_error(plain, expected[:, :IMAGE]) > 1e-3  # or the strengths did nothing


@pytest.mark.parametrize("way", ["plain", "kv", "text", "references"])
def test_two_counts_as_there_twice(model, way):
    """Softmax over the same tokens twice is that of log 2 more; with frozen KV in the first step and in later ones."""
    ours = ported(model)
    params = ours.params
    img, txt, _, img_ids, txt_ids = inputs(model, 64, 96, 2, LENGTH, SIZES[:1])
    x, reference, own, ids = img[:, :IMAGE], img[:1, IMAGE:], img_ids[:, :IMAGE], img_ids[:, IMAGE:]
    steps = plan_steps([1.0, 0.7, 0.0], 0, uses_cfg=False)

    def rope(txt_ids, *ids):
        return FluxKlein.compute_rope(txt_ids, mx.concatenate(ids, axis=1), params.axes_dims_rope, params.rope_theta)

    def velocities(times, strength):
        frozen = FrozenKV(way, IMAGE) if way in ("text", "references") else None
        bias = strength_bias(LENGTH + IMAGE, [20] * times, [strength] * times)
        if way == "kv":
            kv = [
                tuple(mx.concatenate([part] * times, axis=2) for part in block)
                for block in ours.encode_reference_kv(reference, *rope(txt_ids[:, :0], ids))
            ]
            denoiser = Denoiser(lambda: nullcontext(ours), rope(txt_ids, own), IMAGE, [], kv, bias)
        else:
            tables = rope(txt_ids, own, *[ids] * times)
            denoiser = Denoiser(lambda: nullcontext(ours), tables, IMAGE, [reference] * times, None, bias)
        return [denoiser(part, txt, step, frozen=frozen) for part, step in zip((x, 0.6 * x), steps, strict=True)]

    twice, strong, plain, weak = (velocities(*given) for given in ((2, 1.0), (1, 2.0), (1, 1.0), (1, 0.5)))
    for k in range(2):
        assert relative_error(strong[k], to_torch(twice[k])) <= EXACT
        assert relative_error(plain[k], to_torch(twice[k])) > 1e-3
    again = velocities(2, 0.5)
    for k in range(2):
        assert relative_error(again[k], to_torch(plain[k])) <= EXACT
        assert relative_error(weak[k], to_torch(plain[k])) > 1e-3


def test_kernels_and_bytes_stay_within_two_percent():
    recorder, shapes = Recorder(), (TINY[0], mx.bfloat16, 128, 32, 2)
    (plain, moved), (biased, more) = (
        own_step(recorder, *shapes, biased=is_so).kernels(False) for is_so in (False, True)
    )
    assert plain["attention"] == biased["attention"]
    assert sum(biased.values()) - sum(plain.values()) == 1  # one cast of the row that all blocks share
    assert moved < more <= 1.02 * moved


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture
def masks(monkeypatch):
    """The masks of every call of attention."""
    seen, attend = [], mx.fast.scaled_dot_product_attention

    def record(q, k, v, *, scale, mask=None):
        seen.append(mask)
        return attend(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", record)
    return seen


def test_one_takes_no_mask(pipe, images, masks):
    plain = pipe("a fox", image=images, **SMALL).images[0]
    masks.clear()
    assert same(pipe("a fox", image=images, reference_strength=[1, 1.0], **SMALL).images[0], plain)
    assert not any(mask is not None and mask.dtype != mx.bool_ for mask in masks)
    masks.clear()
    assert not same(pipe("a fox", image=images, reference_strength=[1, 0.5], **SMALL).images[0], plain)
    assert any(mask is not None and mask.shape == (1, 1, 1, 16 + 3 * 20) for mask in masks)


@pytest.mark.parametrize("keeps", [False, True])
def test_zero_leaves_the_image_out(pipe, damaged, images, keeps):
    """To the bit; the other keeps its place, so that it is near what a very small strength draws."""
    pipe = kept_by(damaged) if keeps else pipe
    alone = pipe("a fox", image=images[0], **SMALL).images[0]
    assert same(pipe("a fox", image=images, reference_strength=[1, 0], **SMALL).images[0], alone)
    assert not same(pipe("a fox", image=images, **SMALL).images[0], alone)
    second = pipe("a fox", image=images, reference_strength=[0], **SMALL).images[0]
    if not keeps:  # where references see each other, the second has seen the first
        faint = pipe("a fox", image=images, reference_strength=[1e-20], **SMALL).images[0]
        assert np.abs(np.asarray(second, int) - np.asarray(faint)).max() <= 1
    assert not same(second, pipe("a fox", image=images[1], **SMALL).images[0])


def test_kept_references_serve_every_strength(damaged, images, monkeypatch):
    pipe = kept_by(damaged)
    counted = count_keeping(monkeypatch)
    for strengths in ([], [0.5, 2], [1.5]):
        pipe("a fox", image=images, reference_strength=strengths, **SMALL)
    assert counted == [40]
    pipe("a fox", image=images, reference_strength=[1, 0], **SMALL)
    assert counted == [40, 20]


def test_what_is_repainted_comes_first_and_whole(pipe, images, masks):
    mask = Image.new("L", images[0].size, 255)
    pipe("a", init_image=images[0], mask=mask, image=images[1], reference_strength=[0.5], **SMALL)
    (row, *_) = (np.array(mask)[0, 0, 0] for mask in masks if mask is not None and mask.shape[2] == 1)
    assert np.allclose(row, [0] * (16 + 20 + 20) + [np.log(0.5)] * 20)


def test_the_size_is_that_of_the_first_image_at_any_strength(pipe, images):
    options = {name: value for name, value in SMALL.items() if name not in ("height", "width")}
    assert pipe("a", image=images[0], reference_strength=[0], **options).images[0].size == images[0].size


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        (
            [0.5, 1, 1],
            r"reference_strength has 3 numbers, one for each reference image \(--image\), and of these there are 2",
        ),
        ([-0.1], "reference_strength must be numbers from 0 to 2, one for each reference image, got"),
        ([float("nan")], "reference_strength must be numbers from 0 to 2"),
        (0.5, r"one for each reference image, got 0\.5"),
        ("1", "one for each reference image, got '1'"),
    ],
)
def test_other_strengths_are_refused(pipe, images, strengths, message):
    with pytest.raises(InputError, match=message):
        pipe.stream("a fox", image=images, reference_strength=strengths, **SMALL)


def test_frozen_references_of_strength_0_are_refused(pipe, images):
    with pytest.raises(InputError, match="reuse of references belongs to image"):
        pipe.stream("a fox", image=images[0], reference_strength=[0], reuse="references", **SMALL)


def test_a_command_and_a_job_give_one_for_each_image(tmp_path, images):
    for name, image in zip("ab", images, strict=True):
        image.save(tmp_path / f"{name}.png")
    words = ["a", "--image", f"{tmp_path}/a.png", "--image", f"{tmp_path}/b.png"]
    parser = build_parser()

    def strengths(arguments):
        return complete(arguments, None).options.reference_strength

    assert strengths(parser.parse_args(words)) == ()
    for text in (["--reference-strength", "0.5", "--reference-strength", "2"], ["--reference-strength", "0.5,2"]):
        assert strengths(parser.parse_args([*words, *text])) == (0.5, 2)
    given = parser.parse_args([*words, "--reference-strength", "0.5"])
    for value, expected in (("[0, 1.5]", (0, 1.5)), ("0.25", (0.25,)), ("null", (0.5,)), ('"1,2"', (1, 2))):
        job = Job(1, f'{{"prompt": "b", "reference_strength": {value}}}').arguments(parser, given)
        assert strengths(job) == expected
    assert [own.place for own in Inputs(image=images).references([0.0])] == [1]


def test_a_session_sets_them():
    session = Session(lambda *_: None)
    session.handle("set reference-strength 1,0.5")
    assert session.options["reference_strength"] == (1, 0.5)
