"""Weights: find a checkpoint (folder, file, Hub id or name), check its files, and put them into the modules.

Arrays stay lazy: opening reads configs and file headers, and a weight's bytes are read from disk when it is first
computed with. Only safetensors and GGUF are ever opened; pickles are refused.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..families import KV, NANO, RELEASED
from ..models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config
from ..models.names.autoencoder import VAE_PREFIXES
from ..models.names.flux2 import TRANSFORMER_PREFIXES
from ..models.names.qwen3 import TEXT_ENCODER_PREFIXES
from .files import load_files, read_json
from .folder import STEMS, Found, Source, open_folder, weight_files
from .hub import HUB_FILE, HUB_ID, download, download_file, download_part, fetching, local_path


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configs fit together and whose weight files are there.

    Attributes:
        name: what the caller asked for: a released name, a Hub id, or a path.
        revision: of the Hub repository, where the caller asked for one.
        folder: where the files are, of a single file the folder of the rest.
        is_distilled: whether it draws in few steps without guidance.
        has_kv_cache: whether it was trained to cache its references (klein-9b-kv).
        sources: of each component's weights.
        tokenizer: folder of tokenizer.json.
        options: what the caller asked for besides, as open_checkpoint takes it; None where nothing.
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


# ---------------------------------------------------------------------------------------------------- checkpoints


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

    What a file is, is told from its content, never from its name.

    Args:
        model: a folder in the diffusers layout, or as mflux saves one; a safetensors or GGUF file with a transformer,
            whose other parts are taken from the released model of its size; a Hub id, or "owner/name/file"
            there; a released name such as "klein-4b"; or "nano", the miniature in this package. What is not here is
            downloaded, the needed files only; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured.
        revision: branch, tag or commit on the Hub, of the model.
        transformer, text_encoder, vae: instead of the model's own: a file, a folder with config.json and weights, a Hub
            id of such a folder, or "owner/name/file". A vae may be a decoder alone.
        tokenizer: a folder with tokenizer.json.
        distilled: whether the transformer draws in few steps without guidance, where the model does not say it.
        kv_cache: whether the transformer was trained to keep its references, where the model does not say it.

    Raises:
        CheckpointError: for whatever is wrong, with the way out.
    """
    name = os.fspath(model)
    paths = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    given = {part: None if where is None else os.fspath(where) for part, where in paths.items()}
    parts = {part: _find_part(part, where) for part in STEMS if (where := given[part]) is not None}
    if transformer is not None and distilled is None:
        raise _unsaid(given["transformer"])
    if kv_cache and transformer is None:
        check_keeps(name)
    needed = [part for part in STEMS if part not in parts or (part == "vae" and not _is_whole(parts[part]))]
    found = _find_model(name, revision, needed, tokenizer is None, distilled)
    sources = dict(found.sources)
    for part, source in parts.items():
        decoder_only = part == "vae" and not _is_whole(source)
        sources[part] = replace(sources[part], decoder=source.files[0]) if decoder_only else source
    is_distilled = found.is_distilled if distilled is None else distilled
    if is_distilled is None:
        raise _unsaid(name)
    keeps = found.has_kv_cache if transformer is None else None
    if kv_cache and keeps is False:
        raise _keeps_nothing(name)
    folder = found.folder / "tokenizer" if tokenizer is None else Path(tokenizer).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json")
    shapes = {part: sources[part].shape() for part in STEMS}
    _check_pairing(sources, **shapes)
    return Checkpoint(
        name,
        revision,
        found.folder,
        is_distilled,
        bool(keeps) if kv_cache is None else kv_cache,
        shapes["transformer"],
        shapes["text_encoder"],
        shapes["vae"],
        sources,
        folder,
        {**given, "distilled": distilled, "kv_cache": kv_cache},
    )


def check_keeps(name: str) -> None:
    """Refuse a released model that was not trained to keep its references.

    Raises:
        CheckpointError: with the one that was.
    """
    released = RELEASED.get(name, name)
    if released in RELEASED.values() and released != RELEASED[KV]:
        raise _keeps_nothing(name)


def _keeps_nothing(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} was not trained to keep its references, which then see neither the prompt nor the picture: its edits "
        f"would come out wrong; {KV} was (or leave out kv_cache, --kv-cache)"
    )


def _unsaid(name: str | None) -> CheckpointError:
    return CheckpointError(
        f"{name} does not say whether its transformer is distilled (4 steps, no guidance) or a base model (50 steps, "
        "guidance 4); say distilled=True or False (--distilled, --no-distilled)"
    )


def _find_model(
    name: str, revision: str | None, parts: Sequence[str], with_tokenizer: bool, distilled: bool | None
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


def _open_file(path: Path, parts: Sequence[str], with_tokenizer: bool, distilled: bool | None) -> Found:
    """A file with a transformer, and perhaps more; the other parts are those of the released model of its size."""
    inside = _parts_in(path)
    if "transformer" in parts and "transformer" not in inside:
        flags = " and ".join("--" + part.replace("_", "-") for part in inside)
        raise CheckpointError(f"{path} holds no transformer; give a model, and this file as {flags}")
    sources = {part: Source(part, str(path), (path,)) for part in parts if part in inside}
    rest = [part for part in parts if part not in sources]
    if not rest and not with_tokenizer:
        return Found(path.parent, None, None, sources)
    params = Source("transformer", str(path), (path,)).shape()
    base = next((name for name, size in _TEXT_SIZES.items() if size == params.txt_embed_dim), None)
    if base is not None and distilled is None:
        raise _unsaid(str(path))  # before the rest is downloaded
    if base is None:
        raise CheckpointError(
            f"{path} holds the transformer of no released model (it takes prompt embeddings of "
            f"{params.txt_embed_dim}); give its {', '.join([*(_CALLED[part] for part in rest), 'tokenizer'])} as well"
        )
    folder = download(base, RELEASED[base], None, rest, with_tokenizer)
    found = open_folder(folder, rest, with_tokenizer)
    return Found(folder, None, None, {**found.sources, **sources})


_CALLED = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "autoencoder"}
_TEXT_SIZES = {"klein-4b": Qwen3Config().output_size, "klein-9b": Qwen3Config.qwen3_8b().output_size}
_MARKS_OF_PARTS = {
    "transformer": (TRANSFORMER_PREFIXES, ("img_in.weight", "x_embedder.weight")),
    "text_encoder": (
        TEXT_ENCODER_PREFIXES,
        ("model.embed_tokens.weight", "embed_tokens.weight", "token_embd.weight"),
    ),
    "vae": (VAE_PREFIXES, ("decoder.conv_in.weight",)),
}


def _parts_in(path: Path) -> list[str]:
    """Which components a file holds, by the names of its weights.

    Raises:
        CheckpointError: for a file that holds none, saying what it looks like.
    """
    names = load_files([path]).keys()
    parts = [
        part
        for part, (prefixes, marks) in _MARKS_OF_PARTS.items()
        if any(prefix + mark in names for prefix in ("", *prefixes) for mark in marks)
    ]
    if parts:
        return parts
    looks = ""
    if any(re.search(r"lora_|\.lokr_|\.hada_", name) for name in names):
        looks = "; it looks like a LoRA"
    elif any(name.startswith(("model.diffusion_model.input_blocks.", "down_blocks.")) for name in names):
        looks = "; it looks like Stable Diffusion"
    shown = ", ".join(sorted(names)[:3])
    raise CheckpointError(f"{path} holds no part of a FLUX.2 [klein] model{looks} (its first weights: {shown})")


def _find_part(part: str, where: str) -> Source:
    """A component that is given on its own: a file, a folder, or either on the Hub."""
    path = local_path(where)
    if path is None and HUB_FILE.fullmatch(where):
        path = download_file(where, None)
    elif path is None and HUB_ID.fullmatch(where):
        path = fetching(where, where, None, lambda: download_part(where, part))
    if path is None:
        raise CheckpointError(f"no {_CALLED[part]} {where!r}: there is no such file or folder")
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").is_file() else None
        return Source(part, str(path), weight_files(path, part), config)
    inside = _parts_in(path)
    if part not in inside:
        raise CheckpointError(f"{path} holds no {_CALLED[part]}, but {' and '.join(_CALLED[p] for p in inside)}")
    return Source(part, str(path), (path,))


def _is_whole(source: Source) -> bool:
    """Whether an autoencoder is more than a decoder."""
    return "bn.running_mean" in source.weights()


def _check_pairing(
    sources: Mapping[str, Source], transformer: FluxKleinParams, text_encoder: Qwen3Config, vae: AutoEncoderConfig
) -> None:
    if transformer.txt_embed_dim != text_encoder.output_size:
        sizes = {2560: "4B", 4096: "8B"}
        raise CheckpointError(
            f"{sources['transformer'].where} takes prompt embeddings of {transformer.txt_embed_dim} (3 x "
            f"{transformer.txt_embed_dim // 3}), but the text encoder {sources['text_encoder'].where} gives "
            f"{text_encoder.output_size} (3 x {text_encoder.hidden_size}, "
            f"Qwen3-{sizes.get(text_encoder.hidden_size, '?')}); klein-4b goes with Qwen3-4B and klein-9b with Qwen3-8B"
        )
    if transformer.in_channels != vae.packed_channels:
        raise CheckpointError(
            f"{sources['transformer'].where} takes {transformer.in_channels} latent channels, but the autoencoder "
            f"packs {vae.packed_channels}"
        )
