"""The log of a training run, and the curve of its loss."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw

from ..writing import atomic_write
from .trainer import StepReport

LARGEST = float(np.finfo(np.float32).max)  # loss that a step can have
SMOOTHED = 50  # steps in the running mean of the loss


class Log:
    """log.jsonl, one line a step: "step", "loss", "learning_rate", "norm", "change" (StepReport's preservation_loss),
    "pictures_per_second", "peak_bytes".

    Args:
        path: the file; lines are appended to it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, float]] = []

    def truncate(self, step: int) -> None:
        """Drop the lines after ``step`` steps: of steps that were not saved before the run was killed."""
        with contextlib.suppress(OSError):
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self.lines = [line for line in map(_parse, text.splitlines()) if line and line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, report: StepReport, seconds: float) -> None:
        """Append the line of a step that took so many seconds."""
        line = {
            "step": report.step,
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "norm": report.norm,
            "change": report.preservation_loss,
            "pictures_per_second": report.images / seconds,
            "peak_bytes": mx.get_peak_memory(),
        }
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def postfix(self) -> dict[str, str]:
        """The latest line for the progress bar, with the running mean of the loss."""
        line = self.lines[-1]
        return {
            "loss": f"{np.mean([other['loss'] for other in self.lines[-SMOOTHED:]]):.4f}",
            "lr": f"{line['learning_rate']:.1e}",
            "images/s": f"{line['pictures_per_second']:.2f}",
            "peak": f"{line['peak_bytes'] / 1e9:.2f} GB",
        }

    def plot(self, path: Path) -> None:
        """Write the curve of the loss and its running mean as a PNG, if there is any: a log may have been lost."""
        if self.lines:
            write_image(path, plot_losses([line["loss"] for line in self.lines]))


def _parse(text: str) -> dict[str, float] | None:
    """A line of the log, or None for what is none, as a full disk or a power cut leaves it."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and all(_is_number(line.get(name)) for name in ("step", "loss")) else None


def _is_number(value: Any) -> bool:
    """Whether it can be drawn: NaN cannot, nor an integer of hundreds of digits."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def plot_losses(losses: Sequence[float], size: tuple[int, int] = (960, 480)) -> Image.Image:
    """An image of a size (width, height): the losses, and darker their running mean over SMOOTHED steps."""
    width, height = size
    left, top, right, bottom = 64, 16, width - 16, height - 32
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    means = [float(np.mean(losses[max(0, k + 1 - SMOOTHED) : k + 1])) for k in range(len(losses))]
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        across, down = (right - left) / max(1, len(values) - 1), (bottom - top) / (high - low)
        return [(left + k * across, bottom - (value - low) * down) for k, value in enumerate(values)]

    for value in np.linspace(low, high, 5):
        y = bottom - (value - low) * (bottom - top) / (high - low)
        canvas.line([(left, y), (right, y)], fill=(225, 225, 225))
        canvas.text((8, y - 6), f"{value:.4f}", fill=(90, 90, 90))
    for k in np.linspace(1, len(losses), 5).round():
        x = left + (k - 1) * (right - left) / max(1, len(losses) - 1)
        canvas.text((x - 12, bottom + 8), f"{k:.0f}", fill=(90, 90, 90))
    canvas.line(points(losses), fill=(170, 200, 235), width=1)
    canvas.line(points(means), fill=(20, 80, 160), width=3)
    return image


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_image(path: Path, image: Image.Image) -> None:
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
