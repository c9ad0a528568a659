"""A session: each line that is typed is a prompt, or a command; the model stays loaded, and images can be referred to.

A line is a command where it matches one exactly, else a prompt; but what is nearly a command is generated only where it
is typed a second time, since a model takes minutes to show that "sise 96x96" was meant otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..disk_cache import cache_folder
from ..errors import InputError
from ..fields import Options, convert_option, flag_of, parser_of, type_of
from ..imaging.files import FORMATS, open_image, save_image
from ..inputs import open_reference
from ..options import BatchOptions, GenerationOptions, ModelOptions, OutputOptions
from ..paths import expand
from ..request import Settings
from ..runtime.distributed import random_seed
from ..writing import remove_partials
from .arguments import Task, check, complete
from .command import Terminated, tell, tell_fault
from .runner import generate, open_pipeline, start

HELP = """\
Type a prompt to generate an image. $3 in a prompt is image 3, as a reference image; $$ is a dollar sign.
  again             generate the last prompt again, with another seed
  seed N            seed of the next images; seed alone: a random one for each
  size W x H        size of the next images; size alone: the model's default, or the first reference image's size
  steps N           denoising steps of the next images; steps alone: the model's default
  lora FILE[:SCALE] add a LoRA to those in use; lora alone: use none
  set NAME VALUE    set any option of sampling, as set guidance 3; set NAME: its default; set alone: list what is set
  load FILE         load an image file, to refer to it
  save [N] FILE     save the last image, or image N, under another name
  help, quit        Ctrl-C stops generating, Ctrl-D quits"""
_SUFFIXES = "|".join(suffix[1:] for suffix in FORMATS)
# Options that a session can set, by their names in Python; NAMES adds the flags' names.
_CLASSES: list[type[Options]] = [GenerationOptions, BatchOptions, OutputOptions]
SETTABLE: dict[str, tuple[type[Options], Field[Any]]] = {
    **{f.name: (cls, f) for cls in _CLASSES for f in fields(cls)},  # type: ignore[arg-type]
    "lora": (ModelOptions, ModelOptions.field("lora")),
}
NAMES = {name.replace("_", "-"): f.name for _, f in SETTABLE.values() for name in (f.name, flag_of(f))}
_NAMES = "|".join(re.escape(name).replace("\\-", "[-_]") for name in NAMES)
COMMANDS = {
    "again": re.compile(r"again"),
    "seed": re.compile(r"seed(?: +(\d{1,40}))?"),
    "size": re.compile(r"size(?: +(\d{1,9}) *[x×] *(\d{1,9}))?"),
    "steps": re.compile(r"steps(?: +(\d{1,9}))?"),
    "lora": re.compile(r"lora(?: +((?:.+\.safetensors|[\w.-]+(?:/[\w.-]+)+)(?::-?[\d.]+)?))?"),
    "set": re.compile(rf"set(?: +({_NAMES})(?: +(.+))?)?"),
    "load": re.compile(r"load +(.+\.\w+)"),
    "save": re.compile(rf"save(?: +(\d{{1,9}}))? +(.+\.(?:{_SUFFIXES}))", re.IGNORECASE),
    "help": re.compile(r"help|\?"),
    "quit": re.compile(r"quit|exit"),
}
FOREIGN = ("clear", "delete", "exit", "list", "redo", "repeat", "reset", "retry", "show", "stop", "undo")  # elsewhere's
SHORT = 3  # most words of a line that may be a command by its first word alone
MOST_BYTES = 2**29  # of the images that a session keeps: 170 of a megapixel


def meant_command(text: str) -> str | None:
    """What may be meant by a line that is nearly a command: how that one is typed, or "" for none that is known; None
    for a prompt.
    """
    first, _, rest = text.partition(" ")
    word, rest = first.lower(), rest.strip()
    if len(text.split()) > SHORT and not re.match(r"[-+]?\d", rest):
        return None
    near = difflib.get_close_matches(word, [*COMMANDS, *FOREIGN], n=1, cutoff=0.8)
    if word.replace("_", "-") in NAMES and word not in COMMANDS:
        return f"set {word} VALUE"
    if not near:
        return None
    usages = (line[2:20].rstrip() for line in HELP.splitlines()[1:])
    return next((usage for usage in usages if re.match(rf"{near[0]}\b", usage)), "")


@dataclass(frozen=True)
class SessionImage:
    """An image of the session, None where it is no longer kept, and its settings, None for one that was loaded."""

    image: Image.Image | None
    settings: Settings | None


# Generates a prompt: (prompt, reference images, options that are set, callback for each image once it is saved).
Generate = Callable[[str, Sequence[Image.Image], Mapping[str, Any], Callable[[SessionImage], None]], None]


@dataclass
class Session:
    """The images so far, and the options of the next ones.

    Attributes:
        generate: generates a prompt and saves its images.
        images: the images that were generated or loaded, in order; image 1 is the first.
        options: the options that are set, by their names in Python.
        last: the last prompt as it was typed.
        count: how many images the last prompt gave.
        is_new_seed: whether the seed was set after them, so that ``again`` takes it as it is.
        doubted: the line before, where it was nearly a command.
    """

    generate: Generate
    images: list[SessionImage] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    last: str = ""
    count: int = 1
    is_new_seed: bool = False
    doubted: str = ""

    def handle(self, line: str) -> str | None:
        """Run a command, or generate a prompt.

        Returns:
            the reply to print, or None to quit.

        Raises:
            InputError: for what cannot be done.
        """
        text = line.strip()
        if not text:
            return ""
        handlers: dict[str, Callable[..., str | None]] = {
            "again": self._again,
            "seed": self._seed,
            "size": self._size,
            "steps": self._steps,
            "lora": self._lora,
            "set": self._set,
            "load": self._load,
            "save": self._save,
            "help": lambda: HELP,
            "quit": lambda: None,
        }
        for name, pattern in COMMANDS.items():
            match = pattern.fullmatch(text)
            if match is not None:
                return handlers[name](*match.groups())
        meant = None if text == self.doubted else meant_command(text)
        self.doubted = "" if meant is None else text
        if meant is not None:
            usage = f", which is typed {meant}" if meant else "; help lists them"
            raise InputError(f"{text!r} is no command{usage}; type it again to generate it as a prompt")
        return self._prompt(text)

    def add(self, image: SessionImage) -> None:
        """Add an image; beyond MOST_BYTES the oldest ones are no longer kept."""
        self.images.append(image)
        kept = 0
        for k in reversed(range(len(self.images))):
            old = self.images[k].image
            if old is None:
                break
            kept += old.width * old.height * len(old.getbands())
            if kept > MOST_BYTES and k < len(self.images) - 1:
                self.images[k] = replace(self.images[k], image=None)

    def image(self, number: int) -> Image.Image:
        """Image ``number`` of the session.

        Raises:
            InputError: where there is none, or it is no longer kept.
        """
        if not 1 <= number <= len(self.images):
            which = f"the last is {len(self.images)}" if self.images else "there is none yet"
            raise InputError(f"there is no image {number} ({which}); a dollar sign is written $$")
        image = self.images[number - 1].image
        if image is None:
            raise InputError(
                f"image {number} is no longer kept, {MOST_BYTES // 2**20} MB are; load FILE loads it again"
            )
        return image

    def _prompt(self, text: str) -> str:
        prompt, references = self.resolve_references(text)
        self.last = text
        first = len(self.images) + 1
        self.generate(prompt, references, dict(self.options), self.add)
        self.count, self.is_new_seed = len(self.images) + 1 - first, False
        return f"image {first}" if self.count == 1 else f"images {first} to {len(self.images)}"

    def resolve_references(self, text: str) -> tuple[str, list[Image.Image]]:
        """Replace $3 and the like in a prompt by "image 1", "image 2", ..., numbered in the order in which they come.

        Returns:
            (the prompt, the reference images in that order).

        Raises:
            InputError: for an image that does not exist.
        """
        numbers: list[int] = []

        def replace_reference(match: re.Match[str]) -> str:
            if match[0] == "$$":
                return "$"
            number = int(match[1])
            self.image(number)
            if number not in numbers:
                numbers.append(number)
            return f"image {numbers.index(number) + 1}"

        prompt = re.sub(r"\$\$|\$(\d{1,9})", replace_reference, text)
        return prompt, [self.image(number) for number in numbers]

    def _again(self) -> str:
        if not self.last:
            raise InputError("there is no prompt to generate again")
        if "seed" in self.options and not self.is_new_seed:
            self.options["seed"] += self.count
        return self._prompt(self.last)

    def _set_option(self, name: str, value: Any) -> None:
        """Set an option; None returns it to its default."""
        self.is_new_seed = self.is_new_seed or name == "seed"
        if value is None:
            self.options.pop(name, None)
            return
        cls, option = SETTABLE[name]
        self.options[name] = convert_option(cls, option, value)

    def _seed(self, seed: str | None) -> str:
        self._set_option("seed", None if seed is None else int(seed))
        return f"seed {'random' if seed is None else seed}"

    def _size(self, width: str | None, height: str | None) -> str:
        self._set_option("width", None if width is None else int(width))
        self._set_option("height", None if height is None else int(height))
        return "default size" if width is None else f"size {width} x {height}"

    def _steps(self, steps: str | None) -> str:
        self._set_option("num_steps", None if steps is None else int(steps))
        return "default steps" if steps is None else f"{steps} steps"

    def _lora(self, lora: str | None) -> str:
        self._set_option("lora", () if lora is None else (*self.options.get("lora", ()), lora))
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
        if value is not None and type_of(cls, name) == tuple[str, ...]:
            value = (*self.options.get(name, ()), value)  # one more
        self._set_option(name, value)
        return f"{name} {'default' if text is None else text}"

    def _load(self, path: str) -> str:
        self.add(SessionImage(open_image(expand(path)), None))
        return f"image {len(self.images)}"

    def _save(self, number: str | None, path: str) -> str:
        if not self.images or (number is not None and not 1 <= int(number) <= len(self.images)):
            raise InputError(f"there is no image {number or 'yet'}")
        place = len(self.images) if number is None else int(number)
        image, saved = self.image(place), self.images[place - 1]
        if saved.settings is None:
            raise InputError("that image was loaded, and is a file already")
        texts = (saved.settings.metadata(), saved.settings.parameters())
        remove_partials(Path(expand(path)).parent)
        return str(save_image(image, expand(path), *(texts if self.options.get("write_metadata", True) else ())))


def complete_word(text: str, state: int) -> str | None:
    """The state-th completion of a word: commands, then image files of this folder or of the one that is named."""
    names = [f"{name} " for name in COMMANDS if name.startswith(text)] if text else []
    path = Path(expand(text))
    folder = path if text.endswith("/") else path.parent
    stem = "" if text.endswith("/") else path.name
    with contextlib.suppress(OSError, ValueError):  # a null character
        files = sorted(file for file in folder.iterdir() if file.name.startswith(stem))
        images = [file for file in files if file.is_dir() or file.suffix.lower() in FORMATS]
        typed = text[: len(text) - len(stem)]
        names += [f"{typed}{file.name}{'/' if file.is_dir() else ''}" for file in images if stem or text.endswith("/")]
    return names[state] if state < len(names) else None


HISTORY = 1000  # most lines in the history file


def interact(given: argparse.Namespace) -> None:
    """Run a session: the command line's prompt is generated first, and the images of --image are image 1, 2, ..."""
    if given.plan or given.jobs is not None:
        raise InputError("--interactive goes neither with --plan nor with --jobs")
    references, given.image = given.image or [], None
    first = given.prompt if given.prompt_option is None else given.prompt_option
    given.prompt_option = None

    def task_of(prompt: str, **options: Any) -> Task:
        arguments = argparse.Namespace(**{**vars(given), **options, "prompt": prompt})
        return complete(arguments, None, inputs=["image"] if references else [])

    defaults = task_of("")
    check(defaults)
    pipe = open_pipeline(defaults)

    def generate_prompt(
        prompt: str, images: Sequence[Image.Image], options: Mapping[str, Any], add: Callable[[SessionImage], None]
    ) -> None:
        task = task_of(prompt, **{"seed": random_seed(), **options, "image": list(images) or None})
        check(task)
        steps, started = start(task, pipe), time.perf_counter()
        generate(steps, task, started, on_saved=lambda image, settings: add(SessionImage(image, settings)))

    is_seeded = given.seed is not None or given.from_image is not None
    session = Session(generate_prompt, options={"seed": defaults.seed} if is_seeded else {})
    if defaults.model.lora:
        session.options["lora"] = defaults.model.lora
    for path in references:
        session.add(SessionImage(open_reference(path), None))
    if not given.quiet:
        print(HELP)
    converse(session, first)


def converse(session: Session, first: str | None = None) -> None:
    """Handle lines until the input ends, ``first`` before those that are typed; an error ends its line only."""
    line: str | None = first
    with _line_editing():
        while True:
            try:
                line = read_line() if line is None else line
                if line is None:
                    print()
                    return
                reply = session.handle(line)
            except Terminated:
                raise
            except KeyboardInterrupt:
                tell("interrupted")
            except UnicodeDecodeError as error:
                tell(f"error: that is not {error.encoding} text")
            except BaseException as error:
                tell_fault(error)
            else:
                if reply is None:
                    return
                if reply:
                    print(reply)
            line = None


def read_line() -> str | None:
    """The next line that is typed; None where the input ends, or standard input is closed or broken."""
    try:
        return input("> ")
    except UnicodeDecodeError:
        raise
    except (EOFError, OSError, RuntimeError, ValueError):
        return None


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """A history that lasts between sessions, and completion of commands and files, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home folder
        readline.read_history_file(cache_folder() / "history")
    readline.set_history_length(HISTORY)
    readline.set_completer(complete_word)
    readline.set_completer_delims(" ")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            readline.write_history_file(cache_folder() / "history")
