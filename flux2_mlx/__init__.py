"""FLUX.2 [klein] on Apple Silicon, in MLX alone."""

from ._version import __version__
from .checkpoints import sanitize_flux2_klein_weights, sanitize_qwen3_weights, sanitize_vae_weights
from .config import (
    RELEASED,
    AutoEncoderConfig,
    CheckpointError,
    FluxKleinParams,
    InputError,
    Qwen3Config,
)
from .images import read_metadata, save_image
from .latents import image_ids, pack_latents, text_ids, torch_randn, unpack_latents
from .models.autoencoder import AutoEncoder, Decoder, Encoder
from .models.text_encoder import Qwen3TextEncoder
from .models.transformer import FluxKlein
from .pipeline import Flux2Pipeline, Result, Settings, Step
from .plan import Plan
from .quantize import Quantization, QuantizedFluxKlein
from .sampler import FluxSampler, FluxSamplerConfig
from .tokenizer import Qwen3Tokenizer
from .weights import load_quantized_flux_klein, load_safetensors, open_checkpoint

__all__ = [
    "RELEASED",
    "AutoEncoder",
    "AutoEncoderConfig",
    "CheckpointError",
    "Decoder",
    "Encoder",
    "Flux2Pipeline",
    "FluxKlein",
    "FluxKleinParams",
    "FluxSampler",
    "FluxSamplerConfig",
    "InputError",
    "Plan",
    "Quantization",
    "QuantizedFluxKlein",
    "Qwen3Config",
    "Qwen3TextEncoder",
    "Qwen3Tokenizer",
    "Result",
    "Settings",
    "Step",
    "__version__",
    "image_ids",
    "load_quantized_flux_klein",
    "load_safetensors",
    "open_checkpoint",
    "pack_latents",
    "read_metadata",
    "sanitize_flux2_klein_weights",
    "sanitize_qwen3_weights",
    "sanitize_vae_weights",
    "save_image",
    "text_ids",
    "torch_randn",
    "unpack_latents",
]
