"""A checkpoint's folders in the diffusers layout, or as mflux saves them: which files belong to which part."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, OtherModelError
from ..families import RELEASED, check_scheduler_config
from ..models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config
from ..models.names.autoencoder import autoencoder_config
from ..models.names.flux2 import klein_params
from ..models.names.qwen3 import is_read_by_klein, qwen3_config
from .files import PICKLES, load_files, read_index, read_json, starts_with
from .formats.gguf import MAGIC, gguf_values
from .formats.marks import MARK, MODELOPT_NVFP4, mark
from .sanitize import sanitize_flux2_klein_weights, sanitize_qwen3_weights, sanitize_vae_weights

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

# Stem of each component's weight files in the diffusers layout.
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class Source:
    """Where a component's weights come from.

    Attributes:
        part: "transformer", "text_encoder" or "vae".
        where: what messages call it.
        files: one, or the shards.
        config: its config.json, where there is one.
        decoder: of the vae, a file with another decoder for it.
        changes: of its weights, made one after another; each has its name as a string.
    """

    part: str
    where: str
    files: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    decoder: Path | None = None
    changes: tuple[Callable[[Mapping[str, Any]], dict[str, Any]], ...] = ()

    def weights(self) -> dict[str, Any]:
        """The component's weights under the modules' names, lazy.

        Raises:
            CheckpointError: for a bad file or a storage format that is not read.
        """
        sanitize = _SANITIZE[self.part]
        loaded = load_files(self.files)
        quantization = (self.config or {}).get("quantization_config")
        if isinstance(quantization, Mapping) and quantization.get("quant_method") == "modelopt":
            layers = [name.removesuffix(".weight_scale_2") for name in loaded if name.endswith(".weight_scale_2")]
            loaded |= {f"{layer}.{MARK}": mark(MODELOPT_NVFP4) for layer in layers}
        try:
            weights = sanitize(loaded)
            if self.decoder is not None:
                other = {
                    name: weight
                    for name, weight in sanitize(load_files([self.decoder])).items()
                    if name.startswith("decoder.")
                }
                weights = {name: weight for name, weight in weights.items() if not name.startswith("decoder.")} | other
            for change in self.changes:
                weights = change(weights)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        return weights

    def shape(self) -> Any:
        """The component's config, from its config.json or told from its weights.

        Raises:
            CheckpointError: for another architecture.
        """
        try:
            if self.config is not None and self.decoder is None:
                return FROM_CONFIG[self.part](self.config)
            shape = _FROM_WEIGHTS[self.part](self.weights())
            return self._as_header_says(shape) if self.part == "text_encoder" else shape
        except InputError as error:
            message = str(error)
            if isinstance(error, OtherModelError):
                message += f"; released klein models: {', '.join(RELEASED)}"
            raise CheckpointError(message if message.startswith(self.where) else f"{self.where}: {message}") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{self.where}: a config has a value that cannot be ({error})") from None

    def _as_header_says(self, shape: Qwen3Config) -> Qwen3Config:
        """Of a GGUF file, the numbers that no shape tells: a Qwen3 for longer texts has another base of its RoPE."""
        values = gguf_values(self.files[0]) if starts_with(self.files[0], MAGIC) else {}
        written = {
            "rope_theta": values.get("qwen3.rope.freq_base"),
            "rms_norm_eps": values.get("qwen3.attention.layer_norm_rms_epsilon"),
        }
        return replace(shape, **{name: value for name, value in written.items() if value is not None})


_SANITIZE: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "transformer": sanitize_flux2_klein_weights,
    "text_encoder": sanitize_qwen3_weights,
    "vae": sanitize_vae_weights,
}
FROM_CONFIG: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "transformer": FluxKleinParams.from_config,
    "text_encoder": Qwen3Config.from_config,
    "vae": AutoEncoderConfig.from_config,
}
_FROM_WEIGHTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "transformer": klein_params,
    "text_encoder": qwen3_config,
    "vae": autoencoder_config,
}


def needed_shards(index: Path, component: str) -> list[Path]:
    """The shards of an index with weights that are used: of the text encoder, its later layers are not."""
    return sorted(
        {shard for name, shard in read_index(index).items() if component != "text_encoder" or is_read_by_klein(name)}
    )


def weight_files(here: Path, part: str) -> tuple[Path, ...]:
    """Weight files in a component's folder: an index's shards, the single file, or shards alone, under the names that
    diffusers, transformers, mlx-lm ("model") and mflux ("0") give them.

    Raises:
        CheckpointError: where there are none, or shards are missing; the message says what was looked for.
    """
    stems = dict.fromkeys((STEMS[part], "model"))
    indices = [index for stem in stems if (index := here / f"{stem}.safetensors.index.json").is_file()]
    singles = [single for stem in stems if (single := here / f"{stem}.safetensors").is_file()]
    if indices:
        files = tuple(needed_shards(indices[0], part))
    elif singles:
        return (singles[0],)
    else:
        numbered = sorted(here.glob("*.safetensors"))
        files = tuple(file for file in numbered if _SHARD.fullmatch(file.name) or file.stem.isdecimal())
        if not files:
            others = sorted(path.name for path in here.glob("*") if path.suffix in (*PICKLES, ".safetensors"))
            found = f"found only {', '.join(others)}" if others else "found no weights"
            pickles = "; pickles are never loaded" if any(name.endswith(PICKLES) for name in others) else ""
            stem = STEMS[part]
            raise CheckpointError(
                f"{here}: looked for {stem}.safetensors.index.json, {stem}.safetensors or "
                f"{stem}-00001-of-0000N.safetensors, {found}{pickles}"
            )
        shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
        expected = [
            here / f"{stem}-{i + 1:05}-of-{count}.safetensors"
            for stem, count in {(match[1], match[3]) for match in shards}
            for i in range(int(count))
        ]
        files = tuple(sorted({*files, *expected}))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{here}: {len(missing)} of {len(files)} shards missing: {', '.join(missing)}")
    return files


@dataclass(frozen=True)
class Found:
    """A model's parts, and what it says of itself; ``is_distilled`` and ``has_kv_cache`` are None where it says
    nothing.
    """

    folder: Path
    is_distilled: bool | None
    has_kv_cache: bool | None
    sources: Mapping[str, Source]


def open_folder(folder: Path, parts: Sequence[str], with_tokenizer: bool) -> Found:
    """A folder with a folder for each part: in the diffusers layout, or without configs, as mflux saves one."""
    index = folder / "model_index.json"
    if not index.is_file() and not any((folder / part).is_dir() for part in STEMS):
        files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
        hint = f"; to use a file of it, name the file: {', '.join(files)}" if files else ""
        raise CheckpointError(
            f"{folder} is no FLUX.2 [klein] checkpoint in the diffusers layout: no model_index.json, and no folder "
            f"transformer, text_encoder or vae{hint}"
        )
    is_distilled = has_kv_cache = None
    if index.is_file():
        is_distilled, has_kv_cache = read_model_index(folder, parts, with_tokenizer)
    sources = {}
    for part in parts:
        config = folder / part / "config.json"
        content = read_json(config) if config.is_file() else None
        sources[part] = Source(part, f"{folder}/{part}", weight_files(folder / part, part), content)
    return Found(folder, is_distilled, has_kv_cache, sources)


def read_model_index(folder: Path, parts: Sequence[str], with_tokenizer: bool) -> tuple[bool, bool]:
    """(is_distilled, has_kv_cache) of a folder in the diffusers layout, whose configs must all be there."""
    files = ["model_index.json", SCHEDULER, *(f"{part}/config.json" for part in parts)]
    files += [TOKENIZER] if with_tokenizer else []
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} is no FLUX.2 [klein] checkpoint in the diffusers layout: no {', '.join(absent)}"
        )
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"):
        other = {"Flux2Pipeline": " (FLUX.2-dev)", "FluxPipeline": " (FLUX.1)", "FluxKontextPipeline": " (FLUX.1)"}
        raise CheckpointError(
            f"{folder} holds a {kind}{other.get(str(kind), '')}, not a Flux2KleinPipeline; "
            f"released klein models: {', '.join(RELEASED)}"
        )
    try:
        check_scheduler_config(read_json(folder / SCHEDULER))
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(folder)) else f"{folder}: {message}") from None
    has_kv_cache = kind == "Flux2KleinKVPipeline"
    return has_kv_cache or index.get("is_distilled") is True, has_kv_cache
