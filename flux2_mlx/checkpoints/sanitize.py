"""A part's weights as any file has them to those of its module: rename(decode(select(weights)))."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..families import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, Part
from ..lazy import array_of
from .formats.decode import decode, dequantize_square


def sanitize(part: Part, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The part's own weights of a file, as numbers that its modules hold, under their names; unread.

    Raises:
        CheckpointError: for a storage format that is not read.
        InputError: for a path instead of weights.
    """
    if not isinstance(weights, Mapping):
        raise InputError(f"weights must be arrays by name, as load_safetensors(path) gives them, got {weights!r:.80}")
    decoded = decode(part.names.select(weights))
    return part.names.rename(decoded if part.can_be_packed else dequantize_square(decoded))


def _arrays(part: Part, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array_of(weight) for name, weight in sanitize(part, weights).items()}


def sanitize_flux2_klein_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a transformer to the modules' names, decoded: see rename_transformer.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return _arrays(TRANSFORMER, weights)


def sanitize_qwen3_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a text encoder to transformers' names, and leave out the layers, the norm and the head that FLUX.2 [klein]
    does not read.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return _arrays(TEXT_ENCODER, weights)


def sanitize_vae_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Bring an autoencoder, or a decoder alone, to diffusers' names in NHWC: see rename_autoencoder. The attention's
    matrices become dense and two-dimensional, however they are stored.

    Raises:
        CheckpointError: for a storage format that is not read.
    """
    return _arrays(AUTOENCODER, weights)
