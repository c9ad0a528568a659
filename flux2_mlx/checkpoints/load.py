"""Weights into modules: strictly, lazily, and one by one when they are wanted."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..device import parts_of, weights_of
from ..errors import CheckpointError, summarize
from ..families import TRANSFORMER
from ..lazy import INTEGERS, Derived, LazyTensor, cast, read
from ..models.autoencoder import AutoEncoder
from ..models.config import FluxKleinParams
from ..models.flux2 import FluxKlein
from ..models.language_model import Qwen3LanguageModel
from ..models.names.autoencoder import sanitize_taef2_weights
from ..models.names.common import block_count
from ..models.qwen3 import Qwen3TextEncoder
from ..models.taef2 import TinyDecoder
from ..quantization.layers import QuantizedEmbedding, QuantizedLinear, dense_layers, quantize
from ..quantization.packing import PACKED, quantize_rtn, quantize_weight
from ..quantization.recipes import QuantizedFluxKlein, hold_packed, mixed_precision, packed_recipe
from ..quantization.spec import Quantization
from .checkpoint import Checkpoint
from .files import open_safetensors
from .hub import HUB_FILE, download_file, local_path
from .language import find_language_model
from .sanitize import sanitize

M = TypeVar("M", bound=nn.Module)


@dataclass
class PendingWeights:
    """What is still to be done for the weights of a module, each when it is brought into memory.

    A module that ``assign`` filled has it as its attribute ``pending``; ``of`` finds it there.

    Attributes:
        loaders: functions by the name of a weight that is to be converted or packed; each gives the arrays of its layer
            by their names, and is called once. Until then the module holds placeholders of the same shape and dtype.
        sources: by the name of a weight that MLX computes, the arrays to be read first; see lazy.
    """

    loaders: dict[str, Callable[[], dict[str, mx.array]]] = field(default_factory=dict)
    sources: dict[str, tuple[mx.array, ...]] = field(default_factory=dict)

    @staticmethod
    def of(module: nn.Module) -> PendingWeights:
        """The pending weights of a module; empty for a module that was not filled from files."""
        pending = getattr(module, "pending", None)
        return pending if isinstance(pending, PendingWeights) else PendingWeights()


def assign(module: M, weights: Mapping[str, Any], dtype: mx.Dtype, source: str, spec: Quantization | None = None) -> M:
    """Put weights into a module, strictly: all names and shapes must match. They stay lazy, cast to dtype.

    Layers that the weights hold packed stay packed; with ``spec`` the others are packed, see mixed_precision. Latent
    statistics ("bn.") and a text encoder's adapter are in float32 whatever the dtype.

    Args:
        source: what messages call the weights.

    Raises:
        CheckpointError: naming every missing, unknown, mis-shaped and unreadable weight at once.
    """
    try:
        widened = hold_packed(module, weights)
    except CheckpointError as error:
        raise CheckpointError(str(error), source=source) from None
    if widened:
        tell_one_bit()
        weights = {**weights, **widened}
    _check_fit(weights_of(module), weights, source)
    pending = PendingWeights()
    values = {}
    for name in weights_of(module):
        weight = cast(weights[name], mx.float32 if name.startswith(("bn.", "adapter.")) else dtype)
        if isinstance(weight, LazyTensor):
            pending.loaders[name] = partial(_convert, name, weight)
            weight = mx.full(weight.shape, 0 if weight.dtype in INTEGERS else math.nan, weight.dtype)  # a placeholder
        elif isinstance(weight, Derived):
            pending.sources[name] = weight.sources
            weight = weight.array
        values[name] = weight
    module.load_weights(list(values.items()), strict=False)  # _check_fit was strict, and the walk is MLX's
    if spec is not None:
        dense = set(dict(dense_layers(module)))
        quantize(module, mixed_precision(module, spec), quantize_rtn)
        for path, layer in parts_of(module).items():
            if path in dense and isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
                name = f"{path}.weight"
                load = pending.loaders.get(name, partial(_convert, name, weights[name]))
                pending.sources.pop(name, None)
                pending.loaders[name] = partial(_convert_and_pack, path, layer.spec, dtype, load)
    module.pending = pending
    return module


@cache
def tell_one_bit() -> None:
    """Warn, once, that weights take twice the memory that they could."""
    warnings.warn(
        "this MLX has no 1-bit weights, so they are held in 2 bits: the same values in twice the memory; MLX 0.32.4 "
        "has them (pip install -U mlx)",
        stacklevel=2,
    )


def _check_fit(expected: Mapping[str, mx.array], weights: Mapping[str, Any], source: str) -> None:
    """Refuse weights that are not those of a module, by names, shapes and kinds of number.

    Raises:
        CheckpointError: naming every fault.
    """
    common = sorted(expected.keys() & weights.keys())
    misshaped = [
        f"{name} is {weights[name].shape}, not {expected[name].shape}"
        for name in common
        if weights[name].shape != expected[name].shape
    ]
    unreadable = [
        f"{name} is {weights[name].dtype}"
        for name in common
        if (weights[name].dtype in INTEGERS) != (expected[name].dtype in INTEGERS)
    ]
    faults = [
        f"{len(names)} {fault}: {summarize(names)}"
        for fault, names in (
            ("missing", sorted(expected.keys() - weights.keys())),
            ("unknown", sorted(weights.keys() - expected.keys())),
            ("mis-shaped", misshaped),
            ("in formats that are not read", unreadable),
        )
        if names
    ]
    if faults:
        raise CheckpointError(f"the weights do not fit the config: {'; '.join(faults)}", source=source)


def _convert(name: str, weight: Any) -> dict[str, mx.array]:
    return {name: read(weight)}


def _convert_and_pack(
    path: str, spec: Quantization, dtype: mx.Dtype, load: Callable[[], dict[str, mx.array]]
) -> dict[str, mx.array]:
    (dense,) = load().values()
    packed = quantize_weight(dense, spec, dtype, now=True)
    return {f"{path}.{name}": array for name, array in zip(PACKED, packed, strict=False)}


def needs_conversion(module: nn.Module, prefix: str = "") -> bool:
    """Whether weights of that prefix come from another format, or are packed, as they are brought into memory."""
    return any(name.startswith(prefix) for name in PendingWeights.of(module).loaders)


def start_reading(module: nn.Module, prefix: str) -> None:
    """Have MLX read weights of that prefix while it computes something else, in no more memory than they will take."""
    sources = PendingWeights.of(module).sources
    weights = {name: array for name, array in weights_of(module).items() if name.startswith(prefix)}
    room = sum(array.nbytes for array in weights.values())
    unread = {id(source): source for name, array in weights.items() for source in sources.get(name, (array,))}
    total = accumulate(source.nbytes for source in unread.values())
    mx.async_eval([source for source, filled in zip(unread.values(), total, strict=True) if filled <= room])


def load_weights(module: nn.Module, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[int]:
    """Bring a module's weights into memory, one after another, since a conversion holds its source until it is done.

    Args:
        wanted: whether a weight is among them, by its name; a packed layer's arrays all or none.

    Yields:
        the bytes of each.

    Raises:
        CheckpointError: for scales that are not finite.
    """
    pending = PendingWeights.of(module)
    loaded: dict[str, mx.array] = {}
    lazy = weights_of(module)
    for name in filter(wanted, list(lazy)):
        array = lazy.pop(name)
        mx.eval(pending.sources.pop(name, ()))  # on their own: see lazy
        if name in pending.loaders:
            loaded |= pending.loaders.pop(name)()
        if name in loaded:
            array = loaded.pop(name)
            module.load_weights([(name, array)], strict=False)
        mx.eval(array)
        if name.endswith((".scales", ".biases")) and array.dtype != mx.uint8 and not mx.isfinite(array).all().item():
            raise CheckpointError(f"{name} has values that are not finite; fetch the file again")
        yield array.nbytes


def load_all(module: M, wanted: Callable[[str], bool] = lambda _: True) -> M:
    """The module, after load_weights of all that is wanted."""
    for _ in load_weights(module, wanted):
        pass
    return module


def load_transformer(checkpoint: Checkpoint, dtype: mx.Dtype, spec: Quantization | None = None) -> FluxKlein:
    """The checkpoint's transformer with lazy weights; those that it holds dense are packed by the recipe.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    source = checkpoint.sources["transformer"]
    return assign(FluxKlein(checkpoint.transformer), source.weights(), dtype, source.name, spec)


def load_text_encoder(checkpoint: Checkpoint, dtype: mx.Dtype, spec: Quantization | None = None) -> Qwen3TextEncoder:
    """The checkpoint's text encoder with lazy weights, up to the last tapped layer; as load_transformer.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    source = checkpoint.sources["text_encoder"]
    return assign(Qwen3TextEncoder(checkpoint.text_encoder), source.weights(), dtype, source.name, spec)


def load_language_model(
    checkpoint: Checkpoint, dtype: mx.Dtype, spec: Quantization | None = None
) -> Qwen3LanguageModel:
    """The language model that the checkpoint's text encoder begins, with lazy weights; as load_transformer.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
        InputError: for a checkpoint that has not all of it.
    """
    source, weights = find_language_model(checkpoint)
    layers, is_tied = block_count(weights, "model.layers"), "lm_head.weight" not in weights
    model = Qwen3LanguageModel(checkpoint.text_encoder, layers, is_tied=is_tied)
    return assign(model, weights, dtype, source.name, spec)


def load_autoencoder(checkpoint: Checkpoint, dtype: mx.Dtype) -> AutoEncoder:
    """The checkpoint's autoencoder with lazy weights. It is small and is never packed.

    Raises:
        CheckpointError: for a bad file, or weights that do not fit the config.
    """
    source = checkpoint.sources["vae"]
    return assign(AutoEncoder(checkpoint.autoencoder), source.weights(), dtype, source.name)


def load_preview_decoder(file: str | os.PathLike[str], dtype: mx.Dtype) -> TinyDecoder:
    """TAEF2's decoder with lazy weights, from a safetensors file here, or "owner/name/file" on the Hub.

    Raises:
        CheckpointError: for a file that is not there, or holds something else.
    """
    name = os.fspath(file)
    path = local_path(name)
    if path is None and HUB_FILE.fullmatch(name):
        path = download_file(name, None)
    if path is None or not path.is_file():
        raise CheckpointError(f"no preview decoder {name!r}: there is no such file")
    return assign(TinyDecoder(), sanitize_taef2_weights(open_safetensors(path)), dtype, f"{path}, as TAEF2's decoder")


def load_quantized_flux_klein(weights: Mapping[str, mx.array], params: FluxKleinParams) -> QuantizedFluxKlein:
    """A transformer from packed weights; layers that are not packed stay dense.

    Args:
        weights: under any names that sanitize_flux2_klein_weights knows, with ``scales`` (and ``biases``) of the packed
            layers. Their bits follow from the shapes.

    Raises:
        CheckpointError: naming every missing, unknown and mis-shaped weight.
    """
    weights = sanitize(TRANSFORMER, weights)
    dtype = next((weight.dtype for name, weight in weights.items() if ".norm_" in name), mx.bfloat16)
    return assign(QuantizedFluxKlein(params, packed_recipe(weights)), weights, dtype, "the weights")
