"""From a checkpoint's tensor names and layouts to those of the modules. Every rename of the package is here.

Each function takes and returns a dictionary of lazy arrays, reads no data, and changes nothing in a dictionary that
it has already been through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx

from .config import TAPPED_LAYERS

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def sanitize_flux2_klein_weights(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Names of the transformer: those of a diffusers checkpoint are the modules' own, so nothing changes."""
    return dict(weights)


def is_read_by_klein(name: str) -> bool:
    """Whether a Qwen3 weight is used: embedding and layers up to the last tapped one, not the later layers and head."""
    layer = _LAYER.match(name)
    if layer:
        return int(layer[1]) <= TAPPED_LAYERS[-1]
    return name not in ("model.norm.weight", "lm_head.weight")


def sanitize_qwen3_weights(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Leave out the layers, the norm and the head that FLUX.2 [klein] does not read; names stay transformers'."""
    return {name: weight for name, weight in weights.items() if is_read_by_klein(name)}


def sanitize_vae_weights(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Bring a diffusers autoencoder to NHWC: convolutions (out, in, h, w) to (out, h, w, in), and each quantization
    convolution into the encoder or decoder that it belongs to.

    The layout is the checkpoint's, told by the quantization convolutions' names: a diffusers file has them on top,
    a sanitized dictionary inside.
    """
    if not {"quant_conv.weight", "post_quant_conv.weight"} & weights.keys():
        return dict(weights)
    sanitized = {}
    for name, weight in weights.items():
        if name == "bn.num_batches_tracked":
            continue
        if name.startswith("quant_conv."):
            name = f"encoder.{name}"
        elif name.startswith("post_quant_conv."):
            name = f"decoder.{name}"
        sanitized[name] = mx.contiguous(weight.transpose(0, 2, 3, 1)) if weight.ndim == 4 else weight
    return sanitized
