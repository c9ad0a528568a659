"""Large images in tiles: that they cover the image, what they follow, and all of it beside diffusers' transformer."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from benchmarks.hires import seams
from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.device import weight_bytes
from flux2_mlx.generate import main
from flux2_mlx.inputs import Inputs
from flux2_mlx.models.config import FluxKleinParams
from flux2_mlx.models.flux2 import FluxKlein
from flux2_mlx.options import GenerationOptions
from flux2_mlx.runtime.activations import Pass, Workload, transformer_bytes
from flux2_mlx.runtime.released import released_modules
from flux2_mlx.runtime.roofline import image_work
from flux2_mlx.sampling.denoiser import Denoiser
from flux2_mlx.sampling.latents import image_ids
from flux2_mlx.sampling.schedules import StepPlan
from flux2_mlx.sampling.tiles import Axis, Following, TiledVelocity, divide, low_pass
from flux2_mlx.samplings import image_sizes, resolve_samplings, workload_of
from tests.test_pipeline import close, same
from tests.test_plan import peak_of

STEP = StepPlan(1, 0.5, 0.25)
LARGE = {"height": 128, "width": 160, "num_steps": 2, "max_sequence_length": 16, "seed": 4, "hires": 2.0}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
RNG = np.random.default_rng(1)


def unchanged(x, v, sigma):
    """What follows nothing."""
    return v


# ------------------------------------------------------------------------------------------------ the tiles


@pytest.mark.parametrize(
    ("tokens", "most", "starts", "length"),
    [
        (64, 64, (0,), 64),
        (65, 64, (0, 24), 41),
        (128, 64, (0, 37, 74), 54),
        (256, 64, (0, 48, 96, 144, 192), 64),
        (10, 4, (0, 3, 6), 4),
        (5, 4, (0, 2), 3),
    ],
)
def test_tiles_are_few_of_one_length_and_overlap(tokens, most, starts, length):
    assert Axis.divided(tokens, most) == Axis(tokens, length, starts)


def test_every_token_is_covered_and_weights_sum_to_one():
    for tokens in (*range(4, 70), 127, 128, 181, 256, 512):
        for most in (4, 5, 8, 13, 64, 128):
            axis = Axis.divided(tokens, most)
            ends = [start + axis.length for start in axis.starts]
            assert (axis.starts[0], ends[-1]) == (0, tokens)
            assert axis.length <= most
            overlaps = [end - after for end, after in zip(ends[:-1], axis.starts[1:], strict=True)]
            assert all(max(1, most // 4) <= overlap <= axis.length // 2 for overlap in overlaps), (tokens, most)
            total = np.zeros(tokens)
            weights = axis.weights()
            assert weights.dtype == np.float64
            for start, own in zip(axis.starts, weights, strict=True):
                total[start : start + axis.length] += own
            assert np.abs(total - 1).max() < 1e-15
            for own, overlap in zip(weights[1:], overlaps, strict=True):
                assert (np.diff(own[:overlap]) > 0).all()  # it rises from the edge
                assert 0 < own[0] <= 0.5


def test_an_image_that_fits_is_no_tiles():
    assert divide((1024, 2048), 2048) is None
    tiling = divide((2048, 4096), 1024)
    assert (tiling.size, len(tiling), tiling.tokens) == ((864, 1024), 15, 128 * 256)


def test_what_tiles_agree_on_comes_out_as_undivided():
    """A field of the place, and one that is computed from the tokens."""
    tiling = divide((128, 160), 64)
    field = RNG.standard_normal((2, 8, 10, 5)).astype(np.float32)
    x = mx.array(RNG.standard_normal((2, 80, 5)).astype(np.float32))
    by_place = [
        lambda part, step, place=place: mx.array(field[:, place[0], place[1]].reshape(2, -1, 5))
        for place in tiling.places
    ]
    v = TiledVelocity(tiling, by_place, unchanged)(x, STEP)
    assert np.abs(np.array(v).reshape(field.shape) - field).max() < 1e-6
    by_value = [lambda part, step: 2 * part + step.sigma] * len(tiling)
    assert np.abs(np.array(TiledVelocity(tiling, by_value, unchanged)(x, STEP) - (2 * x + 0.5))).max() < 1e-6


def test_positions_are_those_of_the_small_image():
    """Where the places of its tokens fall, by torch's enlarging of a ramp (with half a token at each end beyond it)."""
    tiling = divide((192, 256), 96)
    ramp = torch.arange(-4, 6 + 4, dtype=torch.float64)[None, None]
    for axis, side in ((1, 6), (2, 8)):
        ramp = torch.arange(-4, side + 4, dtype=torch.float64)[None, None]
        expected = torch.nn.functional.interpolate(ramp, scale_factor=2, mode="linear")[0, 0, 8:-8].numpy()
        found = np.full((12, 16), np.nan)
        for place, ids in zip(tiling.places, tiling.position_ids((96, 128)), strict=True):
            found[place] = np.array(ids)[0, :, axis].reshape(found[place].shape)
        assert np.allclose(np.moveaxis(found, axis - 1, 0), expected[:, None])
    same_size = tiling.position_ids((192, 256))
    whole = np.array(image_ids(192, 256)).reshape(12, 16, 4)
    for place, ids in zip(tiling.places, same_size, strict=True):
        assert np.array_equal(np.array(ids)[0], whole[place].reshape(-1, 4))


# ------------------------------------------------------------------------------------------------ what they follow


def pillow_low_pass(z: np.ndarray, small: tuple[int, int]) -> np.ndarray:
    """(h, w, C) scaled to ``small`` and back, channel by channel."""
    out = np.empty_like(z)
    for c in range(z.shape[-1]):
        channel = Image.fromarray(z[..., c])
        reduced = channel.resize(small[::-1], Image.Resampling.BICUBIC)
        out[..., c] = np.asarray(reduced.resize(channel.size, Image.Resampling.BICUBIC))
    return out


@pytest.mark.parametrize(("size", "small"), [((128, 160), (64, 80)), ((192, 96), (128, 64)), ((96, 96), (64, 80))])
def test_low_frequencies_are_what_pillow_keeps(size, small):
    z = RNG.standard_normal((size[0] // 8, size[1] // 8, 3)).astype(np.float32)
    rows, columns = (np.array(matrix) for matrix in low_pass(size, small))
    found = np.einsum("ij,jkc,lk->ilc", rows, z, columns)
    assert np.abs(found - pillow_low_pass(z, (small[0] // 8, small[1] // 8))).max() < 1e-5
    assert np.allclose(rows.sum(1), 1, atol=1e-6)  # what is the same everywhere stays


def test_the_denoised_image_follows():
    """z + sqrt(sigma) L (target - z), by NumPy and Pillow; and v where it is there already."""
    z, v, target = (RNG.standard_normal((16, 20, 3)).astype(np.float32) for _ in range(3))
    sigma = 0.4
    x = z + sigma * v
    off = pillow_low_pass(target - z, (8, 10))
    expected = (x - (z + sigma**0.5 * off)) / sigma

    def follow(target):
        unpack, pack = (lambda x: x.reshape(1, 16, 20, 3)), (lambda z: z.reshape(1, 320, 3))
        own = Following(mx.array(target)[None], *low_pass((128, 160), (64, 80)), unpack, pack)
        return np.array(own(*(mx.array(part).reshape(1, 320, 3) for part in (x, v)), sigma)).reshape(z.shape)

    assert np.abs(follow(target) - expected).max() < 1e-5
    assert np.abs(follow(z) - v).max() < 1e-5


# ------------------------------------------------------------------------------------------------ beside diffusers


def test_a_step_in_tiles_is_diffusers_transformer_tile_by_tile(reference, pipe):
    """From given latents, noised wholly: the noise is diffusers', so are the velocity of each tile, packing and
    statistics; weights and positions are written down anew, Pillow makes the low frequencies.
    """
    small = RNG.standard_normal((1, 8, 10, 32)).astype(np.float32)
    embeds = RNG.standard_normal((1, 16, pipe.checkpoint.transformer.txt_embed_dim)).astype(np.float32)
    options = {"height": 128, "width": 160, "num_steps": 1, "seed": 9}
    found = pipe(
        prompt_embeds=embeds, init_latents=small, hires=2, hires_strength=1, hires_tile=64, output_type="latent",
        **options,
    ).images  # fmt: skip
    vae, model = reference[0].vae, reference[0].transformer
    noise = torch.randn((1, 128, 8, 10), generator=torch.Generator().manual_seed(9))
    mean, var = (stat.view(1, -1, 1, 1) for stat in (vae.bn.running_mean, vae.bn.running_var))
    std = torch.sqrt(var + vae.config.batch_norm_eps)
    v, total = torch.zeros_like(noise), torch.zeros(8, 10)
    txt_ids = torch.tensor([[0, 0, 0, k] for k in range(16)], dtype=torch.float32)
    for top in (0, 2, 4):
        for left in (0, 3, 6):
            part = noise[:, :, top : top + 4, left : left + 4].flatten(2).transpose(1, 2)
            ids = [[0, (top + r + 0.5) / 2 - 0.5, (left + c + 0.5) / 2 - 0.5, 0] for r in range(4) for c in range(4)]
            with torch.no_grad():
                own = model(
                    hidden_states=part,
                    encoder_hidden_states=torch.from_numpy(embeds),
                    timestep=torch.ones(1),
                    img_ids=torch.tensor(ids),
                    txt_ids=txt_ids,
                    guidance=None,
                ).sample
            down, across = torch.ones(4), torch.ones(4)
            for edge, start, last, overlap in ((down, top, 4, 2), (across, left, 6, 1)):
                rising = torch.sin(torch.pi / 2 * (torch.arange(overlap) + 0.5) / overlap) ** 2
                if start != 0:
                    edge[:overlap] = rising
                if start != last:
                    edge[4 - overlap :] = rising.flip(0)
            weights = down[:, None] * across
            v[:, :, top : top + 4, left : left + 4] += weights * own.transpose(1, 2).unflatten(2, (4, 4))
            total[top : top + 4, left : left + 4] += weights
    assert torch.allclose(total, torch.ones(8, 10))
    z = Flux2KleinPipeline._unpatchify_latents((noise - v) * std + mean)[0].permute(1, 2, 0).numpy()
    target = np.stack(
        [np.asarray(Image.fromarray(small[0, ..., c]).resize((20, 16), Image.Resampling.BICUBIC)) for c in range(32)],
        axis=-1,
    )
    expected = z + pillow_low_pass(np.ascontiguousarray(target - z), (8, 10))
    assert np.abs(np.array(found)[0] - expected).max() < 2e-3 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------ in a pipeline


def test_steps_in_tiles_are_steps(pipe):
    steps = list(pipe.stream("a fox", hires_tile=64, **LARGE))
    assert [(step.index, step.steps, step.size) for step in steps] == [
        (1, 3, (64, 80)),
        (2, 3, (64, 80)),
        (3, 3, (128, 160)),
    ]
    assert steps[-1].picture().size == (160, 128)
    assert steps[-1].stats.steps["computed"] == 3
    assert (steps[0].settings.hires_tile, steps[0].settings.hires) == (64, 2.0)


@pytest.mark.filterwarnings("ignore:step_cache is for tens of steps")
def test_each_tile_has_a_cache_of_its_own(pipe):
    options = {**LARGE, "num_steps": 6, "hires_tile": 96, "init_image": PICTURE}
    plain = pipe("a fox", **options)
    assert same(pipe("a fox", step_cache=0.0, **options).images[0], plain.images[0])
    cached = pipe("a fox", step_cache=1e9, **options)
    assert cached.steps == {"computed": 2, "reused": 1}  # all but the first and the last
    assert 0 < np.abs(np.asarray(cached.images[0], int) - np.asarray(plain.images[0])).mean() < 30


def test_what_takes_the_small_image_s_place(pipe):
    """An image as it would be encoded, its latents, and the small image itself all begin the large one."""
    options = {**LARGE, "hires_strength": 0.5, "hires_tile": 64}
    drawn = pipe("a fox", **options)
    small = {**LARGE, "height": 64, "width": 80, "hires": None}
    latents = pipe("a fox", output_type="latent", **small).images
    del options["height"], options["width"]
    given = pipe("a fox", init_latents=latents, **options)
    assert same(given.images[0], drawn.images[0])
    encoded = pipe.autoencoder.encoder(mx.array(np.asarray(PICTURE, np.float32))[None] / 127.5 - 1)
    enlarged = pipe("a fox", init_image=PICTURE, **options)
    assert close(enlarged.images[0], pipe("a fox", init_latents=encoded, **options).images[0])
    settings = enlarged.settings[0]
    assert (settings.width, settings.height, settings.strength, settings.hires_strength) == (160, 128, None, 0.5)
    assert settings.inputs == ("init_image",)
    assert enlarged.steps["computed"] == 1


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (3000, 2000)), ({"width": 1024}, (1024, 688)), ({"width": 2048, "height": 4096}, (2048, 4096))],
)
def test_an_image_is_enlarged_from_its_own_size(options, size):
    """Beyond the megapixel that references are scaled to."""
    inputs = Inputs(init_image=Image.new("RGB", (1500, 1000)))
    width, height = (round(side / 16) * 16 for side in size)
    assert image_sizes(GenerationOptions(hires=2, **options), inputs, None, 1024) == ((height, width), [])


def test_tiles_are_where_the_model_is_for_less():
    """Undivided up to 4 megapixels; each pass has the noise levels of the size that it sees."""
    options = {"hires": 2.0, "num_steps": 4, "hires_strength": 0.5}
    own = {"has_init": False, "inpaints": False}
    _, square = resolve_samplings(GenerationOptions(**options), True, (2048, 2048), 1024, **own)
    assert square.tiling is None
    first, wide = resolve_samplings(GenerationOptions(**options), True, (2048, 4096), 1024, **own)
    assert (first.size, first.tiling, wide.tiling.size, len(wide.tiling)) == ((1024, 2048), None, (864, 1024), 15)
    tile = resolve_samplings(GenerationOptions(num_steps=4), True, (864, 1024), 1024, **own)[0]
    assert [step.sigma for step in wide.steps] == [step.sigma for step in tile.steps[2:]]


def test_what_cannot_be_in_tiles(pipe):
    for options, message in (
        ({"hires": None, "hires_tile": 64}, r"hires_tile belongs to hires \(--hires SCALE\), and none is given"),
        ({"hires_tile": 72}, "hires_tile must be a multiple of 16, got 72; the nearest are 64 and 80"),
        ({"hires_tile": 48}, "hires_tile must be a number from 64 to 2048|hires_tile must be .*64.*got 48"),
        ({"hires_tile": 2064}, "hires_tile must be .*2048, got 2064"),
        ({"hires_tile": 64, "reuse": "text"}, "hires computes 160 x 128 in 9 tiles; leave reuse out"),
        ({"hires": 4, "width": 4096, "height": 2064}, r"8\.06 megapixels; at most 8 \(4096 x 2048\) can be generated$"),
        ({"hires": None, "width": 4096, "height": 2048}, r"at most 4 \(2048 x 2048\) can be .*, or 8 with hires"),
        ({"hires": 1.2, "width": 4096, "height": 2048}, r"with 5\.5. megapixels, and at most 4 are .*, as --hires 2"),
        (
            {"init_image": PICTURE, "mask": PICTURE},
            "hires enlarges whole images, and mask is given",
        ),
        ({"init_image": PICTURE, "expand": {"left": 16}}, "and expand is given; enlarge the result in another call"),
        ({"init_image": PICTURE, "strength": 0.5}, r"strength is hires_strength \(--hires-strength\) where hires"),
        (
            {"init_image": Image.new("RGB", (3000, 2000)), "height": None, "width": None},
            r"6000 x 4000 is 22\.89 megapixels; at most 8",
        ),
    ):
        with pytest.raises(InputError, match=message):
            pipe.stream("a fox", **{**LARGE, **options})


@pytest.mark.nightly
def test_nano_s_tiles_have_no_seams_and_keep_the_composition():
    """Beside the undivided pass: neighbouring pixels at tiles' edges differ by less than two levels more, and the image
    is nearer to the small one.
    """
    pipe = Flux2Pipeline.from_pretrained("nano", cache=False)
    for seed, prompt in enumerate(("a star", "a red circle and a blue square", "a green triangle, black background")):
        small = pipe(prompt, seed=seed, height=128, width=128).images[0].resize((256, 256), Image.Resampling.BICUBIC)
        options = {"seed": seed, "height": 256, "width": 256, "hires": 2}
        undivided, tiled = (pipe(prompt, hires_tile=tile, **options).images[0] for tile in (None, 128))
        assert seams(tiled, 128) - seams(undivided, 128) < 2, prompt
        off = [np.abs(np.asarray(image, float) - np.asarray(small)).mean() for image in (tiled, undivided)]
        assert off[0] < 0.7 * off[1], prompt


# ------------------------------------------------------------------------------------------------ memory


def test_memory_is_that_of_a_tile_or_of_the_small_image():
    """And of ten latents of the whole image in float32; a First Block Cache is each tile's."""
    params, options = FluxKleinParams(), GenerationOptions(hires=4.0, step_cache=0.1)
    work = workload_of(options, (2048, 4096), 512, [], 1024, has_kv_cache=False)
    tile, small = work.passes(caches=1)
    assert tile == Pass(512, 54 * 64, caches=15, whole=128 * 256)
    assert small == Pass(512, 32 * 64, caches=1)
    alone = transformer_bytes(params, Pass(512, 54 * 64, caches=15), mx.bfloat16)
    latents = 10 * 128 * 256 * 128 * 4
    assert [own - was for own, was in zip(transformer_bytes(params, tile, mx.bfloat16), alone, strict=True)] in (
        [latents, latents],
        [latents, 0],  # on a GPU, whose attention is within the others
    )
    undivided = workload_of(GenerationOptions(), (1024, 1024), 512, [], 1024, has_kv_cache=False)
    assert undivided == Workload(1024, 1024, 512, [])


def test_tiles_of_an_image_need_what_the_plan_says(memory):
    """Less than half of the undivided image, latents of all of it among it."""
    params = FluxKleinParams(hidden_size=384, num_heads=3, txt_embed_dim=960, depth=1, depth_single=2)
    transformer, size, text = FluxKlein(params), (384, 384), 128
    tiling = divide(size, 128)
    planned, whole = (
        max(transformer_bytes(params, Workload(*size, text, tiling=own).denoising(), mx.float32))
        for own in (tiling, None)
    )
    ropes = [FluxKlein.compute_rope(mx.zeros((1, text, 4)), ids) for ids in tiling.position_ids((192, 192))]
    txt, latents = mx.zeros((1, text, 960)), [mx.random.normal((1, 576, 128)) for _ in range(4)]
    height, width = tiling.size
    denoisers = [Denoiser(lambda: nullcontext(transformer), rope, height * width // 256) for rope in ropes]
    velocities = [lambda x, step, own=own: own(x, txt, step) for own in denoisers]
    mx.eval(ropes, txt, latents)
    memory()
    taken = peak_of(transformer, lambda: TiledVelocity(tiling, velocities, unchanged)(latents[0], STEP), planned)
    assert planned < whole / 2
    assert 0.7 <= (taken - weight_bytes(transformer)) / planned <= 1.1


def test_the_plan_of_eight_megapixels(capsys):
    """And of seconds, as many passes as tiles; of a released model nothing is downloaded."""
    assert main(["--plan", "--model", "klein-4b", "--width", "4096", "--height", "2048", "--hires", "2"]) == 0
    assert "decoder" in capsys.readouterr().out
    modules = released_modules("klein-4b", mx.bfloat16, {}, mx.bfloat16)
    tiled, tile = (
        image_work(*modules, workload_of(options, size, 512, [], 1024, has_kv_cache=False), mx.bfloat16)["transformer"]
        for options, size in ((GenerationOptions(hires=2.0), (2048, 4096)), (GenerationOptions(), (864, 1024)))
    )
    assert tiled.flops == 15 * tile.flops
