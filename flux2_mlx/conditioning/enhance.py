"""Short prompts written out by the language model that the text encoder is the beginning of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from .._version import __version__
from ..checkpoints.language import find_language_model
from ..checkpoints.load import load_language_model
from ..checks import check_prompt
from ..device import stage_dtype, synchronize
from ..disk_cache import digest_of, read_table, write_table
from ..dtypes import dtype_name
from ..models.language_model import Qwen3LanguageModel, generate, most_likely, sampled
from ..models.names.common import block_count
from ..options import BatchOptions
from ..runtime.activations import language_model_bytes
from ..runtime.residency import LANGUAGE_MODEL, Need, Stages
from ..runtime.stats import Stats, not_finite
from .text import check_tokens
from .tokenizer import Qwen3Tokenizer

MOST_WRITTEN = 300  # tokens
MOST_GIVEN = 300  # tokens of a prompt, the template's among them; a longer one is left as it is
TABLE, MOST_KEPT = "enhanced", 1000  # name and entries of the cache on disk

# What the language model is told. It sees no image, so what an edit's images show is what the prompt says of them.
GENERATE = (
    "You write prompts for an image generator. Write the user's short description out into one paragraph of 60 to 120 "
    "words of plain English prose. Keep all that the user names: subjects, numbers, colours, places, style; text in "
    "quotation marks stays letter for letter. Begin with the main subject. Add what makes the picture concrete: "
    "setting, composition, light, colours, materials, mood, and the medium, a photograph unless the user names "
    "another. Add no text, no people and no brands that the user does not name. Answer with the paragraph alone: no "
    "heading, no list, no comment."
)
EDIT = (
    "You write instructions for an image editor. The editor sees the images; you do not see them, and know of them "
    "what the user says and nothing else. Write the user's instruction out into one to three sentences of plain "
    "English that say exactly what is to change, and that everything else stays as it is. Keep all that the user "
    'names, and names of images such as "image 1"; text in quotation marks stays letter for letter. Never describe '
    "or guess what an image shows. Answer with the instruction alone: no heading, no list, no comment."
)


class Enhancer:
    """Writes prompts out, and owns the two caches of what is written.

    Caches:
        _known: texts by all that they depend on, see _key; of this pipeline, the last MOST_KEPT.
        on disk, while ``uses_disk``: the same, of all pipelines.
    """

    def __init__(self, stages: Stages, tokenizer: Qwen3Tokenizer, *, uses_disk: bool):
        self.stages, self.tokenizer, self.uses_disk = stages, tokenizer, uses_disk
        self._known: dict[str, str] = {}

    def __call__(self, prompt: str, *, edit: bool = False, seed: int | None = None) -> str:
        """Write a short prompt out, into a paragraph that says what the picture is like; for an edit into a clearer
        instruction. The language model is the Qwen3 that the text encoder is the beginning of; it is loaded in the
        place of the text encoder, and what it needs beside it is fetched from the Hub.

        Args:
            prompt: a description, or with ``edit`` an instruction.
            edit: whether there are reference images. None is looked at: of them it knows what the prompt says.
            seed: has tokens drawn at random; None takes the likeliest, always the same.

        Returns:
            one line; the prompt itself where that has MOST_GIVEN tokens already.

        Raises:
            InputError: for what is no prompt or seed, and for a checkpoint that has not all of Qwen3.
            FloatingPointError, DeviceError: where logits are not finite, or the GPU or memory gives out.
        """
        check_prompt(prompt)
        BatchOptions(enhance=True, enhance_seed=seed)
        return self.write([prompt], edit=edit, seed=seed)[prompt]

    def write(
        self, prompts: Sequence[str], *, edit: bool, seed: int | None, stats: Stats | None = None
    ) -> dict[str, str]:
        """What is written of each distinct prompt; by the language model where no cache has it."""
        source, weights = find_language_model(self.stages.checkpoint)
        ids = {text: self.tokenizer.chat_ids(EDIT if edit else GENERATE, text) for text in prompts if self._fits(text)}
        keys = {text: digest_of(source.all_files, self._key(own, seed)) for text, own in ids.items()}
        kept = self._known | (read_table(TABLE) if self.uses_disk else {})
        texts = {text: kept[key] for text, key in keys.items() if key in kept}
        new = [text for text in ids if text not in texts]
        if new:
            check_tokens(max(max(ids[text]) for text in new), self.stages.checkpoint)
            longest, layers = max(len(ids[text]) for text in new) + MOST_WRITTEN, block_count(weights, "model.layers")
            need = Need(language_model_bytes(self.stages.checkpoint.text_encoder, layers, longest, self._dtype))
            del weights
            with self.stages.turn(), self._loaded(need, stats or Stats()) as language_model:
                for text in new:
                    texts[text] = self._write_one(language_model, ids[text], seed) or text
                    self._keep(keys[text], texts[text])
        return {text: texts.get(text, text) for text in prompts}

    def language_model(self) -> Qwen3LanguageModel:
        """The language model, its weights not read.

        Raises:
            InputError: for a checkpoint that has not all of it.
        """
        stages = self.stages
        return load_language_model(stages.checkpoint, self._dtype, stages.quantize.get("text_encoder"))

    @property
    def _dtype(self) -> mx.Dtype:
        return stage_dtype(LANGUAGE_MODEL, self.stages.dtype)

    @contextmanager
    def _loaded(self, need: Need, stats: Stats) -> Iterator[Qwen3LanguageModel]:
        """Lend the language model, loaded in the place of the text encoder, whose layers are its first."""
        stages = self.stages
        stages.unload("text_encoder")
        stages.claim(LANGUAGE_MODEL)
        try:
            with stages.use(LANGUAGE_MODEL, need, stats, what="enhance") as language_model:
                yield language_model
        finally:
            stages.unload(LANGUAGE_MODEL)

    def _write_one(self, language_model: Qwen3LanguageModel, ids: list[int], seed: int | None) -> str:
        """What is written behind these tokens, in one line."""
        pick = most_likely if seed is None else sampled(seed)

        def choose(logits: mx.array) -> int:
            if not mx.isfinite(logits).all().item():
                raise FloatingPointError(not_finite("writing the prompt out", dtype_name(self._dtype)))
            return pick(logits)

        written = []
        with self.stages.bar("writing the prompt out", MOST_WRITTEN, unit="token") as bar:
            for token in generate(language_model, ids, self.tokenizer.ends, MOST_WRITTEN, choose):
                written.append(token)
                bar.update()
        synchronize()  # nothing that a GPU failed to compute is kept
        text = self.tokenizer.decode(written)
        if len(written) == MOST_WRITTEN and "." in text:  # cut off in a sentence
            text = text[: text.rindex(".") + 1]
        return " ".join(text.split())

    def _fits(self, prompt: str) -> bool:
        """Whether a prompt is short enough to be written out; a UserWarning tells of one that is not."""
        tokens = len(self.tokenizer.chat_ids("", prompt))
        if tokens > MOST_GIVEN:
            warnings.warn(
                f"the prompt has {tokens} tokens and is left as it is: enhance writes short ones out", stacklevel=2
            )
        return tokens <= MOST_GIVEN

    def _keep(self, key: str, text: str) -> None:
        self._known = newest({**self._known, key: text})
        if self.uses_disk:
            write_table(TABLE, newest({**read_table(TABLE), key: text}))

    def _key(self, ids: list[int], seed: int | None) -> object:
        """All that a text depends on beside the files of weights; the system prompt is among the tokens."""
        stages = self.stages
        how = self._dtype, stages.quantize.get("text_encoder"), stages.checkpoint.text_encoder
        return __version__, mx.default_device(), how, MOST_WRITTEN, ids, seed


def newest(table: dict[str, str]) -> dict[str, str]:
    """The last MOST_KEPT entries."""
    return dict(list(table.items())[-MOST_KEPT:])
