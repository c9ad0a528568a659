"""The modules of a released model, weightless, to plan it before it is downloaded."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..device import stage_dtype, weight_bytes
from ..models.autoencoder import AutoEncoder
from ..models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config
from ..models.flux2 import FluxKlein
from ..models.qwen3 import Qwen3TextEncoder
from ..quantization.layers import quantize
from ..quantization.packing import quantize_rtn
from ..quantization.recipes import mixed_precision
from ..quantization.spec import Quantization

# Parameters of Qwen3-4B and -8B as they are released, with the layers that klein does not use.
TEXT_ENCODER_PARAMETERS = {"4b": 4_022_468_096, "9b": 8_190_735_360}


def released_modules(
    name: str, dtype: mx.Dtype, spec: Mapping[str, Quantization]
) -> tuple[Qwen3TextEncoder, FluxKlein, AutoEncoder]:
    """The modules of a released model as they will be once they are loaded; their weights are random, lazy, and not
    worth reading.

    Args:
        name: of config.RELEASED.
        dtype: of the transformer.
        spec: the packing of each stage that is packed.
    """
    small = size_of(name) == "4b"
    text_encoder = Qwen3TextEncoder(Qwen3Config() if small else Qwen3Config.qwen3_8b())
    transformer = FluxKlein(FluxKleinParams.klein_4b() if small else FluxKleinParams.klein_9b())
    autoencoder = AutoEncoder(AutoEncoderConfig())
    for stage, module in (("text_encoder", text_encoder), ("transformer", transformer), ("autoencoder", autoencoder)):
        module.set_dtype(stage_dtype(stage, dtype))
        if stage in spec:
            quantize(module, mixed_precision(module, spec[stage]), quantize_rtn)
    return text_encoder, transformer, autoencoder


def download_bytes(name: str) -> int:
    """Bytes of a released model's weights on the Hub, in bfloat16; of the text encoder's files some are not fetched."""
    _, transformer, autoencoder = released_modules(name, mx.bfloat16, {})
    return weight_bytes(transformer) + weight_bytes(autoencoder) + 2 * TEXT_ENCODER_PARAMETERS[size_of(name)]


def size_of(name: str) -> str:
    """A released model's size: "4b" or "9b"."""
    return "9b" if "9b" in name else "4b"
