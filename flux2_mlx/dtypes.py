"""Dtypes by their names, as options, files and callers give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from .device import default_dtype
from .errors import InputError
from .fields import check_choice

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
VAE_DTYPES = ("float32", "bfloat16")  # activations of the autoencoder leave the range of float16


def dtype_of(dtype: Any) -> mx.Dtype:
    """The dtype of that name, or of MLX's or torch's own; None takes what suits the machine.

    Raises:
        InputError: for another one.
    """
    if dtype is None:
        return default_dtype()
    name = dtype if isinstance(dtype, str) else str(dtype).rpartition(".")[2]
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return DTYPES[name]


def vae_dtype_of(dtype: Any) -> mx.Dtype | None:
    """The autoencoder's dtype where one is asked for; None leaves it to device.stage_dtype.

    Raises:
        InputError: for float16 or another one.
    """
    if dtype is None:
        return None
    check_choice("vae_dtype", dtype if isinstance(dtype, str) else str(dtype).rpartition(".")[2], VAE_DTYPES)
    return dtype_of(dtype)


def with_dtype_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, its dtypes by their names.

    Raises:
        InputError: for a dtype that cannot be.
    """
    readers: dict[str, Callable[[Any], Any]] = {"dtype": dtype_of, "torch_dtype": dtype_of, "vae_dtype": vae_dtype_of}
    return {
        name: dtype_name(readers[name](value)) if name in readers and value is not None else value
        for name, value in given.items()
    }


def dtype_name(dtype: mx.Dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
