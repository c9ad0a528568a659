"""The autoencoder's weights under every name that files give them, and back: diffusers', BFL's, mflux's; TAEF2's too.

Each function takes and returns a dictionary of lazy arrays and changes nothing in one that it has already been
through. No weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from ...lazy import derive
from ..config import AutoEncoderConfig
from .common import NUMBER, Names, block_count, gather

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
    return re.compile(anchor + re.escape(old).replace(r"\#", f"({NUMBER})")), new.replace("#", r"\1")


_FROM_BFL_VAE = (
    *(_renaming(bfl, ours) for ours, bfl in _VAE_NAMES),
    _renaming("quant_conv.", "encoder.quant_conv."),  # diffusers'
    _renaming("post_quant_conv.", "decoder.post_quant_conv."),
    (re.compile(r"(\.attentions\.0\.to_out)\.(?=weight|bias)"), r"\1.0."),  # mflux's
)
_TO_BFL_VAE = tuple(_renaming(ours, bfl) for ours, bfl in _VAE_NAMES)
_UP_STAGE = re.compile(rf"^decoder\.up\.({NUMBER})\.")
_ATTENTION = re.compile(r"\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight$")


def rename_autoencoder(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder's dense weights under the modules' names: convolutions (out, in, h, w) as (out, h, w, in), the
    attention's matrices two-dimensional, each quantization convolution in the encoder or decoder that it belongs to.
    The decoder's first convolution decides whether the file has channels first.
    """
    weights = dict(weights)
    weights.pop("bn.num_batches_tracked", None)
    stages = [int(stage[1]) for name in weights if (stage := _UP_STAGE.match(name))]
    first = weights.get("decoder.conv_in.weight")
    channels_first = first is not None and first.ndim == 4 and first.shape[1:3] != (3, 3)
    renamed: list[tuple[str, Any]] = []
    for name, weight in weights.items():
        stage = _UP_STAGE.match(name)
        if stage:  # BFL counts from the image's side
            name = f"decoder.up.{max(stages) - int(stage[1])}.{name[stage.end() :]}"
        for pattern, replacement in _FROM_BFL_VAE:
            name = pattern.sub(replacement, name)
        renamed.append((name, weight))
    sanitized = gather(renamed)
    for name, weight in sanitized.items():
        if _ATTENTION.search(name) and weight.ndim == 4:
            inputs = math.prod(weight.shape[1:])
            sanitized[name] = derive(lambda matrix, inputs=inputs: matrix.reshape(matrix.shape[0], inputs), weight)
    if channels_first:
        for name, weight in sanitized.items():
            if weight.ndim == 4:
                sanitized[name] = derive(lambda kernel: mx.contiguous(kernel.transpose(0, 2, 3, 1)), weight)
    return sanitized


def _channels_first(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Convolutions (out, h, w, in) as (out, in, h, w), and the count that torch's BatchNorm has."""
    named = {
        name: derive(lambda kernel: mx.contiguous(kernel.transpose(0, 3, 1, 2)), weight) if weight.ndim == 4 else weight
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
        f"layers.{number + shift}.{name}": derive(lambda kernel: kernel.transpose(0, 2, 3, 1), weight)
        if weight.ndim == 4
        else weight
        for number, layer in found.items()
        for name, weight in layer.items()
    }


_TAEF2 = re.compile(rf"(?:taesd_)?(?:decoder\.)?(?:layers\.)?({NUMBER})\.(.+)")


def diffusers_vae(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder in diffusers' layout: the inverse of sanitize_vae_weights."""
    return {
        re.sub(r"^(?:encoder|decoder)\.(?=quant_conv\.|post_quant_conv\.)", "", name): weight
        for name, weight in _channels_first(weights).items()
    }


def bfl_vae(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder as ae.safetensors has it: the inverse of sanitize_vae_weights."""
    stages = block_count(weights, "decoder.up_blocks")
    named = {}
    for name, weight in _channels_first(weights).items():
        if _ATTENTION.search(name):
            weight = derive(lambda matrix: matrix[:, :, None, None], weight)
        for pattern, replacement in _TO_BFL_VAE:
            name = pattern.sub(replacement, name)
        stage = _UP_STAGE.match(name)
        if stage:
            name = f"decoder.up.{stages - 1 - int(stage[1])}.{name[stage.end() :]}"
        named[name] = weight
    return named


def autoencoder_config(weights: Mapping[str, Any]) -> AutoEncoderConfig:
    """The autoencoder's shape, inferred from its sanitized weights; what no shape determines is FLUX.2's, and so is
    the encoder of a decoder alone.

    Raises:
        CheckpointError: where they are not those of a FLUX.2 autoencoder.
    """
    try:
        stages = block_count(weights, "decoder.up_blocks")
        decoder = tuple(
            weights[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in reversed(range(stages))
        )
        encoder = tuple(
            weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0]
            for i in range(block_count(weights, "encoder.down_blocks"))
        )
        latents = weights["decoder.conv_in.weight"].shape[-1]
        if latents != AutoEncoderConfig.latent_channels:
            raise CheckpointError(
                f"the autoencoder has {latents} latent channels and FLUX.2's has {AutoEncoderConfig.latent_channels}"
                + {16: "; 16 are FLUX.1's", 4: "; 4 are Stable Diffusion's"}.get(latents, "")
            )
        return AutoEncoderConfig(
            latent_channels=latents,
            block_out_channels=encoder or AutoEncoderConfig.block_out_channels,
            decoder_block_out_channels=decoder if decoder != encoder else None,
            layers_per_block=block_count(weights, "decoder.up_blocks.0.resnets") - 1,
        )
    except KeyError as error:
        raise CheckpointError(f"no FLUX.2 autoencoder: there is no {error.args[0]}") from None
    except CheckpointError:
        raise
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"no FLUX.2 autoencoder: {error}") from None


NAMES = Names(
    prefixes=("vae.", "first_stage_model."),
    marks=("decoder.conv_in.weight",),
    rename=rename_autoencoder,
    infer=autoencoder_config,
    to_diffusers=diffusers_vae,
    to_bfl=bfl_vae,
)
