"""Prompt to token ids: Qwen3's chat template with thinking off, padded on the right.

Reference: transformers' Qwen2Tokenizer with ``apply_chat_template(..., add_generation_prompt=True,
enable_thinking=False)``, then ``padding="max_length", truncation=True``, as diffusers calls it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from ..checkpoints.reading import read_json, read_text
from ..errors import CheckpointError, InputError, abridge, one_line
from ..families import MAX_SEQUENCE_LENGTH

SYSTEM_PREFIX = "<|im_start|>system\n"
SYSTEM_SUFFIX = "<|im_end|>\n"
PROMPT_PREFIX = "<|im_start|>user\n"
PROMPT_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
PAD = "<|endoftext|>"
_MOST_BYTES = 1 << 26  # of tokenizer.json; Qwen3's has a sixth


@contextmanager
def _tokenizer_faults(path: Path) -> Iterator[None]:
    """The library's errors as CheckpointErrors; where Rust panics, they are no Exceptions."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{path} cannot be used as a tokenizer ({one_line(error)}); fetch it again") from None


class Qwen3Tokenizer:
    """The tokenizer of one checkpoint.

    Args:
        folder: the checkpoint's ``tokenizer`` folder, with tokenizer.json.
        most: the most tokens that the text encoder takes; None where it takes any number.

    Attributes:
        ends: the tokens that end an answer.
        default_length: the tokens that a prompt is padded or truncated to by default: 512, or the
            ``model_max_length`` of the folder's tokenizer_config.json, or ``most``, where that is less.

    Raises:
        CheckpointError: for a file that is missing, unreadable, or not Qwen3's.
    """

    def __init__(self, folder: Path, most: int | None = None):
        self._path = path = folder / "tokenizer.json"
        content = read_text(path, _MOST_BYTES)
        with _tokenizer_faults(path):
            self._tokenizer = Tokenizer.from_str(content)
        pad = self._tokenizer.token_to_id(PAD)
        specials = [PAD, "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
        missing = [token for token in specials if self._tokenizer.token_to_id(token) is None]
        if pad is None or missing:
            raise CheckpointError(f"{path} is not Qwen3's tokenizer: it has no {', '.join(missing)}")
        self._pad: int = pad
        self.ends: list[int] = [pad, *self._tokenizer.encode("<|im_end|>", add_special_tokens=False).ids]
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._most = most
        self.default_length = min(_default_length(folder / "tokenizer_config.json"), most or MAX_SEQUENCE_LENGTH)

    def length(self, max_sequence_length: int | None) -> int:
        """The tokens that a prompt is padded or truncated to, of an option that may be None.

        Raises:
            InputError: for more than the text encoder takes.
        """
        length = self.default_length if max_sequence_length is None else max_sequence_length
        check_length(length, self._most)
        return length

    def chat_ids(self, system: str, prompt: str) -> list[int]:
        """Tokens of a chat that an answer follows, with a system prompt and thinking off."""
        text = SYSTEM_PREFIX + system + SYSTEM_SUFFIX + PROMPT_PREFIX + prompt + PROMPT_SUFFIX
        with _tokenizer_faults(self._path):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, special ones left out."""
        with _tokenizer_faults(self._path):
            return str(self._tokenizer.decode(list(ids)))

    def __call__(self, prompts: Sequence[str], max_sequence_length: int | None = None) -> tuple[mx.array, mx.array]:
        """Tokenize prompts in the chat template. Special tokens written out in a prompt become special tokens.

        A prompt that is too long is truncated, with a UserWarning that quotes the lost words.

        Returns:
            (ids, mask), each (B, max_sequence_length) int32; the mask is 1 for the prompt's tokens, 0 for padding.

        Raises:
            InputError: for more tokens than the text encoder takes.
        """
        max_sequence_length = self.length(max_sequence_length)
        ids = np.full((len(prompts), max_sequence_length), self._pad, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            with _tokenizer_faults(self._path):
                encoding = self._tokenizer.encode(PROMPT_PREFIX + prompt + PROMPT_SUFFIX, add_special_tokens=False)
            tokens = encoding.ids[:max_sequence_length]
            if len(encoding.ids) > max_sequence_length:
                start = encoding.offsets[max_sequence_length][0] - len(PROMPT_PREFIX)
                cut = prompt[max(start, 0) :]
                what = f"cut off: {abridge(cut, 80)!r}" if cut else "the end-of-turn tokens were cut off"
                warnings.warn(
                    f"the prompt has {len(encoding.ids)} tokens and max_sequence_length is "
                    f"{max_sequence_length}; {what}",
                    stacklevel=2,
                )
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return mx.array(ids), mx.array(mask)


def check_length(length: int, most: int | None) -> None:
    """Refuse more tokens than a text encoder takes.

    Raises:
        InputError: with the most.
    """
    if most is not None and length > most:
        raise InputError(f"max_sequence_length is {length}, and this text encoder takes {most} tokens at most")


def _default_length(path: Path) -> int:
    """MAX_SEQUENCE_LENGTH, or model_max_length of this tokenizer_config.json where that is less; it may be missing."""
    if not path.exists():
        return MAX_SEQUENCE_LENGTH
    longest = read_json(path).get("model_max_length")
    if longest is None:
        return MAX_SEQUENCE_LENGTH
    if not isinstance(longest, (int, float)) or not longest >= 1:
        raise CheckpointError(f"{path}: model_max_length must be a positive number, got {longest!r}")
    return int(min(longest, MAX_SEQUENCE_LENGTH))  # transformers writes 1e30 for "no limit"
