"""What an option is: a dataclass field that knows its bounds, its help and how text becomes its value."""

from __future__ import annotations

import difflib
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from .errors import InputError
from .paths import expand

O = TypeVar("O", bound="Options")  # noqa: E741


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    group: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    check: Callable[[Any], object] | None = None,
    hash: bool | None = None,
    **more: Any,
) -> Any:
    """A field that is an option.

    Args:
        default: None where it depends on the model or the machine.
        help: one line, to which --help adds the default.
        group: title under which ``--help`` lists it.
        ge, gt, le: bounds of a number.
        choices: the strings that are possible.
        check: refuses other values by an InputError of its own, before type and bounds are looked at.
        hash: False for values that have none.
        more: flag (its name on the command line, None for no flag), also (aliases of the flag, as other tools call it),
            metavar, repeated (whether the flag of a list of numbers may be given once for each), parse (text of the
            command line to a value), nargs and const (as argparse has them), alias (diffusers' name of the argument),
            hint (the way out that a refusal adds), shown (the default as ``--help`` shows it), is_path (see
            paths.expand).
    """
    metadata = {"help": help, "group": group, "ge": ge, "gt": gt, "le": le, "choices": choices, "check": check, **more}
    return field(default=default, hash=hash, metadata=metadata)


def numbers(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(number) for number in text.split(",")]


def sides(text: str) -> dict[str, int]:
    """Pixels on each side: left=128,top=64."""
    pairs = [part.partition("=") for part in text.split(",")]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError
    return {name.strip(): int(pixels) for name, _, pixels in pairs}


def switch(text: str) -> bool:
    """A boolean from the text of a session: on or off."""
    return {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}[text.lower()]


def _bool(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError
    if not math.isfinite(number := float(value)):
        raise TypeError
    return number


def _str(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise TypeError
    return value


def _int_or_str(value: Any) -> int | str:
    return value if isinstance(value, str) else _int(value)


def _tuple_of(convert: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def convert_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise TypeError
        return tuple(convert(part) for part in value)

    return convert_all


def _one_or_more(value: Any) -> str | tuple[str, ...]:
    """A string, also of a list that has one; else a tuple of them."""
    several = (_str(value),) if isinstance(value, (str, os.PathLike)) else _tuple_of(_str)(value)
    return several[0] if len(several) == 1 else several


def _pixels(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {_str(side): _int(pixels) for side, pixels in value.items()}


class Kind(NamedTuple):
    """A type of options: its name in messages, from another value (TypeError if it is none), from text."""

    name: str
    convert: Callable[[Any], Any]
    parse: Callable[[str], Any]


KINDS: dict[Any, Kind] = {
    bool: Kind("true or false", _bool, switch),
    int: Kind("a whole number", _int, int),
    float: Kind("a number", _float, float),
    str: Kind("a string", _str, str),
    int | str: Kind("a whole number or a string", _int_or_str, str),
    tuple[float, ...]: Kind("a list of numbers", _tuple_of(_float), numbers),
    tuple[str, ...]: Kind("a list of strings", _tuple_of(_str), str),
    str | tuple[str, ...]: Kind("a string or a list of strings", _one_or_more, str),
    Mapping[str, int]: Kind("pixels by sides", _pixels, sides),
}


@lru_cache
def _hints(cls: type) -> dict[str, tuple[Any, bool]]:
    """Each field's type without None, and whether it may be None."""
    hints = {}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        own = [part for part in parts if part is not types.NoneType]
        hints[name] = own[0] if len(own) == 1 else Union[tuple(own)], types.NoneType in parts  # noqa: UP007
    return hints


def type_of(cls: type, name: str) -> Any:
    """The type of an option, None left aside."""
    return _hints(cls)[name][0]


def parser_of(cls: type, f: Field[Any]) -> Callable[[str], Any]:
    """The function that makes an option's value of the text of a command line."""
    parse: Callable[[str], Any] = f.metadata.get("parse") or KINDS[type_of(cls, f.name)].parse
    return parse


def flag_of(f: Field[Any]) -> str:
    return str(f.metadata.get("flag") or f.name.replace("_", "-"))


def default_of(f: Field[Any]) -> str:
    """The default as --help shows it; "" where there is nothing to show."""
    shown = f.metadata.get("shown", f.default)
    return (
        ""
        if shown is None or shown is MISSING or isinstance(shown, bool) or not str(shown) or shown == ()
        else str(shown)
    )


def _number_range(ge: float | None, gt: float | None, le: float | None) -> str:
    if ge is not None and le is not None:
        return f" from {ge:g} to {_plain(le)}"
    low = "" if gt is None else f" above {gt:g}"
    return (low if ge is None else f" of at least {ge:g}") + ("" if le is None else f", up to {_plain(le)}")


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def convert_option(cls: type, f: Field[Any], value: Any) -> Any:
    """An option's value as its field has it.

    Raises:
        InputError: for another type, or a value out of bounds, naming both.
    """
    meta, (kind, is_optional) = f.metadata, _hints(cls)[f.name]
    if value is None and is_optional:
        return None
    if meta.get("check") is not None:
        meta["check"](value)
    choices, hint = meta.get("choices"), meta.get("hint", "")
    if choices:
        check_choice(f.name, value, choices)
    ge, gt, le = (meta.get(bound) for bound in ("ge", "gt", "le"))
    try:
        converted = KINDS[kind].convert(value)
        fits = (ge is None or converted >= ge) and (gt is None or converted > gt) and (le is None or converted <= le)
    except (TypeError, OverflowError):
        fits = False
    if not fits:
        raise InputError(f"{f.name} must be {KINDS[kind].name}{_number_range(ge, gt, le)}, got {value!r}{hint}")
    if not meta.get("is_path"):
        return converted
    return expand(converted) if isinstance(converted, str) else tuple(map(expand, converted))


def is_of_type(cls: type, f: Field[Any], value: Any) -> bool:
    kind, is_optional = _hints(cls)[f.name]
    try:
        return (value is None and is_optional) or KINDS[kind].convert(value) is not None
    except (TypeError, OverflowError):
        return False


class Options:
    """A frozen dataclass whose fields are options; making one checks and converts them."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, f.name, convert_option(type(self), f, getattr(self, f.name)))
        self.check_together()

    def check_together(self) -> None:
        """Refuse values that do not go with each other."""

    @classmethod
    def field(cls, name: str) -> Field[Any]:
        return next(f for f in fields(cls) if f.name == name)  # type: ignore[arg-type]

    def metadata(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def select(self, cls: type) -> dict[str, Any]:
        """The options that another class has too."""
        return {f.name: getattr(self, f.name) for f in fields(cls) if hasattr(self, f.name)}

    def marked(self, mark: str) -> dict[str, Any]:
        """The options whose fields have this mark."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get(mark)}  # type: ignore[arg-type]

    @classmethod
    def collect(cls: type[O], given: Mapping[str, Any]) -> O:
        """The options among a call's arguments, some of them under diffusers' names; other arguments are ignored.

        Raises:
            InputError: for a value that cannot be, or that has two names and two values.
        """
        values = {f.name: given[f.name] for f in fields(cls) if f.name in given}  # type: ignore[arg-type]
        for f in fields(cls):  # type: ignore[arg-type]
            alias = str(f.metadata.get("alias"))
            if alias in given:
                values[f.name] = one_of_two(f.name, given.get(f.name), alias, given[alias])
                if values[f.name] is None:
                    del values[f.name]
        return cls(**values)


def changed(cls: type[Options], name: str, default: Any = MISSING, **more: Any) -> Any:
    """The field of that name in another class, with another default, or none, and other metadata."""
    return field(default=default, kw_only=True, metadata={**cls.field(name).metadata, **more})


def one_of_two(name: str, value: Any, other_name: str, other: Any) -> Any:
    """One argument under two names."""
    if value is not None and other is not None and value != other:
        raise InputError(f"{name} ({value}) and {other_name} ({other}) are the same setting; give one of them")
    return other if value is None else value


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, if one is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def options_table(*classes: type) -> str:
    """The options of these classes as a Markdown table."""
    lines = ["| Option | Python | Default | |", "|---|---|---|---|"]
    for f in (f for cls in classes for f in fields(cls)):
        if f.metadata.get("flag", "") is None:
            continue
        choices = f.metadata["choices"]
        help = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        lines.append(f"| `--{flag_of(f)}` | `{f.name}` | {default_of(f)} | {help} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"
