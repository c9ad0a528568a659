"""Training against torch: diffusers' transformer with peft's LoRA, the same weights, noise and noise levels."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from mlx.utils import tree_flatten
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open

from flux2_mlx import Flux2Pipeline, FluxKlein, QuantizedFluxKlein, image_ids, text_ids
from flux2_mlx.adapters.keys import NAMES, lora_arrays
from flux2_mlx.adapters.lora import open_lora, set_adapters
from flux2_mlx.device import weights_of
from flux2_mlx.lora import main
from flux2_mlx.quantization.layers import QuantizedLinear
from flux2_mlx.training.adapter import add_adapters
from flux2_mlx.training.latent_cache import save_arrays
from flux2_mlx.training.losses import flow_loss
from flux2_mlx.training.options import TrainingOptions
from flux2_mlx.training.recompute import checkpoint_block
from tests import tiny
from tests.parity.compare import EXACT, assert_same_picture, relative_error, to_mlx, to_torch
from tests.parity.test_transformer import inputs, ported, theirs

RANK, ALPHA = 4, 6.0
HEIGHT, WIDTH, LENGTH = 64, 96, 24


def options(**changes):
    return TrainingOptions(**{"data": "", "output": "", "rank": RANK, "alpha": ALPHA, **changes})


def batch(model, references=()):
    """What flow_loss takes after the model, of two pictures."""
    rng = np.random.default_rng(5)

    def tokens(height, width):
        return mx.array(rng.standard_normal((2, height * width // 256, 128)).astype(np.float32))

    clean, noise = tokens(HEIGHT, WIDTH), tokens(HEIGHT, WIDTH)
    seen = mx.concatenate([tokens(*size) for size in references], axis=1) if references else None
    txt = mx.array(0.5 * rng.standard_normal((2, LENGTH, model.config.joint_attention_dim)).astype(np.float32))
    grids = [image_ids(HEIGHT, WIDTH), *(image_ids(*size, reference=k) for k, size in enumerate(references))]
    ids = mx.concatenate(grids, axis=1)
    config = model.config
    rope = FluxKlein.compute_rope(text_ids(LENGTH), ids, tuple(config.axes_dims_rope), config.rope_theta)
    return (clean, noise, mx.array([0.3, 0.8]), seen, txt, rope), ids


def trained(seed=3, weights=None):
    """torch's transformer, and with a LoRA of random numbers in all layers of its blocks, by their paths."""
    torch.manual_seed(seed)
    model = tiny.transformer()
    if weights is not None:
        model.load_state_dict(weights)
    paths = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and "blocks." in name]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=paths, init_lora_weights=False))
    layers = {path: model.get_submodule(path) for path in paths}
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_A["default"].weight.normal_(0, 0.1)
            layer.lora_B["default"].weight.normal_(0, 0.1)
    return model, layers


def loss_of(model, given, ids):
    """torch's."""
    clean, noise, t, seen, txt, _ = (to_torch(a) if isinstance(a, mx.array) else a for a in given)
    mixed = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
    velocity = model(
        hidden_states=mixed if seen is None else torch.cat([mixed, seen], dim=1),
        encoder_hidden_states=txt,
        timestep=t,
        img_ids=to_torch(ids)[0],
        txt_ids=to_torch(text_ids(LENGTH))[0],
        guidance=None,
        return_dict=False,
    )[0][:, : clean.shape[1]]
    return torch.nn.functional.mse_loss(velocity, noise - clean)


def adapted(ours, layers, **changes):
    """Our transformer with torch's LoRA."""
    adapters = add_adapters(ours, options(**changes))
    assert adapters.keys() == layers.keys()
    for path, adapter in adapters.items():
        adapter.down = to_mlx(layers[path].lora_A["default"].weight)
        adapter.up = to_mlx(layers[path].lora_B["default"].weight)
    return adapters


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(3)
    return tiny.transformer()


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("references", [(), ((96, 64), (64, 64))], ids=["", "references"])
@pytest.mark.parametrize("packed", [None, 1, 1 << 30], ids=["dense", "unpacked", "fused"])
def test_loss_and_gradients_equal_torch(plain, packed, references, recompute):
    ours, weights = ported(plain), plain.state_dict()
    if packed is not None:
        ours = QuantizedFluxKlein.from_unquantized(ours, group_size=32)
        weights = dict(weights)
        for path, layer in ours.named_modules():
            if isinstance(layer, QuantizedLinear):
                layer.dense_rows = packed
                dense = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=4)
                weights[f"{path}.weight"] = to_torch(dense)
    model, layers = trained(weights=weights)
    given, ids = batch(plain, references)
    expected = loss_of(model, given, ids)
    expected.backward()
    adapters = adapted(ours, layers)
    if recompute:
        ours.block_runner = checkpoint_block
    loss, gradients = nn.value_and_grad(ours, lambda *values: flow_loss(ours, *values))(*given)
    assert abs(loss.item() - expected.item()) <= EXACT * expected.item()
    found = dict(tree_flatten(gradients))
    assert len(found) == 2 * len(adapters)
    for path in adapters:
        for kind, theirs_ in (("down", "lora_A"), ("up", "lora_B")):
            gradient = getattr(layers[path], theirs_)["default"].weight.grad
            if gradient.norm() > 0:  # of the last text stream nothing is read
                ours_ = np.array(found[f"{path}.deltas.0.{kind}"], np.float64)
                assert np.linalg.norm(ours_ - gradient.numpy()) <= 1e-4 * gradient.norm().item(), (path, kind)
    assert sum(layer.lora_A["default"].weight.grad.norm() > 0 for layer in layers.values()) >= len(layers) - 4


def test_bfloat16_keeps_float32_where_it_counts(plain):
    """Activations of the base's dtype, weights and gradients of the LoRA in float32."""
    _, layers = trained()
    ours = ported(plain, mx.bfloat16)
    adapted(ours, layers)
    given, _ = batch(plain)
    loss, gradients = nn.value_and_grad(ours, lambda *values: flow_loss(ours, *values))(*given)
    assert {array.dtype for _, array in tree_flatten(gradients)} == {mx.float32} == {loss.dtype}
    assert {layer.dtype for name, layer in tree_flatten(ours.parameters()) if "deltas" not in name} == {mx.bfloat16}
    clean, _, t, _, txt, rope = given
    assert ours.forward_with_rope(clean, txt, t, *rope).dtype == mx.bfloat16


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("names", NAMES)
def test_diffusers_draws_the_same_with_the_written_file(plain, tmp_path, names):
    file = tmp_path / "a.safetensors"
    model, layers = trained()
    adapters = adapted(ported(plain), layers)
    written, metadata = lora_arrays({path: (own.down, own.up) for path, own in adapters.items()}, ALPHA, names)
    save_arrays(file, written, metadata)
    args = inputs(plain, HEIGHT, WIDTH)
    expected = theirs(model, *args)
    torch.manual_seed(3)
    loaded = tiny.transformer()
    pipe = Flux2KleinPipeline(None, None, None, None, loaded)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    assert relative_error(to_mlx(theirs(loaded, *args)), expected) <= EXACT
    ours = ported(plain)
    own = weights_of(ours)
    set_adapters(ours, [open_lora(str(file), ours, lambda: own)])
    assert relative_error(ours(*args), expected) <= EXACT
    assert (expected - theirs(plain, *args)).norm() > 3e-3 * expected.norm()


def test_some_of_a_fused_layer_in_names_of_bfl(plain, tmp_path):
    """Layers that BFL has fused are written as one, and the modulation of the end in BFL's order."""
    file = tmp_path / "a.safetensors"
    ours = ported(plain)
    targets = ["transformer_blocks.1.attn.to_k", "norm_out", "transformer_blocks.0.attn.add_q_proj"]
    adapters = add_adapters(ours, options(targets=targets))
    rng = np.random.default_rng(1)
    for adapter in adapters.values():
        adapter.up = mx.array(0.3 * rng.standard_normal(adapter.up.shape).astype(np.float32))
    args = inputs(plain, HEIGHT, WIDTH)
    expected = ours(*args)
    written, metadata = lora_arrays({path: (own.down, own.up) for path, own in adapters.items()}, ALPHA, "comfyui")
    assert {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in written} == {
        "diffusion_model.double_blocks.1.img_attn.qkv",
        "diffusion_model.double_blocks.0.txt_attn.qkv",
        "diffusion_model.final_layer.adaLN_modulation.1",
    }
    save_arrays(file, written, metadata)
    with safe_open(file, framework="numpy") as opened:
        assert opened.metadata()["format"] == "pt"
    again = ported(plain)
    own = weights_of(again)
    set_adapters(again, [open_lora(str(file), again, lambda: own)])
    assert relative_error(again(*args), to_torch(expected)) <= EXACT


def test_a_trained_file_draws_the_same_picture_in_diffusers(base_reference, tmp_path):
    """Of the command, on a base model, with guidance."""
    pipe, folder = base_reference
    data, output = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(data / f"{k}.png")
        (data / f"{k}.txt").write_text(f"picture {k}")
    small = ["--model", folder, "--resolution", 64, "--rank", 4, "--steps", 4, "--warmup", 0, "--learning-rate", 0.02]
    layers = ["--targets", "transformer_blocks", "single_transformer_blocks", "proj_out"]
    assert main([str(word) for word in (*small, *layers, "--data", data, "--output", output, "--quiet")]) == 0
    options = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 2.0, "max_sequence_length": 64}
    plain = pipe(prompt="a red fox", generator=torch.Generator().manual_seed(3), **options).images[0]
    pipe.load_lora_weights(output)
    try:
        expected = pipe(prompt="a red fox", generator=torch.Generator().manual_seed(3), **options).images[0]
    finally:
        pipe.unload_lora_weights()
    ours = Flux2Pipeline.from_pretrained(folder)
    ours.load_lora(output)
    assert_same_picture(ours("a red fox", seed=3, **options).images[0], expected)
    assert np.abs(np.asarray(plain, int) - np.asarray(expected)).max() > 8
