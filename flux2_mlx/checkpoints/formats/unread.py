"""Storage formats that other programs write and that are not read here: told by name, with what to get instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import CheckpointError

# What messages call it; "quant_method" in a config; names of weights that nothing else has.
_UNREAD: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("bitsandbytes", ("bitsandbytes",), r"\.weight\.(absmax|quant_map|quant_state\.bitsandbytes__\w+)|\.SCB"),
    ("SDNQ (SD.Next)", ("sdnq", "sdnq_training"), r"\.(zero_point|svd_up|svd_down)"),
    ("optimum-quanto", ("quanto",), r"\.weight\._(data|scale)"),
    ("Nunchaku (SVDQuant)", ("nunchaku", "svdquant"), r"\.(wscales|wcscales|wtscale|smooth_factor|proj_down)"),
    ("GPTQ or AWQ", ("gptq", "awq", "auto-round"), r"\.(qzeros|g_idx)"),
    ("torchao", ("torchao",), r"\.weight_qdata|\.weight:_data"),
    ("HQQ", ("hqq",), r"\.W_q"),
    ("DFloat11 without its config.json", (), r"\.encoded_exponent"),
)


def unread_storage(names: Iterable[str], config: Mapping[str, Any] | None = None) -> str | None:
    """The format that a config or weights' names tell, where it is one that is not read."""
    quantization = (config or {}).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    for label, methods, _ in _UNREAD:
        if method in methods:
            return label
    for name in names:
        for label, _, ending in _UNREAD:
            if re.search(f"(?:{ending})$", name):
                return label
    return None


def refuse_unread(names: Iterable[str], config: Mapping[str, Any] | None, source: str) -> None:
    """Refuse weights in such a format.

    Raises:
        CheckpointError: with its name, and what to get instead.
    """
    label = unread_storage(names, config)
    if label is not None:
        raise CheckpointError(
            f"its weights are stored as {label} has them, which is not read; get the same model in bfloat16, FP8, GGUF "
            "or MLX's formats, or the original, which --quantize packs",
            source=source,
        )
