"""A part's weights as any file has them to those of its module: selected, decoded, renamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models.names.autoencoder import VAE_PREFIXES, rename_autoencoder
from ..models.names.common import select
from ..models.names.flux2 import TRANSFORMER_PREFIXES, rename_transformer
from ..models.names.qwen3 import rename_text_encoder, select_text_encoder
from .formats.decode import decode


def sanitize_flux2_klein_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a transformer to the modules' names, decoded: see rename_transformer.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return rename_transformer(decode(select(weights, TRANSFORMER_PREFIXES)))


def sanitize_qwen3_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a text encoder to transformers' names, and leave out the layers, the norm and the head that FLUX.2 [klein]
    does not read.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return rename_text_encoder(decode(select_text_encoder(weights)))


def sanitize_vae_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring an autoencoder, or a decoder alone, to diffusers' names in NHWC: convolutions (out, in, h, w) to
    (out, h, w, in), and each quantization convolution into the encoder or decoder that it belongs to.

    The layout is the checkpoint's, told once for all its tensors by the decoder's first convolution. The attention's
    matrices become dense and two-dimensional, however they are stored.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return rename_autoencoder(decode(select(weights, VAE_PREFIXES)))
