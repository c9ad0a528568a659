"""A session at a prompt line: what is typed is drawn, the model stays loaded, pictures can be referred to.

A line that reads exactly as a command is one; any other line is a prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from ..disk_cache import cache_folder
from ..errors import InputError, one_line
from ..fields import Options, convert_option, flag_of, parser_of
from ..imaging.files import FORMATS, open_image, save_image
from ..inputs import open_reference
from ..options import BatchOptions, GenerationOptions, ModelOptions
from ..request import Settings
from ..runtime.distributed import random_seed
from .arguments import Task, check, complete
from .runner import JOB_FAULTS, draw, open_pipeline, start

HELP = """\
Type a prompt to generate it. $3 in a prompt is picture 3, as a reference; $$ is a dollar sign.
  again             the last prompt once more, with another seed
  seed N            the seed of the next pictures; seed alone: a random one for each
  size W x H        their size; size alone: the model's, or the first reference's
  steps N           their steps; steps alone: the model's
  lora FILE[:SCALE] draw with a LoRA, beside the others; lora alone: with none
  set NAME VALUE    any option of sampling, as set guidance 3; set NAME: the usual; set alone: what is set
  load FILE         open a picture, to refer to it
  save [N] FILE     write a picture, the last or that of this number, under another name
  help, quit        Ctrl-C stops a picture, Ctrl-D quits"""
_SUFFIXES = "|".join(suffix[1:] for suffix in FORMATS)
# What a session can set, under the names of the flags and of Python.
_CLASSES: list[type[Options]] = [GenerationOptions, BatchOptions]
SETTABLE: dict[str, tuple[type[Options], Field[Any]]] = {
    **{f.name: (cls, f) for cls in _CLASSES for f in fields(cls)},  # type: ignore[arg-type]
    "lora": (ModelOptions, ModelOptions.field("lora")),
}
NAMES = {name.replace("_", "-"): f.name for _, f in SETTABLE.values() for name in (f.name, flag_of(f))}
_NAMES = "|".join(re.escape(name).replace("\\-", "[-_]") for name in NAMES)
COMMANDS = {
    "again": re.compile(r"again"),
    "seed": re.compile(r"seed(?: +(\d+))?"),
    "size": re.compile(r"size(?: +(\d+) *[x×] *(\d+))?"),
    "steps": re.compile(r"steps(?: +(\d+))?"),
    "lora": re.compile(r"lora(?: +((?:.+\.safetensors|[\w.-]+(?:/[\w.-]+)+)(?::-?[\d.]+)?))?"),
    "set": re.compile(rf"set(?: +({_NAMES})(?: +(.+))?)?"),
    "load": re.compile(r"load +(.+\.\w+)"),
    "save": re.compile(rf"save(?: +(\d+))? +(.+\.(?:{_SUFFIXES}))", re.IGNORECASE),
    "help": re.compile(r"help|\?"),
    "quit": re.compile(r"quit|exit"),
}


@dataclass(frozen=True)
class Picture:
    """A picture of the session, and how it was made, unless it was loaded."""

    image: Image.Image
    settings: Settings | None


# (prompt, its references, options that are set, what is told of each picture once it is saved): generates.
Draw = Callable[[str, Sequence[Image.Image], Mapping[str, Any], Callable[[Picture], None]], None]


@dataclass
class Session:
    """What was drawn, and the settings of what comes next.

    Attributes:
        draw: draws a prompt, and saves what it draws.
        pictures: those that were drawn or loaded, in order; picture 1 is the first.
        options: that are set, by their names in Python.
    """

    draw: Draw
    pictures: list[Picture] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    last: str = ""
    count: int = 1  # of pictures that the last prompt gave

    def handle(self, line: str) -> str | None:
        """Do what a line says.

        Returns:
            what there is to say, or None to quit.

        Raises:
            InputError: for what cannot be done.
        """
        text = line.strip()
        if not text:
            return ""
        for name, pattern in COMMANDS.items():
            found = pattern.fullmatch(text)
            if found is not None:
                said: str | None = getattr(self, f"_{name}")(*found.groups())
                return said
        return self._prompt(text)

    def _prompt(self, text: str) -> str:
        prompt, references = self.referring(text)
        self.last = text
        first = len(self.pictures) + 1
        self.draw(prompt, references, dict(self.options), self.pictures.append)
        self.count = len(self.pictures) + 1 - first
        return f"picture {first}" if self.count == 1 else f"pictures {first} to {len(self.pictures)}"

    def referring(self, text: str) -> tuple[str, list[Image.Image]]:
        """A prompt with $3 and the like as "image 1", "image 2", ... in the order in which they come, and the pictures
        that these are.

        Raises:
            InputError: for a picture that does not exist.
        """
        numbers: list[int] = []

        def name(found: re.Match[str]) -> str:
            if found[0] == "$$":
                return "$"
            number = int(found[1])
            if not 1 <= number <= len(self.pictures):
                there = f"the last is {len(self.pictures)}" if self.pictures else "there is none yet"
                raise InputError(f"there is no picture {number} ({there}); a dollar sign is written $$")
            if number not in numbers:
                numbers.append(number)
            return f"image {numbers.index(number) + 1}"

        prompt = re.sub(r"\$\$|\$(\d+)", name, text)
        return prompt, [self.pictures[number - 1].image for number in numbers]

    def _again(self) -> str:
        if not self.last:
            raise InputError("there is no prompt to draw again")
        if "seed" in self.options:
            self.options["seed"] += self.count
        return self._prompt(self.last)

    def _change(self, name: str, value: Any) -> None:
        """Set an option, or take it back by None."""
        if value is None:
            self.options.pop(name, None)
            return
        cls, option = SETTABLE[name]
        self.options[name] = convert_option(cls, option, value)

    def _seed(self, seed: str | None) -> str:
        self._change("seed", None if seed is None else int(seed))
        return f"seed {'random' if seed is None else seed}"

    def _size(self, width: str | None, height: str | None) -> str:
        self._change("width", None if width is None else int(width))
        self._change("height", None if height is None else int(height))
        return "the usual size" if width is None else f"size {width} x {height}"

    def _steps(self, steps: str | None) -> str:
        self._change("num_steps", None if steps is None else int(steps))
        return "the usual steps" if steps is None else f"{steps} steps"

    def _lora(self, lora: str | None) -> str:
        self._change("lora", () if lora is None else (*self.options.get("lora", ()), lora))
        return f"LoRAs: {', '.join(self.options['lora']) or 'none'}"

    def _set(self, name: str | None, text: str | None) -> str:
        if name is None:
            return "\n".join(f"{name} {value}" for name, value in self.options.items()) or "nothing is set"
        name = NAMES[name.replace("_", "-")]
        if name == "lora":
            return self._lora(text)
        cls, option = SETTABLE[name]
        try:
            value = None if text is None else parser_of(cls, option)(text)
        except (ValueError, KeyError):
            raise InputError(f"{name} cannot be {text!r}: {option.metadata['help']}") from None
        self._change(name, value)
        return f"{name} {'as usual' if text is None else text}"

    def _load(self, path: str) -> str:
        self.pictures.append(Picture(open_image(Path(path).expanduser()), None))
        return f"picture {len(self.pictures)}"

    def _save(self, number: str | None, path: str) -> str:
        if not self.pictures or (number is not None and not 1 <= int(number) <= len(self.pictures)):
            raise InputError(f"there is no picture {number or 'yet'}")
        picture = self.pictures[-1 if number is None else int(number) - 1]
        if picture.settings is None:
            raise InputError("that picture was loaded, and is a file already")
        settings = picture.settings
        return str(save_image(picture.image, Path(path).expanduser(), settings.metadata(), settings.parameters()))

    def _help(self) -> str:
        return HELP

    def _quit(self) -> None:
        return None


def completed(text: str, state: int) -> str | None:
    """The state-th way to complete a word: commands, then files of this folder or the one that is named."""
    names = [f"{name} " for name in COMMANDS if name.startswith(text)] if text else []
    where = Path(text).expanduser()
    folder = where if text.endswith("/") else where.parent
    stem = "" if text.endswith("/") else where.name
    with contextlib.suppress(OSError):
        found = sorted(path for path in folder.iterdir() if path.name.startswith(stem))
        kept = [path for path in found if path.is_dir() or path.suffix.lower() in FORMATS]
        before = text[: len(text) - len(stem)]
        names += [f"{before}{path.name}{'/' if path.is_dir() else ''}" for path in kept if stem or text.endswith("/")]
    return names[state] if state < len(names) else None


HISTORY = 1000  # lines that a session keeps


def interact(given: argparse.Namespace) -> None:
    """A session: a prompt that was given is drawn first, pictures of --image are its first ones."""
    if given.plan or given.jobs is not None:
        raise InputError("--interactive goes neither with --plan nor with --jobs")
    references, given.image = given.image or [], None
    first = given.prompt if given.prompt_option is None else given.prompt_option
    given.prompt_option = None

    def task_of(prompt: str, **own: Any) -> Task:
        arguments = argparse.Namespace(**{**vars(given), **own, "prompt": prompt})
        return complete(arguments, None, inputs=["image"] if references else [])

    usual = task_of("")
    check(usual)
    pipe = open_pipeline(usual)

    def draw_prompt(
        prompt: str, images: Sequence[Image.Image], options: Mapping[str, Any], add: Callable[[Picture], None]
    ) -> None:
        own = {"seed": random_seed(), **options, "image": list(images) or None}
        task = task_of(prompt, **own)
        check(task)
        draw(start(task, pipe), task, time.perf_counter(), saved=lambda image, made: add(Picture(image, made)))

    is_seeded = given.seed is not None or given.from_image is not None
    session = Session(draw_prompt, options={"seed": usual.seed} if is_seeded else {})
    if usual.model.lora:
        session.options["lora"] = usual.model.lora
    session.pictures += [Picture(open_reference(path), None) for path in references]
    if not given.quiet:
        print(HELP)
    converse(session, first)


def converse(session: Session, first: str | None = None) -> None:
    """Do what lines say until the end, the first of which may be given; a fault is told, and costs one line."""
    line: str | None = first
    with _line_editing():
        while True:
            try:
                said = session.handle(input("> ") if line is None else line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
            except UnicodeDecodeError as error:
                print(f"error: that is not {error.encoding} text", file=sys.stderr)
            except JOB_FAULTS as error:
                print(f"error: {one_line(error)}", file=sys.stderr)
            else:
                if said is None:
                    return
                if said:
                    print(said)
            line = None


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """History, kept between sessions, and completion of commands and files, where Python has them."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home folder
        readline.read_history_file(cache_folder() / "history")
    readline.set_history_length(HISTORY)
    readline.set_completer(completed)
    readline.set_completer_delims(" ")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            readline.write_history_file(cache_folder() / "history")
