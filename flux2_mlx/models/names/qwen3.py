"""The text encoder's weights under every name that files give them: transformers', llama.cpp's, mflux's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError
from ..config import TAPPED_LAYERS, Qwen3Config, TextAdapterConfig, refuse_changes
from .common import NUMBER, Names, block_count, gather

NEEDED_QWEN3 = "FLUX.2 [klein] needs a Qwen3 for text alone: Qwen3-4B, or for the 9B models Qwen3-8B"

_LAYER = re.compile(rf"(?:model\.)?layers\.({NUMBER})\.|blk\.({NUMBER})\.")
_VISION = re.compile(r"(?:model\.)?(?:visual|language_model)\.")
_LLAMA = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_read_by_klein(name: str) -> bool:
    """Whether a Qwen3 weight is used: embedding and layers up to the last tapped one, not the later layers and head."""
    layer = _LAYER.match(name)
    if layer:
        return int(layer[1] or layer[2]) <= TAPPED_LAYERS[-1]
    return is_weight(name) and name.rpartition(".")[0] not in ("model.norm", "norm", "lm_head", "output_norm", "output")


def is_weight(name: str) -> bool:
    """Whether a name is a weight's of the whole Qwen3, not a table's of mflux's or llama.cpp's."""
    return not name.endswith("rotary_emb.inv_freq") and name != "rope_freqs.weight"


def is_qwen3_vl(names: Iterable[str]) -> bool:
    """Whether weights are those of Qwen3-VL, or another model that sees, by their names."""
    return any(_VISION.match(name) for name in names)


def rename_text_encoder(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A text encoder's weights under transformers' names; llama.cpp's and mflux's are renamed.

    Raises:
        CheckpointError: for Qwen3-VL's, and for a weight that is there under two names.
    """
    if is_qwen3_vl(weights):
        raise CheckpointError(f"these are weights of Qwen3-VL; {NEEDED_QWEN3}")
    return gather((_transformers_name(name), weight) for name, weight in weights.items())


def _transformers_name(name: str) -> str:
    llama = re.fullmatch(rf"(?:blk\.({NUMBER})\.)?(\w+)\.(\w+)", name)
    if llama and llama[2] in _LLAMA:
        layer = f"layers.{llama[1]}." if llama[1] else ""
        return f"model.{layer}{_LLAMA[llama[2]]}.{llama[3]}"
    if llama and not llama[1] and llama[2] == "output":
        return f"lm_head.{llama[3]}"
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def qwen3_config(weights: Mapping[str, Any]) -> Qwen3Config:
    """The text encoder's shape, inferred from its sanitized weights; what no shape determines is Qwen3's.

    Raises:
        CheckpointError: where they are not those of a Qwen3 with all layers that are read.
    """
    layers = block_count(weights, "model.layers")
    if layers <= TAPPED_LAYERS[-1]:
        raise CheckpointError(
            f"the text encoder has {layers} layers; FLUX.2 [klein] reads the output of layer {TAPPED_LAYERS[-1]}, so "
            f"at least {TAPPED_LAYERS[-1] + 1} are needed"
        )
    first = "model.layers.0."
    try:
        head_dim = weights[f"{first}self_attn.q_norm.weight"].shape[0]
        return Qwen3Config(
            vocab_size=weights["model.embed_tokens.weight"].shape[0],
            hidden_size=weights[f"{first}input_layernorm.weight"].shape[0],
            intermediate_size=weights[f"{first}mlp.gate_proj.weight"].shape[0],
            num_attention_heads=weights[f"{first}self_attn.q_proj.weight"].shape[0] // head_dim,
            num_key_value_heads=weights[f"{first}self_attn.k_proj.weight"].shape[0] // head_dim,
            head_dim=head_dim,
        )
    except KeyError as error:
        raise CheckpointError(f"no Qwen3 text encoder: there is no {error.args[0]}") from None
    except (IndexError, ZeroDivisionError, ValueError) as error:
        raise CheckpointError(f"no Qwen3 text encoder: {error}") from None


# What the metadata of an adapter's file says of its kind, where this library has but one; the rest are numbers.
_ADAPTER_KIND = {"norm": "ln-per-layer", "proj_layers": "3", "teacher_layers": "9,18,27"}
_ADAPTER_NUMBERS = {
    "hidden": "hidden_size",
    "attn_dim": "attn_dim",
    "attn_heads": "attn_heads",
    "attention": "attn_blocks",
    "len": "max_tokens",
    "drop_first": "dropped_tokens",
}


def with_adapter(config: Qwen3Config, metadata: Mapping[str, str], weights: Mapping[str, Any]) -> Qwen3Config:
    """A smaller Qwen3's shape with that of its adapter, by the metadata and the weights of the adapter's file.

    Raises:
        CheckpointError: for an adapter of another kind, naming what its metadata says.
        InputError: for one that is made for a Qwen3 of another width.
    """
    wanted = [*_ADAPTER_KIND, *_ADAPTER_NUMBERS, "student_layers"]
    absent = [name for name in wanted if name not in metadata]
    ends = [weights[name].shape for name in ("mlp.1.weight", "mlp.5.weight") if name in weights]
    if absent or [len(shape) for shape in ends] != [2, 2]:
        lacking = (
            f"its metadata has no {', '.join(absent)}" if absent else "it has no matrix mlp.1.weight, mlp.5.weight"
        )
        raise CheckpointError(f"no text adapter, as AiArtLab's is: {lacking}")
    refuse_changes(metadata, _ADAPTER_KIND, "adapter")
    layers = tuple(_whole(text, "student_layers") for text in metadata["student_layers"].split(","))
    if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] != TAPPED_LAYERS[-1] + 1:
        raise CheckpointError(
            f"the adapter reads the layers {metadata['student_layers']}; ascending ones up to {TAPPED_LAYERS[-1] + 1} "
            "are read, as 2,9,14,18,23,27"
        )
    numbers = {field: _whole(metadata[name], name) for name, field in _ADAPTER_NUMBERS.items()}
    adapter = TextAdapterConfig(input_size=ends[0][1], slices=len(layers), output_size=ends[1][0], **numbers)
    return replace(config, tapped_layers=tuple(layer - 1 for layer in layers), adapter=adapter)


def _whole(text: str, name: str) -> int:
    if not re.fullmatch(NUMBER, text):
        raise CheckpointError(f"the adapter's metadata has {name}={text[:80]!r}, where a number is expected")
    return int(text)


NAMES = Names(
    prefixes=(
        "text_encoders.qwen3_4b.transformer.",
        "text_encoders.qwen3_8b.transformer.",
        "text_encoders.llm.",
        "text_encoder.",
        "qwen3_4b.transformer.",
        "qwen3_8b.transformer.",
    ),
    marks=("model.embed_tokens.weight", "embed_tokens.weight", "token_embd.weight"),
    rename=rename_text_encoder,
    infer=qwen3_config,
    is_read=is_read_by_klein,
)
LANGUAGE_MODEL_NAMES = replace(NAMES, is_read=is_weight)
