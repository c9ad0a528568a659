"""The small text encoder: Qwen3-0.6B with AiArtLab's adapter, against transformers and an adapter of torch's layers."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from flux2_mlx import CheckpointError, Flux2Pipeline, FluxKlein, InputError, image_ids, open_checkpoint
from flux2_mlx.checkpoints.load import load_all, load_text_encoder
from flux2_mlx.checkpoints.write import convert
from flux2_mlx.convert import main as flux2_convert
from flux2_mlx.device import weights_of
from flux2_mlx.families import RELEASES, with_small_encoder
from flux2_mlx.generate import main
from flux2_mlx.models.config import Qwen3Config, TextAdapterConfig
from flux2_mlx.models.text_adapter import TextAdapter
from flux2_mlx.quantization.layers import QuantizedEmbedding, QuantizedLinear
from flux2_mlx.runtime.released import download_bytes, released_modules
from flux2_mlx.runtime.roofline import text_encoder_work
from tests import tiny
from tests.parity.compare import EXACT, relative_error, to_torch

LAYERS, DROPPED, LENGTH = (2, 9, 14, 18, 23, 27), 5, 24
HIDDEN, WIDE, DIMS, HEADS, BLOCKS, OUT = 32, 48, 16, 2, 2, 192
FILE = "adapter_v14_bal.safetensors"
# As the header of the published file has it, but for the sizes.
METADATA = {
    "student_layers": "2,9,14,18,23,27",
    "teacher_layers": "9,18,27",
    "drop_first": "5",
    "len": str(LENGTH),
    "norm": "ln-per-layer",
    "attention": str(BLOCKS),
    "attn_heads": str(HEADS),
    "attn_dim": str(DIMS),
    "proj_layers": "3",
    "hidden": str(WIDE),
}


class SlicedNorm(torch.nn.Module):
    def __init__(self, dims, slices):
        super().__init__()
        self.slices, self.all = slices, torch.nn.LayerNorm(dims)

    def forward(self, x):
        parts = [functional.layer_norm(part, part.shape[-1:]) for part in x.chunk(self.slices, dim=-1)]
        return self.all(torch.cat(parts, dim=-1))


class Block(torch.nn.Module):
    def __init__(self, dims, heads):
        super().__init__()
        self.n1, self.n2 = torch.nn.LayerNorm(dims), torch.nn.LayerNorm(dims)
        self.attn = torch.nn.MultiheadAttention(dims, heads, batch_first=True)
        self.ffn = torch.nn.Sequential(
            torch.nn.Linear(dims, 4 * dims), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(4 * dims, dims)
        )

    def forward(self, x):
        h = self.n1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.ffn(self.n2(x))


class Mixer(torch.nn.Module):
    def __init__(self, inputs, outputs, dims, heads, blocks, length):
        super().__init__()
        self.norm, self.inp = torch.nn.LayerNorm(inputs), torch.nn.Linear(inputs, dims)
        self.pos = torch.nn.Parameter(torch.randn(1, length, dims))
        self.blocks = torch.nn.Sequential(*(Block(dims, heads) for _ in range(blocks)))
        self.out = torch.nn.Linear(dims, outputs)

    def forward(self, x):
        return self.out(self.blocks(self.inp(self.norm(x)) + self.pos[:, : x.shape[1]]))


class Adapter(torch.nn.Module):
    def __init__(self, inputs=6 * HIDDEN, outputs=OUT, wide=WIDE, dims=DIMS, heads=HEADS, blocks=BLOCKS, length=LENGTH):
        super().__init__()
        self.mlp = torch.nn.Sequential(
            SlicedNorm(inputs, 6),
            torch.nn.Linear(inputs, wide),
            torch.nn.GELU(approximate="tanh"),
            torch.nn.Linear(wide, wide),
            torch.nn.GELU(approximate="tanh"),
            torch.nn.Linear(wide, outputs),
        )
        self.attn = Mixer(inputs, outputs, dims, heads, blocks, length)
        tiny.randomize_norms(self)

    def forward(self, x):
        return self.mlp(x) + self.attn(x)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(7)
    return tiny.text_encoder(HIDDEN, 2, 1), Adapter().eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """A folder as a user has it: transformers' files, and the adapter's beside them."""
    model, adapter = theirs
    folder = tmp_path_factory.mktemp("small") / "qwen3"
    model.save_pretrained(folder)
    save_file(adapter.state_dict(), folder / FILE, METADATA)
    return folder


@pytest.fixture(scope="module")
def padded():
    """Two prompts of 9 and 20 tokens in 24."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 1000, (2, LENGTH)), np.zeros((2, LENGTH), np.int32)
    mask[0, :9], mask[1, :20] = 1, 1
    return mx.array(ids.astype(np.int32)), mx.array(mask)


def expected(theirs, ids, mask):
    model, adapter = theirs
    with torch.no_grad():
        states = model(to_torch(ids).long(), attention_mask=to_torch(mask), output_hidden_states=True).hidden_states
        return adapter(torch.cat([states[k] for k in LAYERS], dim=-1))[:, DROPPED:]


def test_embeddings_equal_transformers_and_torch(theirs, folder, checkpoint, padded):
    encoder = load_text_encoder(open_checkpoint(checkpoint, text_encoder=folder), mx.float32)
    for ids, mask in (padded, [array[:, :17] for array in padded]):  # fewer tokens than there are positions
        assert relative_error(encoder(ids, mask), expected(theirs, ids, mask)) <= EXACT


def test_bfloat16_stays_close_and_the_adapter_is_in_float32(theirs, folder, checkpoint, padded):
    encoder = load_text_encoder(open_checkpoint(checkpoint, text_encoder=folder), mx.bfloat16)
    assert {array.dtype for array in weights_of(encoder.adapter).values()} == {mx.float32}
    ours = encoder(*padded)
    assert ours.dtype == mx.bfloat16
    assert relative_error(ours, expected(theirs, *padded)) <= 5e-2


def test_the_true_shapes_are_those_of_the_published_parts():
    """Names and shapes as mflux 0.24 builds them: 219.9 million parameters, and Qwen3-0.6B's."""
    shapes = {name: tuple(value.shape) for name, value in true_adapter().items()}
    assert {name: array.shape for name, array in weights_of(TextAdapter(TextAdapterConfig())).items()} == shapes
    config = Qwen3Config.from_config(
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_hidden_layers": 28,
            "rope_theta": 1000000,
            "rms_norm_eps": 1e-6,
        }
    )
    layers = tuple(layer - 1 for layer in LAYERS)
    assert Qwen3Config.small() == replace(config, tapped_layers=layers, adapter=TextAdapterConfig())


def test_text_keeps_its_positions_where_first_tokens_are_dropped(folder, checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, text_encoder=folder)
    (embeds,) = pipe.encode(["a red fox"])
    assert embeds.shape == (1, LENGTH - DROPPED, OUT)
    ids = np.zeros((1, LENGTH - DROPPED, 4), np.int32)
    ids[0, :, 3] = np.arange(DROPPED, LENGTH)
    params, image = pipe.checkpoint.transformer, image_ids(64, 64)
    theirs = FluxKlein.compute_rope(mx.array(ids), image, params.axes_dims_rope, params.rope_theta)
    for ours, table in zip(pipe._generator.references.rope(LENGTH, [image]), theirs, strict=True):
        assert mx.array_equal(ours, table)
    how = {"height": 64, "width": 64, "seed": 1, "output_type": "np"}
    of_text, of_embeds = pipe("a red fox", **how), pipe(prompt_embeds=embeds, **how)
    assert np.array_equal(of_text.images[0], of_embeds.images[0])
    assert [result.settings[0].max_sequence_length for result in (of_text, of_embeds)] == [LENGTH, LENGTH]
    picture = Image.new("RGB", (64, 64), "red")
    faint = pipe("a red fox", image=picture, reference_strength=[1e-20], **how)
    region = pipe("a hat", region=["a red fox@0,0,1,1"], **how)  # masks are of the tokens that are left
    for result in (faint, region):
        assert np.abs(result.images[0] - of_text.images[0]).max() < 1e-4


def test_a_prompt_has_no_more_tokens_than_the_adapter_has_positions(folder, checkpoint):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, text_encoder=folder)
    calls = {
        "encode": lambda: pipe.encode(["a red fox"], LENGTH + 1),
        "plan": lambda: pipe.plan(64, 64, LENGTH + 1),
        "call": lambda: pipe("a red fox", height=64, width=64, max_sequence_length=LENGTH + 1),
    }
    for call in calls.values():
        with pytest.raises(InputError, match="max_sequence_length is 25, and this text encoder takes 24 tokens"):
            call()


def test_streamed_it_gives_the_same_to_the_bit(folder, checkpoint):
    pipes = [
        Flux2Pipeline.from_pretrained(checkpoint, text_encoder=folder, memory=memory, cache=False)
        for memory in ("resident", "streamed")
    ]
    whole, streamed = (pipe.encode(["a red fox"])[0] for pipe in pipes)
    assert mx.array_equal(whole, streamed)
    plan = pipes[1].plan(64, 64)
    assert plan.stages[0].streamed < plan.stages[0].weights


def test_quantize_packs_the_qwen3_and_not_the_adapter(theirs, folder, checkpoint, padded):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, text_encoder=folder, quantize_text_encoder=8, group_size=32)
    packed = {p for p, m in pipe.text_encoder.named_modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding))}
    assert "model.embed_tokens" in packed
    assert all(path.startswith("model.") for path in packed)
    assert relative_error(load_all(pipe.text_encoder)(*padded), expected(theirs, *padded)) <= 2e-2


def test_mlx_lms_packed_qwen3_is_read(theirs, folder, checkpoint, padded, tmp_path):
    """As mlx-lm's convert writes it: MLX's own packing, and its sizes in the config."""
    packed = shutil.copytree(folder, tmp_path / "packed")
    weights = mx.load(str(packed / "model.safetensors"))
    for name, array in list(weights.items()):
        if array.ndim == 2:
            layer = name.removesuffix(".weight")
            parts = mx.quantize(weights.pop(name), group_size=32, bits=8)
            weights |= dict(zip([f"{layer}.{kind}" for kind in ("weight", "scales", "biases")], parts, strict=True))
    mx.save_safetensors(str(packed / "model.safetensors"), weights)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 32, "bits": 8}}))
    encoder = load_text_encoder(open_checkpoint(checkpoint, text_encoder=packed), mx.float32)
    assert isinstance(encoder.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert relative_error(load_all(encoder)(*padded), expected(theirs, *padded)) <= 2e-2


def test_another_adapter_has_other_cached_prompts(theirs, folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "cache"))
    own = shutil.copytree(folder, tmp_path / "own")

    def encoded():
        return Flux2Pipeline.from_pretrained(checkpoint, text_encoder=own).encode(["a red fox"])[0]

    first = encoded()
    assert mx.array_equal(first, encoded())
    weights = load_file(own / FILE)
    weights["attn.out.bias"] += 1
    save_file(weights, own / FILE, METADATA)
    assert np.array(encoded() - first) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_layers": "10,20,30"}, "has {'teacher_layers': '10,20,30'}"),
        ({"norm": "rms"}, "has {'norm': 'rms'}"),
        ({"proj_layers": None}, "metadata has no proj_layers"),
        ({"student_layers": "2,9,14,18,23,28"}, "reads the layers 2,9,14,18,23,28"),
        ({"student_layers": "9,18,27"}, "for a Qwen3 of hidden size 64, and the text encoder's is 32"),
        ({"attn_heads": "two"}, "attn_heads='two'"),
        ({"attn_heads": "3"}, "blocks of 3 heads in 16, cannot be"),
        ({"drop_first": "24"}, "cannot drop 24 of 24 tokens"),
        ({"hidden": "64"}, "adapter.mlp.1.weight is (48, 192), not (64, 192)"),
    ],
)
def test_another_adapter_is_refused(change, message, folder, checkpoint, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    metadata = {name: value for name, value in {**METADATA, **change}.items() if value is not None}
    save_file(load_file(own / FILE), own / FILE, metadata)
    with pytest.raises(CheckpointError) as refusal:
        load_text_encoder(open_checkpoint(checkpoint, text_encoder=own), mx.float32)
    assert message in str(refusal.value)
    assert str(own) in str(refusal.value)


def test_a_file_that_is_no_adapter_is_refused(folder, checkpoint, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    save_file({"mlp.1.weight": torch.zeros(3)}, own / FILE, METADATA)
    with pytest.raises(CheckpointError, match=r"no text adapter, as AiArtLab's is: it has no matrix mlp\.1\.weight"):
        open_checkpoint(checkpoint, text_encoder=own)


def test_it_is_refused_where_prompt_embeddings_have_another_size(checkpoint, capsys):
    """Before anything is fetched: no Hub is here."""
    for model in ("klein-9b", str(checkpoint)):
        with pytest.raises(InputError, match=r"stands for Qwen3-4B.*7680 features.*klein-4b, klein-base-4b"):
            open_checkpoint(model, text_encoder="small")
    assert main(["a red fox", "--model", "klein-9b-kv", "--text-encoder", "small", "--plan"]) == 2
    assert "it is for the 4B models" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [{}, {"quantize_text_encoder": 8, "group_size": 32}], ids=["dense", "packed"])
def test_a_converted_folder_has_it_and_draws_the_same(bits, folder, checkpoint, tmp_path, capsys):
    flags = [word for name, value in bits.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    target = tmp_path / "copy"
    assert flux2_convert([str(checkpoint), str(target), "--text-encoder", str(folder), "--quiet", *flags]) == 0
    assert flux2_convert(["--check", str(target)]) == 0
    assert f"text_encoder/{FILE}: " in capsys.readouterr().out
    assert (target / "text_encoder" / FILE).read_bytes() == (folder / FILE).read_bytes()
    assert FILE in (target / "README.md").read_text()
    config = json.loads((target / "text_encoder" / "config.json").read_text())
    assert ("quantization" in config) == bool(bits)
    images = [
        Flux2Pipeline.from_pretrained(model, dtype="bfloat16", cache=False, **options)(
            "a red fox", height=64, width=64, seed=1, num_steps=2, output_type="np"
        ).images
        for model, options in ((target, {}), (checkpoint, {"text_encoder": folder, **bits}))
    ]
    assert np.array_equal(*images)


def test_bfls_files_do_not_hold_it(folder, checkpoint, tmp_path):
    with pytest.raises(InputError, match="hold no adapter, which the small text encoder needs; leave --layout out"):
        convert(open_checkpoint(checkpoint, text_encoder=folder), tmp_path / "written", layout="bfl")


def test_the_plan_of_a_release_counts_it(capsys):
    """Sizes by the parameters: 7.75 GB of transformer stay; Qwen3-0.6B's 27 layers of 15,730,944 and its embedding."""
    release = with_small_encoder(next(release for release in RELEASES if release.name == "klein-4b"))
    encoder, _, _ = released_modules(release, mx.bfloat16, {})
    adapter = sum(value.numel() for value in true_adapter().values())
    qwen3 = 27 * 15_730_944 + 151_936 * 1024
    assert sum(array.nbytes for array in weights_of(encoder).values()) == 4 * adapter + 2 * qwen3
    whole = download_bytes("klein-4b") - 2 * 4_022_468_096
    assert download_bytes(release) == whole + 2 * 751_632_384 + 4 * adapter
    assert main(["a red fox", "--text-encoder", "small", "--plan", "--dtype", "bfloat16"]) == 0
    assert "download: up to 10.3 GB" in capsys.readouterr().out
    assert main(["a red fox", "--text-encoder", "small", "--plan", "--max-sequence-length", "257"]) == 2
    assert "takes 256 tokens at most" in capsys.readouterr().err


def true_adapter():
    with torch.device("meta"):
        return Adapter(6144, 7680, 8192, 1024, 8, 2, 256).state_dict()


def test_flop_of_the_adapter_are_those_of_torch(folder, checkpoint):
    from tests.test_roofline import counted, kinds

    config = open_checkpoint(checkpoint, text_encoder=folder).text_encoder
    adapter = Adapter()
    work = counted(lambda: adapter(torch.zeros(1, 20, 6 * HIDDEN)))
    alone = text_encoder_work(replace(config, adapter=None), 20, 20, mx.float32)
    assert kinds(text_encoder_work(config, 20, 20, mx.float32)) == kinds(alone + work)
