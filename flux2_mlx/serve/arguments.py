"""The command line of flux2-serve."""

from __future__ import annotations

import argparse
import os
import re

from .._version import __version__
from ..cli.common import Parser, given_options, path
from ..options import ADAPTERS, MEMORY, MODEL, OUTPUT, ModelOptions, RuntimeOptions
from .catalogue import Catalogue
from .orders import Reader
from .queue import Order
from .security import Rules
from .studio import Studio
from .worker import Worker

SERVER, ACCESS = "server", "who may ask"
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
KEY_VARIABLE = "FLUX2_MLX_API_KEY"


def duration(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "2h"; a negative number is for ever, as Ollama has it."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid duration {text!r}, as in 90s, 10m or 2h")
    return float(match[1]) * UNITS[match[2]]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, got {text}")
    return number


def add_model_options(parser: Parser) -> None:
    """What serves a model, whoever asks."""
    parser.add_options(ModelOptions)
    parser.add_options(RuntimeOptions, skip=("cache",))
    parser.titles[MEMORY].add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        help="cache prompt embeddings on disk, those of half-typed prompts too (off)",
    )
    group = parser.titles[SERVER]
    group.add_argument(
        "--models",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]MODEL",
        help="further models that requests may name; any other name is answered by the model that is loaded",
    )
    group.add_argument("--lora-dir", type=path, metavar="DIR", help="folder of LoRAs that requests may name")
    group.add_argument(
        "--keep-alive",
        type=duration,
        default=600.0,
        metavar="TIME",
        help="unload the model after so long without a request, as 90s, 10m, 2h; -1 for never (10m)",
    )
    group.add_argument(
        "--queue",
        type=positive,
        default=16,
        metavar="N",
        help="requests that may wait; others are told to come back (16)",
    )
    parser.add_argument("--version", action="version", version=f"flux2_mlx {__version__}")


def build_parser() -> Parser:
    parser = Parser(
        prog="flux2-serve",
        titles=(SERVER, ACCESS, MODEL, ADAPTERS, MEMORY, OUTPUT),
        description="Serve images: a page that draws as you type, and the APIs of OpenAI, AUTOMATIC1111 and Ollama.",
    )
    add_model_options(parser)
    group = parser.titles[SERVER]
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (127.0.0.1)")
    group.add_argument("--port", type=port, default=7870, metavar="N", help="port; 0 takes a free one (7870)")
    group.add_argument("--open", action="store_true", help="open the page in the browser")
    group = parser.titles[ACCESS]
    group.add_argument(
        "--api-key", metavar="KEY", help=f"demand this key; the variable {KEY_VARIABLE} keeps it out of ps"
    )
    group.add_argument(
        "--no-api-key", action="store_true", help="demand none, though others than this machine reach the address"
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask, as https://example.com; repeat it for several",
    )
    return parser


def studio_of(arguments: argparse.Namespace) -> Studio:
    """The parts of a server, whose thread is not started yet.

    Raises:
        InputError: for what cannot be used.
    """
    given = {"cache": False} | given_options(arguments)
    runtime = RuntimeOptions.collect(given)
    catalogue = Catalogue(ModelOptions.collect(given), arguments.models, arguments.lora_dir)
    reader = Reader(catalogue, runtime)
    first = Order("", catalogue.default, reader.task(catalogue.default, {"prompt": ""}), lambda event: None)
    keep_alive = None if arguments.keep_alive < 0 else arguments.keep_alive
    return Studio(catalogue, reader, Worker(catalogue, first, places=arguments.queue, keep_alive=keep_alive))


def rules_of(arguments: argparse.Namespace) -> Rules:
    """
    Raises:
        InputError: where others would reach the server without a key.
    """
    key = None if arguments.no_api_key else arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    rules = Rules(arguments.host, key, tuple(arguments.allow_origin))
    rules.check_exposure(arguments.no_api_key)
    return rules
