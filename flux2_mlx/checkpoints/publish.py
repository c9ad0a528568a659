"""What a written checkpoint needs to be published: model card, check, checksums, upload."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx

from .._version import __version__
from ..errors import CheckpointError, InputError, one_line, summarize
from ..families import RELEASED, Licence, release_of_size
from ..lazy import read
from .checkpoint import Checkpoint, open_checkpoint
from .files import load_files, read_header
from .hub import HUB_ID
from .load import load_autoencoder, load_text_encoder, load_transformer
from .reading import read_text, weight_names

CHECKSUMS = "SHA256SUMS"


def model_card(checkpoint: Checkpoint, layout: str, recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """The model card: what the folder holds, what it was made from, and under which licence."""
    source = RELEASED.get(checkpoint.name, checkpoint.name)
    ways = {part: recipe["quantization"] for part, recipe in recipes.items() if recipe}
    packed = "; ".join(
        f"{part.replace('_', ' ')} mostly in {way['bits']} bits, groups of {way['group_size']} ({way['mode']})"
        for part, way in ways.items()
    )
    release = release_of_size(checkpoint.transformer.txt_embed_dim)
    licence = Licence("other", "") if release is None else release.licence
    adapter = checkpoint.sources["text_encoder"].adapter
    merged = [Path(change.name).name for change in checkpoint.sources["transformer"].changes]
    is_on_hub = HUB_ID.fullmatch(source) is not None and not Path(source).exists()
    return "\n".join(
        [
            "---",
            "library_name: mlx",
            "pipeline_tag: text-to-image",
            *([f"base_model: {source}"] if is_on_hub else []),
            f"license: {licence.identifier}",
            "---",
            "",
            f"# {Path(source).name}, converted by flux2_mlx {__version__}",
            "",
            f"From {source if is_on_hub else Path(source).name}, in {layout} layout; {packed or 'bfloat16'}. The text",
            "encoder has the layers that FLUX.2 [klein] reads and no others, so other programs need their own.",
            "",
            *([f"It is a smaller Qwen3, which needs its adapter, {adapter.name} beside it.", ""] if adapter else []),
            *([f"Merged into the transformer: {', '.join(merged)}.", ""] if merged else []),
            f"{licence.sentence} The licence of the model that this was made from applies.".strip(),
            "",
        ]
    )


def check(folder: Path) -> Iterator[str]:
    """Verify a folder: each weight file's header, length, values and recorded checksum, and that a model opens.

    Yields:
        a line for each file that is whole.

    Raises:
        CheckpointError: for the first fault.
    """
    recorded = {}
    if (folder / CHECKSUMS).is_file():
        for line in read_text(folder / CHECKSUMS).splitlines():
            digest, _, name = line.partition("  ")
            recorded[name] = digest
    files = [folder / name for name in weight_names(folder, "**/*.safetensors")]
    missing = sorted(set(recorded) - {file.relative_to(folder).as_posix() for file in files})
    if missing:
        raise CheckpointError(f"{folder} has no {summarize(missing)}")
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files")
    for file in files:
        name = file.relative_to(folder).as_posix()
        header = read_header(file)
        if name in recorded:
            digest = sha256(file)
            if digest != recorded[name]:
                raise CheckpointError(f"{file} is not what was written: its SHA-256 is {digest}, not {recorded[name]}")
        weights = load_files([file])
        for weight in sorted(weights):
            array = read(weights.pop(weight))
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise CheckpointError(f"{file}: {weight} has values that are not finite")
        yield f"{name}: {len(header)} tensors, {file.stat().st_size:,} bytes"
    if (folder / "model_index.json").is_file():
        checkpoint = open_checkpoint(folder)
        load_transformer(checkpoint, mx.bfloat16)
        load_text_encoder(checkpoint, mx.bfloat16)
        load_autoencoder(checkpoint, mx.bfloat16)


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def upload(folder: Path, repo: str) -> str:
    """Push a folder to the Hub, into a new private repository or an existing one; returns its address.

    Raises:
        InputError: where the Hub refuses, with the way out.
    """
    try:
        huggingface_hub.create_repo(repo, private=True, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # the Hub's client, its transfer library and its HTTP library each raise their own
        raise InputError(
            f"cannot upload to {repo}: {one_line(error)}; the folder {folder} is whole (log in with `hf auth login` "
            "or set HF_TOKEN)"
        ) from None
    return f"https://huggingface.co/{repo}"
