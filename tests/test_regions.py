"""Regions, beside the laws: the mathematics, what they leave alone, what is planned, and what is refused."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

from flux2_mlx import FluxKlein, FluxKleinParams, InputError
from flux2_mlx.cli.arguments import build_parser, complete
from flux2_mlx.cli.jobs import Job
from flux2_mlx.cli.session import Session
from flux2_mlx.device import weight_bytes
from flux2_mlx.models.kv_cache import FrozenKV, MaskedKV
from flux2_mlx.options import MAX_POSITIONS, GenerationOptions
from flux2_mlx.regions import MAX_REGIONS, parse_region
from flux2_mlx.runtime.activations import Workload, transformer_bytes
from flux2_mlx.sampling.denoiser import Denoiser, strength_bias
from flux2_mlx.sampling.latents import image_ids, text_ids
from flux2_mlx.sampling.regions import make_regions, region_tokens
from flux2_mlx.sampling.schedules import plan_steps
from flux2_mlx.sampling.tiles import divide
from tests.parity.compare import EXACT, relative_error, to_torch
from tests.parity.test_transformer import ported
from tests.test_pipeline import close, kept_by, same
from tests.test_plan import peak_of

SIZE, TEXT, IMAGE, REFERENCE = (64, 96), 8, 24, 20  # of the image, and tokens of each text, the image and a reference
LEFT, CORNER, ALL = (0, 0, 0.5, 1), (0.3, 0.4, 1, 0.9), (0, 0, 1, 1)
SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16, "seed": 3}
STEPS = plan_steps([1.0, 0.7, 0.0], 0, uses_cfg=False)


def arrays(model, texts, batch=1, references=1):
    """Noisy tokens, texts one behind another, reference tokens."""
    rng = np.random.default_rng(7)
    shapes = [(batch, IMAGE, 128), (batch, texts * TEXT, model.config.joint_attention_dim), (1, REFERENCE, 128)]
    x, txt, reference = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
    return x, 0.5 * txt, [reference] * references


def ids(texts, references=1):
    """Positions of texts that each begin at 0, and of image and references."""
    image = [image_ids(*SIZE), *(image_ids(64, 80, reference=k) for k in range(references))]
    return mx.concatenate([text_ids(TEXT)] * texts, axis=1), mx.concatenate(image, axis=1)


def denoiser_of(ours, boxes, references=(), kv=None, strengths=None):
    texts, count = 1 + len(boxes), len(references)
    rope = FluxKlein.compute_rope(*ids(texts, count), ours.params.axes_dims_rope, ours.params.rope_theta)
    kept = 0 if kv is None else kv[0][0].shape[2]
    regions = make_regions(boxes, SIZE, TEXT, count * REFERENCE, kept) if boxes else None
    bias = strength_bias(texts * TEXT + IMAGE, [REFERENCE] * len(strengths), strengths) if strengths else None
    return Denoiser(lambda: nullcontext(ours), rope, IMAGE, references, kv, bias, regions)


def expected_mask(boxes, references):
    """Token by token, in words: what docs/generate.md says of it."""
    kinds = [("text", k) for k in range(1 + len(boxes)) for _ in range(TEXT)]
    kinds += [("image", ((x + 0.5) / 6, (y + 0.5) / 4)) for y in range(4) for x in range(6)]
    kinds += [("reference", None)] * references
    mask = np.zeros((len(kinds), len(kinds)), bool)
    for q, (kind, what) in enumerate(kinds):
        for k, (other, number) in enumerate(kinds):
            if other != "text":
                mask[q, k] = True
            elif kind == "text":
                mask[q, k] = number == what
            elif kind == "reference":
                mask[q, k] = number == 0
            else:
                inside = [left <= what[0] < right and top <= what[1] < bottom for left, top, right, bottom in boxes]
                mask[q, k] = inside[number - 1] if number else not any(inside)
    return mask


# ------------------------------------------------------------------------------------------------ one pass


@pytest.mark.parametrize(("batch", "strengths"), [(1, None), (2, (0.3,))])
def test_the_velocity_is_that_of_diffusers_with_an_attention_mask(model, batch, strengths):
    """Overlapping regions, which leave some of the image out."""
    boxes = [LEFT, CORNER]
    x, txt, references = arrays(model, 3, batch)
    velocity = denoiser_of(ported(model), boxes, references, strengths=strengths)(x, txt, STEPS[1])
    mask = np.where(expected_mask(boxes, REFERENCE), 0.0, -np.inf)
    mask[:, -REFERENCE:] += np.log(strengths[0] if strengths else 1)
    txt_ids, img_ids = ids(3)
    img = mx.concatenate([x, mx.broadcast_to(references[0], (batch, REFERENCE, 128))], axis=1)
    with torch.no_grad():
        expected = model(
            hidden_states=to_torch(img),
            encoder_hidden_states=to_torch(txt),
            timestep=torch.full((batch,), STEPS[1].sigma),
            img_ids=to_torch(img_ids)[0],
            txt_ids=to_torch(txt_ids)[0],
            joint_attention_kwargs={"attention_mask": torch.from_numpy(mask).float()[None, None]},
            return_dict=False,
        )[0]
    assert relative_error(velocity, expected[:, :IMAGE]) <= EXACT


@pytest.mark.parametrize("way", ["plain", "kv", "text", "references", "strength"])
def test_a_region_that_is_the_whole_image_is_its_prompt_alone(model, way):
    """Nothing reads the first text then but references that go through the blocks, which are given the same one; with
    frozen KV in the first step and in later ones.
    """
    ours = ported(model)
    x, txt, references = arrays(model, 2, 2, references=0 if way == "plain" else 1)
    alone = txt[:, :TEXT]
    txt = txt if way in ("plain", "kv") else mx.concatenate([alone, alone], axis=1)
    alone = txt[:, TEXT:]
    kv = None
    if way == "kv":
        positions = FluxKlein.compute_rope(
            text_ids(0), ids(1)[1][:, IMAGE:], ours.params.axes_dims_rope, ours.params.rope_theta
        )
        kv, references = ours.encode_reference_kv(references[0], *positions), []

    def velocities(txt, boxes):
        frozen = FrozenKV(way, IMAGE) if way in ("text", "references") else None
        denoiser = denoiser_of(ours, boxes, references, kv, [0.5] if way == "strength" else None)
        return [denoiser(part, txt, step, frozen=frozen) for part, step in zip((x, 0.6 * x), STEPS, strict=True)]

    for own, plain in zip(velocities(txt, [ALL]), velocities(alone, []), strict=True):
        assert relative_error(own, to_torch(plain)) <= EXACT
    if way == "plain":
        assert relative_error(velocities(txt, [LEFT])[0], to_torch(velocities(alone, [])[0])) > 1e-3


@pytest.mark.parametrize("tokens", ["text", "references"])
def test_frozen_tokens_are_read_as_in_the_first_step(model, tokens):
    """Where nothing has changed since."""
    x, txt, references = arrays(model, 3)
    denoiser, frozen = denoiser_of(ported(model), [LEFT, CORNER], references, strengths=[0.5]), FrozenKV(tokens, IMAGE)
    first, again = (denoiser(x, txt, STEPS[0], frozen=frozen) for _ in range(2))
    assert relative_error(again, to_torch(first)) <= EXACT


def test_their_order_does_not_count(model):
    x, txt, _ = arrays(model, 3)
    main, one, two = mx.split(txt, 3, axis=1)
    ours = ported(model)
    first = denoiser_of(ours, [LEFT, CORNER])(x, txt, STEPS[0])
    second = denoiser_of(ours, [CORNER, LEFT])(x, mx.concatenate([main, two, one], axis=1), STEPS[0])
    assert relative_error(second, to_torch(first)) <= EXACT


def test_a_block_reads_a_text_in_its_region_alone(model):
    """To the bit, in the first block; later ones hear of it from the tokens inside."""
    x, txt, _ = arrays(model, 2)
    ours = ported(model)
    regions = make_regions([CORNER], SIZE, TEXT, 0)
    mods = [[mx.ones((1, 1, ours.params.hidden_size))] * 6] * 2
    rope = FluxKlein.compute_rope(*ids(2, 0), ours.params.axes_dims_rope, ours.params.rope_theta)
    kv = MaskedKV(regions.mask(None))
    outputs = [
        np.array(ours.transformer_blocks[0](ours.x_embedder(x), ours.context_embedder(own), *mods, *rope, kv)[0])
        for own in (txt, txt + (mx.arange(2 * TEXT) >= TEXT)[:, None])
    ]
    changed = (outputs[0] != outputs[1]).any(axis=(0, 2))
    assert np.array_equal(changed, region_tokens(CORNER, *SIZE).reshape(-1))
    assert 0 < changed.sum() < IMAGE


@pytest.mark.parametrize("strengths", [None, [0.5]])
def test_a_negative_prompt_has_no_regions(model, strengths):
    x, txt, references = arrays(model, 1)
    ours = ported(model)
    plain = denoiser_of(ours, [], references, strengths=strengths)(x, txt, STEPS[0])
    negative = denoiser_of(ours, [LEFT, CORNER], references, strengths=strengths)(x, txt, STEPS[0])
    assert np.array_equal(np.array(negative), np.array(plain))


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        (ALL, range(4), range(6)),
        (LEFT, range(4), range(3)),
        ((0, 0, 0.6, 1), range(4), range(4)),  # the centre of the fourth is 0.583
        ((0, 0.25, 1, 0.5), range(1, 2), range(6)),
        ((0.55, 0.3, 0.56, 0.31), range(1, 2), range(3, 4)),  # without a centre: the token that its own is in
        ((0.99, 0.99, 1, 1), range(3, 4), range(5, 6)),
    ],
)
def test_tokens_of_a_region(box, rows, columns):
    grid = region_tokens(box, *SIZE)
    assert {tuple(map(int, place)) for place in np.argwhere(grid)} == {(y, x) for y in rows for x in columns}


def test_a_tile_has_its_part_of_the_mask():
    """Rows and keys of the whole image's mask, of the texts, the tile's tokens and the references."""
    boxes, size, references = [LEFT, CORNER], (96, 128), 4
    whole = np.array(make_regions(boxes, size, TEXT, references).mask(None))[0, 0]
    texts, image = np.arange(3 * TEXT), 3 * TEXT + np.arange(6 * 8).reshape(6, 8)
    for place in divide(size, 64).places:
        tokens = np.concatenate([texts, image[place].reshape(-1), image.max() + 1 + np.arange(references)])
        own = np.array(make_regions(boxes, size, TEXT, references, place=place).mask(None))[0, 0]
        assert np.array_equal(own, whole[np.ix_(tokens, tokens)])


def test_halves_share_no_token_and_leave_none():
    for cut in np.linspace(0.1, 0.9, 17):
        left, right = region_tokens((0, 0, cut, 1), *SIZE), region_tokens((cut, 0, 1, 1), *SIZE)
        assert np.array_equal(left, ~right)


# ------------------------------------------------------------------------------------------------ images


def test_an_image_with_a_region_of_its_own_prompt_is_the_plain_one(pipe, damaged):
    image = Image.new("RGB", (80, 64), "red")
    for own, more in ((pipe, {}), (kept_by(damaged), {"image": image}), (pipe, {"num_images": 2, "batch_size": 2})):
        plain = own("a fox", **SMALL, **more).images[0]
        assert close(own("a fox", region=["a fox@0,0,1,1"], **SMALL, **more).images[0], plain)
        assert not same(own("a fox", region=["a hat@0,0,.5,1"], **SMALL, **more).images[0], plain)


def test_each_pass_of_hires_has_the_regions_of_its_own_grid(pipe, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "flux2_mlx.generation.make_regions", lambda *given: sizes.append(given[:3]) or make_regions(*given)
    )
    pipe("a", region=["b@0,0,.5,1"], hires=2.0, **SMALL | {"height": 128, "width": 160})
    assert sizes == [([LEFT], (64, 80), 16), ([LEFT], (128, 160), 16)]


def test_prompt_embeds_may_have_regions(pipe):
    embeds = pipe.encode(["a fox"], 16)[0]
    first, second = (
        pipe(**given, region=["a hat@0,0,.5,1"], **SMALL).images[0]
        for given in ({"prompt": "a fox"}, {"prompt_embeds": embeds})
    )
    assert same(first, second)


# ------------------------------------------------------------------------------------------------ the plan


def test_a_pass_needs_what_the_plan_says(memory):
    params = FluxKleinParams(hidden_size=384, num_heads=3, txt_embed_dim=960, depth=1, depth_single=1)
    transformer, text, size = FluxKlein(params), 128, (192, 256)
    one = Workload(*size, text, regions=2).denoising()
    assert (one.text, one.image, one.is_masked) == (3 * text, 192, True)
    rope = FluxKlein.compute_rope(mx.concatenate([text_ids(text)] * 3, axis=1), image_ids(*size))
    x, txt = mx.zeros((1, 192, 128)), mx.zeros((1, 3 * text, 960))
    regions = make_regions([LEFT, CORNER], size, text, 0)
    denoiser = Denoiser(lambda: nullcontext(transformer), rope, 192, regions=regions)
    mx.eval(x, txt, *rope, regions.rows, regions.row_of)
    memory()
    need = max(transformer_bytes(params, one, mx.float32))
    taken = peak_of(transformer, lambda: denoiser(x, txt, STEPS[0]), need)
    assert 0.85 <= taken / (weight_bytes(transformer) + need) <= 1.1


def test_the_plan_counts_every_text(pipe):
    plain, two = (pipe.plan(64, 80, 16, region=region) for region in ((), ["a@0,0,1,.5", "b@0,.5,1,1"]))
    stages = {stage.name: stage for stage in plain.stages}
    for stage in two.stages:
        grown = stage.activation_bytes - stages[stage.name].activation_bytes
        assert grown > 0 if stage.name == "transformer" else grown == 0


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("a fox@0,0,0.5,1", ("a fox", (0, 0, 0.5, 1))),
        ("me@home.org@.25,0.1,1,.2", ("me@home.org", (0.25, 0.1, 1, 0.2))),
        ("a fox, red @ 0, 0, 0.5, 1", ("a fox, red ", (0, 0, 0.5, 1))),
    ],
)
def test_the_last_at_sign_counts(text, region):
    assert parse_region(text) == region


@pytest.mark.parametrize(
    "text",
    [
        "a fox",
        "a fox@0,0,1",
        "a fox@0,0,1,1,1",
        "@0,0,1,1",
        "a fox@0.5,0,0.5,1",
        "a fox@0,1,1,0",
        "a fox@-0.1,0,1,1",
        "a fox@0,0,1.01,1",
        "a fox@0,0,nan,1",
        "a fox@0,0,64,80",
        "a fox@left",
    ],
)
def test_what_is_no_region_is_refused(text):
    with pytest.raises(
        InputError, match='region must be "PROMPT@left,top,right,bottom" in shares of the image'
    ) as told:
        parse_region(text)
    assert repr(text) in str(told.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a fox@0,0,1,1", "region must be a list of strings"),
        ([("a fox", (0, 0, 1, 1))], "region must be a list of strings"),
        (["a fox@0,0,1,1"] * (MAX_REGIONS + 1), "region is given 17 times; at most 16 can be"),
        (["\ud800@0,0,1,1"], "the prompt is not Unicode text"),
        (["a" * 100_001 + "@0,0,1,1"], "a prompt has at most 100,000 characters"),
    ],
)
def test_other_regions_are_refused(pipe, value, message):
    with pytest.raises(InputError, match=message):
        pipe.stream("a fox", region=value, **SMALL)


def test_texts_have_no_more_tokens_together_than_one_may():
    """Or a request to a server would take thousands of times the memory of any other."""
    two = ["a@0,0,0.5,1", "b@0.5,0,1,1"]
    assert GenerationOptions(region=two, max_sequence_length=MAX_POSITIONS // 3).region == tuple(two)
    with pytest.raises(InputError, match=r"3 prompts of 20480 tokens each, .* are more than 40960; give fewer"):
        GenerationOptions(region=two, max_sequence_length=20480)


def test_a_command_and_a_job_give_several():
    """A server's request and the page's settings too are read as a job is."""
    parser, texts = build_parser(), ["a@0,0,.5,1", "b, c@.5,0,1,1"]

    def regions(arguments):
        return complete(arguments, None).options.region

    assert regions(parser.parse_args(["a"])) == ()
    given = parser.parse_args(["a", *(word for text in texts for word in ("--region", text))])
    assert regions(given) == tuple(texts)
    for value, expected in (
        ('["d@0,0,1,1"]', ("d@0,0,1,1",)),
        ('"d@0,0,1,1"', ("d@0,0,1,1",)),
        ("null", tuple(texts)),
        ("[]", ()),
    ):
        job = Job(1, f'{{"prompt": "b", "region": {value}}}').arguments(parser, given)
        assert regions(job) == expected


def test_a_session_adds_one_after_another():
    session = Session(lambda *_: None)
    for text in ("a fox@0,0,.5,1", "a hat@.5,0,1,1"):
        session.handle(f"set region {text}")
    assert session.options["region"] == ("a fox@0,0,.5,1", "a hat@.5,0,1,1")
    with pytest.raises(InputError, match="region must be"):
        session.handle("set region a fox")
    session.handle("set region")
    assert "region" not in session.options
