"""FLUX.2 [klein] on Apple Silicon, in MLX alone."""

from ._version import __version__
from .checkpoints.checkpoint import load_quantized_flux_klein, load_safetensors, open_checkpoint
from .conditioning.tokenizer import Qwen3Tokenizer
from .imaging.files import read_metadata, save_image
from .models.autoencoder import AutoEncoder, Decoder, Encoder
from .models.config import RELEASED, AutoEncoderConfig, CheckpointError, FluxKleinParams, InputError, Qwen3Config
from .models.flux2 import FluxKlein
from .models.names.autoencoder import sanitize_flux2_klein_weights, sanitize_qwen3_weights, sanitize_vae_weights
from .models.qwen3 import Qwen3TextEncoder
from .pipeline import Flux2Pipeline, Result, Settings, Step
from .quantization.layers import Quantization, QuantizedFluxKlein
from .runtime.plan import Plan
from .sampling.latents import image_ids, pack_latents, text_ids, torch_randn, unpack_latents
from .sampling.samplers import FluxSampler, FluxSamplerConfig

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
