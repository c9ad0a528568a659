"""What a stage is in this library, mflux, mlx-vlm and torch (diffusers, transformers); the floor of a step, decoding
without strips, and the ways of this library to start.

A stage is a function of arrays, made from this library's module: the text encoder of (ids, mask), a step of (tokens,
prompt embeddings, noise level), decoding of tokens. The MLX peers and the floor compute with the very arrays of that
module's weights, which are in memory once; torch with copies.

mflux runs as its own Flux2Klein.generate_image runs it: its step compiled (not on M1 and M2), its decoder in strips.
mlx-vlm runs as its own Flux2Image.generate_array does, but for its decoder's tiles, which change the image and are off.
What differs: both make the tables of rotations in every step, in float32, where this library makes them once for an
image, in float64; of float16 mflux computes attention and feed-forward alone, as with its --compute-precision, and
mlx-vlm nothing; and here their q and k norms are given the checkpoint's epsilon, 1e-6, where their own is 1e-5. torch
computes one layer of the text encoder more, since transformers normalizes the output of the last one.

Packed, this library is as --quantize packs it, and the MLX peers as their own options do, by mlx.nn.quantize of all
linear layers; torch and the floor stay dense.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.common import Case, Model, Run, diffusers_weights, loaded, mlx_meter, packed_copy, rope_of, velocity
from flux2_mlx import (
    AutoEncoder,
    AutoEncoderConfig,
    FluxKlein,
    FluxKleinParams,
    Qwen3Config,
    Qwen3TextEncoder,
    image_ids,
    open_checkpoint,
    text_ids,
    unpack_latents,
)
from flux2_mlx.device import stage_dtype, weights_of
from flux2_mlx.models import autoencoder


@dataclass(frozen=True)
class Library:
    """A peer made with MLX: its version that is known here, how to install it, and where its modules are."""

    version: str
    install: str
    text_encoder: str
    transformer: str
    vae: str
    decoder: str
    config: str


MLX_PEERS = {
    "mflux": Library(
        "0.24.0",
        "pip install --no-deps mflux==0.24.0 && pip install matplotlib opencv-python piexif platformdirs regex "
        "requests toml torch tqdm transformers",
        "mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder",
        "mflux.models.flux2.model.flux2_transformer.transformer",
        "mflux.models.flux2.model.flux2_vae.vae",
        "mflux.models.flux2.model.flux2_vae.decoder.decoder",
        "mflux.models.common.config.model_config",
    ),
    "mlx-vlm": Library(
        "0.7.10",
        "pip install --no-deps mlx-vlm==0.7.10 && pip install jinja2 requests tqdm transformers",
        "mlx_vlm.models.flux2.qwen.text_encoder",
        "mlx_vlm.models.flux2.transformer.transformer",
        "mlx_vlm.models.flux2.vae.vae",
        "mlx_vlm.models.flux2.vae.decoder.decoder",
        "mlx_vlm.models.flux2.constants",
    ),
}
INSTALL = {name: peer.install for name, peer in MLX_PEERS.items()} | {"torch": 'pip install -e ".[dev]"'}
PACKAGES = {"torch": ("torch", "diffusers", "transformers"), **{name: (name,) for name in MLX_PEERS}}


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here, and what to install; None where it can."""
    try:
        if name == "torch":
            from diffusers import Flux2KleinPipeline  # noqa: F401
        elif name in MLX_PEERS:
            peer = MLX_PEERS[name]
            import_module(peer.transformer)
            if version(name) != peer.version:
                raise ImportError(f"this is {name} {version(name)}")
    except ImportError as error:
        return f"--against {name}: {error}; install it: {INSTALL[name]}"
    return None


def refusal(name: str, model: Model, case: Case) -> str | None:
    """Why an MLX peer's pipeline cannot draw what its modules can compute; None where it can."""
    klein, own = AutoEncoderConfig.flux2(), model.autoencoder
    fault = None
    if name in MLX_PEERS and (own.block_out_channels, own.decoder_channels) != (
        klein.block_out_channels,
        klein.decoder_channels,
    ):
        fault = "has klein's autoencoder alone: give --random small"
    elif name == "mflux" and case.text_length != 512:
        fault = "takes 512 text tokens alone: give --text-length 512"
    elif name == "mlx-vlm" and min(case.width, case.height) < 256:
        fault = "takes images from 256 x 256 on: give --size 256"
    return fault and f"{name}'s pipeline {fault}, or --stages without start"


def forget_files(model: str) -> None:
    """Let the system forget what it holds in memory of a checkpoint's files; where it can't, `sudo purge` does."""
    if not hasattr(os, "posix_fadvise"):
        return
    for source in open_checkpoint(model).sources.values():
        for file in source.files:
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def as_numpy(result: Any) -> np.ndarray:
    return np.array(result.astype(mx.float32)) if isinstance(result, mx.array) else result.float().cpu().numpy()


def meter_of(name: str) -> Callable[[], tuple[int | None, int | None]]:
    """What tells the most bytes that its arrays take from here on."""
    if name != "torch":
        return mlx_meter(name)
    import torch

    if not torch.cuda.is_available():
        return lambda: (None, None)
    torch.cuda.reset_peak_memory_stats()
    return lambda: (torch.cuda.max_memory_allocated(), None)


# ------------------------------------------------------------------------------------------------- this library


def packed(module: Any, case: Case) -> Any:
    """The module, or a packed copy."""
    return packed_copy(module, str(case.bits))[0] if case.bits else module


def ours_encode(module: Qwen3TextEncoder, case: Case) -> Run:
    run: Run = packed(module, case)
    return run


def ours_step(module: FluxKlein, case: Case) -> Run:
    module = packed(module, case)
    rope = rope_of(case.params, case.text_length, image_ids(case.height, case.width))
    return lambda x, txt, sigma: velocity(module, x, txt, sigma, rope)


def ours_decode(module: AutoEncoder, case: Case) -> Run:
    return lambda x: module.decoder(unpack_latents(module.bn.denormalize(x), case.height, case.width))


def undivided_decode(module: AutoEncoder, case: Case) -> Run:
    """The same with the whole image as one strip."""
    decode = ours_decode(module, case)

    def run(x: mx.array) -> mx.array:
        with patch.object(autoencoder, "TILE_BYTES", 2**31 - 1):
            return decode(x)

    return run


# --------------------------------------------------------------------------------------------- mflux and mlx-vlm


def peer_class(name: str, part: str) -> Any:
    """The class of an MLX peer's module; all of them have the same names in both."""
    called = {
        "text_encoder": "Qwen3TextEncoder",
        "transformer": "Flux2Transformer",
        "vae": "Flux2VAE",
        "decoder": "Flux2Decoder",
        "config": "ModelConfig",
    }
    return getattr(import_module(getattr(MLX_PEERS[name], part)), called[part])


def peer_name(name: str) -> str:
    """What both peers call a weight of this library."""
    return re.sub(
        r"(?<=attn\.to_out)\.0|(?<=attentions\.0\.to_out)\.0|timestep_embedder\.|^model\.|^decoder\.(?=post_quant)"
        r"|^encoder\.(?=quant)",
        "",
        name,
    )


def with_weights(name: str, peer: nn.Module, module: nn.Module, dtype: mx.Dtype, bits: int = 0) -> Any:
    """A peer's module with the weights of this library's, packed if bits say so. What is not among these is never
    computed.
    """
    peer_class(name, "config").precision = dtype
    renamed = {peer_name(path): array.astype(dtype) for path, array in weights_of(module).items()}
    peer.load_weights(list(renamed.items()), strict=False)
    if bits:
        nn.quantize(peer, bits=bits, class_predicate=lambda _, layer: hasattr(layer, "to_quantized"))
        loaded(peer)
    return peer


def text_encoder_shape(config: Qwen3Config) -> dict[str, Any]:
    """In the peers' words, but for the number of layers."""
    return {name: value for name, value in asdict(config).items() if name not in ("tapped_layers", "adapter")}


def transformer_shape(params: FluxKleinParams) -> dict[str, Any]:
    """In the peers' words."""
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


def peer_transformer(name: str, module: FluxKlein, dtype: mx.Dtype, bits: int = 0) -> Any:
    """An MLX peer's transformer that computes what this library's does."""
    peer = with_weights(name, peer_class(name, "transformer")(**transformer_shape(module.params)), module, dtype, bits)
    for path, layer in peer.named_modules():
        if re.search(r"norm_(added_)?[qk]$", path):
            layer.eps = module.params.eps
    return peer


def peer_encode(name: str) -> Callable[[Qwen3TextEncoder, Case], Run]:
    def build(module: Qwen3TextEncoder, case: Case) -> Run:
        shape, taps = text_encoder_shape(module.config), [tap + 1 for tap in module.config.tapped_layers]
        peer = peer_class(name, "text_encoder")(num_hidden_layers=module.config.num_layers, **shape)
        with_weights(name, peer, module, stage_dtype("text_encoder", case.dtype), case.bits)
        return lambda ids, mask: peer.get_prompt_embeds(ids, mask, tuple(taps))

    return build


def mflux_step(module: FluxKlein, case: Case) -> Run:
    from mflux.models.common.compute_precision import ComputePrecision
    from mflux.models.flux2.variants import Flux2Klein

    dtype = stage_dtype("text_encoder", case.dtype)
    peer = peer_transformer("mflux", module, dtype, case.bits)
    if case.dtype == mx.float16:
        peer.apply_compute_precision(ComputePrecision(mx.float16))
    predict = Flux2Klein._predict(peer)
    positions = {"latent_ids": image_ids(case.height, case.width), "text_ids": text_ids(case.text_length)}
    unguided = {"negative_prompt_embeds": None, "negative_text_ids": None, "guidance": 1.0}
    return lambda x, txt, sigma: predict(
        latents=x.astype(dtype),
        prompt_embeds=txt.astype(dtype),
        timestep=mx.array(1000 * sigma),
        **positions,
        **unguided,
    )


def mlx_vlm_step(module: FluxKlein, case: Case) -> Run:
    dtype = stage_dtype("text_encoder", case.dtype)
    peer = peer_transformer("mlx-vlm", module, dtype, case.bits)
    positions = {"img_ids": image_ids(case.height, case.width), "txt_ids": text_ids(case.text_length)}
    return lambda x, txt, sigma: peer(x.astype(dtype), txt.astype(dtype), mx.array(1000 * sigma), **positions)


def peer_decode(name: str) -> Callable[[AutoEncoder, Case], Run]:
    def build(module: AutoEncoder, case: Case) -> Run:
        config, dtype = module.config, module.dtype
        peer = peer_class(name, "vae")()
        peer.decoder = peer_class(name, "decoder")(
            block_out_channels=config.decoder_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
        )
        if name == "mflux":
            from mflux.models.common.vae.block_decoder import VAEBlockDecoder

            peer.decode_mode = VAEBlockDecoder.LOW_MEMORY
        with_weights(name, peer, module, dtype)

        def decode(x: mx.array) -> mx.array:
            packed = x.reshape(1, case.height // 16, case.width // 16, -1).transpose(0, 3, 1, 2)
            image: mx.array = peer.decode_packed_latents(packed.astype(dtype))
            return image.transpose(0, 2, 3, 1)

        return decode

    return build


def mflux_training_step(peer: nn.Module, paths: Sequence[str], options: Any, clean: mx.array, txt: mx.array) -> Run:
    """A step of mflux's training, by its own loop.

    Args:
        peer: its transformer.
        paths: of the layers that are trained, in this library's words.
        options: this library's TrainingOptions.
        clean: tokens of the square image that is learned.
        txt: prompt embeddings.
    """
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.training.dataset.batch import Batch, DataItem
    from mflux.models.common.training.lora.target_injector import inject_lora_targets
    from mflux.models.common.training.optimization.optimizer import Optimizer
    from mflux.models.common.training.state import training_spec as specs
    from mflux.models.common.training.trainer import TrainingTrainer
    from mflux.models.flux2.training_adapter.flux2_base_training_adapter import Flux2BaseTrainingAdapter
    from mflux.models.flux2.training_adapter.flux2_training_adapter import Flux2TrainingAdapter

    targets = [specs.LoraTargetSpec(peer_name(path), options.rank) for path in paths]
    side = options.resolution
    spec = specs.TrainingSpec(
        model="flux2-klein-base-4b",
        model_path=None,
        seed=options.seed,
        steps=40,
        guidance=1.0,
        quantize=options.quantize,
        training_loop=specs.TrainingLoopSpec(num_epochs=1, batch_size=options.batch_size),
        optimizer=specs.OptimizerSpec("AdamW", options.learning_rate, max_grad_norm=options.clip),
        checkpoint=None,
        monitoring=None,
        lora_layers=specs.LoraLayersSpec(targets),
        statistics=None,
        data=[],
        gradient_checkpointing=options.grad_checkpoint,
    )
    inject_lora_targets(peer, targets)
    whole = nn.Module()
    whole.transformer, whole.vae, whole.text_encoder = peer, nn.Module(), nn.Module()
    adapter = Flux2TrainingAdapter.__new__(Flux2TrainingAdapter)  # its own __init__ reads a checkpoint
    config = ModelConfig.flux2_klein_base_4b()
    Flux2BaseTrainingAdapter.__init__(adapter, model_config=config, quantize=None, model_factory=lambda *_: whole)
    given = {"prompt_embeds": txt, "text_ids": text_ids(txt.shape[1]), "img_ids": image_ids(side, side)}
    items = [DataItem(k, "", "", clean, given, side, side) for k in range(options.batch_size)]
    optimizer, rng = Optimizer.from_spec(spec), random.Random(options.seed)
    loaded(peer)
    mx.eval(clean, given)

    class Once(list[Any]):
        """Its iterator over batches, of which there is one."""

        num_iterations = 1

        def total_number_of_steps(self) -> int:
            return 1

    state = SimpleNamespace(
        iterator=Once([Batch(items, rng)]),
        optimizer=optimizer,
        should_generate_image=lambda _: False,
        should_save=lambda _: False,
        save=lambda *_: None,
    )
    return lambda: TrainingTrainer.train(adapter=adapter, training_spec=spec, training_state=state)


# -------------------------------------------------------------------------------------------------------- torch


def torch_device() -> Any:
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


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


def finished(run: Run) -> Run:
    """Without gradients, and waited for."""
    import torch

    @torch.inference_mode()
    def run_and_wait(*inputs: Any) -> Any:
        result = run(*inputs)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return result

    return run_and_wait


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

    return finished(encode)


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

    return finished(step)


def torch_decode(module: AutoEncoder, case: Case) -> Run:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

    peer = in_torch(AutoencoderKLFlux2.from_config(module.config.to_config()), diffusers_weights(module))
    mean, scale = as_torch(module.bn.running_mean), as_torch(mx.sqrt(module.bn.running_var + module.bn.eps))

    def decode(x: Any) -> Any:
        packed = (x * scale + mean).reshape(1, case.height // 16, case.width // 16, -1).permute(0, 3, 1, 2)
        latents = Flux2KleinPipeline._unpatchify_latents(packed).to(peer.dtype)
        return peer.decode(latents, return_dict=False)[0].permute(0, 2, 3, 1)

    return finished(decode)


# -------------------------------------------------------------------------------------------------------- floor


def floor(module: FluxKlein, case: Case) -> Run:
    """The matrix products and attentions of a step, on inputs that are ready: nothing elementwise, no copies. Every
    weight is one product, but for the last block's; each group waits for the one before, whose results are then given
    up.
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
        if i < params.depth_single - 1:
            groups += [products(tokens, f"{block}.to_qkv_mlp_proj"), attention, products(tokens, f"{block}.to_out")]
            continue
        # Of the last block's text only keys and values are read.
        q, kv, mlp = mx.split(weights[f"{block}.to_qkv_mlp_proj.weight"], (params.hidden_size, 3 * params.hidden_size))
        parts = mx.contiguous(kv), mx.concatenate([q, mlp])
        mx.eval(parts)
        keys = ready(params.num_heads, tokens, params.head_dim)
        groups += [
            [(ready(rows, params.hidden_size), part) for rows, part in zip((tokens, case.tokens), parts, strict=True)],
            [(ready(params.num_heads, case.tokens, params.head_dim), keys, keys)],
            products(case.tokens, f"{block}.to_out"),
        ]
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
    "mflux": {"text_encoder": peer_encode("mflux"), "step": mflux_step, "decode": peer_decode("mflux")},
    "mlx-vlm": {"text_encoder": peer_encode("mlx-vlm"), "step": mlx_vlm_step, "decode": peer_decode("mlx-vlm")},
    "torch": {"text_encoder": torch_encode, "step": torch_step, "decode": torch_decode},
    "floor": {"step": floor},
    "undivided": {"decode": undivided_decode},
}
# Of each whole library the process of benchmarks.cold that it runs in, and what is special of it: whether the system
# forgets the files first, and what with_flux2_mlx is told.
STARTS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "flux2_mlx": ("flux2_mlx", False, {}),
    "cold": ("flux2_mlx", True, {}),
    "cold-unread": ("flux2_mlx", True, {"read_ahead": False}),
    "known-prompt": ("flux2_mlx", False, {"cache": True}),
    "mflux": ("mflux", False, {}),
    "mlx-vlm": ("mlx-vlm", False, {}),
    "torch": ("torch", False, {}),
}
# Of each peer that trains, how a step is made; mlx-vlm has no training of FLUX.2.
TRAINERS: dict[str, Callable[..., Run]] = {"mflux": mflux_training_step}
