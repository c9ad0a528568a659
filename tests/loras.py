"""Writers of LoRA files in the forms and under the names that are met, and what each of them does to the weights."""

import json
import math
import re

import torch
from safetensors.torch import save_file

from tests.formats import BFL, DOUBLE, QKV, SINGLE

# Layers of the tiny transformer by BFL's names, in the forms that a file may have: fused, split, swapped, global.
LAYERS = (
    "img_in",
    "time_in.in_layer",
    "double_stream_modulation_img.lin",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_attn.qkv",
    "double_blocks.0.img_attn.proj",
    "double_blocks.1.img_mlp.0",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.2.linear2",
    "final_layer.linear",
)
SWAPPED = "final_layer.adaLN_modulation.1"


def places(bfl):
    """diffusers' layers that one of BFL's becomes, in the order of its rows."""
    for ours, theirs in BFL.items():
        if bfl == theirs:
            return [ours]
    kind, number, inner = bfl.split(".", 2)
    block = f"{'transformer_blocks' if kind == 'double_blocks' else 'single_transformer_blocks'}.{number}"
    if inner in QKV:
        return [f"{block}.{name}" for name in QKV[inner]]
    names = DOUBLE if kind == "double_blocks" else SINGLE
    return [f"{block}.{ours}" for ours, theirs in names.items() if theirs == inner]


def rows_of(weights, bfl):
    """The weight of BFL's layer."""
    weight = torch.cat([weights[f"{name}.weight"] for name in places(bfl)])
    return torch.cat(weight.chunk(2)[::-1]) if bfl == SWAPPED else weight


def put(weights, bfl, weight):
    """Weights with another one in BFL's layer."""
    weight = torch.cat(weight.chunk(2)[::-1]) if bfl == SWAPPED else weight
    names = places(bfl)
    return weights | {f"{name}.weight": part for name, part in zip(names, weight.chunk(len(names)), strict=True)}


def random(*shape):
    return 0.15 * torch.randn(*shape)


def lora(outputs, inputs, rank=4):
    """(arrays, the change) without alpha."""
    down, up = random(rank, inputs), random(outputs, rank)
    return {"lora_A.weight": down, "lora_B.weight": up}, up @ down


def loha(outputs, inputs, rank=3, tucker=False):
    arrays, factors = {}, []
    for k in (1, 2):
        a = random(rank, outputs) if tucker else random(outputs, rank)
        b, core = random(rank, inputs), 8 * random(rank, rank)
        arrays |= {f"hada_w{k}_a": a, f"hada_w{k}_b": b} | ({f"hada_t{k}": core} if tucker else {})
        factors.append(torch.einsum("ij,io,jn->on", core, a, b) if tucker else a @ b)
    return arrays, factors[0] * factors[1]


def lokr(outputs, inputs, parts=("w1", "w2"), tucker=False, rank=2, left=4):
    """Of ``parts`` those that are no product of two."""
    arrays, factors = {}, []
    for name, rows, columns in (("w1", left, left), ("w2", outputs // left, inputs // left)):
        if name in parts:
            factors.append(random(rows, columns))
            arrays[f"lokr_{name}"] = factors[-1]
        elif name == "w2" and tucker:
            a, b, core = random(rank, rows), random(rank, columns), 8 * random(rank, rank)
            arrays |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
            factors.append(torch.einsum("ij,io,jn->on", core, a, b))
        else:
            a, b = random(rows, rank), random(rank, columns)
            arrays |= {f"lokr_{name}_a": a, f"lokr_{name}_b": b}
            factors.append(a @ b)
    return arrays, torch.kron(*factors)


FORMS = {
    "LoRA": lora,
    "LoHa": loha,
    "LoHa with a core": lambda o, i: loha(o, i, tucker=True),
    "LoKr": lokr,
    "LoKr, right thin": lambda o, i: lokr(o, i, ("w1",)),
    "LoKr, left thin": lambda o, i: lokr(o, i, ("w2",)),
    "LoKr, both thin": lambda o, i: lokr(o, i, ()),
    "LoKr with a core": lambda o, i: lokr(o, i, ("w1",), tucker=True),
}
RANKS = {"LoRA": 4, "LoHa": 3, "LoHa with a core": 3, "LoKr": None}  # of the others 2


def down_up(arrays):
    names = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    return {names.get(name, name): array for name, array in arrays.items()}


# How a layer is called, by BFL's name or by diffusers', and how its arrays are.
NAMES = {
    "ai-toolkit": (lambda bfl: f"diffusion_model.{bfl}", dict),
    "ComfyUI": (lambda bfl: f"diffusion_model.{bfl}", down_up),
    "PEFT": (lambda bfl: f"base_model.model.{bfl}", dict),
    "bare": (lambda bfl: bfl, dict),
    "kohya": (lambda bfl: f"lora_unet_{bfl.replace('.', '_')}", down_up),
    "kohya, broken": (lambda bfl: f"lora_unet_{bfl.replace('.', '_')}_", down_up),  # sd-scripts, issue 1463
    "musubi": (lambda bfl: f"diffusion_model.{bfl.replace('attn.', 'attn_')}", dict),  # its convert_lora.py
    "unet": (lambda bfl: f"unet.{bfl}", dict),
}


def mflux(name):
    """The path of mflux's own module (its Flux2 transformer)."""
    name = re.sub(r"^(transformer_blocks\.\d+\.attn\.to_out)\.0$", r"\1", name)
    return f"transformer.{name.replace('time_guidance_embed.timestep_embedder.', 'time_guidance_embed.')}"


def swift(name):
    """As flux-2-swift-mlx calls a layer (its getLoRAParameters)."""
    name = re.sub(r"\.(ff|ff_context)\.linear_in$", r".\1.activation.proj", name)
    return name.replace("to_qkv_mlp_proj", "to_qkv_mlp")


DIFFUSERS_NAMES = {
    "mflux": mflux,
    "swift": swift,
    "module": lambda name: f"module.{name}",
    "diffusers": lambda name: f"transformer.{name}",
    "expanded": lambda name: f"diffusion_model.{name}",
    "misspelt": lambda name: f"diffusion_model.{name}".replace(".transformer_blocks", ".sformer_blocks"),
    "LyCORIS": lambda name: f"lycoris_{name.replace('.', '_')}",
    "OneTrainer": lambda name: f"lora_transformer_{name.replace('.', '_')}",
}


def write(path, weights, *, names="ai-toolkit", form="LoRA", alpha=None, dora=False, layers=LAYERS, scale=1.0, seed=0):
    """A file, and the weights (under diffusers' names) with what it says in them.

    Args:
        alpha: written for each layer, unless None; then the factor is 1.
        dora: with the lengths that rows are to have.
        scale: that it is loaded with.
    """
    torch.manual_seed(seed)
    tensors, changed = {}, dict(weights)
    called, spelt = NAMES.get(names, (None, dict))
    for bfl in layers:
        pieces = [(called(bfl), rows_of(weights, bfl))] if called else []
        if not called:
            pieces = [(DIFFUSERS_NAMES[names](name), weights[f"{name}.weight"]) for name in places(bfl)]
        own = []
        for name, weight in pieces:
            arrays, change = FORMS[form](*weight.shape)
            rank = RANKS.get(form, 2)
            if alpha is not None:
                arrays["alpha"] = torch.tensor(float(alpha))
                change = change if rank is None else change * alpha / rank
            whole = weight + change
            if dora:
                lengths = weight.norm(dim=1, keepdim=True) * (1 + random(len(weight), 1).abs())
                arrays["dora_scale"] = lengths
                whole = lengths / whole.norm(dim=1, keepdim=True) * whole
            own.append(weight + scale * (whole - weight))
            tensors |= {f"{name}.{kind}": array.contiguous() for kind, array in spelt(arrays).items()}
        merged = torch.cat(own)
        if not called and bfl == SWAPPED:
            merged = torch.cat(merged.chunk(2)[::-1])  # put expects BFL's order
        changed = put(changed, bfl, merged)
    save_file(tensors, path)
    return changed


def write_split(path, weights):
    """OneTrainer's file: BFL's fused layers in parts of their own; and ComfyUI's two parts."""
    torch.manual_seed(5)
    tensors, changed = {}, dict(weights)
    for bfl, ends in (
        ("double_blocks.0.img_attn.qkv", None),
        ("single_blocks.1.linear1", (64, 128, 192)),
        ("single_blocks.2.linear1", (192,)),
    ):
        weight = rows_of(weights, bfl)
        own = []
        for k, rows in enumerate(weight.chunk(3) if ends is None else weight.tensor_split(ends)):
            part = f"{bfl}.{k}"
            if len(ends or ()) == 1:  # ComfyUI's lora.py
                part = f"{bfl}_{('qkv', 'mlp')[k]}"
            elif k == 1:
                own.append(rows)  # left out
                continue
            arrays, change = lora(*rows.shape)
            tensors |= {f"diffusion_model.{part}.{kind}": array for kind, array in down_up(arrays).items()}
            own.append(rows + change)
        changed = put(changed, bfl, torch.cat(own))
    save_file(tensors, path)
    return changed


def write_with_header(path, weights, *, rslora=False):
    """diffusers' own file, its alphas in the header: 8 of rank 4, but 2 for one layer."""
    torch.manual_seed(6)
    tensors, changed = {}, dict(weights)
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"):
        weight = weights[f"{name}.weight"]
        arrays, change = lora(*weight.shape)
        alpha = 2 if name.endswith("to_q") else 8
        tensors |= {f"transformer.{name}.{kind}": array for kind, array in arrays.items()}
        changed[f"{name}.weight"] = weight + change * alpha / (math.sqrt(4) if rslora else 4)
    config = {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"transformer_blocks.0.attn.to_q": 2},
        "use_rslora": rslora,
        "target_modules": ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"],
        "peft_type": "LORA",
    }
    metadata = {f"transformer.{name}": value for name, value in config.items()}
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return changed
