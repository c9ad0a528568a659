"""A checkpoint's folders in the diffusers layout, or as mflux saves them: which files belong to which part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..device import weights_of
from ..errors import CheckpointError, InputError, OtherModelError, summarize
from ..families import PARTS, RELEASED_NAMES, TEXT_ENCODER, TRANSFORMER, Part, check_scheduler_config
from ..models.config import Qwen3Config
from ..models.names.qwen3 import with_adapter
from .files import PICKLES, header_metadata, is_gguf, load_files, read_index
from .formats.dfloat11 import CONFIG, decode_groups
from .formats.gguf import gguf_values
from .formats.marks import MARK, mark
from .formats.nvfp4 import MODELOPT_MARK
from .formats.unread import refuse_unread
from .reading import read_json, weight_names
from .sanitize import sanitize

_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(\.[\w-]+)?\.safetensors")
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer/tokenizer.json"
SLOW_TOKENIZER = "give a folder with tokenizer.json as --tokenizer (vocab.json and merges.txt alone are not read)"


class WeightChange(Protocol):
    """A change of a part's weights between the file and the modules, as a fused LoRA makes.

    Attributes:
        name: what the model card calls it.
    """

    @property
    def name(self) -> str: ...

    def apply(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The weights, under the modules' names, with the change; lazy.

        Raises:
            CheckpointError: for weights that it cannot change.
        """
        ...


@contextmanager
def config_faults(source: str | Path) -> Iterator[None]:
    """Raise a config's errors as errors of its source; for another model's config with the released models' names.

    Raises:
        CheckpointError: in the place of any error of a config.
    """
    try:
        yield
    except OtherModelError as error:
        raise CheckpointError(f"{error}; released klein models: {RELEASED_NAMES}", source=source) from None
    except InputError as error:
        raise CheckpointError(str(error), source=source) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"a config has a value that cannot be ({error})", source=source) from None


@dataclass(frozen=True)
class Source:
    """Where a part's weights come from.

    Attributes:
        name: what messages call it: a path.
        files: one, or the shards.
        config: its config.json, where there is one.
        decoder: a file with another decoder, for an autoencoder.
        adapter: a file with the adapter of a smaller text encoder.
        changes: what changes its weights, one after another, as fused LoRAs.
    """

    part: Part
    name: str
    files: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    decoder: Path | None = None
    adapter: Path | None = None
    changes: tuple[WeightChange, ...] = ()

    @property
    def all_files(self) -> tuple[Path, ...]:
        """Every file that the weights depend on."""
        return (*self.files, *(file for file in (self.decoder, self.adapter) if file is not None))

    def weights(self) -> dict[str, Any]:
        """The part's weights under the modules' names, lazy.

        Raises:
            CheckpointError: for a bad file or a storage format that is not read.
        """
        loaded = self._without_groups(load_files(self.files))
        refuse_unread(loaded, self.config, self.name)
        if self._is_modelopt():
            layers = [name.removesuffix(".weight_scale_2") for name in loaded if name.endswith(".weight_scale_2")]
            loaded |= {f"{layer}.{MARK}": mark(MODELOPT_MARK) for layer in layers}
        other = None if self.decoder is None else load_files([self.decoder])
        try:
            weights = sanitize(self.part, loaded)
            if other is not None:
                encoder = {name: weight for name, weight in weights.items() if not name.startswith("decoder.")}
                decoder = sanitize(self.part, other).items()
                weights = encoder | {name: weight for name, weight in decoder if name.startswith("decoder.")}
            if self.adapter is not None:
                weights |= {f"adapter.{name}": weight for name, weight in load_files([self.adapter]).items()}
            for change in self.changes:
                weights = change.apply(weights)
        except CheckpointError as error:
            raise CheckpointError(str(error), source=self.name) from None
        return weights

    def shape(self) -> Any:
        """The part's config, from its config.json, else inferred from its weights.

        Raises:
            CheckpointError: for another architecture.
        """
        if self.adapter is not None:
            config = replace(self, adapter=None).shape()
            weights = load_files([self.adapter])
            with config_faults(self.adapter):
                return with_adapter(config, header_metadata(self.adapter), weights)
        if self.config is not None and self.decoder is None:
            refuse_unread((), self.config, self.name)
            with config_faults(self.name):
                return self.part.config.from_config(self.config)
        weights = self.weights()
        with config_faults(self.name):
            shape = self.part.names.infer(weights)
            return self._as_header_says(shape) if self.part is TEXT_ENCODER else shape

    def _without_groups(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """Weights with the matrices of DFloat11's groups, which a config names, in the place of their arrays.

        Raises:
            CheckpointError: for groups that do not fit the config.
        """
        if self.config is None or CONFIG not in self.config:
            return loaded
        module = self.part.module(self.shape())
        shapes = {name: array.shape for name, array in weights_of(module).items()}
        try:
            return decode_groups(loaded, self.config[CONFIG], shapes, self.part.names.is_read)
        except CheckpointError as error:
            raise CheckpointError(str(error), source=self.name) from None

    def _is_modelopt(self) -> bool:
        quantization = (self.config or {}).get("quantization_config")
        return isinstance(quantization, Mapping) and quantization.get("quant_method") == "modelopt"

    def _as_header_says(self, shape: Qwen3Config) -> Qwen3Config:
        """The config with a GGUF header's numbers, which no shape has: a long-context Qwen3 has another RoPE base.

        Raises:
            CheckpointError: for another architecture, or positions that are scaled.
        """
        values = gguf_values(self.files[0]) if is_gguf(self.files[0]) else {}
        kind = values.get("general.architecture") or "qwen3"
        if kind != "qwen3":
            raise CheckpointError(f"a GGUF of the architecture {kind!r}; FLUX.2 [klein] needs a Qwen3 (4B or 8B)")
        scaling = values.get("qwen3.rope.scaling.type") or "none"
        if scaling != "none":
            raise CheckpointError(f"its positions are scaled ({scaling!r}), and FLUX.2 [klein]'s are not")
        written = {
            "rope_theta": values.get("qwen3.rope.freq_base"),
            "rms_norm_eps": values.get("qwen3.attention.layer_norm_rms_epsilon"),
        }
        return replace(shape, **{name: value for name, value in written.items() if value is not None})


def needed_shards(index: Path, part: Part) -> list[Path]:
    """The shards of an index with weights that are used: of the text encoder, its later layers are not."""
    return sorted({shard for name, shard in read_index(index).items() if part.names.is_read(name)})


def stems_of(part: Part) -> list[str]:
    """Stems that its weight files may have: diffusers' or transformers', and mlx-lm's."""
    return list(dict.fromkeys((part.stem, "model")))


def weight_files(folder: Path, part: Part) -> tuple[Path, ...]:
    """Weight files in a part's folder: an index's shards, the single file, or shards alone, under the names that
    diffusers, transformers, mlx-lm ("model") and mflux ("0") give them; else the only variant that is there.

    Raises:
        CheckpointError: where there are none, several variants, or shards are missing; the message says what was
            looked for.
    """
    named = [folder / f"{stem}.safetensors" for stem in stems_of(part)]
    index = next((path for file in named if (path := file.with_name(f"{file.name}.index.json")).is_file()), None)
    single = next((file for file in named if file.is_file()), None)
    if index is None and single is not None:
        return (single,)
    files = _set_without_index(folder, part) if index is None else needed_shards(index, part)
    if not files and index is None:
        raise _no_weights(folder, part)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{len(missing)} of {len(files)} shards missing: {summarize(missing)}", source=folder)
    return tuple(files)


def variant_of(name: str, part: Part) -> str | None:
    """The variant in a weight file's name, "bf16" in model.bf16.safetensors and in its shards' names; "" in the names
    of shards without one; None in others.
    """
    shard = _SHARD.fullmatch(name)
    stem = shard[1] if shard else name.removesuffix(".safetensors")
    if shard and shard[4]:
        return shard[4][1:]  # as diffusers once wrote it
    known = next((known for known in stems_of(part) if stem.startswith(f"{known}.")), None)
    if known is not None:
        return stem.removeprefix(f"{known}.")
    return "" if shard or stem.isdecimal() else None


def only_variant(names: Iterable[str], part: Part, source: object) -> list[str]:
    """The weight files without a variant in their names, else those of the only one.

    Raises:
        CheckpointError: for several variants.
    """
    sets: dict[str, list[str]] = {}
    for name in names:
        variant = variant_of(name, part)
        if variant is not None:
            sets.setdefault(variant, []).append(name)
    if "" in sets or len(sets) < 2:
        return sets.get("") or next(iter(sets.values()), [])
    raise CheckpointError(f"has several variants, {', '.join(sorted(sets))}; keep one, or name its file", source=source)


def _set_without_index(folder: Path, part: Part) -> list[Path]:
    """The files of a part that no index names: those that are there, and those that shards' names say there should
    be.
    """
    names = only_variant(weight_names(folder, "*.safetensors"), part, folder)
    whole = [name for name in names if not _SHARD.fullmatch(name) and not Path(name).stem.isdecimal()]
    if whole:
        return [folder / whole[0]]
    series = {(match[1], match[3], match[4] or "") for name in names if (match := _SHARD.fullmatch(name))}
    expected = [
        f"{stem}-{i + 1:05}-of-{count}{variant}.safetensors"
        for stem, count, variant in series
        for i in range(int(count))
    ]
    return [folder / name for name in sorted({*names, *expected})]


def _no_weights(folder: Path, part: Part) -> CheckpointError:
    pickles = [path.name for path in folder.glob("*") if path.suffix in PICKLES and not path.name.startswith(".")]
    others = sorted([*weight_names(folder), *pickles])
    found = f"found only {summarize(others)}" if others else "found no weights"
    refused = "; pickles are never loaded" if pickles else ""
    own = folder / part.key
    hint = f"; its {part.label} is in {own}: give that folder" if own.is_dir() else ""
    return CheckpointError(
        f"looked for {part.stem}.safetensors.index.json, {part.stem}.safetensors or "
        f"{part.stem}-00001-of-0000N.safetensors, {found}{refused}{hint}",
        source=folder,
    )


@dataclass(frozen=True)
class Found:
    """A model's parts, and its variant; ``is_distilled`` and ``has_kv_cache`` are None where the files do not say."""

    folder: Path
    is_distilled: bool | None
    has_kv_cache: bool | None
    sources: Mapping[str, Source]
    is_bonsai: bool = False


def is_bonsai(folder: Path) -> bool:
    """Whether a model's folder is in the layout of PrismML's Bonsai Image."""
    return part_folder(folder, TRANSFORMER) == TRANSFORMER.bonsai_key


def part_folder(folder: Path, part: Part) -> str:
    """The name of a part's folder in a model's: the one that is there, else that of the diffusers layout."""
    return next((name for name in part.folders if (folder / name).is_dir()), part.key)


def open_folder(folder: Path, parts: Sequence[Part], with_tokenizer: bool) -> Found:
    """A folder with a folder for each part: in the diffusers layout, without configs, as mflux saves one, or Bonsai's,
    whose index and scheduler are not asked: it is distilled, and mlx-vlm samples it as klein.
    """
    index = folder / "model_index.json"
    if not index.is_file() and not any((folder / key).is_dir() for key in PARTS):
        files = weight_names(folder)
        hint = f"; to use a file of it, name the file: {summarize(files)}" if files else ""
        raise CheckpointError(
            f"{folder} is no FLUX.2 [klein] checkpoint in the diffusers layout: no model_index.json, and no folder "
            f"transformer, text_encoder or vae{hint}"
        )
    is_distilled = has_kv_cache = None
    bonsai = is_bonsai(folder)
    if bonsai:
        is_distilled, has_kv_cache = True, False
    elif index.is_file():
        is_distilled, has_kv_cache = read_model_index(folder, parts, with_tokenizer)
    sources = {}
    for part in parts:
        here = folder / part_folder(folder, part)
        config = read_json(here / "config.json") if (here / "config.json").is_file() else None
        sources[part.key] = Source(part, str(here), weight_files(here, part), config)
    return Found(folder, is_distilled, has_kv_cache, sources, bonsai)


def read_model_index(folder: Path, parts: Sequence[Part], with_tokenizer: bool) -> tuple[bool, bool]:
    """(is_distilled, has_kv_cache) of a folder in the diffusers layout, whose configs must all be there."""
    files = ["model_index.json", SCHEDULER, *(f"{part.key}/config.json" for part in parts)]
    files += [TOKENIZER] if with_tokenizer else []
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        hint = f"; {SLOW_TOKENIZER}" if TOKENIZER in absent else ""
        raise CheckpointError(
            f"{folder} is no FLUX.2 [klein] checkpoint in the diffusers layout: no {', '.join(absent)}{hint}"
        )
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"):
        other = {"Flux2Pipeline": " (FLUX.2-dev)", "FluxPipeline": " (FLUX.1)", "FluxKontextPipeline": " (FLUX.1)"}
        raise CheckpointError(
            f"{folder} holds a {kind}{other.get(str(kind), '')}, not a Flux2KleinPipeline; "
            f"released klein models: {RELEASED_NAMES}"
        )
    scheduler = read_json(folder / SCHEDULER)
    with config_faults(folder):
        check_scheduler_config(scheduler)
    has_kv_cache = kind == "Flux2KleinKVPipeline"
    return has_kv_cache or index.get("is_distilled") is True, has_kv_cache
