"""Shared by the commands: a parser that reports an error in one line, flags made from options, how a command ends."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from ..adapters.lora import fuse, parse_lora
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.write import LAYOUTS, convert
from ..errors import InputError
from ..fields import default_of, flag_of, nearest, parser_of, type_of
from ..options import CheckpointOptions
from ..paths import expand
from .streams import shows_bars

MODEL_HELP = CheckpointOptions.field("model").metadata["help"]


class Parser(argparse.ArgumentParser):
    """A parser that lists its options under titles and reports an error in one line, with the option that was meant.

    Args:
        titles: the titles, in the order of ``--help``.
        hints: for flags that do not exist, what to do instead.
    """

    def __init__(self, *, titles: Sequence[str] = (), hints: Mapping[str, str] | None = None, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.titles = {title: self.add_argument_group(title) for title in titles}
        self.hints = hints or {}
        self.exclusive: dict[str, Any] = {}  # groups of options that exclude each other

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        for word in rest:
            flag = word.partition("=")[0]
            if flag in self.hints:
                raise InputError(f"unknown option {flag}: {self.hints[flag]}")
            if flag.startswith("-"):
                near = nearest(flag, list(self._option_string_actions))
                raise InputError(f"unknown option {flag}{near or '; see --help'}")
        if rest:
            raise InputError(f"{rest[0]!r} is one word too many: text with spaces needs quotes; see --help")
        return parsed

    def _parse_optional(self, arg_string: str) -> Any:
        """A text with spaces that begins with one dash is a value, not a short flag; argparse asks for every word."""
        is_text = " " in arg_string and not arg_string.startswith("--")
        return None if is_text else super()._parse_optional(arg_string)

    def add_options(self, cls: type, skip: Sequence[str] = ()) -> None:
        """A flag for each option of a class; one that is not given is None, or absent if argument_default says so."""
        for f in fields(cls):
            if f.name not in skip and f.metadata.get("flag", "") is not None:
                self.add_option(cls, f)

    def add_option(self, cls: type, f: Field[Any], **more: Any) -> None:
        """An option's flag, and its aliases, which --help does not list."""
        meta, shown, kind = f.metadata, default_of(f), type_of(cls, f.name)
        group: Any = self.titles.get(meta["group"], self)
        if meta.get("either"):
            if meta["either"] not in self.exclusive:
                self.exclusive[meta["either"]] = group.add_mutually_exclusive_group()
            group = self.exclusive[meta["either"]]
        argument: dict[str, Any] = {"dest": f.name, **more}
        if kind is bool:
            argument["action"] = argparse.BooleanOptionalAction
        else:
            argument["metavar"] = "N" if kind in (int, float) else None
            argument |= {
                name: meta[name] for name in ("metavar", "choices", "nargs", "const") if meta.get(name) is not None
            }
            argument["type"] = parser_of(cls, f)
            if kind in (tuple[str, ...], str | tuple[str, ...]) and "nargs" not in argument:
                argument["action"] = "append"
            if meta.get("repeated"):
                argument["action"] = "extend"
        group.add_argument(f"--{flag_of(f)}", help=meta["help"] + (f" ({shown})" if shown else ""), **argument)
        if meta.get("also"):
            group.add_argument(*meta["also"], help=argparse.SUPPRESS, **argument)


def path(text: str) -> Path:
    """A path of the command line; see paths.expand."""
    return Path(expand(text))


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that a command line gives."""
    return {name: value for name, value in vars(arguments).items() if value is not None}


def add_writing_options(parser: Parser) -> None:
    """Options of every command that writes a model."""
    parser.add_options(CheckpointOptions, skip=("model", "dtype", "vae_dtype"))
    parser.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0], help="layout of the written files (%(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def write_model(arguments: argparse.Namespace, loras: Sequence[str] = (), partial: bool = False) -> None:
    """Write the model of the command line to ``target``, with these LoRAs merged.

    Raises:
        InputError: for what cannot be used.
    """
    silence_downloads(arguments.quiet)
    options = CheckpointOptions.collect(given_options(arguments))
    layout, quantization = arguments.layout, options.quantization()
    checkpoint = fuse(open_checkpoint(**options.source), [parse_lora(text) for text in loras], partial)
    existed = arguments.target.exists()
    try:
        convert(
            checkpoint, arguments.target, layout=layout, quantization=quantization, progress=shows_bars(arguments.quiet)
        )
    except KeyboardInterrupt:
        if arguments.target.exists() and not existed:  # it came as the folder had its name
            raise KeyboardInterrupt(f"{arguments.target} is written, and whole") from None
        raise
    print(arguments.target)


def silence_downloads(quiet: bool) -> None:
    """Have the Hub's client show bars only where bars are wanted, and where all is to be quiet no warnings either."""
    if shows_bars(quiet):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the client is imported, with its first use
    if quiet:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
