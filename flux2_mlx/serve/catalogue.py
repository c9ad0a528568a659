"""What the owner of a server offers: models and LoRAs by names, behind which their paths stay unknown to clients."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..adapters.lora import check_scale, parse_lora
from ..errors import InputError, one_line
from ..fields import nearest
from ..options import CheckpointOptions, ModelOptions
from ..paths import expand
from ..request import Settings, paths_of

# A folder's path, up to the name that ends it; not the slashes of an address.
FOLDERS = re.compile(r"(?<![\w:/.~])(?:~|\.{1,2})?/(?:[^/\s'\"`,;:]+/)*(?=[^/\s])")


def name_of(source: str) -> str:
    """What a model, a part of one or a LoRA is called: of a path the last part, without a suffix of files."""
    if not (os.path.isabs(source) or source.startswith((".", "~")) or Path(source).exists()):
        return source  # a released name, or one of the Hub
    path = Path(os.path.abspath(expand(source)))
    return path.stem if path.suffix in (".safetensors", ".gguf") else path.name


def strength(text: str) -> float:
    """
    Raises:
        InputError: for what is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise InputError(f"the strength of a LoRA must be a number, got {text!r}") from None


class Catalogue:
    """The models and LoRAs that requests may name.

    Args:
        model: the command line's model, which draws where a request names none.
        others: further models, each SOURCE or NAME=SOURCE.
        lora_dir: a folder whose safetensors files are LoRAs.

    Attributes:
        models: options of each model, by name; the command line's is the first.
        loras: the file of each LoRA, by name.

    Raises:
        InputError: for a name that is given twice, or a folder that is none.
    """

    def __init__(self, model: ModelOptions, others: Sequence[str] = (), lora_dir: Path | None = None):
        self.models: dict[str, ModelOptions] = {name_of(model.transformer or model.model): model}
        self.default = next(iter(self.models))
        own = ("model", "revision", "transformer", "text_encoder", "vae", "tokenizer", "distilled", "kv_cache", "lora")
        shared = {name: value for name, value in vars(model).items() if name not in own}
        for text in others:
            name, _, source = text.rpartition("=")
            name = name or name_of(source)
            if name in self.models:
                raise InputError(f"two models are called {name!r}; --models NAME=SOURCE gives another name")
            self.models[name] = ModelOptions(model=source, **shared)
        self.loras: dict[str, str] = {}
        if lora_dir is not None and not lora_dir.is_dir():
            raise InputError(f"--lora-dir {lora_dir} is no folder")
        files = [] if lora_dir is None else sorted(lora_dir.glob("*.safetensors"))
        for source in [*(parse_lora(text)[0] for text in model.lora), *map(str, files)]:
            name = name_of(source)
            if self.loras.setdefault(name, source) != source:
                raise InputError(f"two LoRAs are called {name!r}, {self.loras[name]} and {source}; rename one")

    def model_named(self, name: Any, loaded: str | None = None) -> tuple[str, str | None]:
        """The model that answers for a name, and what is to be told where that is another one: the one that is loaded,
        since clients name models of their own services.
        """
        if name is None or name == "":
            return self.default, None
        if isinstance(name, str) and name in self.models:
            return name, None
        other = loaded or self.default
        return other, f"there is no model {str(name)[:80]!r} here; {other} drew this"

    def lora_words(self, given: Any) -> list[str]:
        """LoRAs as the command line takes them, of a request's: a name, "name:strength", a list of them, or strengths
        by name.

        Raises:
            InputError: for what the owner has not listed.
        """
        pairs: list[tuple[str, Any]] = []
        if isinstance(given, Mapping):
            pairs = list(given.items())
        else:
            for text in given if isinstance(given, (list, tuple)) else [given]:
                if not isinstance(text, str):
                    raise InputError(f"a LoRA must be a name, or name:strength, got {text!r}")
                name, _, scale = text.rpartition(":")
                pairs.append((text, 1.0) if text in self.loras or not name else (name, strength(scale)))
        for name, scale in pairs:
            if name not in self.loras:
                known = f"; there are {', '.join(self.loras)}" if self.loras else "; there is none (--lora-dir)"
                raise InputError(f"there is no LoRA {name!r} here{nearest(name, list(self.loras)) or known}")
            check_scale(scale)
        return [f"{self.loras[name]}:{scale:g}" for name, scale in pairs]

    def own_loras(self, model: str) -> dict[str, float]:
        """The strengths of the LoRAs that a model has where a request names none."""
        by_source = {source: name for name, source in self.loras.items()}
        return {by_source[source]: scale for source, scale in map(parse_lora, self.models[model].lora)}

    def public(self, settings: Settings, model: str) -> Settings:
        """An image's settings with the names of this server in the place of paths."""
        own = {name: getattr(settings, name) for name in paths_of(type(settings))}
        names: dict[str, Any] = {name: value and name_of(value) for name, value in own.items() if name != "lora"}
        by_source = {source: name for name, source in self.loras.items()}
        loras = (parse_lora(text) for text in settings.lora)
        names["lora"] = tuple(f"{by_source.get(source, name_of(source))}:{scale:g}" for source, scale in loras)
        return replace(settings, **names | {"model": model})

    def tell(self, error: BaseException | str) -> str:
        """An error's message, in one line and without this machine's paths."""
        text = error if isinstance(error, str) else one_line(error)
        sources = {source: name for name, source in self.loras.items()}
        for name, options in self.models.items():
            values = {f.name: getattr(options, f.name) for f in fields(CheckpointOptions) if f.metadata.get("is_path")}
            sources |= {value: name_of(value) for value in values.values() if value}
            sources[options.model] = name
        for source in sorted(sources, key=len, reverse=True):
            if os.sep in source and os.path.exists(source):
                text = text.replace(source, sources[source])
        return FOLDERS.sub("", text.replace(os.path.expanduser("~") + os.sep, "~/"))
