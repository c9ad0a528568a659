"""LoRAs: the velocity against diffusers' with the same file, and against weights merged by hand."""

import re

import mlx.core as mx
import pytest
import torch
from diffusers import Flux2KleinPipeline

from flux2_mlx import FluxKlein, FluxKleinParams, QuantizedFluxKlein
from flux2_mlx.adapters.lora import open_lora, set_adapters
from flux2_mlx.checkpoints.load import assign, load_weights
from flux2_mlx.device import weights_of
from tests import loras, tiny
from tests.parity.compare import EXACT, relative_error, to_torch
from tests.parity.test_transformer import inputs, ported, theirs


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return tiny.transformer()


@pytest.fixture
def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def velocity_of(weights):
    """torch's, with these weights."""
    torch.manual_seed(3)
    model = tiny.transformer()
    model.load_state_dict(weights)
    args = inputs(model, 64, 96)
    return theirs(model, *args)


def ways(model, file, **options):
    """Our velocity with a file beside the weights, and merged into them."""
    args = inputs(model, 64, 96)
    beside = ported(model)
    own = weights_of(beside)
    set_adapters(beside, [open_lora(str(file), beside, lambda: own, **options)])
    lora = open_lora(str(file), ported(model), lambda: own, merge=True, **options)
    merged = assign(FluxKlein(FluxKleinParams.from_config(model.config)), lora.apply(own), mx.float32, "test")
    list(load_weights(merged))
    return {"beside": beside(*args), "merged": merged(*args)}


def check(model, file, expected, bound=EXACT, **options):
    plain = theirs(model, *inputs(model, 64, 96))
    assert (expected - plain).norm() > 2e-3 * plain.norm(), "the file has to matter"
    for way, velocity in ways(model, file, **options).items():
        assert relative_error(velocity, expected) <= bound, way


@pytest.mark.parametrize("names", loras.NAMES)
@pytest.mark.parametrize("alpha", [None, 8])
def test_names_of_bfl(model, weights, tmp_path, names, alpha):
    layers = (*loras.LAYERS, loras.SWAPPED)
    merged = loras.write(tmp_path / "a.safetensors", weights, names=names, alpha=alpha, layers=layers)
    check(model, tmp_path / "a.safetensors", velocity_of(merged))


@pytest.mark.parametrize("names", loras.DIFFUSERS_NAMES)
def test_names_of_diffusers(model, weights, tmp_path, names):
    layers = (*loras.LAYERS, loras.SWAPPED)
    merged = loras.write(tmp_path / "a.safetensors", weights, names=names, alpha=2, layers=layers)
    check(model, tmp_path / "a.safetensors", velocity_of(merged))


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("form", loras.FORMS)
def test_forms(model, weights, tmp_path, form, dora):
    merged = loras.write(
        tmp_path / "a.safetensors",
        weights,
        form=form,
        dora=dora,
        alpha=1.5,
        scale=0.6,
        layers=(*loras.LAYERS, loras.SWAPPED),
    )
    check(model, tmp_path / "a.safetensors", velocity_of(merged), scale=0.6)


def test_layers_in_parts(model, weights, tmp_path):
    merged = loras.write_split(tmp_path / "a.safetensors", weights)
    check(model, tmp_path / "a.safetensors", velocity_of(merged))


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_in_the_header(model, weights, tmp_path, rslora):
    merged = loras.write_with_header(tmp_path / "a.safetensors", weights, rslora=rslora)
    check(model, tmp_path / "a.safetensors", velocity_of(merged))


def test_several_add_up(model, weights, tmp_path):
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    merged = weights
    for k, (file, form) in enumerate(zip(files, ("LoRA", "LoKr", "LoRA"), strict=True)):
        changed = loras.write(file, weights, form=form, seed=k, scale=0.5 + k)
        merged = {name: merged[name] + changed[name] - weights[name] for name in merged}
    ours = ported(model)
    own = weights_of(ours)
    set_adapters(ours, [open_lora(str(file), ours, lambda: own, scale=0.5 + k) for k, file in enumerate(files)])
    assert relative_error(ours(*inputs(model, 64, 96)), velocity_of(merged)) <= EXACT
    layer = ours.transformer_blocks[0].ff.linear_in
    assert [type(delta).__name__ for delta in layer.get("deltas", ())] in ([], ["LoKrDelta", "LoRADelta"])
    wide = ours.single_transformer_blocks[0].attn.to_qkv_mlp_proj
    assert [type(delta).__name__ for delta in wide.deltas] == ["LoKrDelta", "LoRADelta"], "thin products are one"
    set_adapters(ours, [])
    assert relative_error(ours(*inputs(model, 64, 96)), velocity_of(weights)) <= EXACT


@pytest.mark.parametrize("form", ["LoRA", "LoKr", "DoRA"])
def test_packed_weights_keep_what_is_beside_them(model, weights, tmp_path, form):
    """Equal to dense weights with the packing's error, and the change, in them."""
    packed = QuantizedFluxKlein.from_unquantized(ported(model), group_size=32)
    rounded = dict(weights)
    for path, layer in packed.named_modules():
        if "scales" in layer:
            dense = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=4)
            rounded[f"{path}.weight"] = to_torch(dense)
    file = tmp_path / "a.safetensors"
    merged = loras.write(file, rounded, form="LoRA" if form == "DoRA" else form, dora=form == "DoRA", alpha=2)
    own = weights_of(packed)
    set_adapters(packed, [open_lora(str(file), packed, lambda: own)])
    for rows in (1, 1 << 30):  # unpacked, and by the fused product
        for _, layer in packed.named_modules():
            if "scales" in layer:
                layer.dense_rows = rows
        assert relative_error(packed(*inputs(model, 64, 96)), velocity_of(merged)) <= 2 * EXACT


# ------------------------------------------------------------------------------------------------ diffusers itself


def by_diffusers(file, scale=1.0):
    torch.manual_seed(3)
    model = tiny.transformer()
    pipe = Flux2KleinPipeline(None, None, None, None, model)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="it")
    pipe.set_adapters("it", scale)
    return theirs(model, *inputs(model, 64, 96))


@pytest.mark.parametrize(
    ("names", "form", "alpha"),
    [
        ("diffusers", "LoRA", None),
        ("ai-toolkit", "LoRA", None),
        ("kohya", "LoRA", 8),
        ("ai-toolkit", "LoKr", None),
        ("ai-toolkit", "LoKr, right thin", 1.5),
        ("LyCORIS", "LoKr", None),
    ],
)
def test_files_that_diffusers_loads(model, weights, tmp_path, names, form, alpha):
    file = tmp_path / "a.safetensors"
    dropped = {"LyCORIS": r"(?!.*_blocks)", "kohya": "double_stream"}.get(names, "(?!)")  # by diffusers
    layers = [layer for layer in loras.LAYERS if not re.match(dropped, layer)]
    loras.write(file, weights, names=names, form=form, alpha=alpha, layers=layers)
    check(model, file, by_diffusers(file))
    check(model, file, by_diffusers(file, 0.5), scale=0.5)


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_header(model, weights, tmp_path, rslora):
    file = tmp_path / "a.safetensors"
    loras.write_with_header(file, weights, rslora=rslora)
    check(model, file, by_diffusers(file))


def test_a_file_that_diffusers_wrote(model, tmp_path):
    """Its LoRA of a transformer, in its names and with its header."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(3)
    trained = tiny.transformer()
    trained.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "linear_in", "to_qkv_mlp_proj"])
    )
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    expected = theirs(trained, *inputs(model, 64, 96))
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(trained),
        weight_name="a.safetensors",
        transformer_lora_adapter_metadata=trained.peft_config["default"].to_dict(),
    )
    check(model, tmp_path / "a.safetensors", expected)


def test_it_is_the_swapped_layer_that_diffusers_gets_wrong(model, weights, tmp_path):
    """If this fails, diffusers has learned to swap the halves of final_layer.adaLN_modulation.1, and the layer can go
    into test_files_that_diffusers_loads.
    """
    file = tmp_path / "a.safetensors"
    merged = loras.write(file, weights, layers=[loras.SWAPPED])
    expected = velocity_of(merged)
    assert (by_diffusers(file) - expected).norm() > 1e-3 * expected.norm()
    check(model, file, expected)
