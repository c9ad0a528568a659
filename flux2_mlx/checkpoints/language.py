"""Where a checkpoint has the language model that its text encoder is the beginning of, if it has all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..families import LANGUAGE_MODEL, NANO
from ..models.names.common import block_count
from .checkpoint import Checkpoint
from .folder import Source, weight_files
from .hub import complete_part

WAY_OUT = "a model in the diffusers layout has it whole, as klein-4b does; or leave out enhance (--enhance)"


def find_language_model(checkpoint: Checkpoint) -> tuple[Source, dict[str, Any]]:
    """(source, weights): the language model's weights under the module's names, lazy. Files that are left out of the
    Hub's cache, since the text encoder does not need them, are fetched.

    Raises:
        InputError: for a checkpoint that has not all of it, with the way out.
    """
    source = checkpoint.sources["text_encoder"]
    if checkpoint.name == NANO:
        raise no_language_model(f"{NANO}'s text encoder knows the words of its scenes alone and cannot write")
    if source.adapter is not None:
        raise no_language_model(f"the small text encoder, {source.name}, is too small to write prompts out")
    folder = Path(source.name)
    if folder.is_dir():
        complete_part(folder, LANGUAGE_MODEL)
        try:
            source = replace(source, files=weight_files(folder, LANGUAGE_MODEL))
        except CheckpointError as error:
            raise no_language_model(f"{error}, which the text encoder does without; get them") from None
    source = replace(source, part=LANGUAGE_MODEL)
    weights = source.weights()
    config = source.config or {}
    layers = block_count(weights, "model.layers")
    if "model.norm.weight" not in weights or layers < config.get("num_hidden_layers", layers):
        raise no_language_model(
            f"{source.name} has no language model to write prompts out with, but the {layers} layers that images need"
        )
    if config.get("tie_word_embeddings"):  # some files hold the head all the same
        weights = {name: weight for name, weight in weights.items() if not name.startswith("lm_head.")}
    return source, weights


def no_language_model(fault: str) -> InputError:
    return InputError(f"{fault}; {WAY_OUT}")
