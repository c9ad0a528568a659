"""From a checkpoint's tensor names, layouts and storage to those of the modules. Every rename of the package is here.

Names that are understood, told apart by the names themselves: diffusers and transformers (the modules' own), BFL's
and ComfyUI's single files, llama.cpp's (text encoders in GGUF), mflux's. Storage: floats; FP8 and int8 with their
scales, per tensor, row or block; MXFP8; NVFP4; integers packed by MLX (``weight``, ``scales``, ``biases``), which stay
packed.

Each function takes and returns a dictionary of lazy arrays and changes nothing in one that it has already been
through. No weight is read, only marks and scales.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import (
    TAPPED_LAYERS,
    AutoEncoderConfig,
    CheckpointError,
    FluxKleinParams,
    InputError,
    OtherModelError,
    Qwen3Config,
)

# Rows of a deferred weight that are converted at one time.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Deferred:
    """A weight in a format that MLX cannot read lazily: read and converted when its turn comes.

    Attributes:
        read: rows from one up to another, converted.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[int, int], mx.array]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def make(self) -> mx.array:
        """All of it, some rows at a time."""
        parts = []
        for start in range(0, self.shape[0], ROWS_AT_ONCE):
            parts.append(self.read(start, min(start + ROWS_AT_ONCE, self.shape[0])))
            mx.eval(parts)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def cast(weight: Any, dtype: mx.Dtype) -> Any:
    """A weight in another dtype; integers, which are packed, stay."""
    if weight.dtype in INTEGERS:
        return weight
    if isinstance(weight, Deferred):
        return Deferred(weight.shape, dtype, lambda start, stop: weight.read(start, stop).astype(dtype))
    return weight.astype(dtype)


INTEGERS = (mx.uint8, mx.int8, mx.uint32, mx.int64)


def read_rows(weight: Any, start: int, stop: int) -> mx.array:
    """Rows of a weight from one up to another, of a deferred one converted."""
    return weight.read(start, stop) if isinstance(weight, Deferred) else weight[start:stop]


def _rows(weight: Any, start: int, stop: int) -> Any:
    if isinstance(weight, Deferred):
        shape = (stop - start, *weight.shape[1:])
        return Deferred(shape, weight.dtype, lambda a, b: weight.read(start + a, start + b))
    return weight[start:stop]


def _joined(parts: list[Any]) -> Any:
    """The rows of some weights as one."""
    if not any(isinstance(part, Deferred) for part in parts):
        return mx.concatenate(parts)
    ends = list(accumulate(part.shape[0] for part in parts))

    def read(start: int, stop: int) -> mx.array:
        found = []
        for part, end in zip(parts, ends, strict=True):
            first = end - part.shape[0]
            if start < end and stop > first:
                found.append(read_rows(part, max(start - first, 0), min(stop, end) - first))
        return mx.concatenate(found)

    return Deferred((ends[-1], *parts[0].shape[1:]), parts[0].dtype, read)


# ---------------------------------------------------------------------------------------------------- storage

PACKED = ("weight", "scales", "biases")  # what MLX keeps of a quantized layer

_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "weight_scale_2")
_UNUSED = ("input_scale", "scale_input")  # of the activations, for hardware that multiplies in FP8

# The 16 values of E2M1: sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# A mark of a layer's storage, as ComfyUI writes it beside the weight, and the formats that may stand in it: those of
# ComfyUI (QUANT_ALGOS in its quant_ops.py) that are read, and one for ModelOpt's NVFP4.
MARK = "comfy_quant"
MODELOPT_NVFP4 = "modelopt_nvfp4"
_INT8, _MXFP8, _NVFP4 = "int8_tensorwise", "mxfp8", "nvfp4"
_FORMATS = ("float8_e4m3fn", "float8_e5m2", _INT8, _MXFP8, MODELOPT_NVFP4, _NVFP4)


def mark(format: str) -> mx.array:
    """The mark of a layer's storage, for a file that says it elsewhere."""
    return mx.array(np.frombuffer(json.dumps({"format": format}).encode(), np.uint8))


def format_of(settings: Any) -> str:
    """The format that is said of a layer, with "convrot" where its weight is rotated, which ComfyUI says beside it.

    Raises:
        AttributeError, TypeError, KeyError: where none is said.
    """
    rotated = settings.get("convrot") or settings.get("params", {}).get("convrot")
    return f"{settings['format']} with convrot" if rotated else str(settings["format"])


def _format(layer: str, array: mx.array) -> str:
    try:
        return format_of(json.loads(bytes(np.array(array))))
    except (ValueError, AttributeError, TypeError, KeyError):
        raise CheckpointError(f"{layer}.{MARK} does not say a format") from None


def _with_scales(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights that have scales times these, as floats; everything else as it is.

    Raises:
        CheckpointError: for a storage format that is not read, or scales that are not finite.
    """
    formats = {
        name.removesuffix(f".{MARK}"): _format(name.removesuffix(f".{MARK}"), array)
        for name, array in weights.items()
        if name.endswith(f".{MARK}")
    }
    unread = sorted({format for format in formats.values() if format not in _FORMATS})
    if unread:
        raise CheckpointError(
            f"weights are stored as {', '.join(unread)}, which is not read, only {', '.join(_FORMATS)}"
        )
    result: dict[str, Any] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if name == "scaled_fp8":
            continue
        if kind in (*_SCALES, *_UNUSED, MARK) and f"{layer}.weight" in weights:
            continue
        if kind == "weight":
            found = {kind: weights[f"{layer}.{kind}"] for kind in _SCALES if f"{layer}.{kind}" in weights}
            if found or formats.get(layer) == _MXFP8:  # which means nothing without scales
                weight = _scaled(layer, weight, found, formats.get(layer))
        result[name] = weight
    return result


def _scaled(layer: str, weight: Any, scales: dict[str, mx.array], format: str | None) -> Any:
    for name, scale in scales.items():
        if not isinstance(scale, mx.array):
            raise CheckpointError(f"{layer}.{name} is in GGUF, where no scales belong")
        if not mx.isfinite(scale).all().item():
            raise CheckpointError(f"{layer}.{name} is not a finite number")
    if format == _MXFP8:
        scales = {"weight_scale": _mxfp8_scale(layer, weight, scales)}
    if "weight_scale_2" in scales:
        if weight.dtype != mx.uint8 or weight.ndim != 2 or "weight_scale" not in scales:
            raise CheckpointError(f"{layer}: weight_scale_2 belongs to NVFP4, but the weight is {weight.dtype}")
        if format not in (_NVFP4, MODELOPT_NVFP4):
            raise CheckpointError(
                f"{layer} is NVFP4, but the file does not say in which of two layouts its scales are: neither a "
                f"{MARK} mark (ComfyUI) nor a quantization_config (ModelOpt) is there"
            )
        return _from_nvfp4(layer, weight, scales["weight_scale"], scales["weight_scale_2"], format == _NVFP4)
    if len(scales) > 1:
        raise CheckpointError(f"{layer} has more than one scale: {', '.join(scales)}")
    (scale,) = scales.values()
    if scale.dtype in INTEGERS:
        raise CheckpointError(f"{layer} has scales in bytes (MXFP8), but no {MARK} mark that says their layout")
    if weight.dtype == mx.uint8:
        raise CheckpointError(f"{layer} is packed in bytes with one scale, a format that is not read")
    if (weight.dtype == mx.int8) != (format == _INT8):  # int8 without a mark may be rotated
        raise CheckpointError(f"{layer} is {weight.dtype}, marked {format or 'with no format'}, which is not read")
    scale = scale.astype(mx.float32)
    scale = _spread(layer, scale.reshape(len(scale), -1), weight.shape) if scale.size > 1 else scale.reshape(())
    scale = mx.broadcast_to(scale, weight.shape)
    return _by_rows(weight, scale, lambda rows, scale: rows.astype(mx.float32) * scale)


def _by_rows(weight: Any, scale: mx.array, convert: Callable[[mx.array, mx.array], mx.array]) -> Any:
    """What a weight and the scales of all its values stand for; of a deferred one, rows as they are read."""
    if isinstance(weight, Deferred):
        return Deferred(
            scale.shape, mx.float32, lambda start, stop: convert(weight.read(start, stop), scale[start:stop])
        )
    return convert(weight, scale)


def _spread(layer: str, scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Scales of rows (out, 1) or of equal blocks, repeated to where they apply; the last blocks may be cut off."""
    if scale.ndim != len(shape) or scale.size > shape[0] * shape[1]:
        raise CheckpointError(f"{layer} is {shape} and its scales {scale.shape}; they do not belong together")
    for axis, size in enumerate(shape):
        if scale.shape[axis] in (1, size):
            continue
        block = 1 << max(0, -(-size // scale.shape[axis]) - 1).bit_length()  # blocks are powers of two
        if -(-size // block) != scale.shape[axis]:
            raise CheckpointError(f"{layer} is {shape} and its scales {scale.shape}; they do not belong together")
        scale = mx.repeat(scale, block, axis=axis)
        scale = scale[:size] if axis == 0 else scale[:, :size]
    return scale


def _untiled(layer: str, scale: mx.array, rows: int, blocks: int) -> mx.array:
    """Scales (rows, blocks) out of the tiles of 128 x 4 that NVIDIA's matrix units read (cuBLAS, "1D block scaling
    factors layout"), as ComfyUI's files have them.
    """
    tiles = (-(-rows // 128), -(-blocks // 4))
    if scale.size != 512 * tiles[0] * tiles[1]:
        raise CheckpointError(f"{layer}: {scale.size} scales in tiles for {rows} x {blocks} blocks")
    scale = scale.reshape(*tiles, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(128 * tiles[0], 4 * tiles[1])
    return scale[:rows, :blocks]


def _mxfp8_scale(layer: str, weight: Any, scales: dict[str, mx.array]) -> mx.array:
    """Scales (rows, blocks) of MXFP8: one for every 32 values of FP8, a power of two in E8M0 (OCP Microscaling Formats
    1.0, 5.4.1), so an exponent as float32 has it. ComfyUI's files have them in tiles; other writers' are by rows.
    """
    scale = scales.get("weight_scale")
    if scale is None or scale.dtype != mx.uint8 or len(scales) > 1 or weight.dtype in INTEGERS or weight.ndim != 2:
        raise CheckpointError(f"{layer} is marked {_MXFP8}, but is not FP8 with one weight_scale, in bytes")
    rows, columns = weight.shape
    exponents = _untiled(layer, scale, rows, -(-columns // 32))
    if (exponents == 255).any().item():
        raise CheckpointError(f"{layer}.weight_scale is not a finite number")
    return mx.maximum(exponents.astype(mx.uint32) << 23, 1 << 22).view(mx.float32)  # 0 is 2^-127


def _from_nvfp4(layer: str, weight: Any, scale: mx.array, scale_2: mx.array, comfy: bool) -> Any:
    """NVFP4 to floats: two E2M1 codes a byte, an FP8 scale of every 16, and one of all.

    ComfyUI's files have the first code in the upper half of the byte, and the scales in tiles; ModelOpt's have it in
    the lower half, and the scales row by row.
    """
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    blocks = -(-columns // 16)
    if comfy:
        scale = _untiled(layer, scale, rows, blocks)
    elif scale.shape != (rows, blocks):
        raise CheckpointError(f"{layer}: scales {scale.shape} for {rows} x {columns} weights of NVFP4")
    scale = mx.repeat(scale.astype(mx.float32) * scale_2.astype(mx.float32), 16, axis=1)[:, :columns]

    def convert(weight: mx.array, scale: mx.array) -> mx.array:
        upper, lower = weight >> 4, weight & 15
        codes = mx.stack([upper, lower] if comfy else [lower, upper], axis=-1).reshape(scale.shape)
        return mx.array(_E2M1)[codes] * scale

    return _by_rows(weight, scale, convert)


def bits_and_group(weights: Mapping[str, Any], layer: str, columns: int) -> tuple[int, int]:
    """(bits, group size) of a packed layer whose dense weight has that many columns.

    Raises:
        CheckpointError: where the shapes fit no such packing.
    """
    packed, scales = weights[f"{layer}.weight"], weights[f"{layer}.scales"]
    if packed.ndim == scales.ndim == 2 and packed.dtype == mx.uint32 and scales.shape[1]:
        bits, rest = divmod(32 * packed.shape[1], columns)
        group, uneven = divmod(columns, scales.shape[1])
        if not rest and not uneven and packed.shape[0] == scales.shape[0]:
            return bits, group
    raise CheckpointError(
        f"{layer}: weight {packed.shape} and scales {scales.shape} are no packing of {columns} columns"
    )


# ---------------------------------------------------------------------------------------------------- transformer


def _only(weights: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The component's own weights of a file that may hold more, without the prefix; of one that does not, all."""
    for prefix in prefixes:
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        if own:
            return own
    return dict(weights)


TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
TEXT_ENCODER_PREFIXES = ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer.")
VAE_PREFIXES = ("vae.", "first_stage_model.")

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
_BFL_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")

# mflux's names of the same modules.
_MFLUX = (
    (re.compile(r"^time_guidance_embed\.linear_"), "time_guidance_embed.timestep_embedder.linear_"),
    (re.compile(r"^(transformer_blocks\.\d+\.attn\.to_out)\.(?=weight|scales|biases)"), r"\1.0."),
)


def _diffusers_modules(module: str) -> tuple[str, ...]:
    """The diffusers modules that one of BFL's becomes: three of a fused qkv, else one; unknown names stay."""
    block = _BFL_BLOCK.fullmatch(module)
    if not block:
        return _BFL.get(module, (module,))
    kind, number, inner = block.groups()
    return tuple(f"{_BLOCKS[kind]}.{number}.{name}" for name in _BFL_BLOCKS[kind].get(inner, (inner,)))


def _swap_halves(weight: Any) -> Any:
    half = weight.shape[0] // 2
    return _joined([_rows(weight, half, 2 * half), _rows(weight, 0, half)])


def sanitize_flux2_klein_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a transformer to the modules' names, decoded: see rename_transformer.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return rename_transformer(_with_scales(_only(weights, TRANSFORMER_PREFIXES)))


def rename_transformer(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's weights under the modules' names: diffusers' stay, BFL's, ComfyUI's and mflux's are renamed,
    fused q, k, v split by rows, and the final modulation turned from (shift, scale) to (scale, shift).
    """
    weights = dict(weights)
    if "time_guidance_embed.linear_1.weight" in weights:  # mflux's: a bias that some of its versions made up
        weights.pop("norm_out.linear.bias", None)
    sanitized: dict[str, Any] = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        targets = _diffusers_modules(module)
        if targets == (module,):
            for pattern, replacement in _MFLUX:
                name = pattern.sub(replacement, name)
            sanitized[name] = weight
            continue
        kind = "weight" if kind == "scale" else kind  # of a norm
        if module == "final_layer.adaLN_modulation.1":
            weight = _swap_halves(weight)
        third = weight.shape[0] // 3
        for k, target in enumerate(targets):
            part = weight if len(targets) == 1 else _rows(weight, k * third, (k + 1) * third)
            sanitized[f"{target}.{kind}"] = part
    return sanitized


# Of a layer, its outputs from one up to another.
Rows = tuple[str, int, int]


def lora_layers(outputs: Mapping[str, int], hidden: int) -> dict[str, tuple[Rows, ...]]:
    """Every name that files of LoRAs have for the transformer's linear layers, and what the outputs of a layer of that
    name are, in their order.

    The names are diffusers', BFL's, those of OneTrainer, which splits BFL's fused layers ("qkv.0", "linear1.3"), and
    those of diffusers with q, k and v fused; "sformer_blocks" is a misspelling that is met.

    Args:
        outputs: how many each linear layer has, by its path.
        hidden: the transformer's width.
    """

    def whole(*paths: str) -> tuple[Rows, ...]:
        return tuple((path, 0, outputs[path]) for path in paths)

    names = {path: whole(path) for path in outputs}
    modules = [*_BFL]
    for bfl, ours in _BLOCKS.items():
        modules += [f"{bfl}.{k}.{name}" for k in range(_block_count(outputs, ours)) for name in _BFL_BLOCKS[bfl]]
    for module in modules:
        targets = _diffusers_modules(module)
        if not all(target in outputs for target in targets):
            continue  # a norm
        names[module] = whole(*targets)
        if len(targets) > 1:
            names |= {f"{module}.{k}": whole(target) for k, target in enumerate(targets)}
            block, _, first = targets[0].rpartition(".")
            names[f"{block}.{'to_qkv' if first == 'to_q' else 'to_added_qkv'}"] = whole(*targets)
        if module.endswith(".linear1"):
            ends = [0, hidden, 2 * hidden, 3 * hidden, outputs[targets[0]]]
            names |= {f"{module}.{k}": ((targets[0], *part),) for k, part in enumerate(pairwise(ends))}
    size = outputs["norm_out.linear"]
    names["final_layer.adaLN_modulation.1"] = (
        ("norm_out.linear", size // 2, size),
        ("norm_out.linear", 0, size // 2),
    )
    return names | {
        f"sformer_blocks.{name.removeprefix('transformer_blocks.')}": rows
        for name, rows in names.items()
        if name.startswith("transformer_blocks.")
    }


# ---------------------------------------------------------------------------------------------------- text encoder

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.|blk\.(\d+)\.")
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
    if name.endswith("rotary_emb.inv_freq"):  # a table that mflux saves
        return False
    return name.rpartition(".")[0] not in ("model.norm", "norm", "lm_head", "output_norm", "output")


def sanitize_qwen3_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a text encoder to transformers' names, and leave out the layers, the norm and the head that FLUX.2 [klein]
    does not read.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return rename_text_encoder(_with_scales(select_text_encoder(weights)))


def select_text_encoder(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a Qwen3 that FLUX.2 [klein] reads, without the prefix of a file that holds more."""
    return {name: weight for name, weight in _only(weights, TEXT_ENCODER_PREFIXES).items() if is_read_by_klein(name)}


def rename_text_encoder(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A text encoder's weights under transformers' names; llama.cpp's and mflux's are renamed."""
    return {_transformers_name(name): weight for name, weight in weights.items()}


def _transformers_name(name: str) -> str:
    llama = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", name)
    if llama and llama[2] in _LLAMA:
        layer = f"layers.{llama[1]}." if llama[1] else ""
        return f"model.{layer}{_LLAMA[llama[2]]}.{llama[3]}"
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.")) else name


# ---------------------------------------------------------------------------------------------------- autoencoder

# The modules' names and BFL's of the same parts, # for a number; one that begins with a letter begins the name.
_VAE_NAMES = (
    ("encoder.conv_norm_out.", "encoder.norm_out."),
    ("decoder.conv_norm_out.", "decoder.norm_out."),
    (".conv_shortcut.", ".nin_shortcut."),
    ("encoder.down_blocks.#.resnets.", "encoder.down.#.block."),
    ("encoder.down_blocks.#.downsamplers.0.", "encoder.down.#.downsample."),
    ("decoder.up_blocks.#.resnets.", "decoder.up.#.block."),
    ("decoder.up_blocks.#.upsamplers.0.", "decoder.up.#.upsample."),
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm."),
    (".mid_block.attentions.0.to_q.", ".mid.attn_1.q."),
    (".mid_block.attentions.0.to_k.", ".mid.attn_1.k."),
    (".mid_block.attentions.0.to_v.", ".mid.attn_1.v."),
    (".mid_block.attentions.0.to_out.0.", ".mid.attn_1.proj_out."),
)


def _renaming(old: str, new: str) -> tuple[re.Pattern[str], str]:
    anchor = "" if old.startswith(".") else "^"
    return re.compile(anchor + re.escape(old).replace(r"\#", r"(\d+)")), new.replace("#", r"\1")


_FROM_BFL_VAE = (
    *(_renaming(bfl, ours) for ours, bfl in _VAE_NAMES),
    _renaming("quant_conv.", "encoder.quant_conv."),  # diffusers'
    _renaming("post_quant_conv.", "decoder.post_quant_conv."),
    (re.compile(r"(\.attentions\.0\.to_out)\.(?=weight|bias|scales)"), r"\1.0."),  # mflux's
)
_TO_BFL_VAE = tuple(_renaming(ours, bfl) for ours, bfl in _VAE_NAMES)
_UP_STAGE = re.compile(r"^decoder\.up\.(\d+)\.")
_ATTENTION = re.compile(r"\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight$")


def sanitize_vae_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring an autoencoder, or a decoder alone, to diffusers' names in NHWC: convolutions (out, in, h, w) to
    (out, h, w, in), and each quantization convolution into the encoder or decoder that it belongs to.

    The layout is the checkpoint's, told once for all its tensors by the decoder's first convolution. The attention's
    matrices become dense and two-dimensional, however they are stored.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return rename_autoencoder(_with_scales(_only(weights, VAE_PREFIXES)))


def rename_autoencoder(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder's weights, decoded, under the modules' names and in NHWC; see sanitize_vae_weights."""
    weights = dict(weights)
    if any(isinstance(weight, Deferred) for weight in weights.values()):
        raise CheckpointError("autoencoders in GGUF or F8_E5M2 are not read; it is small, so get another file")
    weights.pop("bn.num_batches_tracked", None)
    stages = [int(stage[1]) for name in weights if (stage := _UP_STAGE.match(name))]
    first = weights.get("decoder.conv_in.weight")
    channels_first = first is not None and first.ndim == 4 and first.shape[1:3] != (3, 3)
    sanitized: dict[str, Any] = {}
    for name, weight in weights.items():
        stage = _UP_STAGE.match(name)
        if stage:  # BFL counts from the picture's side
            name = f"decoder.up.{max(stages) - int(stage[1])}.{name[stage.end() :]}"
        for pattern, replacement in _FROM_BFL_VAE:
            name = pattern.sub(replacement, name)
        sanitized[name] = weight
    for name in [name for name in sanitized if _ATTENTION.search(name)]:
        layer, weight = name.removesuffix(".weight"), sanitized[name]
        if f"{layer}.scales" in sanitized:
            bits, group = bits_and_group(sanitized, layer, weight.shape[0])  # these matrices are square
            scales, biases = sanitized.pop(f"{layer}.scales"), sanitized.pop(f"{layer}.biases", None)
            sanitized[name] = mx.dequantize(weight, scales, biases, group_size=group, bits=bits)
        elif weight.ndim == 4:
            sanitized[name] = weight.reshape(weight.shape[0], -1)
    if channels_first:
        for name, weight in sanitized.items():
            if weight.ndim == 4:
                sanitized[name] = mx.contiguous(weight.transpose(0, 2, 3, 1))
    return sanitized


# ---------------------------------------------------------------------------------------------------- and back


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
        for number in range(_block_count(weights, ours)):
            for inner, targets in _BFL_BLOCKS[bfl].items():
                parts = [weights.get(f"{ours}.{number}.{target}.weight") for target in targets]
                if all(part is not None for part in parts):
                    kind = "scale" if inner.endswith("_norm") else "weight"
                    named[f"{bfl}.{number}.{inner}.{kind}"] = _joined(parts) if len(parts) > 1 else parts[0]
    return named


def bfl_lora(layers: Mapping[str, tuple[mx.array, mx.array]]) -> dict[str, tuple[mx.array, mx.array]]:
    """A LoRA's down (R, inputs) and up (outputs, R) of each layer, by its path, under BFL's names. Of a fused q, k, v
    down has the ranks of all three, and up a block for each; what is not there is left out, its outputs zero.
    """
    modules: dict[str, tuple[str, ...]] = dict(_BFL)
    for bfl, ours in _BLOCKS.items():
        for number in range(_block_count(layers, ours)):
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
        named[module] = down, _swap_halves(up) if module == "final_layer.adaLN_modulation.1" else up
    return named


def _channels_first(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Convolutions (out, h, w, in) as (out, in, h, w), and the count that torch's BatchNorm has."""
    named = {
        name: mx.contiguous(weight.transpose(0, 3, 1, 2)) if weight.ndim == 4 else weight
        for name, weight in weights.items()
    }
    return named | {"bn.num_batches_tracked": mx.array(0, mx.int64)}


def sanitize_taef2_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring TAEF2's decoder to ``layers.N`` in NHWC, from taesd's names ("N", "decoder.N", "taesd_decoder.N") or
    diffusers' ("decoder.layers.N", which does not count the first layer); an encoder beside it is left out.
    """
    if any(name.startswith("layers.") for name in weights):
        return dict(weights)
    found: dict[int, dict[str, Any]] = {}
    for name, weight in weights.items():
        place = _TAEF2.fullmatch(name)
        if place is not None:
            found.setdefault(int(place[1]), {})[place[2]] = weight
    shift = 1 if 0 in found else 0
    return {
        f"layers.{number + shift}.{name}": weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight
        for number, layer in found.items()
        for name, weight in layer.items()
    }


_TAEF2 = re.compile(r"(?:taesd_)?(?:decoder\.)?(?:layers\.)?(\d+)\.(.+)")


def diffusers_vae(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """An autoencoder in diffusers' layout: the inverse of sanitize_vae_weights."""
    return {
        re.sub(r"^(?:encoder|decoder)\.(?=quant_conv\.|post_quant_conv\.)", "", name): weight
        for name, weight in _channels_first(weights).items()
    }


def bfl_vae(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """An autoencoder as ae.safetensors has it: the inverse of sanitize_vae_weights."""
    stages = _block_count(weights, "decoder.up_blocks")
    named = {}
    for name, weight in _channels_first(weights).items():
        if _ATTENTION.search(name):
            weight = weight[:, :, None, None]
        for pattern, replacement in _TO_BFL_VAE:
            name = pattern.sub(replacement, name)
        stage = _UP_STAGE.match(name)
        if stage:
            name = f"decoder.up.{stages - 1 - int(stage[1])}.{name[stage.end() :]}"
        named[name] = weight
    return named


# ---------------------------------------------------------------------------------------------------- configs


def _block_count(weights: Mapping[str, Any], prefix: str) -> int:
    numbers = [int(match[1]) for name in weights if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _columns(weights: Mapping[str, Any], layer: str, group: int) -> int:
    """Columns of a layer's dense weight; packed, it has groups of that size."""
    scales = weights.get(f"{layer}.scales")
    return int(weights[f"{layer}.weight"].shape[1] if scales is None else scales.shape[1] * group)


def klein_params(weights: Mapping[str, Any]) -> FluxKleinParams:
    """The transformer's shape, told from its sanitized weights; what no shape tells is klein's.

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
            txt_embed_dim=_columns(weights, "context_embedder", group),
            num_heads=hidden // head_dim,
            mlp_ratio=weights["transformer_blocks.0.ff.linear_in.weight"].shape[0] / (2 * hidden),
            depth=_block_count(weights, "transformer_blocks"),
            depth_single=_block_count(weights, "single_transformer_blocks"),
            head_dim=head_dim,
            axes_dims_rope=(head_dim // 4,) * 4,
            timestep_channels=_columns(weights, "time_guidance_embed.timestep_embedder.linear_1", group),
        )
    except KeyError as error:
        raise CheckpointError(f"no FLUX.2 [klein] transformer: there is no {error.args[0]}") from None
    except (IndexError, ZeroDivisionError, ValueError) as error:
        raise CheckpointError(f"no FLUX.2 [klein] transformer: {error}") from None


def qwen3_config(weights: Mapping[str, Any]) -> Qwen3Config:
    """The text encoder's shape, told from its sanitized weights; what no shape tells is Qwen3's.

    Raises:
        CheckpointError: where they are not those of a Qwen3 with all layers that are read.
    """
    layers = _block_count(weights, "model.layers")
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


def autoencoder_config(weights: Mapping[str, Any]) -> AutoEncoderConfig:
    """The autoencoder's shape, told from its sanitized weights; what no shape tells is FLUX.2's, and of a decoder alone
    so is the encoder.

    Raises:
        CheckpointError: where they are not those of a FLUX.2 autoencoder.
    """
    try:
        stages = _block_count(weights, "decoder.up_blocks")
        decoder = tuple(
            weights[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in reversed(range(stages))
        )
        encoder = tuple(
            weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0]
            for i in range(_block_count(weights, "encoder.down_blocks"))
        )
        latents = weights["decoder.conv_in.weight"].shape[-1]
        if latents != AutoEncoderConfig.latent_channels:
            raise CheckpointError(
                f"the autoencoder has {latents} latent channels and FLUX.2's has {AutoEncoderConfig.latent_channels}"
                + ("; 16 are FLUX.1's" if latents == 16 else "")
            )
        return AutoEncoderConfig(
            latent_channels=latents,
            block_out_channels=encoder or AutoEncoderConfig.block_out_channels,
            decoder_block_out_channels=decoder if decoder != encoder else None,
            layers_per_block=_block_count(weights, "decoder.up_blocks.0.resnets") - 1,
        )
    except KeyError as error:
        raise CheckpointError(f"no FLUX.2 autoencoder: there is no {error.args[0]}") from None
    except CheckpointError:
        raise
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"no FLUX.2 autoencoder: {error}") from None
