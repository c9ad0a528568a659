"""What the commands share: a parser that tells faults in one line, and the options that say which model to open."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .config import InputError
from .quantize import AFFINE_BITS, FLOAT_MODES

# What belongs to the model besides its name, as Flux2Pipeline.from_pretrained takes it.
PART_OPTIONS = ("transformer", "text_encoder", "vae", "tokenizer", "distilled", "kv_cache")
MODEL_OPTIONS = (*PART_OPTIONS, "quantize", "quantize_text_encoder", "group_size")

MODEL_HELP = "a released name, nano, a folder, a file, a Hub id or owner/name/file"


class Parser(argparse.ArgumentParser):
    """Tells a fault in one line, as the rest of a command does, instead of with its usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that opens a model, besides its name."""
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    for part, what in (("transformer", "transformer"), ("text-encoder", "text encoder"), ("vae", "autoencoder")):
        parser.add_argument(f"--{part}", metavar="FILE", help=f"another {what}: a file, a folder, or one on the Hub")
    parser.add_argument("--tokenizer", metavar="DIR", help="another folder with tokenizer.json")
    parser.add_argument(
        "--distilled",
        action=argparse.BooleanOptionalAction,
        help="whether the transformer draws in few steps without guidance, where its file does not say",
    )
    parser.add_argument(
        "--kv-cache",
        action=argparse.BooleanOptionalAction,
        help="whether the transformer was trained to keep its references (klein-9b-kv), where its file does not say",
    )
    parser.add_argument(
        "--quantize",
        metavar="BITS",
        help=f"pack matrices: {', '.join(map(str, AFFINE_BITS))} bits, {', '.join(FLOAT_MODES)}; below 8 "
        "bits the most sensitive layers get more",
    )
    parser.add_argument("--quantize-text-encoder", metavar="BITS", help="the same of the text encoder, to differ")
    parser.add_argument("--group-size", type=int, help="weights that share a scale: 32, 64, 128 (64)")
