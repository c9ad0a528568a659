"""The public names, which the package takes from here when the first of them is asked for."""

from ._version import __version__
from .checkpoints.checkpoint import open_checkpoint
from .checkpoints.files import load_safetensors
from .checkpoints.load import load_quantized_flux_klein
from .checkpoints.sanitize import sanitize_flux2_klein_weights, sanitize_qwen3_weights, sanitize_vae_weights
from .conditioning.tokenizer import Qwen3Tokenizer
from .errors import CheckpointError, DeviceError, InputError
from .families import RELEASED
from .imaging.files import read_metadata, save_image
from .models.autoencoder import AutoEncoder, Decoder, Encoder
from .models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config
from .models.flux2 import FluxKlein
from .models.qwen3 import Qwen3TextEncoder
from .options import GenerationOptions, ModelOptions
from .pipeline import Flux2Pipeline
from .quantization.recipes import QuantizedFluxKlein
from .quantization.spec import Quantization
from .request import Settings
from .results import Result, Step
from .runtime.plan import Plan
from .sampling.latents import image_ids, pack_latents, text_ids, torch_randn, unpack_latents
from .sampling.samplers import FluxSampler, FluxSamplerConfig

__all__ = [
    "RELEASED",
    "AutoEncoder",
    "AutoEncoderConfig",
    "CheckpointError",
    "Decoder",
    "DeviceError",
    "Encoder",
    "Flux2Pipeline",
    "FluxKlein",
    "FluxKleinParams",
    "FluxSampler",
    "FluxSamplerConfig",
    "GenerationOptions",
    "InputError",
    "ModelOptions",
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
