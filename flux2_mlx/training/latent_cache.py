"""Latents and prompt embeddings of a data set, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .._version import __version__
from ..device import memory_limit, stage_dtype
from ..disk_cache import digest_of
from ..imaging.files import atomic_write, open_image
from ..pipeline import Flux2Pipeline
from ..runtime.activations import encoder_bytes
from ..sampling.latents import pack_latents
from .dataset import Example, Size, fitted

ENCODED_AT_ONCE = 16  # captions


class Encoded:
    """Latents and prompt embeddings of what is trained on, in files, so that neither encoder stays in memory.

    Args:
        folder: of the files, each named by all that it depends on.
    """

    def __init__(self, pipe: Flux2Pipeline, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.length = pipe.tokenizer.default_length
        self._files: dict[Any, Path] = {}

    def prompt(self, text: str) -> mx.array:
        """Embeddings (1, L, D)."""
        return _read(self._prompt_file(text))

    def picture(self, path: Path, size: Size) -> mx.array:
        """Clean tokens (1, S, 128) of a picture at a size, float32."""
        return _read(self._picture_file(path, size)).astype(mx.float32)

    def encode(self, prompts: Iterable[str], pictures: Iterable[tuple[Path, Size]]) -> Iterator[int]:
        """Encode what is not there yet; then unload what it took.

        Yields:
            how many more are done.

        Raises:
            FloatingPointError: where an encoder's output is not finite.
        """
        texts, sized = list(dict.fromkeys(prompts)), list(dict.fromkeys(pictures))
        new = [text for text in texts if not _is_whole(self._prompt_file(text))]
        yield len(texts) - len(new)
        for k in range(0, len(new), ENCODED_AT_ONCE):
            part = new[k : k + ENCODED_AT_ONCE]
            for text, embeds in zip(part, self.pipe.encode(part), strict=True):
                _write(self._prompt_file(text), embeds)
            yield len(part)
        self.pipe.encode(new[-1:])  # which keeps the latest alone
        self.pipe.unload("text_encoder")
        autoencoder, config = self.pipe.autoencoder, self.pipe.checkpoint.autoencoder
        for path, size in sized:
            file = self._picture_file(path, size)
            if not _is_whole(file):
                working = encoder_bytes(config, *size, stage_dtype("autoencoder", self.pipe.dtype))
                with memory_limit(self.pipe.memory_limit, working):
                    latents = autoencoder.encoder(fitted(open_image(path), size))
                    _write(file, autoencoder.bn.normalize(pack_latents(latents)))
            yield 1
        self.pipe.unload("autoencoder")

    def _prompt_file(self, text: str) -> Path:
        if text not in self._files:
            checkpoint = self.pipe.checkpoint
            source, tokenizer = checkpoint.sources["text_encoder"], checkpoint.tokenizer / "tokenizer.json"
            how = self.pipe.quantize.get("text_encoder")
            key = self._made_by(), source.config, how, self.length, text
            self._files[text] = self.folder / f"{digest_of([*source.files, tokenizer], key)}.safetensors"
        return self._files[text]

    def _picture_file(self, path: Path, size: Size) -> Path:
        if (path, size) not in self._files:
            source = self.pipe.checkpoint.sources["vae"]
            files = [*source.files, *([source.decoder] if source.decoder else [])]
            key = self._made_by(), source.config, size, hashlib.sha256(path.read_bytes()).hexdigest()
            self._files[path, size] = self.folder / f"{digest_of(files, key)}.safetensors"
        return self._files[path, size]

    def _made_by(self) -> tuple[str, ...]:
        return __version__, str(mx.default_device()), str(self.pipe.dtype)


def pictures_of(example: Example) -> list[tuple[Path, Size]]:
    """An example's picture and references, each with the size that it is seen at."""
    return list(zip((example.picture, *example.references), example.shape, strict=True))


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy"):  # MLX reads past the end of a file that was cut short
            return True
    except (OSError, SafetensorError):
        return False


def _write(path: Path, array: mx.array) -> None:
    if not mx.isfinite(array).all().item():
        raise FloatingPointError("an encoder's output is not finite; check the checkpoint's files")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path, {"array": array}, {})


def _read(path: Path) -> mx.array:
    return cast("dict[str, mx.array]", mx.load(str(path)))["array"]


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file over the one before it, never half of one.

    Raises:
        InputError: for a full disk or another failure to write.
    """
    with atomic_write(path) as temporary:
        mx.save_safetensors(str(temporary), dict(arrays), dict(metadata))
        temporary.replace(path)
