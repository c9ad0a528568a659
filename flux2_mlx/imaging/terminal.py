"""Images in a terminal, by one of three graphics protocols.

kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol
iTerm2: https://iterm2.com/documentation-images.html
sixel: DEC's VT330/VT340 Programmer Reference Manual, chapter 14
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

PROTOCOLS = ("kitty", "iterm2", "sixel")
MAX_SIDE = 512  # larger images are scaled down before they are sent
CHUNK = 4096  # most characters of data in one escape sequence of kitty's protocol


def detect_protocol(environment: Mapping[str, str]) -> str | None:
    """Which of PROTOCOLS the terminal understands, by its environment variables; None where they do not tell.

    None within tmux and screen, which do not pass the outer terminal's graphics on.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or term.startswith(("tmux", "screen")):
        return None
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if term.startswith(("foot", "mlterm", "contour")) or "sixel" in term:
        return "sixel"
    return None


def encode(image: Image.Image, protocol: str) -> str:
    """An image as the escape sequences that make a terminal show it, scaled down to MAX_SIDE pixels a side at most."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    if protocol == "sixel":
        return encode_sixel(image)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    if protocol == "iterm2":
        return f"\033]1337;File=inline=1;size={buffer.tell()}:{text}\a\n"
    chunks = [text[k : k + CHUNK] for k in range(0, len(text), CHUNK)]
    parts = []
    for k, chunk in enumerate(chunks):
        more = int(k + 1 < len(chunks))
        parts.append(f"\033_G{'a=T,f=100,' if k == 0 else ''}m={more};{chunk}\033\\")
    return "".join(parts) + "\n"


def encode_sixel(image: Image.Image) -> str:
    """An image as sixels in 256 colours: bands of six rows, and within a band one colour after the other."""
    indexed = image.quantize(256)
    palette = np.array(indexed.getpalette(), np.int64).reshape(-1, 3)
    pixels = np.asarray(indexed)
    parts = [f'\033Pq"1;1;{image.width};{image.height}']
    for number in np.unique(pixels):
        red, green, blue = (palette[number] * 100 + 127) // 255
        parts.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, image.height, 6):
        band = pixels[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        for number in np.unique(band):
            columns = ((band == number) * bits).sum(axis=0)
            parts.append(f"#{number}{_run_length(columns)}$")
        parts.append("-")
    return "".join(parts) + "\033\\\n"


def _run_length(columns: np.ndarray) -> str:
    """Six-pixel columns as characters; a run of more than three of the same is written as a count and one."""
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    counts = np.diff(starts, append=len(columns))
    parts = []
    for value, count in zip(columns[starts], counts, strict=True):
        character = chr(63 + int(value))
        parts.append(f"!{count}{character}" if count > 3 else character * int(count))
    return "".join(parts)
