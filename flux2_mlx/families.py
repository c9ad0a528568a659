"""What FLUX.2 [klein] is made of, and which models of it were released: facts that the rest of the library looks up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import InputError
from .models.autoencoder import AutoEncoder
from .models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config, refuse_changes, refuse_other_class
from .models.flux2 import FluxKlein
from .models.language_model import Qwen3LanguageModel
from .models.names import autoencoder, flux2, qwen3
from .models.names.common import Names
from .models.qwen3 import Qwen3TextEncoder
from .quantization.spec import Quantization

# Tokens that a prompt is padded or truncated to, unless the tokenizer takes fewer or the caller sets another number.
MAX_SEQUENCE_LENGTH = 512

NANO = "nano"  # a trained miniature, which is part of the package


@dataclass(frozen=True)
class Part:
    """One of the three models that make a pipeline.

    Attributes:
        key: the option, the folder in the diffusers layout, and the key of Checkpoint.sources.
        label: what messages call it.
        stem: the stem of its weight files in the diffusers layout.
        bfl_stem: the stem of its single file in BFL's layout.
        config: its configuration, with from_config and to_config.
        module: the class that the configuration makes one of.
        names: what files call its weights.
        can_be_packed: whether the module can hold packed layers.
        blocks: paths of the lists of blocks, in the order in which they run.
        bonsai_key: its folder in Bonsai's layout; None where that is ``key``.
    """

    key: str
    label: str
    stem: str
    bfl_stem: str
    config: Any
    module: Any
    names: Names
    can_be_packed: bool = True
    blocks: tuple[str, ...] = ()
    bonsai_key: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that it may be in, in any layout."""
        return (self.key,) if self.bonsai_key is None else (self.key, self.bonsai_key)


TRANSFORMER = Part(
    key="transformer",
    label="transformer",
    stem="diffusion_pytorch_model",
    bfl_stem="transformer",
    config=FluxKleinParams,
    module=FluxKlein,
    names=flux2.NAMES,
    blocks=("transformer_blocks", "single_transformer_blocks"),
    bonsai_key="transformer-packed-mflux",
)
TEXT_ENCODER = Part(
    key="text_encoder",
    label="text encoder",
    stem="model",
    bfl_stem="text_encoder",
    config=Qwen3Config,
    module=Qwen3TextEncoder,
    names=qwen3.NAMES,
    blocks=("model.layers",),
    bonsai_key="text_encoder-mlx-4bit",
)
AUTOENCODER = Part(
    key="vae",
    label="autoencoder",
    stem="diffusion_pytorch_model",
    bfl_stem="ae",
    config=AutoEncoderConfig,
    module=AutoEncoder,
    names=autoencoder.NAMES,
    can_be_packed=False,
)
# Whose first layers the text encoder is: in the same files, of which the rest is fetched and read once it is asked for.
LANGUAGE_MODEL = replace(
    TEXT_ENCODER, label="language model", module=Qwen3LanguageModel, names=qwen3.LANGUAGE_MODEL_NAMES
)
PARTS = {part.key: part for part in (TRANSFORMER, TEXT_ENCODER, AUTOENCODER)}


@dataclass(frozen=True)
class Variant:
    """The default steps and CFG scale of a kind of transformer."""

    num_steps: int
    guidance: float


DISTILLED, BASE = Variant(4, 1.0), Variant(50, 4.0)


@dataclass(frozen=True)
class Licence:
    """A licence as a model card states it: the Hub's identifier, and a sentence."""

    identifier: str
    sentence: str


APACHE = Licence("apache-2.0", "The 4B models of FLUX.2 [klein] are under Apache-2.0.")
NON_COMMERCIAL = Licence(
    "other", "The 9B models of FLUX.2 [klein] are under Black Forest Labs' non-commercial licence."
)


@dataclass(frozen=True)
class Release:
    """A released model: what is known of it before anything is downloaded.

    Attributes:
        name: the name that from_pretrained and --model take.
        repo: its id on the Hub.
        text_encoder_parameters: parameters of the whole Qwen3 in the repository, with the layers that klein does not
            use.
        licence: which, for the 9B models, has to be accepted on the Hub.
        is_distilled: whether it generates in few steps without CFG.
        has_kv_cache: whether it was trained to cache its references.
        packed: how the files hold matrices packed: (the part's key, the beginning of the layers' paths, how).
    """

    name: str
    repo: str
    transformer: FluxKleinParams
    text_encoder: Qwen3Config
    text_encoder_parameters: int
    licence: Licence
    is_distilled: bool = True
    has_kv_cache: bool = False
    packed: tuple[tuple[str, str, Quantization], ...] = ()

    def packing(self, part: str, path: str) -> Quantization | None:
        """How the files hold a part's matrix of that path packed; None where it is dense."""
        return next((spec for key, start, spec in self.packed if key == part and path.startswith(start)), None)


def _release_4b(name: str, repo: str, *, is_distilled: bool = True) -> Release:
    return Release(name, repo, FluxKleinParams.klein_4b(), Qwen3Config(), 4_022_468_096, APACHE, is_distilled)


def _release_9b(name: str, repo: str, *, is_distilled: bool = True, has_kv_cache: bool = False) -> Release:
    params, encoder = FluxKleinParams.klein_9b(), Qwen3Config.qwen3_8b()
    return Release(name, repo, params, encoder, 8_190_735_360, NON_COMMERCIAL, is_distilled, has_kv_cache)


def _release_bonsai(name: str, repo: str, bits: int) -> Release:
    """Bonsai Image 4B of PrismML: klein-4b, its blocks trained to so few bits, and Qwen3 in 4 bits."""
    blocks = [(TRANSFORMER.key, f"{path}.", Quantization(bits, 128)) for path in TRANSFORMER.blocks]
    packed = (*blocks, (TEXT_ENCODER.key, "", Quantization(4, 64)))
    return replace(_release_4b(name, repo), packed=packed)


# Qwen3-0.6B in the place of Qwen3-4B, with AiArtLab's adapter, a file in float32; both are under Apache-2.0.
SMALL = "small"
SMALL_REPO, SMALL_ADAPTER = "Qwen/Qwen3-0.6B", "AiArtLab/qwen3-0.6b-4b-adapter/adapter_v14_bal.safetensors"
SMALL_PARAMETERS = 751_632_384  # of the whole Qwen3-0.6B, its embedding twice


def with_small_encoder(release: Release) -> Release:
    """A released model with the small text encoder.

    Raises:
        InputError: for a 9B model.
    """
    check_small(release.name, release.transformer.txt_embed_dim)
    packed = tuple(packing for packing in release.packed if packing[0] != TEXT_ENCODER.key)
    return replace(release, text_encoder=Qwen3Config.small(), text_encoder_parameters=SMALL_PARAMETERS, packed=packed)


def check_small(name: str, txt_embed_dim: int) -> None:
    """Refuse the small text encoder for a transformer whose prompt embeddings it does not give.

    Raises:
        InputError: with the way out.
    """
    size = Qwen3Config.small().output_size
    if txt_embed_dim != size:
        raise InputError(
            f"the small text encoder (Qwen3-0.6B and its adapter) stands for Qwen3-4B, whose prompt embeddings have "
            f"{size} features, and {name} takes {txt_embed_dim}; it is for the 4B models: klein-4b, klein-base-4b"
        )


RELEASES = (
    _release_4b("klein-4b", "black-forest-labs/FLUX.2-klein-4B"),
    _release_9b("klein-9b", "black-forest-labs/FLUX.2-klein-9B"),
    _release_4b("klein-base-4b", "black-forest-labs/FLUX.2-klein-base-4B", is_distilled=False),
    _release_9b("klein-base-9b", "black-forest-labs/FLUX.2-klein-base-9B", is_distilled=False),
    _release_9b("klein-9b-kv", "black-forest-labs/FLUX.2-klein-9b-kv", has_kv_cache=True),
    _release_bonsai("bonsai-4b", "prism-ml/bonsai-image-ternary-4B-mlx-2bit", 2),
    _release_bonsai("bonsai-4b-1bit", "prism-ml/bonsai-image-binary-4B-mlx-1bit", 1),
)
RELEASED: dict[str, str] = {release.name: release.repo for release in RELEASES}
RELEASED_NAMES = ", ".join(RELEASED)  # the list in messages


def find_release(model: str) -> Release | None:
    """The released model of that name or Hub id; None where it is none."""
    return next((release for release in RELEASES if model in (release.name, release.repo)), None)


def release_of_size(txt_embed_dim: int) -> Release | None:
    """The first released model whose transformer takes prompt embeddings of that size."""
    return next((release for release in RELEASES if release.transformer.txt_embed_dim == txt_embed_dim), None)


def check_scheduler_config(config: Mapping[str, Any]) -> None:
    """Refuse a diffusers ``scheduler_config.json`` that asks for another sampling than FLUX.2 [klein]'s.

    Its shift, base_shift, max_shift and sequence lengths have no effect under dynamic shifting and are not looked at.

    Raises:
        CheckpointError: naming what differs.
    """
    refuse_other_class(config, "FlowMatchEulerDiscreteScheduler", "scheduler")
    expected = {"num_train_timesteps": 1000, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
    off = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    refuse_changes(config, {**expected, **dict.fromkeys(off, False), "shift_terminal": None}, "scheduler")
