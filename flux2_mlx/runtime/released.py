"""The modules of a released model, weightless, to plan it before it is downloaded."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..device import stage_dtype, weight_bytes
from ..errors import InputError
from ..families import RELEASED_NAMES, Release, find_release
from ..models.autoencoder import AutoEncoder
from ..models.config import AutoEncoderConfig
from ..models.flux2 import FluxKlein
from ..models.qwen3 import Qwen3TextEncoder
from ..quantization.layers import quantize
from ..quantization.packing import quantize_rtn
from ..quantization.recipes import mixed_precision
from ..quantization.spec import Quantization


def released_modules(
    name: str, dtype: mx.Dtype, specs: Mapping[str, Quantization], vae_dtype: mx.Dtype | None = None
) -> tuple[Qwen3TextEncoder, FluxKlein, AutoEncoder]:
    """The modules of a released model as they will be once they are loaded; their weights are random, lazy, and not
    worth reading.

    Args:
        name: the release's name or Hub id.
        dtype: the transformer's dtype.
        specs: how the stages are packed; a stage that is not named stays dense.
        vae_dtype: the autoencoder's dtype; None takes the default.

    Raises:
        InputError: for a name of no release.
    """
    release = _release(name)
    text_encoder = Qwen3TextEncoder(release.text_encoder)
    transformer, autoencoder = FluxKlein(release.transformer), AutoEncoder(AutoEncoderConfig())
    for stage, module in (("text_encoder", text_encoder), ("transformer", transformer), ("autoencoder", autoencoder)):
        module.set_dtype(stage_dtype(stage, dtype, vae_dtype))
        if stage in specs:
            quantize(module, mixed_precision(module, specs[stage]), quantize_rtn)
    return text_encoder, transformer, autoencoder


def download_bytes(name: str) -> int:
    """Bytes of a released model's weights on the Hub, in bfloat16; of the text encoder's files some are not fetched."""
    _, transformer, autoencoder = released_modules(name, mx.bfloat16, {})
    text_encoder_bytes = _release(name).text_encoder_parameters * mx.bfloat16.size
    return weight_bytes(transformer) + weight_bytes(autoencoder) + text_encoder_bytes


def _release(name: str) -> Release:
    release = find_release(name)
    if release is None:
        raise InputError(f"{name!r} is no released model; there are {RELEASED_NAMES}")
    return release
