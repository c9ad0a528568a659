"""Configurations: one frozen dataclass a model, filled from the checkpoint's own config.json.

Field defaults are those of FLUX.2 [klein] 4B. ``from_config`` takes the dictionary that diffusers or transformers
wrote and refuses another architecture by name, so that a FLUX.1 or FLUX.2-dev folder fails before a weight is read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from reprlib import repr as shown
from typing import Any

from ..errors import CheckpointError, InputError, OtherModelError

# The text encoder's layers whose outputs klein reads, counted from zero (hidden_states 9, 18, 27 in transformers).
TAPPED_LAYERS = (8, 17, 26)

# More blocks of a kind than any model of this family has; a config beyond is damaged.
MAX_BLOCKS = 256
MAX_LAYERS_PER_BLOCK = 16  # of the autoencoder, which has 2
MAX_WIDTH = 2**20  # of any layer; the vocabulary, its widest, has a seventh


def _require(config: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise CheckpointError(f"the {what} config has no {', '.join(missing)}; is it a FLUX.2 [klein] checkpoint?")


def refuse_changes(config: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Refuse options that would change the model and that no FLUX.2 [klein] checkpoint sets; absent is as expected."""
    found = {name: config[name] for name in expected if config.get(name) is not None}
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    changed = {name: value for name, value in found.items() if value != expected[name]}
    if changed:
        raise CheckpointError(
            f"the {what} config has {shown(changed)}; FLUX.2 [klein] has { {name: expected[name] for name in changed} }"
        )


def refuse_other_class(config: Mapping[str, Any], expected: str, what: str) -> None:
    found = config.get("_class_name", expected)
    if found != expected:
        known = {"FluxTransformer2DModel": " (FLUX.1)", "AutoencoderKL": " (FLUX.1 or Stable Diffusion)"}
        named = known.get(str(found), "")
        raise CheckpointError(f"the {what} is a {str(found)[:80]}{named}, not the {expected} of FLUX.2 [klein]")


class _Config:
    """The base of the configurations: every field must have the kind of value that its default has."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            value, default = getattr(self, field.name), field.default
            values = value if isinstance(value, tuple) else (value,)
            if isinstance(default, float):
                fits = type(value) in (int, float) and 0 < value <= sys.float_info.max
            elif default is None and (value is None or isinstance(value, _Config)):
                fits = True
            else:
                fits = bool(values) and all(type(v) is int and 0 < v <= MAX_WIDTH for v in values)
                fits &= isinstance(value, tuple) == isinstance(default, (tuple, type(None)))
            if not fits:
                raise InputError(f"{field.name} cannot be {shown(value)} in a {type(self).__name__}")


@dataclass(frozen=True)
class FluxKleinParams(_Config):
    """The transformer's shape. Defaults are klein-4B's.

    ``head_dim`` times ``num_heads`` is ``hidden_size``; ``axes_dims_rope`` sums to ``head_dim``.
    """

    in_channels: int = 128
    hidden_size: int = 3072
    txt_embed_dim: int = 7680
    num_heads: int = 24
    mlp_ratio: float = 3.0
    depth: int = 5
    depth_single: int = 20
    head_dim: int = 128
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    eps: float = 1e-6
    timestep_channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads * self.head_dim != self.hidden_size:
            raise InputError(
                f"hidden_size must be num_heads * head_dim = {self.num_heads * self.head_dim}, got {self.hidden_size}"
            )
        odd = any(dims % 2 for dims in self.axes_dims_rope)
        if len(self.axes_dims_rope) != 4 or sum(self.axes_dims_rope) != self.head_dim or odd:
            raise InputError(
                f"axes_dims_rope must be four even sizes that sum to head_dim {self.head_dim}, "
                f"got {self.axes_dims_rope}"
            )
        if max(self.depth, self.depth_single) > MAX_BLOCKS or not 1 <= self.hidden_size * self.mlp_ratio <= MAX_WIDTH:
            raise InputError(
                f"{self.depth} double and {self.depth_single} single blocks with mlp_ratio {self.mlp_ratio} are no "
                "FLUX.2 [klein], which has 5 and 20 or 8 and 24, and 3.0"
            )

    @property
    def blocks(self) -> int:
        """Blocks of both kinds."""
        return self.depth + self.depth_single

    @property
    def mlp_hidden(self) -> int:
        """Width of the feed-forward layers after the gate."""
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def klein_4b(cls) -> FluxKleinParams:
        return cls()

    @classmethod
    def klein_9b(cls) -> FluxKleinParams:
        return cls(hidden_size=4096, txt_embed_dim=12288, num_heads=32, depth=8, depth_single=24)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FluxKleinParams:
        """Read a diffusers ``transformer/config.json``.

        Raises:
            CheckpointError: for another architecture, FLUX.1 and FLUX.2-dev named as such.
        """
        refuse_other_class(config, "Flux2Transformer2DModel", "transformer")
        if config.get("guidance_embeds"):
            raise OtherModelError("the transformer has a guidance embedding: this is FLUX.2-dev, not FLUX.2 [klein]")
        keys = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
        _require(config, keys, "transformer")
        in_channels = config.get("in_channels", 128)
        refuse_changes(config, {"patch_size": 1, "out_channels": in_channels}, "transformer")
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        if type(heads) is not int or type(head_dim) is not int:
            raise InputError(f"{shown(heads)} heads of {shown(head_dim)} are no whole numbers")
        return cls(
            in_channels=in_channels,
            hidden_size=heads * head_dim,
            txt_embed_dim=config["joint_attention_dim"],
            num_heads=heads,
            mlp_ratio=config.get("mlp_ratio", 3.0),
            depth=config["num_layers"],
            depth_single=config["num_single_layers"],
            head_dim=head_dim,
            axes_dims_rope=tuple(config.get("axes_dims_rope", (32, 32, 32, 32))),
            rope_theta=config.get("rope_theta", 2000),
            eps=config.get("eps", 1e-6),
            timestep_channels=config.get("timestep_guidance_channels", 256),
        )

    def to_config(self) -> dict[str, Any]:
        """The dictionary that diffusers writes: the inverse of from_config."""
        return {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": None,
            "num_layers": self.depth,
            "num_single_layers": self.depth_single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.num_heads,
            "joint_attention_dim": self.txt_embed_dim,
            "timestep_guidance_channels": self.timestep_channels,
            "mlp_ratio": self.mlp_ratio,
            "axes_dims_rope": list(self.axes_dims_rope),
            "rope_theta": self.rope_theta,
            "eps": self.eps,
            "guidance_embeds": False,
        }


@dataclass(frozen=True)
class TextAdapterConfig(_Config):
    """The adapter from the layers of a smaller Qwen3 to the prompt embeddings that a transformer was trained with.
    Defaults are AiArtLab's, from Qwen3-0.6B to Qwen3-4B.

    Its input are ``slices`` layers' outputs side by side, ``input_size`` together; ``hidden_size`` is the feed-forward
    part's width, ``attn_dim`` the attention's. A prompt has ``max_tokens`` at most, and its first ``dropped_tokens``
    have no embedding.
    """

    input_size: int = 6144
    slices: int = 6
    output_size: int = 7680
    hidden_size: int = 8192
    attn_dim: int = 1024
    attn_heads: int = 8
    attn_blocks: int = 2
    max_tokens: int = 256
    dropped_tokens: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_size % self.slices or self.attn_dim % self.attn_heads or self.attn_blocks > MAX_BLOCKS:
            raise InputError(
                f"an adapter of {self.input_size} features from {self.slices} layers, with {self.attn_blocks} blocks "
                f"of {self.attn_heads} heads in {self.attn_dim}, cannot be"
            )
        if self.dropped_tokens >= self.max_tokens:
            raise InputError(f"an adapter cannot drop {self.dropped_tokens} of {self.max_tokens} tokens")


@dataclass(frozen=True)
class Qwen3Config(_Config):
    """The text encoder's shape. Defaults are Qwen3-4B's.

    ``head_dim`` is its own number: in Qwen3-4B it is not ``hidden_size / num_attention_heads``.
    ``tapped_layers`` are zero-based; nothing after the last of them is built.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tapped_layers: tuple[int, ...] = TAPPED_LAYERS
    adapter: TextAdapterConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        tapped = len(self.tapped_layers) * self.hidden_size
        if self.adapter is not None and self.adapter.input_size != tapped:
            raise InputError(
                f"the adapter is for a Qwen3 of hidden size {self.adapter.input_size // len(self.tapped_layers)}, "
                f"and the text encoder's is {self.hidden_size}"
            )
        if self.num_attention_heads * self.head_dim > MAX_WIDTH:
            raise InputError(f"num_attention_heads {self.num_attention_heads} of head_dim {self.head_dim} cannot be")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}, and head_dim {self.head_dim} even"
            )

    @property
    def num_layers(self) -> int:
        """Layers that are built: up to the last tapped one."""
        return self.tapped_layers[-1] + 1

    @property
    def output_size(self) -> int:
        """Features of the prompt embeddings: the adapter's, or the tapped layers' outputs side by side."""
        return len(self.tapped_layers) * self.hidden_size if self.adapter is None else self.adapter.output_size

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that a prompt may have; None where any length goes."""
        return None if self.adapter is None else self.adapter.max_tokens

    @property
    def dropped_tokens(self) -> int:
        """How many of a prompt's first tokens have no embedding; the others keep their positions."""
        return 0 if self.adapter is None else self.adapter.dropped_tokens

    @classmethod
    def small(cls) -> Qwen3Config:
        """Qwen3-0.6B with AiArtLab's adapter."""
        return cls(
            hidden_size=1024,
            intermediate_size=3072,
            num_attention_heads=16,
            tapped_layers=(1, 8, 13, 17, 22, 26),
            adapter=TextAdapterConfig(),
        )

    @classmethod
    def qwen3_8b(cls) -> Qwen3Config:
        return cls(hidden_size=4096, intermediate_size=12288)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """Read a transformers ``text_encoder/config.json``; old and new spellings of ``rope_theta`` are understood.

        Raises:
            CheckpointError: for a model that is not Qwen3, or one with too few layers.
        """
        if config.get("model_type", "qwen3") != "qwen3":
            raise CheckpointError(
                f"the text encoder is a {shown(config['model_type'])} model; FLUX.2 [klein] needs a Qwen3 (4B or 8B)"
            )
        keys = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
        )
        _require(config, keys, "text encoder")
        if config["num_hidden_layers"] <= TAPPED_LAYERS[-1]:
            raise CheckpointError(
                f"the text encoder has {config['num_hidden_layers']} layers; FLUX.2 [klein] reads the output of layer "
                f"{TAPPED_LAYERS[-1]}, so at least {TAPPED_LAYERS[-1] + 1} are needed"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"the text encoder config has rope parameters {shown(rope)}; an object is expected")
        expected = {"rope_type": "default", "attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
        found = {"rope_type": rope.get("rope_type") or rope.get("type"), **config}
        refuse_changes(found, expected, "text encoder")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 1e6),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        )

    def to_config(self) -> dict[str, Any]:
        """The dictionary that transformers writes, for the layers that are built: the inverse of from_config."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": False,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True)
class AutoEncoderConfig(_Config):
    """The autoencoder's shape, in diffusers' field names. Defaults are FLUX.2's.

    ``sample_size`` is the side in pixels of the images that the checkpoint is for.
    ``decoder_block_out_channels`` of None means the encoder's. ``batch_norm_eps`` belongs to the statistics of the
    packed latents; ``norm_eps`` to the GroupNorms, which diffusers fixes at 1e-6.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    batch_norm_eps: float = 1e-4
    sample_size: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_per_block > MAX_LAYERS_PER_BLOCK:
            raise InputError(f"layers_per_block is at most {MAX_LAYERS_PER_BLOCK}, got {self.layers_per_block}")
        for channels in (self.block_out_channels, self.decoder_channels):
            if len(channels) != 4 or any(c % self.norm_num_groups for c in channels):
                raise InputError(
                    f"block_out_channels must be four multiples of norm_num_groups {self.norm_num_groups}, "
                    f"got {channels}"
                )

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def packed_channels(self) -> int:
        """Channels of a latent once its 2x2 patches are packed."""
        return 4 * self.latent_channels

    @classmethod
    def flux2(cls) -> AutoEncoderConfig:
        return cls()

    @classmethod
    def flux2_small_decoder(cls) -> AutoEncoderConfig:
        return cls(decoder_block_out_channels=(96, 192, 384, 384))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoEncoderConfig:
        """Read a diffusers ``vae/config.json``.

        Raises:
            CheckpointError: for another architecture or an option that FLUX.2 never uses.
        """
        refuse_other_class(config, "AutoencoderKLFlux2", "vae")
        _require(config, ("block_out_channels", "latent_channels"), "vae")
        expected = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
        refuse_changes(config, {**expected, "act_fn": "silu", "patch_size": [2, 2]}, "vae")
        decoder = config.get("decoder_block_out_channels")
        return cls(
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            latent_channels=config["latent_channels"],
            block_out_channels=tuple(config["block_out_channels"]),
            decoder_block_out_channels=None if decoder is None else tuple(decoder),
            layers_per_block=config.get("layers_per_block", 2),
            norm_num_groups=config.get("norm_num_groups", 32),
            batch_norm_eps=config.get("batch_norm_eps", 1e-4),
            sample_size=config.get("sample_size", 1024),
        )

    def to_config(self) -> dict[str, Any]:
        """The dictionary that diffusers writes: the inverse of from_config."""
        decoder = self.decoder_block_out_channels
        return {
            "_class_name": "AutoencoderKLFlux2",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "latent_channels": self.latent_channels,
            "block_out_channels": list(self.block_out_channels),
            "decoder_block_out_channels": None if decoder is None else list(decoder),
            "down_block_types": ["DownEncoderBlock2D"] * len(self.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "batch_norm_eps": self.batch_norm_eps,
            "sample_size": self.sample_size,
            "act_fn": "silu",
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
            "patch_size": [2, 2],
        }
