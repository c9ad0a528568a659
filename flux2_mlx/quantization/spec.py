"""How a layer is quantized: bits or a floating point format, and the options that name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
READ_BITS = (1, *AFFINE_BITS)  # 1 bit only of weights that were trained to it
AFFINE_GROUPS = (32, 64, 128)

# Formats of 4 and 8 bits with floating point codes: (bits, group size), both fixed.
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True)
class Quantization:
    """How a layer's weight is packed.

    Attributes:
        bits: a weight, without scales.
        group_size: inputs that share a scale.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".

    Raises:
        InputError: for a combination that MLX does not have.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode in FLOAT_MODES:
            if (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
                bits, group_size = FLOAT_MODES[self.mode]
                raise InputError(
                    f"{self.mode} has {bits} bits in groups of {group_size}, got {self.bits} in {self.group_size}"
                )
        elif self.mode != "affine":
            raise InputError(f"the mode must be affine, {', '.join(FLOAT_MODES)}, got {self.mode!r}")
        elif self.bits not in READ_BITS or self.group_size not in AFFINE_GROUPS:
            raise InputError(
                f"affine quantization has {', '.join(map(str, READ_BITS))} bits in groups of "
                f"{', '.join(map(str, AFFINE_GROUPS))}, got {self.bits!r} in {self.group_size!r}"
            )

    def check(self, layer: str, columns: int) -> None:
        """Refuse a layer that does not divide into groups.

        Raises:
            InputError: naming it.
        """
        if columns % self.group_size:
            raise InputError(f"{layer} has {columns} inputs, which are no multiple of the group size {self.group_size}")

    @classmethod
    def parse(cls, value: int | str | None, group_size: int | None = None) -> Quantization | None:
        """The quantization of an option's value: bits (4 or "4"), a mode ("mxfp4"), or None or "none".

        Args:
            group_size: inputs that share a scale, 64 unless given; a floating point mode has its own.

        Raises:
            InputError: naming what is possible.
        """
        if value in (None, "none"):
            return None
        if value in FLOAT_MODES:
            return cls(*FLOAT_MODES[str(value)], str(value))
        if not str(value).isdecimal() or int(str(value)) == 1:  # which is for reading alone
            raise InputError(
                f"quantize must be {', '.join(map(str, AFFINE_BITS))} bits or one of {', '.join(FLOAT_MODES)}, "
                f"got {value!r}"
            )
        return cls(int(str(value)), 64 if group_size is None else group_size)


def parse_options(
    quantize: int | str | None, quantize_text_encoder: int | str | None, group_size: int | None
) -> dict[str, Quantization]:
    """The quantization of each part, by its key, from the options of these names.

    Raises:
        InputError: for what cannot be, a group size of nothing among it.
    """
    text = quantize if quantize_text_encoder is None else quantize_text_encoder
    specs = {
        "transformer": Quantization.parse(quantize, group_size),
        "text_encoder": Quantization.parse(text, group_size),
    }
    given = {part: spec for part, spec in specs.items() if spec is not None}
    if group_size is not None and not any(spec.mode == "affine" for spec in given.values()):
        raise InputError(f"group_size {group_size} belongs to quantize in bits, and none is given")
    return given


def options_of(specs: Mapping[str, Quantization]) -> dict[str, Any]:
    """The options from which parse_options gives these specs."""
    named: dict[str, int | str] = {
        part: spec.bits if spec.mode == "affine" else spec.mode for part, spec in specs.items()
    }
    transformer, text = named.get("transformer"), named.get("text_encoder", "none")
    groups = [spec.group_size for spec in specs.values() if spec.mode == "affine"]
    return {
        "quantize": transformer,
        "quantize_text_encoder": None if text == (transformer or "none") else text,
        "group_size": groups[0] if groups else None,
    }
