"""LoRAs in a pipeline and in the commands; files that do not fit. tests/parity/test_lora.py holds the arithmetic."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_mlx import CheckpointError, Flux2Pipeline, FluxKlein, FluxKleinParams, InputError, read_metadata
from flux2_mlx.adapters.lora import open_lora, parse_lora
from flux2_mlx.checkpoints.load import load_weights
from flux2_mlx.device import weights_of
from flux2_mlx.fuse import main as fuse
from flux2_mlx.generate import main as generate
from flux2_mlx.runtime.residency import Stages
from tests import loras

SMALL = {"width": 80, "height": 64, "num_steps": 2, "max_sequence_length": 16, "seed": 3}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def weights(checkpoint):
    return load_file(checkpoint / WEIGHTS)


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """Three files by name, and the folder of a checkpoint's weights with the first at scale 0.5 in them."""
    folder = tmp_path_factory.mktemp("loras")
    merged = loras.write(folder / "style.safetensors", weights, alpha=4, scale=0.5)
    loras.write(folder / "other.safetensors", weights, form="LoKr", seed=1)
    loras.write(folder / "dora.safetensors", weights, dora=True, seed=2)
    save_file(merged, folder / "merged.st")
    return folder


def draw(pipe, **options):
    return np.asarray(pipe("a red fox", **(SMALL | options)).images[0], np.int16)


def far(a, b):
    return np.abs(a - b).mean() > 1


@pytest.fixture(scope="module")
def plain(pipe):
    return draw(pipe)


@pytest.fixture(scope="module")
def styled(checkpoint, files, tmp_path_factory):
    """The picture of weights with the first file in them, half of it."""
    folder = tmp_path_factory.mktemp("styled") / "model"
    shutil.copytree(checkpoint, folder)
    shutil.copyfile(files / "merged.st", folder / WEIGHTS)
    return draw(Flux2Pipeline.from_pretrained(folder))


@pytest.mark.filterwarnings("ignore:the .* is streamed and its weights are converted")
@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize("memory", ["resident", "staged", "streamed"])
def test_a_lora_is_drawn_with_until_it_is_unloaded(checkpoint, files, plain, styled, memory, merge):
    assert far(styled, plain)
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory=memory)
    lora = pipe.load_lora(files / "style.safetensors", name="style", scale=0.5, merge=merge)
    assert lora.summary == "LoRA, 15 of 39 layers, rank 4, alpha 4"
    assert np.abs(draw(pipe) - styled).max() <= 1
    pipe.set_lora("style", 2)
    assert far(draw(pipe), styled)
    pipe.set_lora("style", 0.5)
    assert np.abs(draw(pipe) - styled).max() <= 1
    assert pipe("a", **SMALL).settings[0].lora == (f"{files / 'style.safetensors'}:0.5",)
    pipe.unload_lora("style")
    assert np.array_equal(draw(pipe), plain)


def test_unloading_leaves_every_byte(checkpoint, files):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="resident", quantize=4, group_size=32)
    draw(pipe)
    before = {name: np.array(array.view(mx.uint8)).tobytes() for name, array in weights_of(pipe.transformer).items()}
    for name in ("style", "other", "dora"):
        pipe.load_lora(files / f"{name}.safetensors", name=name)
    assert len(weights_of(pipe.transformer)) > len(before)
    draw(pipe)
    pipe.unload_lora()
    after = {name: np.array(array.view(mx.uint8)).tobytes() for name, array in weights_of(pipe.transformer).items()}
    assert after == before


def test_a_loaded_transformer_stays_loaded(checkpoint, files, monkeypatch):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, memory="resident")
    first = draw(pipe)
    monkeypatch.setattr(Stages, "_open", lambda *_: pytest.fail("the transformer is read again"))
    pipe.load_lora(files / "style.safetensors", name="style")
    pipe.set_lora("style", 0.5)
    draw(pipe)
    pipe.unload_lora()
    assert np.array_equal(draw(pipe), first)


@pytest.mark.filterwarnings("ignore:the .* is streamed and its weights are converted")
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_packed_weights_keep_a_lora(checkpoint, files, memory):
    """In eight bits the picture is near that of dense weights; without the LoRA it is far from it."""
    options = {"quantize": 8, "group_size": 32, "memory": memory}
    dense = Flux2Pipeline.from_pretrained(checkpoint, memory="resident")
    packed = Flux2Pipeline.from_pretrained(checkpoint, **options)
    before = draw(packed)
    for name in ("style", "other", "dora"):
        for pipe in (dense, packed):
            pipe.load_lora(files / f"{name}.safetensors")
    ours, theirs = draw(packed), draw(dense)
    assert np.abs(ours - theirs).mean() < 0.2 * np.abs(before - theirs).mean()


def test_several_are_told_apart_by_name(pipe, files, plain):
    assert list(pipe.loras) == []
    path = str(files / "style.safetensors")
    pipe.load_lora(path)
    with pytest.raises(InputError, match="is loaded; set_lora changes its scale"):
        pipe.load_lora(path)
    with pytest.raises(InputError, match=r"no LoRA 'x' is loaded, only .*style"):
        pipe.set_lora("x", 1)
    for scale in (float("nan"), 1000, "a", True):
        with pytest.raises(InputError, match="scale of a LoRA must be a number from -100 to 100"):
            pipe.set_lora(path, scale)
    pipe.load_lora(files / "other.safetensors", name="other")
    both = draw(pipe)
    pipe.unload_lora(path)
    assert far(draw(pipe), both)
    pipe.unload_lora()
    assert np.array_equal(draw(pipe), plain)


def test_a_lora_that_does_not_fit_changes_nothing(pipe, files, plain, tmp_path):
    save_file({"diffusion_model.img_in.lora_A.weight": torch.zeros(4, 128)}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="img_in has down alone"):
        pipe.load_lora(tmp_path / "half.safetensors")
    assert pipe.loras == {}
    assert np.array_equal(draw(pipe), plain)


def test_packed_weights_are_not_merged_into(checkpoint, files, tmp_path, capsys):
    from flux2_mlx.convert import main as convert

    assert convert([str(checkpoint), str(tmp_path / "packed"), "--quantize", "4", "--group-size", "32", "--quiet"]) == 0
    pipe = Flux2Pipeline.from_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match="cannot be merged into packed weights"):
        pipe.load_lora(files / "style.safetensors", merge=True)
    assert pipe.loras == {}
    before = draw(pipe)
    pipe.load_lora(files / "style.safetensors")
    assert far(draw(pipe), before)


def test_the_plan_counts_what_is_loaded(checkpoint, files):
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    stages = [next(s for s in pipe.plan(64, 64, 16).stages if s.name == "transformer")]
    pipe.load_lora(files / "style.safetensors")
    stages.append(next(s for s in pipe.plan(64, 64, 16).stages if s.name == "transformer"))
    arrays = load_file(files / "style.safetensors")
    size = sum(4 * array.numel() for name, array in arrays.items() if not name.endswith("alpha"))
    assert size <= stages[1].weights - stages[0].weights < 1.5 * size  # of a fused layer each part has its own


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def model(weights):
    params = FluxKleinParams(
        hidden_size=64, num_heads=2, txt_embed_dim=192, depth=2, depth_single=3, head_dim=32, axes_dims_rope=(8,) * 4
    )
    return FluxKlein(params)


def read(model, path, **options):
    return open_lora(str(path), model, dict, **options)


KLEIN = {"diffusion_model.img_in.lora_A.weight": (4, 128), "diffusion_model.img_in.lora_B.weight": (64, 4)}
SQUARE = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4), "dora_scale": (1, 64)}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"lora_te1_text_model_layers_0.lora_down.weight": (4, 8)}, "1 key is not used, by their names a text"),
        ({"transformer.transformer_blocks.0.norm1.linear.lora_A.weight": (4, 8)}, "FLUX.1's"),
        ({"lora_unet_double_blocks_0_img_mod_lin.alpha": ()}, "FLUX.1's"),
        ({"diffusion_model.guidance_in.in_layer.lora_A.weight": (4, 256)}, "FLUX.2-dev's"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.alpha": ()}, "Stable Diffusion's"),
        ({"diffusion_model.double_blocks.7.img_attn.proj.lora_A.weight": (4, 64)}, "blocks that this model does not"),
        ({"diffusion_model.img_in.lora_C.weight": (4, 64)}, "a form that is not known: diffusion_model.img_in.lora_C"),
        ({"diffusion_model.double_blocks.2.img_attn.proj.alpha": ()}, "does not have (double_blocks are 2)"),
        ({"lora_unet_single_blocks_3_linear1.alpha": ()}, "does not have (single_blocks are 3)"),
        ({f"transformer.transformer_blocks.{'9' * 5000}.attn.to_q.alpha": ()}, "blocks that this model does not have"),
        ({"transformer.transformer_blocks.0.attn.to_x.alpha": ()}, "of no layer that these blocks have"),
        ({"lora_unet_model_diffusion_model_x.alpha": ()}, "of an unknown layer"),
        ({"transformer.transformer_blocks.0.attn.to_q.oft_R.weight": (2, 496)}, "not read (OFT)"),
        ({"base_model.model.transformer_blocks.0.attn.to_q.boft_R": (1, 2, 2, 2)}, "not read (BOFT)"),
        ({"base_model.model.transformer_blocks.0.attn.to_q.ia3_l": (64, 1)}, "not read (IA3)"),
        ({"base_model.vera_A": (4, 64), "base_model.model.x_embedder.vera_lambda_b": (64,)}, "not read (VeRA)"),
        ({"lycoris_x_embedder.a1.weight": (4, 64)}, "not read (GLoRA)"),
        ({"lycoris_x_embedder.weight": (64, 128)}, "a layer's whole weights"),
        ({"txt_in.lora_A.weight": (4, 192), "txt_in.lora_B.weight": (64, 4), "txt_in.lora_B.bias": (64,)}, "a bias"),
        ({"double_blocks.0.img_attn.norm.query_norm.diff": (64,)}, "query_norm changes 64, not 32"),
        ({"transformer_blocks.0.attn.norm_q.lora_A.weight": (4, 32)}, "is a norm and has down, where only a full"),
        ({"txt_in.diff": (64, 96)}, "txt_in changes 64 x 96, not 64 x 192"),
        ({"txt_in.lokr_w1": (2, 2, 2), "txt_in.lokr_w2": (32, 96)}, "txt_in has matrices that do not go"),
        ({"txt_in.lora_A.weight": (4, 192, 1), "txt_in.lora_B.weight": (64, 4)}, "txt_in has matrices that do not go"),
        ({"\x1b]0;owned\x07\x1b[2J.lora_A.weight": (4, 4)}, r"\x1b]0;owned\x07\x1b[2J.lora_A.weight"),
        ({"diffusion_model.txt_in.lora_A.weight": (4, 192)}, "txt_in has down alone"),
        ({"diffusion_model.txt_in.alpha": ()}, "txt_in has alpha alone"),
        (
            {"img_in.lora_down.weight": (4, 128)},
            "is there twice, under two names",
        ),
        (
            {"txt_in.lora_A.weight": (4, 96), "txt_in.lora_B.weight": (64, 4)},
            "txt_in changes 64 x 96, not 64 x 192",
        ),
        ({"txt_in.lora_A.weight": (4, 192), "txt_in.lora_B.weight": (64, 3)}, "txt_in has matrices that do not go"),
        ({"txt_in.lokr_w1": (4, 4), "txt_in.lokr_w2_a": (16, 2), "txt_in.lokr_w2_b": (3, 48)}, "do not go together"),
        (
            {
                "txt_in.lora_A.weight": (4, 192),
                "txt_in.lora_B.weight": (64, 4),
                "txt_in.dora_scale": (1, 192),
            },
            "DoRA lengths (1, 192), not one of each of its 64 outputs",
        ),
        (
            {"double_blocks.0.img_attn.proj." + kind: shape for kind, shape in SQUARE.items()},
            "DoRA lengths (1, 64), not one of each of its 64 outputs",
        ),
        ({"txt_in.lora_A.weight": (0, 192), "txt_in.lora_B.weight": (64, 0)}, "do not go together"),
        ({"txt_in.lora_A.weight": (192,), "txt_in.lora_B.weight": (64, 4)}, "do not go together"),
        ({**{name.replace("img_in", "txt_in"): s for name, s in KLEIN.items()}, "txt_in.alpha": (2,)}, "has 2 alphas"),
    ],
)
def test_keys_that_fit_nothing_are_named(model, tmp_path, shapes, expected):
    """Unless the rest is asked for, which then is loaded alone."""
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(shape) for name, shape in {**KLEIN, **shapes}.items()}, path)
    with pytest.raises(CheckpointError) as fault:
        read(model, path)
    assert expected in str(fault.value)
    assert "partial (--lora-partial) loads the rest" in str(fault.value)
    lora = read(model, path, partial=True)
    assert list(lora.deltas()) == ["x_embedder"]
    assert "passed over" in lora.summary
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    if "img_in.lora_down.weight" not in shapes:
        with pytest.raises(CheckpointError, match="does not fit"):
            read(model, path, partial=True)


@pytest.mark.parametrize(("width", "name"), [(3072, "klein-4b"), (6144, "FLUX.2-dev")])
def test_a_lora_of_another_model_is_told(tmp_path, width, name):
    """A LoRA of the 4B model on the 9B one; nothing of that size is computed."""
    model = FluxKlein(FluxKleinParams.klein_9b())
    tensors = {"down": torch.zeros(4, width), "up": torch.zeros(width, 4)}
    save_file(
        {
            "diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight": tensors["down"],
            "diffusion_model.double_blocks.0.img_attn.proj.lora_up.weight": tensors["up"],
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises(CheckpointError, match=f"changes {width} x {width}, not 4096 x 4096, as {name}'s"):
        read(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("no JSON", "lora_adapter_metadata cannot be read"),
        ("[1]", "lora_adapter_metadata cannot be read"),
        ('{"transformer.lora_alpha": "x"}', "an alpha that is no number"),
        ('{"transformer.alpha_pattern": [1]}', "lora_adapter_metadata cannot be read"),
    ],
)
def test_a_header_that_cannot_be_read(model, tmp_path, metadata, expected):
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.ones(shape) for name, shape in KLEIN.items()}
    save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError, match=expected):
        read(model, path)


def test_alpha_of_an_adapter_config_beside_the_file(model, tmp_path):
    save_file({name: torch.ones(shape) for name, shape in KLEIN.items()}, tmp_path / "adapter_model.safetensors")
    assert read(model, tmp_path).summary == "LoRA, 1 of 39 layers, rank 4, alpha 4"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    assert read(model, tmp_path).summary == "LoRA, 1 of 39 layers, rank 4, alpha 8"
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read"):
        read(model, tmp_path)


def test_files_that_are_none(model, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.ones(shape) for name, shape in KLEIN.items()}
    save_file({name: tensor / 0 for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"img_in\.(up|down) has values that are not finite"):
        read(model, path)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read(model, path)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="has no weights of a LoRA"):
        read(model, path)
    save_file({name: tensor.to(torch.int64) for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match="formats that are not read"):
        read(model, path)
    save_file({name: tensor.to(torch.uint8) for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"img_in has whole numbers in (up, down|down, up)"):
        read(model, path)
    with pytest.raises(CheckpointError, match=r"no LoRA 'nowhere.safetensors'"):
        read(model, "nowhere.safetensors")
    shutil.copyfile(path, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"has several files; name one: .*a.safetensors, .*b.safetensors"):
        read(model, tmp_path)


def test_what_is_no_lora_is_named(model, checkpoint, tmp_path):
    """Whole checkpoints, and what a text encoder has of zeros, which changes nothing."""
    for part, told in (
        ("transformer", "transformer and is no LoRA; give it as --transformer"),
        ("text_encoder", "text encoder and is no LoRA; give it as --text-encoder"),
        ("vae", "autoencoder and is no LoRA; give it as --vae"),
    ):
        with pytest.raises(CheckpointError, match=f"has the weights of a whole {told}"):
            read(model, next((checkpoint / part).glob("*.safetensors")))
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="is GGUF, and no LoRA is read from that"):
        read(model, tmp_path / "a.gguf")
    zeros = {f"text_encoder.model.layers.0.self_attn.q_proj.lora_{kind}.weight": torch.zeros(4, 4) for kind in "AB"}
    save_file({name: torch.ones(shape) for name, shape in KLEIN.items()} | zeros, tmp_path / "a.safetensors")
    assert read(model, tmp_path / "a.safetensors").summary == "LoRA, 1 of 39 layers, rank 4, alpha 4"


def test_hidden_files_are_no_loras(model, tmp_path):
    """What macOS leaves beside each file on drives of others, and what a run that was killed left of its own."""
    save_file({name: torch.ones(shape) for name, shape in KLEIN.items()}, tmp_path / "style.safetensors")
    for name in ("._style.safetensors", ".lora.safetensors"):
        (tmp_path / name).write_bytes(bytes(4096))
    assert read(model, tmp_path).file.name == "style.safetensors"


def test_an_alpha_that_is_a_whole_number(model, tmp_path):
    tensors = {name: torch.ones(shape) for name, shape in KLEIN.items()}
    save_file(tensors | {"diffusion_model.img_in.alpha": torch.tensor(2)}, tmp_path / "a.safetensors")
    assert read(model, tmp_path).summary == "LoRA, 1 of 39 layers, rank 4, alpha 2"


def test_a_scale_stands_behind_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").write_text("")
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert parse_lora("owner/name/file.safetensors:-1") == ("owner/name/file.safetensors", -1.0)
    assert parse_lora("a:2") == ("a:2", 1.0)
    assert parse_lora("C:x") == ("C:x", 1.0)
    for text in ("a:1000", "a:nan"):
        with pytest.raises(InputError, match="scale of a LoRA"):
            parse_lora(text)


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--width", "80", "--height", "64", "--steps", "2", "--max-sequence-length", "16", "--seed", "3"]

    def run(*arguments):
        code = generate(["a red fox", *words, "--model", str(checkpoint), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image, np.int16)


def test_the_command_draws_with_loras(run, files, tmp_path, styled, plain, capsys):
    code, _, err = run("--lora", f"{files / 'style.safetensors'}:0.5", "--output", "a.png")
    assert code == 0, err
    assert "style.safetensors:0.5: LoRA, 15 of 39 layers" in err
    assert np.abs(pixels("a.png") - styled).max() <= 1
    assert read_metadata(tmp_path / "a.png")["lora"] == [f"{files / 'style.safetensors'}:0.5"]
    assert generate(["--from-image", "a.png", "--output", "b.png", "--quiet"]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert run("--lora", f"{files / 'style.safetensors'}:0.5", "--lora-merge", "--output", "c.png", "--quiet")[0] == 0
    assert np.abs(pixels("c.png") - styled).max() <= 1
    twice = run("--lora", files / "style.safetensors", "--lora", f"{files / 'style.safetensors'}:2", "--quiet")
    assert twice[0] == 2
    assert "given twice" in twice[2]
    missing = run("--lora", "nowhere.safetensors", "--quiet")
    assert (missing[0], missing[2].count("\n")) == (2, 1)
    assert "no LoRA 'nowhere.safetensors'" in missing[2]


def test_jobs_swap_loras_on_a_model_that_stays(checkpoint, files, tmp_path, monkeypatch, opened, styled, plain):
    monkeypatch.chdir(tmp_path)
    small = {"width": 80, "height": 64, "steps": 2, "max_sequence_length": 16, "seed": 3, "prompt": "a red fox"}
    style = f"{files / 'style.safetensors'}:0.5"
    lines = [{"lora": style}, {}, {"lora": [style, str(files / "other.safetensors")]}, {"lora": [style]}]
    text = "\n".join(json.dumps({**small, **line, "output": f"{k}.png"}) for k, line in enumerate(lines))
    (tmp_path / "jobs.jsonl").write_text(text)
    assert generate(["--jobs", "jobs.jsonl", "--model", str(checkpoint), "--quiet"]) == 0
    assert len(opened) == 1
    assert np.array_equal(pixels("1.png"), plain)
    assert np.abs(pixels("0.png") - styled).max() <= 1
    assert far(pixels("2.png"), styled)
    assert np.array_equal(pixels("3.png"), pixels("0.png"))


@pytest.mark.parametrize("form", ["style", "other", "dora"])
def test_fuse_writes_a_checkpoint_with_them(checkpoint, files, tmp_path, capsys, form):
    target = tmp_path / "fused"
    lora = files / f"{form}.safetensors"
    assert fuse([str(checkpoint), str(target), "--lora", f"{lora}:0.5", "--quiet"]) == 0
    assert f"Merged into the transformer: {lora.name}:0.5." in (target / "README.md").read_text()
    pipe = Flux2Pipeline.from_pretrained(checkpoint, dtype="bfloat16")
    pipe.load_lora(lora, scale=0.5, merge=True)
    list(load_weights(pipe.transformer))
    ours, theirs = weights_of(pipe.transformer), load_file(target / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert np.array_equal(np.array(weight.astype(mx.float32)), theirs[name].float().numpy()), name


def test_fuse_packs_what_was_merged(checkpoint, files, tmp_path, weights, styled):
    """Merged at full precision first: the packed weights are those of the merged ones."""
    target = tmp_path / "fused"
    words = ["--lora", f"{files / 'style.safetensors'}:0.5", "--quantize", "8", "--group-size", "32", "--quiet"]
    assert fuse([str(checkpoint), str(target), *words]) == 0
    merged = load_file(files / "merged.st")["transformer_blocks.1.ff.linear_in.weight"]
    pipe = Flux2Pipeline.from_pretrained(target)
    layer = pipe.transformer.transformer_blocks[1].ff.linear_in
    dense = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=8))
    assert np.abs(dense - merged.numpy()).max() < 0.02 * merged.abs().max()
    assert np.abs(draw(pipe) - styled).mean() < 2


def test_fuse_into_files_of_bfl(checkpoint, tmp_path, weights, capsys):
    """Also where a LoRA changes one of the three layers that are one there."""
    lora, target = tmp_path / "a.safetensors", tmp_path / "fused"
    arrays = {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(64, 2)}
    save_file({f"transformer.transformer_blocks.0.attn.to_k.{kind}": array for kind, array in arrays.items()}, lora)
    assert fuse([str(checkpoint), str(target), "--lora", str(lora), "--layout", "bfl", "--quiet"]) == 0
    fused = load_file(target / "transformer.safetensors")["double_blocks.0.img_attn.qkv.weight"]
    q, k, v = (weights[f"transformer_blocks.0.attn.to_{name}.weight"] for name in "qkv")
    assert torch.equal(fused, torch.cat([q, k + 2, v]).bfloat16())


def test_fuse_refuses_in_one_line(checkpoint, files, tmp_path, capsys):
    for words, expected in (
        (["--lora", "nowhere"], "no LoRA 'nowhere'"),
        (["--lora", f"{files / 'style.safetensors'}:1e9"], "scale of a LoRA"),
        ([], "required: --lora"),
    ):
        assert fuse([str(checkpoint), str(tmp_path / "x"), *words, "--quiet"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert expected in err
    assert list(tmp_path.iterdir()) == []
