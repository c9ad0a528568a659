"""Latents and prompt embeddings of a data set, cached on disk."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._version import __version__
from ..checkpoints.load import load_all
from ..device import memory_limit
from ..disk_cache import digest_of, read_array, write_array
from ..errors import InputError
from ..imaging.files import open_image
from ..pipeline import Flux2Pipeline
from ..runtime.activations import encoder_bytes
from ..sampling.latents import pack_latents
from ..writing import atomic_write
from .dataset import Example, Size, fit_image

ENCODED_AT_ONCE = 16  # captions in a call of the text encoder
COLOURS = "sRGB"  # of latents; those of earlier versions are of the file's bare numbers


class LatentCache:
    """Latents and prompt embeddings in files, so that neither encoder has to stay in memory during training.

    Args:
        folder: the folder of the entries, one file each, named by a hash of everything that the entry depends on.
    """

    def __init__(self, pipe: Flux2Pipeline, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.length = pipe.tokenizer.default_length
        self.dropped = pipe.checkpoint.text_encoder.dropped_tokens  # first tokens of a prompt without embeddings
        self._files: dict[Any, Path] = {}

    def prompt_embeds(self, text: str) -> mx.array:
        """Prompt embeddings (1, L, D)."""
        return _read(self._prompt_file(text))

    def latents(self, path: Path, size: Size) -> mx.array:
        """Clean latent tokens (1, S, 128) of an image at a size, float32."""
        return _read(self._latents_file(path, size)).astype(mx.float32)

    def encode(self, prompts: Iterable[str], images: Iterable[tuple[Path, Size]]) -> Iterator[int]:
        """Encode the prompts and images that have no entry yet, then unload the encoders.

        Yields:
            the number of prompts or images done since the last yield.

        Raises:
            FloatingPointError: where an encoder's output is not finite.
        """
        texts, unique_images = list(dict.fromkeys(prompts)), list(dict.fromkeys(images))
        new = [text for text in texts if read_array(self._prompt_file(text)) is None]
        yield len(texts) - len(new)
        for k in range(0, len(new), ENCODED_AT_ONCE):
            part = new[k : k + ENCODED_AT_ONCE]
            for text, embeds in zip(part, self.pipe.encode(part), strict=True):
                _write(self._prompt_file(text), embeds)
            yield len(part)
        self.pipe.encode(new[-1:])  # the pipeline caches the embeddings of one call: let it be a small one
        self.pipe.unload("text_encoder")
        config = self.pipe.checkpoint.autoencoder
        autoencoder = load_all(self.pipe.autoencoder, lambda name: not name.startswith("decoder."))
        for path, size in unique_images:
            file = self._latents_file(path, size)
            if read_array(file) is None:
                activation_bytes = encoder_bytes(config, *size, self.pipe.vae_dtype)
                with memory_limit(self.pipe.memory_limit, activation_bytes):
                    with warnings.catch_warnings():  # what there is to tell was told when the data set was checked
                        warnings.simplefilter("ignore", UserWarning)
                        image = open_image(path)
                    latents = autoencoder.encoder(fit_image(image, size))
                    _write(file, autoencoder.bn.normalize(pack_latents(latents)))
            yield 1
        self.pipe.unload("autoencoder")

    def _prompt_file(self, text: str) -> Path:
        if text not in self._files:
            checkpoint = self.pipe.checkpoint
            source, tokenizer = checkpoint.sources["text_encoder"], checkpoint.tokenizer / "tokenizer.json"
            quantization = self.pipe.quantize.get("text_encoder")
            key = self._environment(self.pipe.dtype), source.config, quantization, self.length, text
            self._files[text] = self.folder / f"{digest_of([*source.all_files, tokenizer], key)}.safetensors"
        return self._files[text]

    def _latents_file(self, path: Path, size: Size) -> Path:
        if (path, size) not in self._files:
            source = self.pipe.checkpoint.sources["vae"]
            environment = self._environment(self.pipe.vae_dtype)
            key = environment, COLOURS, source.config, size, hashlib.sha256(path.read_bytes()).hexdigest()
            self._files[path, size] = self.folder / f"{digest_of(source.all_files, key)}.safetensors"
        return self._files[path, size]

    def _environment(self, dtype: mx.Dtype) -> tuple[str, ...]:
        """What entries depend on besides files and options."""
        return __version__, str(mx.default_device()), str(dtype)


def sized_images(example: Example) -> list[tuple[Path, Size]]:
    """An example's image and references, each with its training size."""
    return list(zip((example.image, *example.references), example.shape, strict=True))


def _write(path: Path, array: mx.array) -> None:
    if not mx.isfinite(array).all().item():
        raise FloatingPointError("an encoder's output is not finite; check the checkpoint's files")
    write_array(path, array)


def _read(path: Path) -> mx.array:
    """The array of an entry, which ``encode`` wrote or found whole.

    Raises:
        InputError: where it is gone, or was changed since.
    """
    array = read_array(path)
    if array is None:
        raise InputError(f"{path} was removed or changed while the run used it; --resume encodes it again and goes on")
    return array


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically.

    Raises:
        InputError: for a full disk or another failure to write.
    """
    with atomic_write(path, lasting=True) as temporary:
        mx.save_safetensors(str(temporary), dict(arrays), dict(metadata))
