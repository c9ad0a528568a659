"""The stages of benchmarks.peers in this library, mflux, torch (diffusers, transformers); the floor of a step, and
decoding without tiles.

A stage is a function of arrays, made from this library's module: the text encoder of (ids, mask), a step of (tokens,
prompt embeddings, noise level), decoding of tokens. mflux and the floor compute with the very arrays of that module's
weights, which are in memory once; torch with copies.

mflux runs as its own Flux2Klein.generate_image runs it: its step compiled (not on M1 and M2), its decoder in strips.
What differs: it makes the tables of rotations in every step, in float32, where this library makes them once for a
picture, in float64; of float16 it computes attention and feed-forward alone, as with its --compute-precision; and here
its q and k norms are given the checkpoint's epsilon, 1e-6, where its own is 1e-5. torch computes one layer of the text
encoder more, since transformers normalizes the output of the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux2_mlx import (
    AutoEncoder,
    FluxKlein,
    FluxKleinParams,
    Qwen3Config,
    Qwen3TextEncoder,
    image_ids,
    text_ids,
    unpack_latents,
)
from flux2_mlx.device import stage_dtype, weights_of
from flux2_mlx.models import autoencoder
from flux2_mlx.models.names.autoencoder import diffusers_vae

MFLUX = "0.24.0"
INSTALL = {
    "mflux": f"pip install --no-deps mflux=={MFLUX} && pip install matplotlib opencv-python piexif platformdirs regex "
    "requests toml torch tqdm transformers",
    "torch": 'pip install -e ".[dev]"',
}

Run = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """What is computed: a picture's size in pixels, its text's in tokens, the transformer's shape and dtype."""

    width: int
    height: int
    text_length: int
    params: FluxKleinParams
    dtype: mx.Dtype

    @property
    def tokens(self) -> int:
        return self.width * self.height // 256


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here, and what to install; None where it can."""
    try:
        if name == "mflux":
            from mflux.models.flux2.variants import Flux2Klein  # noqa: F401

            if version("mflux") != MFLUX:
                raise ImportError(f"this is mflux {version('mflux')}")
        elif name == "torch":
            from diffusers import Flux2KleinPipeline  # noqa: F401
    except ImportError as error:
        return f"--against {name}: {error}; install it: {INSTALL[name]}"
    return None


def finished(result: Any) -> Any:
    """The same, computed."""
    if isinstance(result, mx.array):
        mx.eval(result)
    else:
        synchronize()
    return result


def as_numpy(result: Any) -> np.ndarray:
    return np.array(result.astype(mx.float32)) if isinstance(result, mx.array) else result.float().cpu().numpy()


def peak_of(name: str) -> Callable[[], int | None]:
    """What tells the most bytes that its arrays take from here on."""
    if name != "torch":
        mx.reset_peak_memory()
        return mx.get_peak_memory
    import torch

    if not torch.cuda.is_available():
        return lambda: None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated


# ------------------------------------------------------------------------------------------------- this library


def ours_encode(module: Qwen3TextEncoder, case: Case) -> Run:
    return module


def ours_step(module: FluxKlein, case: Case) -> Run:
    params = case.params
    rope = FluxKlein.compute_rope(
        text_ids(case.text_length), image_ids(case.height, case.width), params.axes_dims_rope, params.rope_theta
    )
    return lambda x, txt, sigma: module.forward_with_rope(x, txt, mx.array([sigma]), *rope)


def ours_decode(module: AutoEncoder, case: Case) -> Run:
    return lambda x: module.decoder(unpack_latents(module.bn.denormalize(x), case.height, case.width))


def undivided_decode(module: AutoEncoder, case: Case) -> Run:
    """The same with the whole picture as one tile."""
    decode = ours_decode(module, case)

    def run(x: mx.array) -> mx.array:
        with patch.object(autoencoder, "TILE_BYTES", 2**31 - 1):
            return decode(x)

    return run


# -------------------------------------------------------------------------------------------------------- mflux


def in_mflux(peer: nn.Module, module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """mflux's module with the weights of this library's. What is not among these is never computed."""
    from mflux.models.common.config.model_config import ModelConfig

    ModelConfig.precision = dtype
    renamed = {
        re.sub(
            r"(?<=attn\.to_out)\.0|(?<=attentions\.0\.to_out)\.0|timestep_embedder\.|^model\.|^decoder\.(?=post_quant)"
            r"|^encoder\.(?=quant)",
            "",
            name,
        ): array.astype(dtype)
        for name, array in weights_of(module).items()
    }
    peer.load_weights(list(renamed.items()), strict=False)
    return peer


def mflux_text_encoder(config: Qwen3Config) -> dict[str, Any]:
    """Its shape in mflux's words, but for the number of layers."""
    return {name: value for name, value in asdict(config).items() if name != "tapped_layers"}


def mflux_transformer(params: FluxKleinParams) -> dict[str, Any]:
    """Its shape in mflux's words."""
    return {
        "in_channels": params.in_channels,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single,
        "attention_head_dim": params.head_dim,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.txt_embed_dim,
        "timestep_guidance_channels": params.timestep_channels,
        "mlp_ratio": params.mlp_ratio,
        "axes_dims_rope": params.axes_dims_rope,
        "rope_theta": params.rope_theta,
    }


def mflux_encode(module: Qwen3TextEncoder, case: Case) -> Run:
    from mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder import Qwen3TextEncoder as Peer

    peer = Peer(num_hidden_layers=module.config.num_layers, **mflux_text_encoder(module.config))
    return in_mflux(peer, module, stage_dtype("text_encoder", case.dtype)).get_prompt_embeds


def mflux_step(module: FluxKlein, case: Case) -> Run:
    from mflux.models.common.compute_precision import ComputePrecision
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
    from mflux.models.flux2.variants import Flux2Klein

    params, dtype = case.params, stage_dtype("text_encoder", case.dtype)
    peer = in_mflux(Flux2Transformer(**mflux_transformer(params)), module, dtype)
    if case.dtype == mx.float16:
        peer.apply_compute_precision(ComputePrecision(mx.float16))
    for path, layer in peer.named_modules():
        if re.search(r"norm_(added_)?[qk]$", path):
            layer.eps = params.eps
    predict = Flux2Klein._predict(peer)
    places = {"latent_ids": image_ids(case.height, case.width), "text_ids": text_ids(case.text_length)}
    unguided = {"negative_prompt_embeds": None, "negative_text_ids": None, "guidance": 1.0}
    return lambda x, txt, sigma: predict(
        latents=x.astype(dtype), prompt_embeds=txt.astype(dtype), timestep=mx.array(1000 * sigma), **places, **unguided
    )


def mflux_decode(module: AutoEncoder, case: Case) -> Run:
    from mflux.models.common.vae.block_decoder import VAEBlockDecoder
    from mflux.models.flux2.model.flux2_vae.decoder.decoder import Flux2Decoder
    from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE

    config, dtype = module.config, stage_dtype("autoencoder", case.dtype)
    peer = Flux2VAE()
    peer.decoder = Flux2Decoder(
        block_out_channels=config.decoder_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
    )
    peer.decode_mode = VAEBlockDecoder.LOW_MEMORY
    in_mflux(peer, module, dtype)

    def decode(x: mx.array) -> mx.array:
        packed = x.reshape(1, case.height // 16, case.width // 16, -1).transpose(0, 3, 1, 2)
        return peer.decode_packed_latents(packed.astype(dtype)).transpose(0, 2, 3, 1)

    return decode


# -------------------------------------------------------------------------------------------------------- torch


def torch_device() -> Any:
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def synchronize() -> None:
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def as_torch(array: Any) -> Any:
    """An MLX array on torch's device, in its dtype; what is no array as it is."""
    import torch

    if not isinstance(array, mx.array):
        return array
    if array.dtype not in (mx.float16, mx.bfloat16, mx.float32):
        return torch.from_numpy(np.array(array)).to(torch_device())
    dtype = getattr(torch, str(array.dtype).removeprefix("mlx.core."))
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(torch_device(), dtype)


def in_torch(peer: Any, weights: dict[str, mx.array]) -> Any:
    """torch's module with these weights, in their dtype."""
    import torch

    some = as_torch(next(iter(weights.values())))
    torch.nn.Module.to(peer, some.device, some.dtype).eval()  # diffusers warns of its own about a dtype
    state = peer.state_dict()
    for name, array in weights.items():
        state[name].copy_(as_torch(array))
    return peer


def without_gradients(run: Run) -> Run:
    import torch

    return torch.inference_mode()(run)


def torch_encode(module: Qwen3TextEncoder, case: Case) -> Run:
    import torch
    from transformers import Qwen3Config, Qwen3Model

    config = module.config
    shape = {**config.to_config(), "num_hidden_layers": config.num_layers + 1}
    weights = {name.removeprefix("model."): array for name, array in weights_of(module).items()}
    peer = in_torch(Qwen3Model(Qwen3Config(**shape)), weights)

    def encode(ids: Any, mask: Any) -> Any:
        states = peer(ids, mask, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[tap + 1] for tap in config.tapped_layers], dim=-1)

    return without_gradients(encode)


def torch_step(module: FluxKlein, case: Case) -> Run:
    import torch
    from diffusers import Flux2Transformer2DModel

    peer = in_torch(Flux2Transformer2DModel.from_config(case.params.to_config()), weights_of(module))
    places = {
        "img_ids": as_torch(image_ids(case.height, case.width)),
        "txt_ids": as_torch(text_ids(case.text_length)),
    }

    def step(x: Any, txt: Any, sigma: float) -> Any:
        time = torch.full((1,), sigma, device=x.device, dtype=peer.dtype)
        x, txt = x.to(peer.dtype), txt.to(peer.dtype)
        return peer(x, encoder_hidden_states=txt, timestep=time, guidance=None, return_dict=False, **places)[0]

    return without_gradients(step)


def torch_decode(module: AutoEncoder, case: Case) -> Run:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

    weights = diffusers_vae(weights_of(module))
    peer = in_torch(AutoencoderKLFlux2.from_config(module.config.to_config()), weights)
    mean, scale = as_torch(module.bn.running_mean), as_torch(mx.sqrt(module.bn.running_var + module.bn.eps))

    def decode(x: Any) -> Any:
        packed = (x * scale + mean).reshape(1, case.height // 16, case.width // 16, -1).permute(0, 3, 1, 2)
        latents = Flux2KleinPipeline._unpatchify_latents(packed).to(peer.dtype)
        return peer.decode(latents, return_dict=False)[0].permute(0, 2, 3, 1)

    return without_gradients(decode)


# -------------------------------------------------------------------------------------------------------- floor


def floor(module: FluxKlein, case: Case) -> Run:
    """The matrix products and attentions of a step, on inputs that are ready: nothing elementwise, no copies. Every
    weight is one product; each group waits for the one before, whose results are then given up.
    """
    params, weights = case.params, weights_of(module)
    text, tokens = case.text_length, case.text_length + case.tokens
    inputs: dict[tuple[int, ...], mx.array] = {}

    def ready(*shape: int) -> mx.array:
        if shape not in inputs:
            inputs[shape] = mx.random.normal((1, *shape)).astype(case.dtype)
            mx.eval(inputs[shape])
        return inputs[shape]

    def products(rows: int, *layers: str) -> list[tuple[mx.array, ...]]:
        found = [weights[f"{layer}.weight"] for layer in layers]
        return [(ready(rows, weight.shape[1]), weight) for weight in found]

    attention: list[tuple[mx.array, ...]] = [(ready(params.num_heads, tokens, params.head_dim),) * 3]
    embedder = "time_guidance_embed.timestep_embedder.linear_"
    modulations = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    groups = [
        products(1, f"{embedder}1"),
        products(1, f"{embedder}2"),
        products(1, *(f"{name}.linear" for name in (*modulations, "norm_out"))),
        products(case.tokens, "x_embedder") + products(text, "context_embedder"),
    ]
    for i in range(params.depth):
        block = f"transformer_blocks.{i}"
        image, words = (f"{block}.attn.to_{x}" for x in "qkv"), (f"{block}.attn.add_{x}_proj" for x in "qkv")
        groups += [
            products(case.tokens, *image) + products(text, *words),
            attention,
            products(case.tokens, f"{block}.attn.to_out.0") + products(text, f"{block}.attn.to_add_out"),
            products(case.tokens, f"{block}.ff.linear_in") + products(text, f"{block}.ff_context.linear_in"),
            products(case.tokens, f"{block}.ff.linear_out") + products(text, f"{block}.ff_context.linear_out"),
        ]
    for i in range(params.depth_single):
        block = f"single_transformer_blocks.{i}.attn"
        groups += [products(tokens, f"{block}.to_qkv_mlp_proj"), attention, products(tokens, f"{block}.to_out")]
    groups += [products(case.tokens, "proj_out")]

    def run(x: mx.array, txt: mx.array, sigma: float) -> mx.array:
        results = [x]
        for group in groups:
            starts = mx.depends([first for first, *_ in group], results)
            results = [
                mx.fast.scaled_dot_product_attention(first, *rest, scale=params.head_dim**-0.5)
                if len(rest) == 2
                else first @ rest[0].T
                for first, (_, *rest) in zip(starts, group, strict=True)
            ]
        return results[0]

    return run


# Of each contender the stages that it has.
CONTENDERS: dict[str, dict[str, Callable[..., Run]]] = {
    "flux2_mlx": {"text_encoder": ours_encode, "step": ours_step, "decode": ours_decode},
    "mflux": {"text_encoder": mflux_encode, "step": mflux_step, "decode": mflux_decode},
    "torch": {"text_encoder": torch_encode, "step": torch_step, "decode": torch_decode},
    "floor": {"step": floor},
    "undivided": {"decode": undivided_decode},
}
