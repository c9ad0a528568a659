"""Find a checkpoint (folder, file, Hub id or name), and check that its configs and files fit together.

Opening reads configs and file headers; a weight's bytes are read from disk when it is first computed with. Only
safetensors and GGUF are ever opened; pickles are refused.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..families import (
    NANO,
    PARTS,
    RELEASED,
    RELEASES,
    SMALL,
    SMALL_ADAPTER,
    SMALL_REPO,
    TEXT_ENCODER,
    TRANSFORMER,
    Part,
    check_small,
    find_release,
    release_of_size,
)
from ..models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config
from ..models.names.qwen3 import NEEDED_QWEN3, is_qwen3_vl
from ..paths import expand
from .files import load_files
from .folder import SLOW_TOKENIZER, Found, Source, open_folder, weight_files
from .formats.unread import unread_storage
from .hub import HUB_FILE, HUB_ID, download, download_file, download_part, fetching, local_path
from .reading import WEIGHT_SUFFIXES, read_json


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configs fit together and whose weight files are there.

    Attributes:
        name: what the caller asked for: a released name, a Hub id, or a path.
        revision: the revision on the Hub, where the caller asked for one.
        folder: where the files are, of a single file the folder of the rest.
        is_distilled: whether it generates in few steps without CFG.
        has_kv_cache: whether it was trained to cache its references (klein-9b-kv).
        sources: where each part's weights come from, by its key; see families.PARTS.
        tokenizer: folder of tokenizer.json.
        options: what the caller asked for besides, as open_checkpoint takes it; None where nothing.
        is_bonsai: whether its transformer is PrismML's Bonsai Image, which was trained to draw from text alone.
    """

    name: str
    revision: str | None
    folder: Path
    is_distilled: bool
    has_kv_cache: bool
    transformer: FluxKleinParams
    text_encoder: Qwen3Config
    autoencoder: AutoEncoderConfig
    sources: Mapping[str, Source]
    tokenizer: Path
    options: Mapping[str, Any]
    is_bonsai: bool = False

    @property
    def configs(self) -> dict[str, Any]:
        """Each part's config, by its key."""
        return {"transformer": self.transformer, "text_encoder": self.text_encoder, "vae": self.autoencoder}


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    distilled: bool | None = None,
    kv_cache: bool | None = None,
) -> Checkpoint:
    """Find a checkpoint and check it: configs, pairing of the parts, presence of the files.

    A file's content decides what it is, never its name.

    Args:
        model: a folder in the diffusers layout, or as mflux saves one; a safetensors or GGUF file with a transformer,
            whose other parts are taken from the released model of its size; a Hub id, or "owner/name/file"
            there; a released name such as "klein-4b"; or "nano", the miniature in this package. What is not here is
            downloaded, the needed files only; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured.
        revision: branch, tag or commit on the Hub, of the model.
        transformer, text_encoder, vae: instead of the model's own: a file, a folder with config.json and weights, a Hub
            id of such a folder, or "owner/name/file". A vae may be a decoder alone. A Qwen3-0.6B, or "small" for the
            Hub's, stands for Qwen3-4B with its adapter, a file beside it or on the Hub.
        tokenizer: a folder with tokenizer.json.
        distilled: whether the transformer generates in few steps without CFG, where the model does not say it; what
            the model says goes for another transformer, too, with a UserWarning.
        kv_cache: whether the transformer was trained to cache its references, where the model does not say it.

    Raises:
        CheckpointError: for whatever is wrong, with the way out.
    """
    name = os.fspath(model)
    paths = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    given = {option: None if path is None else os.fspath(path) for option, path in paths.items()}
    is_small = text_encoder == SMALL and local_path(SMALL) is None  # found once it is known to fit
    if is_small and transformer is None and (release := find_release(name)) is not None:
        check_small(name, release.transformer.txt_embed_dim)
    parts = [part for part in PARTS.values() if not (is_small and part is TEXT_ENCODER)]
    own = {part.key: _find_part(part, path) for part in parts if (path := given[part.key]) is not None}
    if kv_cache and transformer is None:
        check_kv_support(name)
    whole = {key: source for key, source in own.items() if key != "vae" or has_encoder(source)}
    needed = [part for part in parts if part.key not in whole]
    found = _find_model(name, revision, needed, tokenizer is None, distilled)
    sources = {**found.sources, **whole}
    if own.keys() - whole.keys():  # a decoder alone
        own["vae"].shape()  # refuses another model's under its own name
        sources["vae"] = replace(sources["vae"], decoder=own["vae"].files[0])
    if is_small:
        check_small(sources["transformer"].name, sources["transformer"].shape().txt_embed_dim)
        sources["text_encoder"] = _find_part(TEXT_ENCODER, SMALL_REPO)
    sources["text_encoder"] = _with_adapter(sources["text_encoder"], sources["transformer"])
    if transformer is not None:
        found = replace(found, has_kv_cache=None, is_bonsai=False)
        if distilled is None and found.is_distilled is not None:
            kind = "distilled" if found.is_distilled else "a base model"
            other = "False (--no-distilled)" if found.is_distilled else "True (--distilled)"
            warnings.warn(
                f"{given['transformer']} is taken for {kind}, as {name} is; else say distilled={other}", stacklevel=2
            )
    is_distilled, has_kv_cache = _variant_of(given["transformer"] or name, found, distilled, kv_cache)
    folder = _tokenizer_folder(str(found.folder / "tokenizer") if tokenizer is None else expand(tokenizer))
    shapes = {key: sources[key].shape() for key in PARTS}
    _check_pairing(sources, **shapes)
    return Checkpoint(
        name,
        revision,
        found.folder,
        is_distilled,
        has_kv_cache,
        shapes["transformer"],
        shapes["text_encoder"],
        shapes["vae"],
        sources,
        folder,
        {**given, "distilled": distilled, "kv_cache": kv_cache},
        found.is_bonsai,
    )


def _tokenizer_folder(name: str) -> Path:
    folder = local_path(name)
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{name} has no tokenizer.json; {SLOW_TOKENIZER}")
    return folder


def _variant_of(name: str, found: Found, distilled: bool | None, kv_cache: bool | None) -> tuple[bool, bool]:
    """(is_distilled, has_kv_cache) of a model: the caller's, else the model's own.

    Raises:
        CheckpointError: where nobody says whether it is distilled, or the model says that it has no KV cache.
    """
    is_distilled = found.is_distilled if distilled is None else distilled
    if is_distilled is None:
        raise missing_variant(name)
    if kv_cache and found.has_kv_cache is False:
        raise no_kv_support(name)
    return is_distilled, bool(found.has_kv_cache) if kv_cache is None else kv_cache


def check_kv_support(name: str) -> None:
    """Refuse a released model that was not trained to cache its references.

    Raises:
        CheckpointError: with the one that was.
    """
    release = find_release(name)
    if release is not None and not release.has_kv_cache:
        raise no_kv_support(name)


def no_kv_support(name: str) -> CheckpointError:
    trained = ", ".join(release.name for release in RELEASES if release.has_kv_cache)
    return CheckpointError(
        f"{name} was not trained to cache its references (KV cache), which then see neither the prompt nor the image: "
        f"its edits would come out wrong; {trained} was (or leave out kv_cache, --kv-cache)"
    )


def missing_variant(name: str | None) -> CheckpointError:
    return CheckpointError(
        f"{name} does not say whether its transformer is distilled (4 steps, no CFG) or a base model (50 steps, "
        "CFG scale 4); say distilled=True or False (--distilled, --no-distilled)"
    )


def _find_model(
    name: str, revision: str | None, parts: Sequence[Part], with_tokenizer: bool, distilled: bool | None
) -> Found:
    """The parts of a model: of a folder, a file, or what the Hub has under the name."""
    path = local_path(name)
    if path is not None and revision is not None:
        raise InputError(
            f"revision {revision!r} has no meaning for the local {'folder' if path.is_dir() else 'file'} {name}"
        )
    if path is None and HUB_FILE.fullmatch(name):
        path = download_file(name, revision)
    if path is not None:
        try:
            if path.is_dir():
                return open_folder(path, parts, with_tokenizer)
            return _open_file(path, parts, with_tokenizer, distilled)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    if path is None and Path(name).suffix in WEIGHT_SUFFIXES:
        raise CheckpointError(f"no model {name!r}: there is no such file")
    if name not in RELEASED and not HUB_ID.fullmatch(name):
        known = (*RELEASED, NANO)
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4) or known
        raise CheckpointError(
            f"no model {name!r}: there is no such folder or file, and no released model of that name; "
            f"did you mean {' or '.join(near)}?"
        )
    folder = download(name, RELEASED.get(name, name), revision, parts, with_tokenizer)
    try:
        return open_folder(folder, parts, with_tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or the download is incomplete: run it again with a connection") from None


def _open_file(path: Path, parts: Sequence[Part], with_tokenizer: bool, distilled: bool | None) -> Found:
    """A file with a transformer, and perhaps more; the other parts are those of the released model of its size."""
    inside = _parts_in(path)
    if TRANSFORMER in parts and TRANSFORMER not in inside:
        flags = " and ".join("--" + part.key.replace("_", "-") for part in inside)
        raise CheckpointError(f"{path} holds no transformer; give a model, and this file as {flags}")
    sources = {part.key: Source(part, str(path), (path,)) for part in parts if part in inside}
    rest = [part for part in parts if part not in inside]
    if not rest and not with_tokenizer:
        return Found(path.parent, None, None, sources)
    size = Source(TRANSFORMER, str(path), (path,)).shape().txt_embed_dim
    release = release_of_size(size)
    if release is None:
        raise CheckpointError(
            f"{path} holds the transformer of no released model (it takes prompt embeddings of {size}); give its "
            f"{', '.join([*(part.label for part in rest), 'tokenizer'])} as well"
        )
    if distilled is None:
        raise missing_variant(str(path))  # before the rest is downloaded
    folder = download(release.name, release.repo, None, rest, with_tokenizer)
    found = open_folder(folder, rest, with_tokenizer)
    return Found(folder, None, None, {**found.sources, **sources})


def _parts_in(path: Path) -> list[Part]:
    """Which parts a file holds, by the names of its weights.

    Raises:
        CheckpointError: for a file that holds none, saying what it looks like.
    """
    names = load_files([path]).keys()
    parts = [part for part in PARTS.values() if part.names.are_in(names)]
    if parts:
        return parts
    looks = ""
    if any(re.search(r"lora_|\.lokr_|\.hada_", name) for name in names):
        looks = "; it looks like a LoRA"
    elif any(name.startswith(("model.diffusion_model.input_blocks.", "down_blocks.")) for name in names):
        looks = "; it looks like Stable Diffusion"
    elif is_qwen3_vl(names):
        looks = f"; it is Qwen3-VL, and {NEEDED_QWEN3}"
    elif (storage := unread_storage(names)) is not None:
        looks = f"; its weights are stored as {storage} has them, which is not read"
    shown = ", ".join(sorted(names)[:3])
    raise CheckpointError(f"{path} holds no part of a FLUX.2 [klein] model{looks} (its first weights: {shown})")


def _find_part(part: Part, name: str) -> Source:
    """A part that is given on its own: a file, a folder, or either on the Hub."""
    path = local_path(name)
    if path is None and HUB_FILE.fullmatch(name):
        path = download_file(name, None)
    elif path is None and HUB_ID.fullmatch(name):
        path = fetching(name, name, None, lambda: download_part(name, part))
    if path is None:
        raise CheckpointError(f"no {part.label} {name!r}: there is no such file or folder")
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").is_file() else None
        return Source(part, str(path), weight_files(path, part), config)
    inside = _parts_in(path)
    if part not in inside:
        raise CheckpointError(f"{path} holds no {part.label}, but {' and '.join(other.label for other in inside)}")
    return Source(part, str(path), (path,))


def _with_adapter(text_encoder: Source, transformer: Source) -> Source:
    """A text encoder that is too small for a transformer with its adapter: the file beside it, else the Hub's.

    Raises:
        CheckpointError: where the transformer is not one that the adapter is for.
    """
    config, size = text_encoder.shape(), transformer.shape().txt_embed_dim
    if config.output_size == size:
        return text_encoder
    adapter = text_encoder.files[0].with_name(Path(SMALL_ADAPTER).name)
    if not adapter.is_file():
        if config.hidden_size != Qwen3Config.small().hidden_size:
            return text_encoder
        check_small(transformer.name, size)
        adapter = download_file(SMALL_ADAPTER, None, "text adapter")
    return replace(text_encoder, adapter=adapter)


def has_encoder(source: Source) -> bool:
    """Whether an autoencoder is more than a decoder."""
    return any(name.startswith("encoder.") for name in source.weights())


def _check_pairing(
    sources: Mapping[str, Source], transformer: FluxKleinParams, text_encoder: Qwen3Config, vae: AutoEncoderConfig
) -> None:
    if transformer.txt_embed_dim != text_encoder.output_size:
        sizes = {2560: "4B", 4096: "8B"}
        raise CheckpointError(
            f"{sources['transformer'].name} takes prompt embeddings of {transformer.txt_embed_dim} (3 x "
            f"{transformer.txt_embed_dim // 3}), but the text encoder {sources['text_encoder'].name} gives "
            f"{text_encoder.output_size} (3 x {text_encoder.hidden_size}, "
            f"Qwen3-{sizes.get(text_encoder.hidden_size, '?')}); klein-4b goes with Qwen3-4B and klein-9b with Qwen3-8B"
        )
    if transformer.in_channels != vae.packed_channels:
        raise CheckpointError(
            f"{sources['transformer'].name} takes {transformer.in_channels} latent channels, but the autoencoder "
            f"packs {vae.packed_channels}"
        )
