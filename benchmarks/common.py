"""What the benchmarks share: the machine, the model that is measured, turns, tables and the line of JSON.

The package's internals that several benchmarks reach for are called here, and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from flux2_mlx import (
    AutoEncoder,
    AutoEncoderConfig,
    FluxKlein,
    FluxKleinParams,
    Quantization,
    Qwen3Config,
    Qwen3TextEncoder,
    __version__,
    open_checkpoint,
    text_ids,
)
from flux2_mlx import __file__ as package
from flux2_mlx.adapters.deltas import LoRADelta
from flux2_mlx.checkpoints.load import load_autoencoder, load_text_encoder, load_transformer
from flux2_mlx.device import default_dtype, stage_dtype, weights_of
from flux2_mlx.dtypes import DTYPES, VAE_DTYPES, vae_dtype_of
from flux2_mlx.lazy import array_of
from flux2_mlx.models.kv_cache import KVReader
from flux2_mlx.models.layers import Linear
from flux2_mlx.models.names.autoencoder import diffusers_vae
from flux2_mlx.quantization.layers import QuantizedLinear, autotune, quantize
from flux2_mlx.quantization.recipes import mixed_precision

# Shapes for a few seconds on any machine: they show that a script runs, nothing about speed.
TINY = (
    FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=192, depth=1, depth_single=1),
    Qwen3Config(1000, 64, 128, 2, 1, 32),
    AutoEncoderConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4),
)
# Whole images in seconds on a CPU: klein's autoencoder, which the peers' pipelines have built in, and little else.
SMALL = (
    FluxKleinParams(hidden_size=1024, num_heads=8, txt_embed_dim=1536, depth=1, depth_single=3),
    Qwen3Config(1000, 512, 1536, 8, 4),
    AutoEncoderConfig.flux2(),
)
RANDOM = {
    "4b": (FluxKleinParams.klein_4b(), Qwen3Config(), AutoEncoderConfig.flux2()),
    "9b": (FluxKleinParams.klein_9b(), Qwen3Config.qwen3_8b(), AutoEncoderConfig.flux2()),
    "small": SMALL,
    "tiny": TINY,
}
STEMS = {"text_encoder": "model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
SHARD = 2**30  # bytes
PART = {"text_encoder": "text_encoder", "step": "transformer", "decode": "autoencoder"}  # whose dtype a stage has
FIGURES = ("median_s", "min_s", "max_s", "peak_gb")

Figures = dict[str, dict[str, Any]]  # by what took its turn
Run = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """Chip, memory, system and versions, for the JSON line."""
    info = mx.device_info()
    return {
        "chip": info.get("device_name") or platform.processor(),
        "cores": os.cpu_count(),
        "gpu_cores": gpu_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": str(mx.default_device()),
        "os": platform.platform(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "flux2_mlx": __version__,
    }


def gpu_cores() -> int | None:
    """Of a Mac."""
    if sys.platform != "darwin":
        return None
    tree = subprocess.run(["ioreg", "-l"], capture_output=True, text=True, errors="replace").stdout
    found = re.search(r'"gpu-core-count" = (\d+)', tree)
    return int(found[1]) if found else None


def process_peak_gb() -> float:
    """The largest memory that this process had, as the system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


# ------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Case:
    """What is computed: an image's size in pixels, its text's in tokens, the transformer's shape and dtype, the
    autoencoder's dtype (None: the default), and the bits that text encoder and transformer are packed in (0: none).
    """

    width: int
    height: int
    text_length: int
    params: FluxKleinParams
    dtype: mx.Dtype
    vae_dtype: mx.Dtype | None = None
    bits: int = 0

    @property
    def tokens(self) -> int:
        return self.width * self.height // 256


@dataclass(frozen=True)
class Model:
    """A checkpoint's modules or random ones, each made when its stage comes.

    Attributes:
        build: by stage, from a dtype to a module whose weights are in memory.
    """

    name: str
    params: FluxKleinParams
    text_encoder: Qwen3Config
    autoencoder: AutoEncoderConfig
    build: Mapping[str, Callable[[mx.Dtype], Any]]


def add_case_options(parser: argparse.ArgumentParser, source: Any = None) -> None:
    """Options that say which model computes what; source is the group that --model and --random join."""
    source = source or parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a released name, a folder or a Hub id")
    source.add_argument("--random", choices=tuple(RANDOM), help="random weights in the shapes of this model")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--size", type=int, help="width and height")
    parser.add_argument("--text-length", type=int, default=512, help="tokens of text (%(default)s)")
    parser.add_argument("--depth", type=int, help="double blocks, of random weights")
    parser.add_argument("--depth-single", type=int, help="single blocks, of random weights")
    parser.add_argument("--depth-text", type=int, help="layers of the text encoder, of random weights")
    parser.add_argument("--hidden-size", type=int, help="the transformer's width, of random weights, in heads of 128")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: what this library takes on this machine")
    parser.add_argument("--vae-dtype", choices=VAE_DTYPES, help="default: what this library takes on this machine")


def model_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Model, Case]:
    """What the options of add_case_options ask for; completes width, height and dtype."""
    shape = (arguments.depth, arguments.depth_single, arguments.depth_text, arguments.hidden_size)
    if arguments.model and any(shape):
        parser.error("--depth, --depth-single, --depth-text, --hidden-size are for --random: a checkpoint has its own")
    if arguments.depth_text is not None and arguments.depth_text < 3:
        parser.error(f"--depth-text must be at least 3, whose outputs are the prompt's, got {arguments.depth_text}")
    arguments.width, arguments.height = arguments.size or arguments.width, arguments.size or arguments.height
    arguments.dtype = arguments.dtype or name_of(default_dtype())
    model = random_model(arguments) if arguments.random else opened(arguments.model)
    dtype = DTYPES[arguments.dtype]
    vae_dtype = vae_dtype_of(arguments.vae_dtype)
    return model, Case(arguments.width, arguments.height, arguments.text_length, model.params, dtype, vae_dtype)


def random_model(arguments: argparse.Namespace) -> Model:
    params, text_config, image_config = RANDOM[arguments.random]
    width = arguments.hidden_size or params.hidden_size
    params = replace(
        params,
        depth=arguments.depth or params.depth,
        depth_single=arguments.depth_single or params.depth_single,
        hidden_size=width,
        num_heads=width // params.head_dim,
    )
    shape = f", {params.hidden_size} wide, {params.depth} and {params.depth_single} blocks"
    name = f"random {arguments.random}" + (shape if params != RANDOM[arguments.random][0] else "")
    if layers := arguments.depth_text:
        text_config = replace(text_config, tapped_layers=(layers // 3 - 1, 2 * layers // 3 - 1, layers - 1))
        name += f", {layers} text layers"
    build: dict[str, Callable[[mx.Dtype], Any]] = {
        "text_encoder": lambda dtype: randomized(Qwen3TextEncoder(text_config), dtype),
        "step": lambda dtype: randomized(FluxKlein(params), dtype),
        "decode": lambda dtype: randomized(AutoEncoder(image_config), dtype),
    }
    return Model(name, params, text_config, image_config, build)


def random_parts(model: Model) -> dict[str, Any]:
    """Modules of a model's shapes for write_checkpoint, in bfloat16, whose weights nobody reads; the text encoder has a
    layer more, since transformers normalizes the output of the last one.
    """
    taps = model.text_encoder.tapped_layers
    text_config = replace(model.text_encoder, tapped_layers=(*taps, taps[-1] + 1))
    shapes = Qwen3TextEncoder(text_config), FluxKlein(model.params), AutoEncoder(model.autoencoder)
    for module in shapes:
        module.set_dtype(mx.bfloat16)
    return dict(zip(STEMS, shapes, strict=True))


def opened(name: str) -> Model:
    checkpoint = open_checkpoint(name)
    build: dict[str, Callable[[mx.Dtype], Any]] = {
        "text_encoder": lambda dtype: loaded(load_text_encoder(checkpoint, dtype)),
        "step": lambda dtype: loaded(load_transformer(checkpoint, dtype)),
        "decode": lambda dtype: loaded(load_autoencoder(checkpoint, dtype)),
    }
    shapes = checkpoint.transformer, checkpoint.text_encoder, checkpoint.autoencoder
    return Model(Path(name).name, *shapes, build)


def dtype_of_stage(stage: str, dtype: mx.Dtype, vae_dtype: mx.Dtype | None = None) -> mx.Dtype:
    return stage_dtype(PART[stage], dtype, vae_dtype)


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def randomized(module: nn.Module, dtype: mx.Dtype) -> Any:
    """A module with random weights in dtype, in memory; tensor by tensor, so that casts do not add up. Norms and biases
    begin at ones and zeros, which would hide one that is skipped or swapped, so they get noise.
    """
    noise = lambda x: x + 0.1 * mx.random.uniform(-1, 1, x.shape) if x.ndim == 1 else x  # noqa: E731
    module.update(tree_map(lambda array: noise(array).astype(dtype), module.parameters()))
    return loaded(module)


def loaded(module: nn.Module) -> Any:
    """A module with its lazy weights in memory."""
    for array in weights_of(module).values():
        mx.eval(array)
    return module


def pack(module: nn.Module, bits: str | None) -> Any:
    """The module packed as --quantize packs it; as it is for "none" or nothing."""
    spec = Quantization.parse(bits) if bits else None
    if spec is not None:
        quantize(module, mixed_precision(module, spec))
    return module


def diffusers_weights(module: nn.Module) -> dict[str, mx.array]:
    """A module's weights in diffusers' layout, without evaluating them."""
    weights = weights_of(module)
    if isinstance(module, AutoEncoder):
        return {name: array_of(weight) for name, weight in diffusers_vae(weights).items()}
    if isinstance(module, Qwen3TextEncoder):  # files have a last norm, which mflux asks for and nobody computes
        return {**weights, "model.norm.weight": mx.ones((module.config.hidden_size,), mx.bfloat16)}
    return weights


def write_checkpoint(folder: Path, modules: Mapping[str, Any]) -> None:
    """A checkpoint in the diffusers layout, with nano's tokenizer, in random weights of the modules' shapes and dtypes.

    Args:
        modules: by folder, as in STEMS.
    """
    nano = Path(package).with_name("nano")
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(nano / name, folder / name)
    for part, module in modules.items():
        (folder / part).mkdir()
        config = module.params if isinstance(module, FluxKlein) else module.config
        (folder / part / "config.json").write_text(json.dumps(config.to_config()))
        weights = diffusers_weights(module)
        names = sorted(weights, key=lambda name: [int(w) if w.isdecimal() else w for w in name.split(".")])
        shards: list[list[str]] = [[]]
        for name in names:  # as they stand in the model, so that a block is read from one shard or two
            if sum(weights[other].nbytes for other in shards[-1]) > SHARD:
                shards.append([])
            shards[-1].append(name)
        files = [f"{STEMS[part]}-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
        for file, own in zip(files, shards, strict=True):
            mx.save_safetensors(str(folder / part / file), {name: random_weight(name, weights[name]) for name in own})
        index = {name: file for file, own in zip(files, shards, strict=True) for name in own}
        total = {"total_size": sum(array.nbytes for array in weights.values())}
        text = json.dumps({"metadata": total, "weight_map": index})
        (folder / part / f"{STEMS[part]}.safetensors.index.json").write_text(text)
    shutil.copyfile(nano / "model_index.json", folder / "model_index.json")


def random_weight(name: str, like: mx.array) -> mx.array:
    if like.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, like.shape).astype(mx.uint32)
    if name.endswith("running_var") or ".norm" in name or "layernorm" in name:
        return mx.ones(like.shape, like.dtype)
    return (0.01 * mx.random.normal(like.shape)).astype(like.dtype)


# -------------------------------------------------------------------------------------- the package's internals


def rope_of(params: FluxKleinParams, text_length: int, *ids: mx.array) -> tuple[mx.array, mx.array]:
    """The tables of rotations of so much text and of these images' tokens."""
    joined = mx.concatenate(list(ids), axis=1)
    return FluxKlein.compute_rope(text_ids(text_length), joined, params.axes_dims_rope, params.rope_theta)


def velocity(
    model: Any,
    x: mx.array,
    txt: mx.array,
    sigma: float,
    rope: tuple[mx.array, mx.array],
    kv: Any = None,
    tokens: int | None = None,
) -> mx.array:
    """A pass through the transformer: the velocity of the first tokens of x, by default of all. kv are a reference's
    keys and values that encode_kv made.
    """
    readers = kv and [KVReader(own) for own in kv]
    v: mx.array = model.forward_with_rope(x, txt, mx.full((len(x),), sigma), *rope, image_tokens=tokens, kv=readers)
    return v


def encode_kv(model: Any, clean: mx.array, rope: tuple[mx.array, mx.array]) -> Any:
    """A reference's keys and values, of its clean tokens and their rotations."""
    return model.encode_reference_kv(clean, *rope)


def packed_copy(module: Any, bits: str) -> tuple[Any, dict[str, Any]]:
    """The same weights packed, with what measuring from how many rows each shape is unpacked took and found."""
    copy: Any = FluxKlein(module.params) if isinstance(module, FluxKlein) else Qwen3TextEncoder(module.config)
    copy.update(tree_map(lambda array: array, module.parameters()))
    loaded(pack(copy, bits))
    start = time.perf_counter()
    autotune(copy, arrays_of(module.parameters())[0].dtype)
    seconds = time.perf_counter() - start
    layers = [layer for _, layer in copy.named_modules() if isinstance(layer, QuantizedLinear)]
    shapes = [
        (layer.weight.shape[0], layer.weight.shape[1] * 32 // layer.spec.bits, layer.spec.bits) for layer in layers
    ]
    rows = {
        f"{outputs} x {inputs}, {bits} bits": layer.dense_rows
        for (outputs, inputs, bits), layer in zip(shapes, layers, strict=True)
    }
    return copy, {"tuning_s": seconds, "rows": rows}


def random_lora(model: nn.Module, rank: int, dtype: mx.Dtype) -> dict[str, LoRADelta]:
    """A random LoRA of every layer of the blocks, by its path."""
    deltas = {}
    for path, layer in model.named_modules():
        if "_blocks." in path and isinstance(layer, Linear):
            rows, columns = layer.weight.shape
            down, up = mx.random.normal((rank, columns)), mx.random.normal((rows, rank))
            deltas[path] = LoRADelta(down.astype(dtype), (1e-3 * up).astype(dtype), mx.ones((rank,), dtype))
            mx.eval(deltas[path].parameters())
    return deltas


def put_lora(model: nn.Module, deltas: Mapping[str, LoRADelta]) -> None:
    """These deltas on the model's layers, and no others."""
    for path, layer in model.named_modules():
        if isinstance(layer, (Linear, QuantizedLinear)):
            layer.deltas = [deltas[path]] if path in deltas else []


# ---------------------------------------------------------------------------------------------------------- turns


def mlx_meter(name: str) -> Callable[[], tuple[int | None, int | None]]:
    """What tells the most bytes that MLX's arrays take from here on: of all, and beside those that are there now."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()

    def read() -> tuple[int, int]:
        return mx.get_peak_memory(), mx.get_peak_memory() - before

    return read


def arrays_of(result: Any) -> list[mx.array]:
    """The MLX arrays in lists, tuples and dicts."""
    return [leaf for _, leaf in cast(Any, tree_flatten([result])) if isinstance(leaf, mx.array)]


def compute(result: Any) -> Any:
    """A run's result with its MLX arrays computed; a peer's run waits for its own."""
    mx.eval(arrays_of(result))
    return result


def take_turns(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    check: Callable[[str, Any], None] = lambda name, result: None,
    meter: Callable[[str], Callable[[], tuple[int | None, int | None]]] = mlx_meter,
) -> Figures:
    """Seconds and peak memory of each run. They take turns, so that ratios mean something on a machine that others use.
    The first turn warms up, hands its results to check, and counts only where no other follows.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[tuple[int | None, int | None]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            read = meter(name)
            start = time.perf_counter()
            result = compute(run())
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(read())
            if turn == 0:
                check(name, result)
            del result
    return {name: figures_of(seconds[name], peaks[name]) for name in runs}


def figures_of(seconds: Sequence[float], peaks: Iterable[tuple[int | None, int | None]] = ()) -> dict[str, Any]:
    """Figures of the turns of a run, of which the first warmed up."""
    first, *rest = seconds
    rest = rest or [first]
    peaks = list(peaks)
    return {
        "turns": len(rest),
        "first_s": first,
        "median_s": statistics.median(rest),
        "min_s": min(rest),
        "max_s": max(rest),
        "peak_gb": max((whole / 1e9 for whole, _ in peaks if whole is not None), default=None),
        "beside_gb": max((beside / 1e9 for _, beside in peaks if beside is not None), default=None),
    }


def ratio(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Seconds over another's, in medians and in the shortest; none of one turn, which says nothing of a ratio."""
    if own["turns"] < 2:
        return {}
    return {key: own[key] / other[key] for key in FIGURES[:2]}


# -------------------------------------------------------------------------------------------------------- reports


def print_row(name: str, values: Iterable[object], width: int = 12, first: int = 26) -> None:
    """A line of a table, numbers with three decimals."""
    cells = ("–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
    print(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)


def print_json(benchmark: str, arguments: argparse.Namespace | None, report: Mapping[str, Any]) -> None:
    """The last line: what was asked for, what came out, and where."""
    variant = {} if arguments is None else {"variant": vars(arguments)}
    line = {"benchmark": benchmark, **variant, **report, "process_peak_gb": process_peak_gb(), **machine()}
    print(json.dumps(line, default=str))


def child(module: str, *words: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a benchmark in a process of its own says in its last line."""
    command, settings = [sys.executable, "-m", module, *words], {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {words[0]} failed; it says above why")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
