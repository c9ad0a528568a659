"""The transformer's weights under every name that files give them, and back.

Names that are understood, recognized by the names themselves: diffusers (the modules' own), BFL's and ComfyUI's single
files, mflux's, flux-2-swift-mlx's; and those of LoRAs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import mlx.core as mx

from ...errors import CheckpointError, InputError, OtherModelError
from ...lazy import array_of, concat_rows, slice_rows
from ..config import FluxKleinParams
from .common import NUMBER, Names, block_count, dense_columns, gather

_BFL = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_BFL_BLOCKS: dict[str, dict[str, tuple[str, ...]]] = {
    "double_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.norm.query_norm": ("attn.norm_q",),
        "img_attn.norm.key_norm": ("attn.norm_k",),
        "txt_attn.norm.query_norm": ("attn.norm_added_q",),
        "txt_attn.norm.key_norm": ("attn.norm_added_k",),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    "single_blocks": {
        "linear1": ("attn.to_qkv_mlp_proj",),
        "linear2": ("attn.to_out",),
        "norm.query_norm": ("attn.norm_q",),
        "norm.key_norm": ("attn.norm_k",),
    },
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_BFL_BLOCK = re.compile(rf"(double_blocks|single_blocks)\.({NUMBER})\.(.+)")

# mflux's names of the same modules.
_MFLUX = (
    (re.compile(r"^time_guidance_embed\.linear_"), "time_guidance_embed.timestep_embedder.linear_"),
    (re.compile(r"^(transformer_blocks\.\d+\.attn\.to_out)\.(?=weight|scales|biases)"), r"\1.0."),
)

# flux-2-swift-mlx's, in snake case: properties of its Swift classes, see Sources/Flux2Core/Transformer of
# https://github.com/VincentGourbin/flux-2-swift-mlx.
_SWIFT = {
    ".linear1.": ".linear_1.",
    ".linear2.": ".linear_2.",
    ".activation.proj.": ".linear_in.",
    ".to_qkv_mlp.": ".to_qkv_mlp_proj.",
}
_SWIFT_MARK = "xEmbedder.weight"


def _from_swift(name: str) -> str:
    name = re.sub(r"(?<=[a-zA-Z])(?=[A-Z])", "_", name).lower()
    for theirs, ours in _SWIFT.items():
        name = name.replace(theirs, ours)
    return name


def _diffusers_modules(module: str) -> tuple[str, ...]:
    """The diffusers modules that one of BFL's becomes: three of a fused qkv, else one; unknown names stay."""
    block = _BFL_BLOCK.fullmatch(module)
    if not block:
        return _BFL.get(module, (module,))
    kind, number, inner = block.groups()
    return tuple(f"{_BLOCKS[kind]}.{number}.{name}" for name in _BFL_BLOCKS[kind].get(inner, (inner,)))


def _swap_halves(weight: Any) -> Any:
    half = weight.shape[0] // 2
    return concat_rows([slice_rows(weight, half, 2 * half), slice_rows(weight, 0, half)])


def rename_transformer(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's weights under the modules' names: diffusers' stay, BFL's, ComfyUI's, mflux's and
    flux-2-swift-mlx's are renamed, fused q, k, v split by rows, and BFL's final modulation turned from (shift, scale)
    to (scale, shift).

    Raises:
        CheckpointError: for a weight that is there under two names, and for a number where a matrix is expected.
    """
    is_swift = _SWIFT_MARK in weights
    weights = {_from_swift(name) if is_swift else name: weight for name, weight in weights.items()}
    if "time_guidance_embed.linear_1.weight" in weights:  # mflux's: a bias that some of its versions made up
        weights.pop("norm_out.linear.bias", None)
    return gather(renamed for name, weight in weights.items() for renamed in _renamed(name, weight))


def _renamed(name: str, weight: Any) -> list[tuple[str, Any]]:
    module, _, kind = name.rpartition(".")
    targets = _diffusers_modules(module)
    if targets == (module,):
        for pattern, replacement in _MFLUX:
            name = pattern.sub(replacement, name)
        return [(name, weight)]
    kind = "weight" if kind == "scale" else kind  # BFL calls a norm's weight scale
    if weight.ndim == 0 and (len(targets) > 1 or module == "final_layer.adaLN_modulation.1"):
        raise CheckpointError(f"{name} is a single number, and a matrix is expected")
    if module == "final_layer.adaLN_modulation.1":
        weight = _swap_halves(weight)
    if len(targets) == 1:
        return [(f"{targets[0]}.{kind}", weight)]
    third = weight.shape[0] // 3
    return [(f"{target}.{kind}", slice_rows(weight, k * third, (k + 1) * third)) for k, target in enumerate(targets)]


# What trainers and converters of LoRAs call the same layers.
_LORA_NAMES = (
    (re.compile(r"(transformer_blocks\.\d+\.attn\.to_out)\.0"), r"\1"),  # mflux's
    (re.compile(r"time_guidance_embed\.timestep_embedder\.(linear_\d)"), r"time_guidance_embed.\1"),  # mflux's
    (re.compile(r"(transformer_blocks\.\d+\.ff(?:_context)?)\.linear_in"), r"\1.activation.proj"),  # swift's
    (re.compile(r"(single_transformer_blocks\.\d+\.attn\.to_qkv_mlp)_proj"), r"\1"),  # flux-2-swift-mlx's
    (re.compile(r"(double_blocks\.\d+\.(?:img|txt)_attn)\.(qkv|proj)"), r"\1_\2"),  # musubi-tuner's convert_lora
    (re.compile(r"transformer_blocks\.(.+)"), r"sformer_blocks.\1"),  # a misspelling that is met
)

# Of a layer, its outputs from one up to another.
Rows = tuple[str, int, int]


def lora_layers(outputs: Mapping[str, int], hidden: int) -> dict[str, tuple[Rows, ...]]:
    """Every name that files of LoRAs have for the transformer's layers, and what the outputs of a layer of that name
    are, in their order.

    The names are diffusers', BFL's, those of OneTrainer, which splits BFL's fused layers ("qkv.0", "linear1.3"), of
    ComfyUI, which does so too ("linear1_qkv"), those of diffusers with q, k and v fused, and those of _LORA_NAMES.

    Args:
        outputs: how many each layer has, by its path; of a norm, its size.
        hidden: the transformer's width.
    """

    def whole(*paths: str) -> tuple[Rows, ...]:
        return tuple((path, 0, outputs[path]) for path in paths)

    names = {path: whole(path) for path in outputs}
    modules = [*_BFL]
    for bfl, ours in _BLOCKS.items():
        modules += [f"{bfl}.{k}.{name}" for k in range(block_count(outputs, ours)) for name in _BFL_BLOCKS[bfl]]
    for module in modules:
        targets = _diffusers_modules(module)
        if not all(target in outputs for target in targets):
            continue
        names[module] = whole(*targets)
        if len(targets) > 1:
            names |= {f"{module}.{k}": whole(target) for k, target in enumerate(targets)}
            block, _, first = targets[0].rpartition(".")
            names[f"{block}.{'to_qkv' if first == 'to_q' else 'to_added_qkv'}"] = whole(*targets)
        if module.endswith(".linear1"):
            ends = [0, hidden, 2 * hidden, 3 * hidden, outputs[targets[0]]]
            names |= {f"{module}.{k}": ((targets[0], *part),) for k, part in enumerate(pairwise(ends))}
            names[f"{module}_qkv"], names[f"{module}_mlp"] = (
                ((targets[0], 0, ends[3]),),
                ((targets[0], ends[3], ends[4]),),
            )
    size = outputs["norm_out.linear"]
    names["final_layer.adaLN_modulation.1"] = (
        ("norm_out.linear", size // 2, size),
        ("norm_out.linear", 0, size // 2),
    )
    for pattern, replacement in _LORA_NAMES:
        names |= {pattern.sub(replacement, name): rows for name, rows in names.items() if pattern.fullmatch(name)}
    return names


def bfl_transformer(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer of dense weights under BFL's names: the inverse of sanitize_flux2_klein_weights."""
    named: dict[str, Any] = {}
    for name in weights:
        if not name.endswith(".weight"):
            raise InputError(f"{name} is packed, and BFL's files hold no packed weights")
    tops = {targets[0]: module for module, targets in _BFL.items()}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module in tops:
            weight = _swap_halves(weight) if module == "norm_out.linear" else weight
            named[f"{tops[module]}.weight"] = weight
    for bfl, ours in _BLOCKS.items():
        for number in range(block_count(weights, ours)):
            for inner, targets in _BFL_BLOCKS[bfl].items():
                parts = [weights.get(f"{ours}.{number}.{target}.weight") for target in targets]
                if all(part is not None for part in parts):
                    kind = "scale" if inner.endswith("_norm") else "weight"
                    named[f"{bfl}.{number}.{inner}.{kind}"] = concat_rows(parts) if len(parts) > 1 else parts[0]
    return named


def bfl_lora(layers: Mapping[str, tuple[mx.array, mx.array]]) -> dict[str, tuple[mx.array, mx.array]]:
    """A LoRA's down (R, inputs) and up (outputs, R) of each layer, by its path, under BFL's names. Of a fused q, k, v
    down has the ranks of all three, and up a block for each; what is not there is left out, its outputs zero.
    """
    modules: dict[str, tuple[str, ...]] = dict(_BFL)
    for bfl, ours in _BLOCKS.items():
        for number in range(block_count(layers, ours)):
            for inner, targets in _BFL_BLOCKS[bfl].items():
                modules[f"{bfl}.{number}.{inner}"] = tuple(f"{ours}.{number}.{target}" for target in targets)
    named = {}
    for module, targets in modules.items():
        present = [target for target in targets if target in layers]
        if not present:
            continue
        down = mx.concatenate([layers[target][0] for target in present])
        blocks = []
        for target in targets:
            own = layers[target][1] if target in layers else layers[present[0]][1][:, :0]
            before = sum(layers[other][1].shape[1] for other in present if other in targets[: targets.index(target)])
            blocks.append(mx.pad(own, [(0, 0), (before, down.shape[0] - before - own.shape[1])]))
        up = mx.concatenate(blocks)
        named[module] = down, array_of(_swap_halves(up)) if module == "final_layer.adaLN_modulation.1" else up
    return named


def klein_params(weights: Mapping[str, Any]) -> FluxKleinParams:
    """The transformer's shape, inferred from its sanitized weights; what no shape determines is klein's.

    Raises:
        CheckpointError: where they are not those of a FLUX.2 [klein] transformer.
    """
    first = "transformer_blocks.0."
    if {"vector_in.in_layer.weight", f"{first}img_mod.lin.weight", f"{first}norm1.linear.weight"} & weights.keys():
        raise OtherModelError("the transformer is FLUX.1's (schnell, dev, kontext), not FLUX.2 [klein]'s")
    if {"guidance_in.in_layer.weight", "time_guidance_embed.guidance_embedder.linear_1.weight"} & weights.keys():
        raise OtherModelError("the transformer has a guidance embedding: this is FLUX.2-dev, not FLUX.2 [klein]")
    try:
        hidden, in_channels = (weights[f"{name}.weight"].shape[0] for name in ("x_embedder", "proj_out"))
        known = ("norm_out.linear", "single_stream_modulation.linear", "transformer_blocks.0.attn.to_q")  # from hidden
        packed = [scales for name in known if (scales := weights.get(f"{name}.scales")) is not None]
        group = hidden // packed[0].shape[1] if packed else 32  # GGUF's, where all of these are dense
        head_dim = weights["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
        return FluxKleinParams(
            in_channels=in_channels,
            hidden_size=hidden,
            txt_embed_dim=dense_columns(weights, "context_embedder", group),
            num_heads=hidden // head_dim,
            mlp_ratio=weights["transformer_blocks.0.ff.linear_in.weight"].shape[0] / (2 * hidden),
            depth=block_count(weights, "transformer_blocks"),
            depth_single=block_count(weights, "single_transformer_blocks"),
            head_dim=head_dim,
            axes_dims_rope=(head_dim // 4,) * 4,
            timestep_channels=dense_columns(weights, "time_guidance_embed.timestep_embedder.linear_1", group),
        )
    except KeyError as error:
        raise CheckpointError(f"no FLUX.2 [klein] transformer: there is no {error.args[0]}") from None
    except (IndexError, ZeroDivisionError, ValueError) as error:
        raise CheckpointError(f"no FLUX.2 [klein] transformer: {error}") from None


NAMES = Names(
    prefixes=("model.diffusion_model.", "diffusion_model."),
    marks=("img_in.weight", "x_embedder.weight", _SWIFT_MARK),
    rename=rename_transformer,
    infer=klein_params,
    to_bfl=bfl_transformer,
)
