"""Reuse of what is seen of text or references, beside the laws: the mathematics, what is drawn and refused, and what
it takes.
"""

import gc
import re

import diffusers.models.transformers.transformer_flux2 as flux2
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from examples.nano_score import draw, unseen_edits, unseen_tasks
from flux2_mlx import Flux2Pipeline, FluxKlein, FluxKleinParams, InputError
from flux2_mlx.device import memory_limit
from flux2_mlx.generate import main
from flux2_mlx.models.kv_cache import FrozenKV
from flux2_mlx.options import FROZEN
from flux2_mlx.runtime.activations import Pass, kv_bytes, transformer_bytes
from tests.parity.compare import EXACT, relative_error
from tests.parity.test_transformer import inputs, ported, theirs
from tests.test_pipeline import kept_by, same

LENGTH, TOKENS = 24, 24  # of the text, and of a picture of 64 x 96
SMALL = {"height": 64, "width": 80, "num_steps": 3, "max_sequence_length": 16, "seed": 3}


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))


def tables(model, args):
    return model.compute_rope(args[4], args[3], model.params.axes_dims_rope, model.params.rope_theta)


def step(model, frozen, img, txt, timesteps, rope, image_tokens=None):
    """The velocity of tokens of the picture, by default of all that go through the blocks."""
    img, txt, cos, sin, kv = frozen.begin_step(img, txt, *rope, model.params.blocks)
    return model.forward_with_rope(img, txt, timesteps, cos, sin, image_tokens=image_tokens, kv=kv)


# ------------------------------------------------------------------------------------------------ one pass


def substituting(monkeypatch, start, stop):
    """Let diffusers' attention see the keys and values of these rows as a first pass had them; returns what a later
    pass begins with.
    """
    attend, kept, calls = flux2.dispatch_attention_fn, [], []

    def attended(query, key, value, **options):
        if not calls:
            kept.append((key[:, start:stop].clone(), value[:, start:stop].clone()))
        else:
            key, value = key.clone(), value.clone()
            key[:, start:stop], value[:, start:stop] = kept[calls[0]]
            calls[0] += 1
        return attend(query, key, value, **options)

    monkeypatch.setattr(flux2, "dispatch_attention_fn", attended)
    return lambda: calls.append(0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("what", FROZEN)
def test_later_steps_see_what_the_first_one_saw(model, what, batch, monkeypatch):
    """As diffusers does which computes all tokens, and replaces keys and values of these; the first step is as ever."""
    ours = ported(model)
    img, txt, timesteps, img_ids, txt_ids = inputs(model, 64, 96, batch, LENGTH, [(64, 80), (80, 64)])
    rope = tables(ours, (img, txt, timesteps, img_ids, txt_ids))
    reuse = FrozenKV(what, TOKENS)
    first = step(ours, reuse, img, txt, timesteps, rope)
    assert mx.array_equal(first, ours.forward_with_rope(img, txt, timesteps, *rope)).item()
    begin_later = substituting(monkeypatch, *((0, LENGTH) if what == "text" else (LENGTH + TOKENS, None)))
    theirs(model, img, txt, timesteps, img_ids, txt_ids)
    begin_later()
    later = mx.concatenate([0.7 * img[:, :TOKENS] + 0.2, img[:, TOKENS:]], axis=1), 0.6 * timesteps
    expected = theirs(model, later[0], txt, later[1], img_ids, txt_ids)
    expected = expected if what == "text" else expected[:, :TOKENS]
    velocity = step(ours, reuse, later[0], txt, later[1], rope)
    assert relative_error(velocity, expected) <= EXACT
    plain = ours.forward_with_rope(later[0], txt, later[1], *rope)
    assert relative_error(plain[:, :TOKENS], expected[:, :TOKENS]) > 1e-4  # or nothing was reused


@pytest.mark.parametrize("what", FROZEN)
def test_the_same_step_again_gives_the_same(model, what):
    """Though its text, or its references, are not looked at."""
    ours = ported(model)
    img, txt, timesteps, *ids = inputs(model, 64, 96, 2, LENGTH, [(64, 80)])
    rope = tables(ours, (img, txt, timesteps, *ids))
    reuse = FrozenKV(what, TOKENS)
    first = step(ours, reuse, img, txt, timesteps, rope)
    if what == "text":
        txt = mx.full(txt.shape, mx.nan)
    else:
        img = mx.concatenate([img[:, :TOKENS], mx.full((2, 20, 128), mx.nan)], axis=1)
    again = step(ours, reuse, img, txt, timesteps, rope, TOKENS)
    error = mx.linalg.norm(again - first[:, :TOKENS]) / mx.linalg.norm(first[:, :TOKENS])
    assert error.item() <= 1e-5


# ------------------------------------------------------------------------------------------------ pictures


@pytest.fixture(scope="module")
def nano():
    return Flux2Pipeline.from_pretrained("nano")


@pytest.mark.parametrize("how", [None, 8])
@pytest.mark.parametrize(
    ("what", "tasks"), [("text", unseen_tasks(1)), ("text", unseen_edits(2)[1:]), ("references", unseen_edits(2)[1:])]
)
def test_nano_draws_nearly_the_same(nano, what, tasks, how):
    pipe = nano if how is None else Flux2Pipeline.from_pretrained("nano", quantize=how)
    (plain,), (reused,) = draw(pipe, tasks), draw(pipe, tasks, reuse=what)
    difference = np.abs(np.asarray(plain.picture, float) - np.asarray(reused.picture)).mean()
    assert 0 < difference < 3
    assert reused.is_right


def test_what_is_repainted_is_a_reference(pipe, picture):
    mask = Image.new("L", picture.size)
    mask.paste(255, (20, 0, 60, 64))
    options = {**SMALL, "init_image": picture, "mask": mask}
    assert not same(pipe("a", reuse="references", **options).images[0], pipe("a", **options).images[0])


def test_a_model_that_keeps_its_references_reuses_text_without_them(damaged):
    expected = Flux2Pipeline.from_pretrained(damaged)("a", reuse="text", **SMALL).images[0]
    assert same(kept_by(damaged)("a", reuse="text", **SMALL).images[0], expected)


def test_nothing_is_kept_after_the_last_step(pipe, monkeypatch):
    """Nor by who has the step."""
    made = []
    make = FrozenKV.__init__
    monkeypatch.setattr(FrozenKV, "__init__", lambda self, *given: made.append(self) or make(self, *given))
    steps = pipe.stream("a", reuse="text", **SMALL)
    assert [(next(steps).is_last, made[0].kv == []) for _ in range(3)] == [
        (False, False),
        (False, False),
        (True, True),
    ]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse": "everything"}, "reuse must be one of text, references, got 'everything'"),
        ({"reuse": "text", "step_cache": 0.1}, "step_cache is for tens of steps and reuse for a few; give one of them"),
    ],
)
def test_what_cannot_be_reused_is_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe.stream("a", **options)


def test_base_models_are_refused(base_reference):
    pipe = Flux2Pipeline.from_pretrained(base_reference[1])
    for guidance in (None, 1.0):
        with pytest.raises(InputError, match=r"for the few steps of distilled models, and .* is a base model, whose"):
            pipe.stream("a", reuse="text", guidance=guidance)


def test_models_that_keep_their_references_are_refused(damaged, picture):
    pipe = kept_by(damaged)
    with pytest.raises(InputError, match="as klein-9b-kv does, and reuse of the text beside them costs too much"):
        pipe.stream("a", image=picture, reuse="text")


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("what", FROZEN)
def test_a_picture_takes_the_memory_that_is_planned(what, memory):
    """The proportions of the released models; keys and values stay between the steps, and nothing that they are of."""
    params = FluxKleinParams(hidden_size=384, num_heads=3, txt_embed_dim=960, depth=1, depth_single=2)
    model = FluxKlein(params)
    img, txt = mx.random.normal((1, 384, 128)), mx.random.normal((1, 128, 960))
    rope = FluxKlein.compute_rope(mx.zeros((1, 128, 4)), mx.zeros((1, 384, 4)))
    mx.eval(model.parameters(), img, txt, *rope)
    before = memory()
    held = kv_bytes(params, 128, mx.float32)
    most = max(transformer_bytes(params, Pass(128, 256, 128, frozen=what), mx.float32))
    reuse, there = FrozenKV(what, 256), 0
    for sigma in (0.9, 0.8):
        with memory_limit(before + most, most - there):
            mx.reset_peak_memory()
            velocity = step(model, reuse, img, txt, mx.array([sigma]), rope, 256)
            mx.eval(velocity)
            assert 0.75 <= (mx.get_peak_memory() - before) / most <= 1.1
        del velocity
        gc.collect()
        there = memory() - before
        assert held <= there <= 1.01 * held


def test_what_is_reused_is_planned(pipe):
    """Keys and values of the prompt's or of the references' tokens in every block."""
    params = pipe.checkpoint.transformer
    stages = {
        what: {stage.name: stage.activation_bytes for stage in pipe.plan(256, 256, 16, [(128, 128)], reuse=what).stages}
        for what in (None, *FROZEN)
    }
    plain = stages.pop(None)
    for what, tokens in (("text", 16), ("references", 64)):
        more = stages[what].pop("transformer") - plain["transformer"]
        assert more >= kv_bytes(params, tokens, pipe.dtype)
        assert stages[what].items() <= plain.items()


def test_the_command_plans_it_too(checkpoint, capsys):
    """Of a folder and of a released model."""
    for model in (checkpoint, "klein-4b"):
        works = []
        for more in ([], ["--reuse", "text"]):
            assert main(["--plan", "--model", str(model), "--max-sequence-length", "8192", *more]) == 0
            works.append(float(re.search(r"^transformer +\S+ +(\S+)", capsys.readouterr().out, re.MULTILINE)[1]))
        assert works[0] < works[1]
