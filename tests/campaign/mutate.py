"""Mutations that know what they damage: bytes, JSON, lines, headers of safetensors; all from one random generator."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

NUMBERS = (
    0, -1, 1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**53 + 1,
    2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**20, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e30, 1e308, -1e308, float("nan"),
    float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\0", "a\0b", "\n", "\r\n", "\x1b]0;owned\x07\x1b[2J", "\ud800", "\udfff", "😀", "é", "\u202e",
    "\ufeff", "..", "../..", "/etc/passwd", "~", "~nobody", "~/x", "$HOME", "${X}", "%s%n", "{seed}",
    "{0}", "{seed:99999}", "-", "--", "--help", "null", "nan", "inf", "1e999", "0x10", "1_000", "٣", "²", "9" * 400,
    "9" * 5000, "-" * 300, "a" * 5000, "a" * 200_000, "owner/name", "klein-4b", "nano", "True", "[", "(", "*", "|",
    "lora:1e9", "a:nan", "x.safetensors:2",
)  # fmt: skip
LARGE = 1 << 24  # bytes that no input has more of
WHOLE = 0.3  # the share of mutations that work on bare bytes whatever the content is


def mutate(rng: random.Random, name: str, content: bytes) -> bytes:
    """A file's content with one to three mutations, of the kinds that its name and content allow."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = _KINDS.get(PurePath(name).suffix, _bytes)
        content = (_bytes if rng.random() < WHOLE else kind)(rng, content)[:LARGE]
    return content


def _bytes(rng: random.Random, content: bytes) -> bytes:
    """Bits, numbers, pieces that are taken away, doubled, moved, filled."""
    if not content:
        return rng.randbytes(rng.randrange(1, 40))
    size = len(content)
    # Half of the places are in the beginning, where headers are.
    at = rng.randrange(size if rng.random() < 0.5 else min(size, 512))
    length = min(size - at, rng.choice((1, 1, 2, 4, 8, 16, 64, 512, size // 3 + 1)))
    before, piece, after = content[:at], content[at : at + length], content[at + length :]
    action = rng.randrange(10)
    if action == 0:
        return before + bytes([piece[0] ^ (1 << rng.randrange(8))]) + piece[1:] + after
    if action == 1:
        return before
    if action == 2:
        return before + after
    if action == 3:
        return before + piece * rng.choice((2, 3, 100)) + after
    if action == 4:
        other = rng.randrange(size)
        return before + content[other : other + length] + after
    if action == 5:
        return before + bytes([rng.choice((0, 0xFF, 0x20, 0x80))]) * length + after
    if action == 6:
        return before + rng.randbytes(length) + after
    if action == 7:
        number = rng.choice([int(value) for value in NUMBERS if value == value and abs(value) < 2**64])
        width = rng.choice((1, 2, 4, 8))
        return before + (number % 256**width).to_bytes(width, rng.choice(("little", "big"))) + content[at + width :]
    if action == 8:
        return before + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + after
    return content + rng.randbytes(length)


def _value(rng: random.Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind <= 1:
        return rng.choice(NUMBERS)
    if kind <= 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return [_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind == 6:
        return {rng.choice(TEXTS): _value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2)))}
    return [rng.choice((*NUMBERS[:-4], "a"))] * rng.choice((10, 3000))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) within a value of JSON."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        found += [(node, key) for key in keys]
        pending += [node[key] for key in keys]
    return found


def mutate_json(rng: random.Random, root: Any) -> Any:
    """A value of JSON with one place changed."""
    places = _places(root)
    if not places or rng.random() < 0.03:
        return _value(rng)
    node, key = rng.choice(places)
    value, action = node[key], rng.randrange(9)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice((str(key) + "x", str(key).upper(), *TEXTS))] = node.pop(key)
    elif action == 2:
        other, its = rng.choice(places)
        if its in other if isinstance(other, dict) else its < len(other):
            node[key], other[its] = other[its], value
    elif action == 3 and type(value) in (int, float) and abs(value) < 1e300:
        node[key] = rng.choice(
            (value + 1, value - 1, value * 2, -value, str(value), [value], value * 1000, float(value))
        )
    elif action == 4 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        node[key] = value[:at] + rng.choice(TEXTS) + value[at + rng.randrange(3) :]
    elif action == 5:
        node[key] = [value] if rng.random() < 0.5 else {"a": value}
    elif action == 6 and isinstance(node, list):
        node *= rng.choice((0, 2, 3))
    else:
        node[key] = _value(rng)
    return root


def dump(rng: random.Random, value: Any) -> bytes:
    """JSON, now and then with a key twice, or nested a hundred thousand times."""
    try:
        text = json.dumps(value, indent=rng.choice((None, 2)))
    except RecursionError:  # a value that was put into itself
        return b"[" * 1000
    except ValueError:
        return b"{}"
    odd = rng.randrange(40)
    if odd == 0:
        text = text.replace("{", '{"a": ' + "[" * 100_000, 1)
    elif odd == 1 and text.startswith("{") and len(text) < 10**6:
        text = text[:-1] + "," + text[1:] if len(text) > 2 else text
    elif odd == 2:
        text = "[" * 100_000 + "]" * 100_000
    return text.encode("utf-8", "surrogatepass")


def _json(rng: random.Random, content: bytes) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(rng, content)
    return dump(rng, mutate_json(rng, value))


def _lines(rng: random.Random, content: bytes) -> bytes:
    """Lines that are taken away, doubled, put elsewhere, damaged; lines of JSON as such."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    action = rng.randrange(8)
    if action == 0:
        del lines[at]
    elif action == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif action == 2 and len(content) < 10_000:
        lines *= rng.choice((2, 10))
    elif action == 3:
        lines[at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    elif action == 4:
        words = lines[at].split(b" ")
        words[rng.randrange(len(words))] = str(rng.choice((*TEXTS, *NUMBERS[:-3]))).encode("utf-8", "surrogatepass")
        lines[at] = b" ".join(words)
    elif lines[at][:1] in (b"{", b"["):
        lines[at] = _json(rng, lines[at]).replace(b"\n", b" ")
    else:
        lines[at] = _bytes(rng, lines[at])
    return b"\n".join(lines)


def _safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header as JSON, its length, what it says of the data; the data itself seldom."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        return _bytes(rng, content)
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return _bytes(rng, content)
    data = content[8 + length :]
    action = rng.randrange(12)
    if action == 0:
        return struct.pack("<Q", rng.choice((length + 1, length - 1, 2**63, 2**64 - 1, 100_000_001, 640))) + content[8:]
    if action == 1:
        return content[: 8 + length] + _bytes(rng, data)
    if action == 2 and isinstance(header, dict):  # values of a number's odd kinds, where they stand in the data
        size = rng.choice((2, 4))
        at = rng.randrange(max(1, len(data) // size)) * size
        odd = rng.choice((b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0"))[
            :size
        ]
        return content[: 8 + length] + data[:at] + odd + data[at + size :]
    is_retyped = action <= 6 and isinstance(header, dict)
    text = dump(rng, (_retyped if is_retyped else mutate_json)(rng, header))
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _retyped(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A tensor under another name, dtype or shape of as many bytes, so that the file as such stays valid."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "U32": 4, "I64": 8, "F64": 8}
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "data_offsets" in entry]
    if not names:
        return header
    name = rng.choice(names)
    entry = header[name]
    try:
        start, stop = entry["data_offsets"]
        dtype = rng.choice(list(sizes)) if rng.random() < 0.5 else entry["dtype"]
        count = (stop - start) // sizes.get(dtype, 4)
        shapes = [[count], [1, count], [count, 1], [1, 1, count], [2, count // 2], [count, 1, 1, 1], [0, count]]
        shapes += [[]] if count == 1 else []
        changed = {"dtype": dtype, "shape": rng.choice(shapes), "data_offsets": [start, stop]}
    except (TypeError, ValueError, KeyError, OverflowError):
        return header
    action = rng.randrange(3)
    if action == 0:
        header[name] = changed
    elif action == 1:
        parts = name.split(".")
        at = rng.randrange(len(parts))
        number = rng.choice(("0", "1", "16", "99999", "9" * 30, "9" * 5000, "-1", "x", "", "²"))
        parts[at] = number if parts[at].isdecimal() or rng.random() < 0.3 else rng.choice(names).split(".")[-1]
        header[".".join(parts)] = header.pop(name)
    else:
        suffix = rng.choice(
            ("scales", "biases", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant", "alpha")
        )
        header = {other: header.pop(other) for other in list(header) if other != name} | {
            name.rpartition(".")[0] + "." + suffix: entry
        }
    return header


_KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".txt": _lines,
    ".toml": _lines,
    ".caption": _lines,
    ".sums": _lines,
    ".safetensors": _safetensors,
}
