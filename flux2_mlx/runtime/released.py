"""The modules of a released model, weightless, to plan it before it is downloaded."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.language import no_language_model
from ..device import stage_dtype, weights_of
from ..errors import InputError
from ..families import RELEASED_NAMES, Release, find_release
from ..models.autoencoder import AutoEncoder
from ..models.config import AutoEncoderConfig
from ..models.flux2 import FluxKlein
from ..models.language_model import Qwen3LanguageModel
from ..models.qwen3 import Qwen3TextEncoder
from ..quantization.layers import Recipe, quantize
from ..quantization.packing import quantize_rtn
from ..quantization.recipes import mixed_precision, readable
from ..quantization.spec import Quantization


def released_modules(
    model: str | Release, dtype: mx.Dtype, specs: Mapping[str, Quantization], vae_dtype: mx.Dtype | None = None
) -> tuple[Qwen3TextEncoder, FluxKlein, AutoEncoder]:
    """The modules of a released model as they will be once they are loaded; their weights are random, lazy, and not
    worth reading.

    Args:
        model: the release, or its name or Hub id.
        dtype: the transformer's dtype.
        specs: how the stages are packed; a stage that is not named stays dense.
        vae_dtype: the autoencoder's dtype; None takes the default.

    Raises:
        InputError: for a name of no release.
    """
    release = _release(model)
    text_encoder = Qwen3TextEncoder(release.text_encoder)
    transformer, autoencoder = FluxKlein(release.transformer), AutoEncoder(AutoEncoderConfig())
    for stage, module in (("text_encoder", text_encoder), ("transformer", transformer), ("autoencoder", autoencoder)):
        module.set_dtype(stage_dtype(stage, dtype, vae_dtype))
        quantize(module, _stored_recipe(release, stage), quantize_rtn)
        if stage in specs:
            quantize(module, mixed_precision(module, specs[stage]), quantize_rtn)
    if release.text_encoder.adapter is not None:
        text_encoder.adapter.set_dtype(mx.float32)
    return text_encoder, transformer, autoencoder


def released_language_model(
    model: str | Release, dtype: mx.Dtype, specs: Mapping[str, Quantization]
) -> Qwen3LanguageModel:
    """The language model that a released model's text encoder is the beginning of; as released_modules.

    Raises:
        InputError: for a name of no release, and for the small text encoder.
    """
    release = _release(model)
    if release.text_encoder.adapter is not None:
        raise no_language_model("the small text encoder is too small to write prompts out")
    ways = [Qwen3LanguageModel(release.text_encoder, is_tied=is_tied) for is_tied in (True, False)]
    sizes = [sum(array.size for array in weights_of(way).values()) for way in ways]
    language_model = ways[sizes.index(release.text_encoder_parameters)]
    language_model.set_dtype(stage_dtype("text_encoder", dtype))
    quantize(language_model, _stored_recipe(release, "text_encoder"), quantize_rtn)
    if "text_encoder" in specs:
        quantize(language_model, mixed_precision(language_model, specs["text_encoder"]), quantize_rtn)
    return language_model


def _stored_recipe(release: Release, part: str) -> Recipe:
    """The recipe that a part's files follow, as packed_recipe tells it of weights that are there."""

    def recipe(path: str, _: nn.Module) -> Quantization | None:
        spec = release.packing(part, path)
        return spec and readable(spec)

    return recipe


def download_bytes(model: str | Release) -> int:
    """Bytes of a released model's weights on the Hub, packed or in bfloat16; of the text encoder's files some are not
    fetched.
    """
    release = _release(model)
    encoder, transformer = Qwen3TextEncoder(release.text_encoder), FluxKlein(release.transformer)
    more = release.text_encoder_parameters / sum(array.size for array in weights_of(encoder.model).values())
    text_encoder_bytes = round(more * _stored_bytes(release, "text_encoder", encoder.model))
    if release.text_encoder.adapter is not None:
        text_encoder_bytes += sum(array.size for array in weights_of(encoder.adapter).values()) * mx.float32.size
    autoencoder_bytes = _stored_bytes(release, "vae", AutoEncoder(AutoEncoderConfig()))
    return text_encoder_bytes + _stored_bytes(release, "transformer", transformer) + autoencoder_bytes


def _stored_bytes(release: Release, part: str, module: nn.Module) -> int:
    """Bytes of a dense module's weights in the release's files."""
    total = 0.0
    for path, array in weights_of(module).items():
        spec = release.packing(part, path) if array.ndim == 2 else None
        total += array.size * (mx.bfloat16.size if spec is None else spec.bits / 8 + 4 / spec.group_size)
    return int(total)


def _release(model: str | Release) -> Release:
    release = find_release(model) if isinstance(model, str) else model
    if release is None:
        raise InputError(f"{model!r} is no released model; there are {RELEASED_NAMES}")
    return release
