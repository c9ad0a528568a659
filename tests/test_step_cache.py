"""Step caching, beside the laws: what is left out, what is used again, and what that takes."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline, FluxKlein, FluxKleinParams
from flux2_mlx.device import weight_bytes
from flux2_mlx.models.first_block_cache import FirstBlockCache
from flux2_mlx.models.flux2 import DoubleBlock, SingleBlock
from flux2_mlx.runtime.activations import Pass, transformer_bytes
from flux2_mlx.sampling.schedules import flux2_sigmas
from tests.test_pipeline import close, kept_by, same

STEPS = 12
SMALL = {"height": 64, "width": 80, "num_steps": STEPS, "max_sequence_length": 16, "seed": 3}
HUGE = 1e9  # lets everything be reused that may be
SOME = 1.0  # some, of a random model, whose steps differ much
LEVELS = flux2_sigmas(STEPS, 20)[:-1]


@pytest.fixture(scope="module")
def base(base_reference):
    return Flux2Pipeline.from_pretrained(base_reference[1])


@pytest.fixture(scope="module")
def base_in_turn(base_reference):
    """There is never room for both passes of guidance at once."""
    return Flux2Pipeline.from_pretrained(base_reference[1], memory="resident", memory_limit=10**6)


@pytest.fixture
def blocks(monkeypatch):
    """Counts of the double and the single blocks that are computed."""
    counts = {DoubleBlock: 0, SingleBlock: 0}

    def counted(kind):
        call = kind.__call__

        def counting(block, *given):
            counts[kind] += 1
            return call(block, *given)

        monkeypatch.setattr(kind, "__call__", counting)

    for kind in counts:
        counted(kind)
    return counts


# ------------------------------------------------------------------------------------------------ one pass


def rows(*values) -> mx.array:
    """Streams of 4 tokens of the picture, all of a value."""
    return mx.broadcast_to(mx.array(values)[:, None, None], (len(values), 4, 3))


def passed(cache, before, behind, end, level=1.0):
    """What is behind all blocks, where the first block turns ``before`` into ``behind`` and the others that into
    ``end``.
    """
    cache.start(before, mx.full((len(before),), level))
    again = cache.predict(behind)
    return cache.update(end) if again is None else again


def test_the_last_change_is_made_again():
    """That of the others, on top of what the first block has done now."""
    cache = FirstBlockCache(0.5)
    assert mx.array_equal(passed(cache, rows(1.0), rows(2.0), end := rows(10.0)), end).item()
    again = passed(cache, rows(1.75), rows(3.0), rows(0.0))
    assert cache.is_used
    assert again[0].tolist() == [[3.0 + 8.0] * 3] * 4


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_change_goes_on_in_a_straight_line(dtype):
    """From the last two that were computed: 8 at level 1 and 9.5 at 0.75, so 11 at 0.5; then 2 at 0.25, so 0.125 at
    0.125.
    """
    cache = FirstBlockCache(0.5)
    steps = [(1.0, 1.0, 8.0), (0.75, 2.0, 9.5), (0.5, 2.5, 11.0), (0.25, 8.0, 2.0), (0.125, 8.0, 0.125)]
    for k, (level, added, change) in enumerate(steps):
        before, behind, end = (rows(value).astype(dtype) for value in (0.0, added, added + change))
        given = end if k in (0, 1, 3) else rows(0.0)
        out = passed(cache, before, behind, given, level)
        assert cache.is_used == (k in (2, 4))
        assert out[0].tolist() == [[added + change] * 3] * 4


@pytest.mark.parametrize(("threshold", "is_used"), [(0.0, False), (0.24, False), (0.26, True)])
def test_the_picture_that_differs_most_decides(threshold, is_used):
    """A change of 1.25 for 1 in one picture, none in the other."""
    cache = FirstBlockCache(threshold)
    passed(cache, rows(0.0, 0.0), rows(1.0, 1.0), rows(2.0, 2.0))
    passed(cache, rows(0.0, 0.0), rows(1.0, 1.25), rows(2.0, 2.0))
    assert cache.is_used == is_used


def test_a_step_is_held_against_the_last_that_was_computed():
    """Not against the one before it, or steps could go far by small parts."""
    cache = FirstBlockCache(0.5)
    used = []
    for level in (1.0, 1.3, 1.6, 1.9, 2.2):
        passed(cache, rows(0.0), rows(level), rows(5.0))
        used.append(cache.is_used)
    assert used == [False, True, False, True, True]


def test_a_leader_decides_for_both():
    leader = FirstBlockCache(0.5)
    other = FirstBlockCache(0.5, leader=leader)
    used = []
    for level, others_level in ((1.0, 1.0), (1.1, 9.0), (2.0, 9.0)):
        passed(leader, rows(0.0), rows(level), rows(5.0))
        passed(other, rows(0.0), rows(others_level), rows(5.0))
        used.append((leader.is_used, other.is_used))
    assert used == [(False, False), (True, True), (False, False)]


def test_nothing_that_is_no_number_is_near():
    cache = FirstBlockCache(HUGE)
    for level in (0.0, 0.0, float("nan")):
        passed(cache, rows(0.0), rows(level), rows(5.0))
        assert not cache.is_used


def test_a_large_picture_in_float16_is_compared():
    """Sums over it are beyond float16."""
    img = mx.full((1, 4096, 64), 10.0, mx.float16)
    cache = FirstBlockCache(0.5)
    used = []
    for share in (1.0, 1.25, 2.0):
        passed(cache, mx.zeros_like(img), share * img, img)
        used.append(cache.is_used)
    assert used == [False, True, False]


# ------------------------------------------------------------------------------------------------ pictures


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))


def ways(picture) -> dict[str, dict]:
    mask = Image.new("L", picture.size)
    mask.paste(255, (20, 0, 60, 64))
    return {
        "guidance": {"guidance": 3.0},
        "interval": {"guidance": 3.0, "guidance_interval": (LEVELS[8], LEVELS[2])},
        "alone": {"guidance": 1.0},
        "references": {"image": [picture, picture.rotate(90, expand=True)]},
        "mask": {"init_image": picture, "mask": mask, "image": picture},
        "strength": {"init_image": picture, "strength": 0.9},
        "batch": {"num_images": 3, "batch_size": 3},
    }


WAYS = tuple(ways(Image.new("RGB", (80, 64))))


@pytest.mark.parametrize("way", WAYS)
def test_a_threshold_of_zero_changes_no_number(base, picture, way):
    options = {**SMALL, **ways(picture)[way]}
    plain, cached = (base("a", step_cache=threshold, output_type="latent", **options) for threshold in (None, 0))
    assert mx.array_equal(plain.images, cached.images).item()
    assert plain.steps == cached.steps
    assert cached.steps["reused"] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_turn", [False, True], ids=["both", "in turn"])
@pytest.mark.filterwarnings("ignore:the .* needs about")
def test_only_what_must_be_is_computed(base, base_in_turn, picture, blocks, way, in_turn):
    """The first step and the last, and those where guidance begins and ends; of others the first block."""
    options = {**SMALL, **ways(picture)[way]}
    result = (base_in_turn if in_turn else base)("a", step_cache=HUGE, **options)
    pictures = options.get("num_images", 1)
    steps = {"strength": 11}.get(way, STEPS)
    computed = {"interval": 4}.get(way, 2)
    assert result.steps == {"computed": pictures * computed, "reused": pictures * (steps - computed)}
    guided = [way != "alone" and (way != "interval" or 2 <= k <= 8) for k in range(STEPS)][-steps:]
    passes = [(2 if is_guided else 1) if in_turn else 1 for is_guided in guided]
    turns = pictures if in_turn else 1
    whole = [k for k in range(steps) if k in (0, steps - 1) or guided[k] != guided[k - 1]]
    assert len(whole) == computed
    others = sum(passes[k] for k in whole)
    params = base.checkpoint.transformer
    assert blocks == {
        DoubleBlock: turns * (sum(passes) + others * (params.depth - 1)),
        SingleBlock: turns * others * params.depth_single,
    }


def test_some_steps_are_reused_and_the_picture_is_near(base):
    plain = base("a", **SMALL)
    errors = []
    for threshold in (0.9, SOME, HUGE):
        result = base("a", step_cache=threshold, **SMALL)
        difference = np.abs(np.asarray(plain.images[0], int) - np.asarray(result.images[0]))
        errors.append((result.steps["reused"], difference.mean()))
    assert errors == sorted(errors)
    assert 0 < errors[0][0] < errors[1][0] < errors[2][0]
    assert 0 < errors[0][1] < errors[2][1]


@pytest.mark.filterwarnings("ignore:the .* needs about")
def test_passes_in_turn_reuse_as_one_does(base, base_in_turn):
    together, in_turn = (pipe("a", step_cache=HUGE, **SMALL).images[0] for pipe in (base, base_in_turn))
    assert close(in_turn, together)


def test_kept_references_go_with_it(damaged, picture):
    pipe = kept_by(damaged)
    options = {**SMALL, "image": picture}
    plain, zero, some = (pipe("a", step_cache=threshold, **options) for threshold in (None, 0, SOME))
    assert same(plain.images[0], zero.images[0])
    assert 0 < some.steps["reused"] < STEPS - 2
    assert not same(plain.images[0], some.images[0])


def test_few_steps_are_warned_of(base):
    options = {**SMALL, "num_steps": 4}
    with pytest.warns(UserWarning, match="step_cache is for tens of steps: of 4, each differs much"):
        base("a", step_cache=0.1, **options)
    base("a", step_cache=0, **options)


# ------------------------------------------------------------------------------------------------ memory


def test_blocks_that_are_left_out_are_not_read(base_reference, memory):
    pipe = Flux2Pipeline.from_pretrained(base_reference[1], memory="streamed")
    steps = pipe.stream("a", step_cache=HUGE, **SMALL)
    reused = [next(steps) for _ in range(3)][-1]
    assert reused.stats.steps == {"computed": 1, "reused": 2}
    del reused
    before = memory()
    pipe.transformer.block_runner.fresh = nn.Module()
    assert before - memory() < weight_bytes(pipe.transformer.transformer_blocks[1]) / 10


def test_what_is_cached_is_planned(base):
    """Three changes of the picture's tokens, for both passes of guidance."""
    params = base.checkpoint.transformer
    plain, cached = (
        {
            stage.name: stage.activation_bytes
            for stage in base.plan(256, 256, 16, [(128, 128)], step_cache=threshold).stages
        }
        for threshold in (None, 0.1)
    )
    more = 2 * 3 * 256 * params.hidden_size * base.dtype.size
    assert cached.pop("transformer") - plain.pop("transformer") == more
    assert cached == plain


def test_pictures_take_the_memory_that_is_planned(memory):
    """The proportions of the released models; what is cached stays between the steps, and no more than that."""
    params = FluxKleinParams(hidden_size=384, num_heads=3, txt_embed_dim=960, depth=1, depth_single=2)
    model = FluxKlein(params)
    img, txt = mx.random.normal((1, 256, 128)), mx.random.normal((1, 128, 960))
    rope = FluxKlein.compute_rope(mx.zeros((1, 128, 4)), mx.zeros((1, 256, 4)))
    mx.eval(model.parameters(), img, txt, *rope)
    before = memory()
    cache = FirstBlockCache(0.0)
    for sigma in (0.9, 0.8, 0.7):
        velocity = model.forward_with_rope(img, txt, mx.array([sigma]), *rope, cache=cache)
        mx.eval(velocity)
    del velocity
    gc.collect()
    plain, cached = (transformer_bytes(params, Pass(128, 256, caches=caches), mx.float32)[0] for caches in (0, 1))
    assert 0.99 <= (memory() - before) / (cached - plain) <= 1.05
