"""Every form of adapter with alpha in every place that it can stand: against weights that PEFT merged, and against
LyCORIS's arithmetic (Apache-2.0; lycoris/modules: scale = alpha / dim, and 1 for a LoKr of two whole matrices).
"""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flux2_mlx import CheckpointError
from flux2_mlx.adapters.lora import open_lora, set_adapters
from flux2_mlx.device import weights_of
from tests import tiny
from tests.parity.test_transformer import ported

LAYERS = ("transformer_blocks.0.ff.linear_out", "transformer_blocks.1.attn.to_add_out")
TARGETS = {"target_modules": list(LAYERS)}
FIRST = r"transformer_blocks\.0\.ff\.linear_\w+"
SECOND = "attn.to_add_out"

LORA = {"init_lora_weights": False}
OTHER = {"init_weights": False}
BOTH = OTHER | {"decompose_both": True}

CONFIGS = {
    "LoRA": LoraConfig(r=4, lora_alpha=8, **LORA, **TARGETS),
    "LoRA of rank": LoraConfig(r=4, lora_alpha=8, rank_pattern={SECOND: 2}, **LORA, **TARGETS),
    "LoRA of pattern": LoraConfig(
        r=4, lora_alpha=8, alpha_pattern={"attn.*": 5, "transformer_blocks.*": 1}, **LORA, **TARGETS
    ),
    "LoRA anchored": LoraConfig(r=4, lora_alpha=8, alpha_pattern={"^" + FIRST: 1, "o_add_out": 7}, **LORA, **TARGETS),
    "rsLoRA": LoraConfig(r=4, lora_alpha=8, use_rslora=True, **LORA, **TARGETS),
    "rsLoRA of pattern": LoraConfig(r=4, lora_alpha=8, use_rslora=True, alpha_pattern={FIRST: 1}, **LORA, **TARGETS),
    "DoRA": LoraConfig(r=4, lora_alpha=8, use_dora=True, **LORA, **TARGETS),
    "DoRA of pattern": LoraConfig(r=4, lora_alpha=8, use_dora=True, alpha_pattern={SECOND: 2}, **LORA, **TARGETS),
    "LoHa": LoHaConfig(r=4, alpha=2, **OTHER, **TARGETS),
    "LoHa of patterns": LoHaConfig(
        r=4, alpha=2, alpha_pattern={FIRST: 9}, rank_pattern={SECOND: 3}, **OTHER, **TARGETS
    ),
    "LoKr": LoKrConfig(r=3, alpha=2, **OTHER, **TARGETS),
    "LoKr of pattern": LoKrConfig(r=3, alpha=2, alpha_pattern={FIRST: 9}, **OTHER, **TARGETS),
    "LoKr, both thin": LoKrConfig(r=2, alpha=8, **BOTH, **TARGETS),
    "LoKr, both whole": LoKrConfig(r=64, alpha=32, **OTHER, **TARGETS),
    "LoKr, both whole, of patterns": LoKrConfig(
        r=64, alpha=32, alpha_pattern={FIRST: 9}, rank_pattern={FIRST: 50}, **OTHER, **TARGETS
    ),
}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(3)
    return {name: value.clone() for name, value in tiny.transformer().state_dict().items()}


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(3)
    return ported(tiny.transformer())


def by_peft(config, folder):
    """PEFT's files in a folder, and the weights of the layers that it merges them into."""
    torch.manual_seed(3)
    model = get_peft_model(tiny.transformer(), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change = 1 + 0.3 * torch.rand_like(parameter)
                parameter.copy_(parameter * change if "magnitude" in name else 0.4 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    return {layer: merged[f"{layer}.weight"] for layer in LAYERS}


def check(ours, file, base, merged, most=2e-6):
    """The layers, with the file merged into them and beside them, against merged weights."""
    own = weights_of(ours)
    fused = open_lora(str(file), ours, lambda: own, merge=True).apply(own)
    set_adapters(ours, [open_lora(str(file), ours, lambda: own)])
    modules = dict(ours.named_modules())
    try:
        for name, expected in merged.items():
            change = (expected - base[f"{name}.weight"]).numpy()
            assert np.linalg.norm(change) > 0.1
            found = np.array(fused[f"{name}.weight"].load()) - base[f"{name}.weight"].numpy()
            assert np.linalg.norm(found - change) < most * np.linalg.norm(expected), name
            x = torch.randn(3, expected.shape[1])
            wanted = (x @ expected.T).numpy()
            beside = np.array(modules[name](mx.array(x.numpy())))
            assert np.linalg.norm(beside - wanted) < 5 * most * np.linalg.norm(wanted), name
    finally:
        set_adapters(ours, [])


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # o_add_out, a part of a name
@pytest.mark.parametrize("name", CONFIGS)
def test_alphas_of_peft(ours, base, tmp_path, name):
    check(ours, tmp_path, base, by_peft(CONFIGS[name], tmp_path))


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "LoKr", "LoKr, both thin", "LoKr, both whole", "DoRA"])
def test_a_config_counts_for_pefts_own_file(ours, base, tmp_path, name):
    """Under another name too, while the ranks are its; not for another's file beside it."""
    merged = by_peft(CONFIGS[name], tmp_path)
    arrays = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "renamed.safetensors")
    check(ours, tmp_path / "renamed.safetensors", base, merged)
    # The same arrays under diffusers' prefix: alpha is the rank, as of a file without a config.
    others = {key.replace("base_model.model.", "transformer."): array for key, array in arrays.items()}
    (tmp_path / "alone").mkdir()
    for folder in (tmp_path, tmp_path / "alone"):
        save_file(others, folder / "other.safetensors")
    own = weights_of(ours)
    beside, alone = (
        open_lora(str(folder / "other.safetensors"), ours, lambda: own, merge=True)
        for folder in (tmp_path, tmp_path / "alone")
    )
    assert beside.summary == f"{alone.summary}, adapter_config.json beside it is not its own and not applied"
    for layer in LAYERS:
        first, second = (lora.apply(own)[f"{layer}.weight"].load() for lora in (beside, alone))
        assert np.array_equal(np.array(first), np.array(second))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if name != "LoKr, both whole":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 77}))
        told = open_lora(str(tmp_path / "renamed.safetensors"), ours, lambda: own).summary
        assert told.endswith("adapter_config.json beside it is of other ranks and not applied")


def random(*shape):
    return 0.4 * torch.randn(*shape)


def arrays_of(form, outputs, inputs, rank):
    """(arrays, the change without alpha, whether alpha counts) of a form, as LyCORIS has it."""
    if form == "LoRA":
        down, up = random(rank, inputs), random(outputs, rank)
        return {"lora_down.weight": down, "lora_up.weight": up}, up @ down, True
    if form == "LoHa":
        a1, b1, a2, b2 = random(outputs, rank), random(rank, inputs), random(outputs, rank), random(rank, inputs)
        return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, (a1 @ b1) * (a2 @ b2), True
    arrays, factors = {}, []
    for name, rows, columns in (("w1", 4, 4), ("w2", outputs // 4, inputs // 4)):
        if name in form:  # thin
            arrays |= {f"lokr_{name}_a": random(rows, rank), f"lokr_{name}_b": random(rank, columns)}
            factors.append(arrays[f"lokr_{name}_a"] @ arrays[f"lokr_{name}_b"])
        else:
            arrays[f"lokr_{name}"] = random(rows, columns)
            factors.append(arrays[f"lokr_{name}"])
    return arrays, torch.kron(*factors), form != "LoKr"


FORMS = ("LoRA", "LoHa", "LoKr", "LoKr w1", "LoKr w2", "LoKr w1 w2")


def write(file, base, form, places, *, dora=False, dtype=torch.float32, alpha=6.0, prefix="diffusion_model."):
    """A file with alpha in some places, and the weights that it is to make."""
    torch.manual_seed(5)
    tensors, merged, metadata = {}, {}, {}
    for name in LAYERS:
        weight = base[f"{name}.weight"]
        arrays, change, counts = arrays_of(form, *weight.shape, rank=4)
        factor = alpha / 4 if counts and places else 1
        whole = weight + factor * change
        if dora:
            lengths = weight.norm(dim=1, keepdim=True) * (1 + torch.rand(len(weight), 1))
            arrays["dora_scale"] = lengths
            whole = lengths * whole / whole.norm(dim=1, keepdim=True)
        if "tensor" in places:
            arrays["alpha"] = torch.tensor(alpha).to(dtype)
        merged[name] = whole
        tensors |= {f"{prefix}{name}.{kind}": array.contiguous() for kind, array in arrays.items()}
    if "swift" in places:
        metadata = {"lora_rank": "4", "lora_alpha": str(alpha)}
    if "config" in places:  # which LyCORIS, kohya and ai-toolkit never write, and so is another's
        file.with_name("adapter_config.json").write_text(json.dumps({"lora_alpha": 32, "alpha": 32, "r": 4}))
    save_file(tensors, file, metadata)
    return merged


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("places", [(), ("tensor",), ("tensor", "config")], ids=["none", "tensor", "tensor, config"])
def test_alphas_of_lycoris(ours, base, tmp_path, form, places, dora):
    check(ours, tmp_path / "a.safetensors", base, write(tmp_path / "a.safetensors", base, form, places, dora=dora))


def test_alphas_of_swifts_header(ours, base, tmp_path):
    check(
        ours, tmp_path / "a.safetensors", base, write(tmp_path / "a.safetensors", base, "LoRA", ("swift",), prefix="")
    )


def test_an_alpha_that_means_nothing_may_be_infinite(ours, base, tmp_path):
    """As ai-toolkit's is: 9,999,999,999 in float16."""
    file = tmp_path / "a.safetensors"
    merged = write(file, base, "LoKr", ("tensor",), alpha=9999999999.0, dtype=torch.float16)
    check(ours, file, base, merged)
    write(file, base, "LoKr w2", ("tensor",), alpha=9999999999.0, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"alpha has values that are not finite"):
        open_lora(str(file), ours, dict)


BROKEN = {
    '{"lora_alpha": 1%s, "r": 4}' % ("0" * 400): "an alpha that is no number",
    '{"lora_alpha": 1%s, "r": 4}' % ("0" * 5000): "cannot be read",
    '{"lora_alpha": NaN, "r": 4}': "an alpha that is no number",
    '{"lora_alpha": true, "r": 4}': "an alpha that is no number",
    '{"lora_alpha": 8, "r": 0}': "a rank that is not above 0",
    '{"lora_alpha": 8, "r": "4"}': "a rank that is no number",
    '{"lora_alpha": 8, "r": 4, "alpha_pattern": {"a(": 4}}': "alpha_pattern has what is no regular expression",
    '{"lora_alpha": 8, "r": 4, "rank_pattern": {"*": 4}}': "rank_pattern has what is no regular expression",
    '{"lora_alpha": 8, "r": 4, "alpha_pattern": [1]}': "cannot be read",
}


@pytest.mark.parametrize("config", BROKEN, ids=range(len(BROKEN)))
def test_configs_that_cannot_be_read(ours, tmp_path, config):
    save_file(
        {f"base_model.model.{LAYERS[1]}.lora_{kind}.weight": torch.ones(*shape)
         for kind, shape in {"A": (4, 64), "B": (64, 4)}.items()}, tmp_path / "adapter_model.safetensors",
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=BROKEN[config]) as fault:
        open_lora(str(tmp_path), ours, dict)
    assert "\n" not in str(fault.value)


def test_pefts_oft_is_named(ours, tmp_path):
    by_peft(OFTConfig(r=0, oft_block_size=32, init_weights=False, **TARGETS), tmp_path)
    with pytest.raises(CheckpointError, match=r"2 keys are not used, of a form that is not read \(OFT\)"):
        open_lora(str(tmp_path), ours, dict)


def test_an_alpha_of_null_is_the_rank(ours, base, tmp_path):
    merged = write(tmp_path / "adapter_model.safetensors", base, "LoRA", ())
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": null, "r": null, "alpha_pattern": null}')
    check(ours, tmp_path, base, merged)


def test_two_whole_matrices_need_the_rank_that_alpha_is_divided_by(ours, base, tmp_path):
    write(tmp_path / "adapter_model.safetensors", base, "LoKr", ())
    (tmp_path / "adapter_config.json").write_text('{"alpha": 8}')
    with pytest.raises(CheckpointError, match=r"has an alpha without the rank \(r\)"):
        open_lora(str(tmp_path), ours, dict)


def test_full_differences(ours, base, tmp_path):
    """Of a matrix, of a norm, of a fused layer, as ComfyUI's extraction and LyCORIS ("w_norm") write them; of a matrix
    in F8_E5M2 too. A bias that is zero changes nothing.
    """
    torch.manual_seed(6)
    tensors, merged = {}, {}
    names = {
        "diffusion_model.double_blocks.0.img_attn.proj.diff": ["transformer_blocks.0.attn.to_out.0"],
        "diffusion_model.double_blocks.1.img_attn.qkv.diff": [f"transformer_blocks.1.attn.to_{name}" for name in "qkv"],
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": ["transformer_blocks.0.attn.norm_q"],
        "lycoris_transformer_blocks_1_attn_norm_added_k.w_norm": ["transformer_blocks.1.attn.norm_added_k"],
        "lycoris_single_transformer_blocks_0_attn_norm_k.w_norm": ["single_transformer_blocks.0.attn.norm_k"],
    }
    for key, layers in names.items():
        weights = [base[f"{layer}.weight"] for layer in layers]
        tensors[key] = (0.3 * torch.randn(sum(map(len, weights)), *weights[0].shape[1:])).half()
        changes = tensors[key].float().chunk(len(layers))
        merged |= {layer: weight + 0.6 * part for layer, weight, part in zip(layers, weights, changes, strict=True)}
    tensors["diffusion_model.double_blocks.0.img_attn.proj.diff_b"] = torch.zeros(64)
    save_file(tensors, tmp_path / "a.safetensors")
    own = weights_of(ours)
    options = {"scale": 0.6}
    lora = open_lora(str(tmp_path / "a.safetensors"), ours, lambda: own, merge=True, **options)
    assert lora.summary == "full difference, 4 of 39 layers, 3 norms"
    fused = lora.apply(own)
    set_adapters(ours, [open_lora(str(tmp_path / "a.safetensors"), ours, lambda: own, **options)])
    try:
        for name, expected in merged.items():
            assert torch.equal(torch.tensor(np.array(fused[f"{name}.weight"].load())), expected), name
            x = torch.randn(3, expected.shape[-1])
            if expected.ndim == 2:
                wanted = x @ expected.T
            else:
                wanted = torch.nn.functional.rms_norm(x, (expected.shape[0],), expected, ours.params.eps)
            found = np.array(dict(ours.named_modules())[name](mx.array(x.numpy())))
            assert np.linalg.norm(found - wanted.numpy()) < 1e-5 * wanted.norm(), name
    finally:
        set_adapters(ours, [])


def test_a_lora_in_e5m2(ours, base, tmp_path):
    weight = base[f"{LAYERS[0]}.weight"]
    down, up = (random(*shape).to(torch.float8_e5m2) for shape in ((4, weight.shape[1]), (weight.shape[0], 4)))
    bias = torch.zeros(len(weight))  # PEFT's lora_bias
    tensors = {f"{LAYERS[0]}.lora_A.weight": down, f"{LAYERS[0]}.lora_B.weight": up, f"{LAYERS[0]}.lora_B.bias": bias}
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    check(ours, tmp_path / "a.safetensors", base, {LAYERS[0]: weight + up.float() @ down.float()})
