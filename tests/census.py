"""What MLX is asked to do: every (primitive, dtypes) of every stage, packing, format, adapter and training step.

    python -m tests.census        # writes tests/data/census.txt; read the diff before you commit it

Functions are traced by mx.export_function, as on a GPU, and nothing of them is computed but in training. Modules have
klein's widths, one block of a kind, and weights of one number each. What cannot be exported is noted as it is called:

- operations of mx.fast, whose parts on the CPU are noted too: a GPU computes these where it has no kernel of the whole;
- quantize, dequantize, from_fp8 and contiguous, in whose place the trace has an array of the same shape and dtype.

A compiled function is traced through. A custom function is called as what it wraps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers  # noqa: F401  (before mx.compile is looked at)
import numpy as np
from mlx.utils import tree_flatten, tree_map

from flux2_mlx import AutoEncoderConfig, FluxKleinParams, image_ids, text_ids
from flux2_mlx.adapters.keys import LoraLayer
from flux2_mlx.checkpoints.files import _decoded
from flux2_mlx.checkpoints.formats.decode import decode, dequantize_square
from flux2_mlx.checkpoints.formats.marks import mark
from flux2_mlx.imaging.preprocess import to_unit
from flux2_mlx.lazy import LazyTensor, array_of, cast
from flux2_mlx.models.autoencoder import AutoEncoder
from flux2_mlx.models.config import Qwen3Config
from flux2_mlx.models.first_block_cache import FirstBlockCache
from flux2_mlx.models.flux2 import FluxKlein
from flux2_mlx.models.kv_cache import FrozenKV
from flux2_mlx.models.language_model import Qwen3LanguageModel
from flux2_mlx.models.layers import Linear
from flux2_mlx.models.qwen3 import Qwen3TextEncoder, TokenCache
from flux2_mlx.models.taef2 import TinyDecoder
from flux2_mlx.quantization.layers import QuantizedEmbedding, QuantizedLinear
from flux2_mlx.quantization.packing import quantize_rtn, quantize_weight
from flux2_mlx.quantization.spec import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES, READ_BITS, Quantization
from flux2_mlx.sampling.denoiser import CachedDenoiser, Denoiser, FrozenDenoiser, strength_bias
from flux2_mlx.sampling.guidance import Guidance, batched, sequential
from flux2_mlx.sampling.latents import PIXELS_PER_TOKEN, initial_noise, pack_latents, resize_latents, unpack_latents
from flux2_mlx.sampling.regions import make_regions
from flux2_mlx.sampling.samplers import MaskBlend, add_noise, sample_euler
from flux2_mlx.sampling.schedules import flux2_sigmas, plan_steps
from flux2_mlx.sampling.tiles import Following, TiledVelocity, divide, low_pass
from flux2_mlx.training.dataset import Example
from flux2_mlx.training.options import TrainingOptions
from flux2_mlx.training.trainer import Trainer
from tests.kernels import BITWISE, MODES, REDUCTIONS, VIEWS, Operation

ACCEPTED = Path(__file__).parent / "data" / "census.txt"
DTYPES = (mx.float32, mx.bfloat16, mx.float16)

# ---------------------------------------------------------------------------------------------------------- the tracer


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def arrays_of(tree: Any) -> list[mx.array]:
    return [array for _, array in tree_flatten(tree) if isinstance(array, mx.array)]


class Census:
    """The operations that were traced, each with the places where it was met first."""

    def __init__(self) -> None:
        self.places: dict[Operation, str] = {}
        self.place = ""

    def note(self, name: str, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype], *details: object) -> None:
        sides = [() if name in VIEWS else tuple(map(name_of, side)) for side in (inputs, outputs)]
        if name == "Concatenate":  # of any number of arrays
            sides = [tuple(dict.fromkeys(side)) for side in sides]
        self.places.setdefault(Operation(name, sides[0], sides[1], tuple(map(str, details))), self.place)

    def trace(self, place: str, function: Callable[..., Any], *arrays: Any, answers: Sequence[Any] = ()) -> None:
        """Note the operations of a function of arrays, those of what it evaluates on its way among them.

        Args:
            answers: what array.item() gives in turn for arrays that have no value while they are traced.
        """
        self.place = place
        asked = iter(answers)
        item = mx.array.item
        evaluated: list[mx.array] = []

        def answer(array: mx.array) -> Any:
            evaluated.append(array)
            try:
                return item(array)
            except ValueError:
                return next(asked)

        def note(*trees: Any) -> None:
            evaluated.extend(arrays_of(trees))

        def outputs(*given: mx.array) -> list[mx.array]:
            made = arrays_of(function(*given))
            return [*made, *evaluated]

        with (
            as_on_gpu(self),
            patch.object(mx, "eval", note),
            patch.object(mx, "async_eval", note),
            patch.object(mx.array, "item", answer),
        ):
            mx.export_function(self._tell, outputs, *arrays)

    def run(self, place: str, function: Callable[[], Any]) -> None:
        """Note the operations of what a function evaluates, while it runs: it may look at the values."""
        self.place = place
        evaluate = mx.eval

        def noted(*trees: Any) -> None:
            mx.export_function(self._tell, lambda: arrays_of(trees))
            evaluate(*trees)

        with as_on_gpu(self), patch.object(mx, "eval", noted):
            function()

    def _tell(self, told: dict[str, Any]) -> None:
        if told["type"] != "primitive":
            return
        name, state = told["name"], told["arguments"]
        details: tuple[object, ...] = ()
        if name == "Reduce":
            name = f"Reduce {REDUCTIONS[state[0]]}"
        elif name == "ArgReduce":
            name = f"ArgReduce {('argmin', 'argmax')[state[0]]}"
        elif name == "BitwiseBinary":
            name = f"Bitwise {BITWISE[state[0]]}"
        elif name == "Sqrt" and state[0]:
            name = "Rsqrt"
        elif name == "Softmax" and state[0]:
            details = ("precise",)
        elif name == "QuantizedMatmul":
            details = MODES[state[2]], state[1], state[0]
        self.note(name, *([dtype for _, _, dtype in told[side]] for side in ("inputs", "outputs")), *details)


@contextmanager
def as_on_gpu(census: Census) -> Iterator[None]:
    """The package takes the branches of a GPU, and what cannot be exported is noted as it is called."""
    fast = mx.fast
    norms = {"rms_norm": ("RMSNorm", fast.rms_norm), "layer_norm": ("LayerNorm", fast.layer_norm)}
    rope, attention = fast.rope, fast.scaled_dot_product_attention

    def normed(name: str, x: mx.array, *rest: Any, **options: Any) -> mx.array:
        census.note(norms[name][0], [x.dtype], [x.dtype])
        return norms[name][1](x, *rest, **options)

    def rotated(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        census.note("RoPE", [x.dtype], [x.dtype])
        return rope(x, *rest, **options)

    def attended(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any) -> mx.array:
        kind = "none" if mask is None else mask if isinstance(mask, str) else name_of(mask.dtype)
        census.note("ScaledDotProductAttention", [q.dtype, k.dtype, v.dtype], [q.dtype], q.shape[-1], kind)
        return attention(q, k, v, scale=scale, mask=mask, **options)

    def stand_in(shape: Sequence[int], dtype: mx.Dtype, *inputs: mx.array) -> mx.array:
        """An array that waits for the inputs, so that these are traced too."""
        return mx.depends([mx.zeros(tuple(shape), dtype)], list(inputs))[0]

    def dequantized(
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        dtype: mx.Dtype | None = None,
    ) -> mx.array:
        target = dtype or (scales.dtype if mode == "affine" else mx.bfloat16)
        given = [w, scales, *([] if biases is None else [biases])]
        census.note("Dequantize", [array.dtype for array in given], [target], mode, bits, group_size)
        return stand_in((*w.shape[:-1], w.shape[-1] * 32 // bits), target, *given)

    def quantized(x: mx.array, group_size: int = 64, bits: int = 4, mode: str = "affine") -> list[mx.array]:
        kinds = [mx.uint32, x.dtype, x.dtype] if mode == "affine" else [mx.uint32, mx.uint8]
        census.note("Quantize", [x.dtype], kinds, mode, bits, group_size)
        sizes = [x.shape[-1] * bits // 32, *[x.shape[-1] // group_size] * 2]
        return [stand_in((*x.shape[:-1], n), kind, x) for n, kind in zip(sizes, kinds, strict=False)]

    def from_fp8(x: mx.array, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
        census.note("FromFP8", [x.dtype], [dtype])
        return stand_in(x.shape, dtype, x)

    def contiguous(x: mx.array, *_: Any) -> mx.array:
        census.note("Contiguous", [x.dtype], [x.dtype])
        return stand_in(x.shape, x.dtype, x)

    def custom(function: Callable[..., Any]) -> Callable[..., Any]:
        function.vjp = lambda backward: backward  # type: ignore[attr-defined]
        return function

    modules = [
        module for name, module in sys.modules.items() if name.startswith("flux2_mlx") and "on_gpu" in vars(module)
    ]
    patches = [
        *(patch.object(module, "on_gpu", lambda: True) for module in modules),
        *(patch.object(fast, name, partial(normed, name)) for name in norms),
        patch.object(fast, "rope", rotated),
        patch.object(fast, "scaled_dot_product_attention", attended),
        patch.object(mx, "quantize", quantized),
        patch.object(mx, "dequantize", dequantized),
        patch.object(mx, "from_fp8", from_fp8),
        patch.object(mx, "contiguous", contiguous),
        patch.object(mx, "custom_function", custom),
    ]
    mx.disable_compile()  # compiled functions of what is no input could not be exported
    for one in patches:
        one.start()
    try:
        yield
    finally:
        mx.enable_compile()
        for one in patches:
            one.stop()


def hollow(module: nn.Module, dtype: mx.Dtype) -> Any:
    """A module whose weights are one number each, but for the statistics, which are float32."""
    numbers = {kind: mx.array(0, kind) for kind in (dtype, mx.float32)}
    kept = {id(array) for name, array in tree_flatten(module.parameters()) if name.startswith("bn.")}
    module.update(
        tree_map(
            lambda array: mx.broadcast_to(numbers[mx.float32 if id(array) in kept else dtype], array.shape),
            module.parameters(),
        )
    )
    mx.eval(module.parameters())
    return module


# ---------------------------------------------------------------------------------------------------------- the stages

PARAMS = replace(FluxKleinParams.klein_4b(), depth=1, depth_single=1)
SIZE, LENGTH = (64, 80), 16  # of the image, and of prompts
TOKENS = SIZE[0] * SIZE[1] // 256


def text_encoder(census: Census, dtype: mx.Dtype) -> None:
    model = hollow(Qwen3TextEncoder(Qwen3Config(vocab_size=64)), dtype)
    ids = mx.zeros((1, LENGTH), mx.int32)
    census.trace("text encoder", model, ids, ids, answers=[LENGTH // 2])
    census.trace("text encoder", model, ids)
    small = hollow(Qwen3TextEncoder(replace(Qwen3Config.small(), vocab_size=64)), dtype)
    small.adapter = hollow(small.adapter, mx.float32)
    census.trace("small text encoder", small, ids, ids, answers=[LENGTH // 2])


def language_model(census: Census, dtype: mx.Dtype) -> None:
    """Given tokens, then a written one; how the next one is chosen of their logits."""
    for is_tied in (True, False):
        model = hollow(Qwen3LanguageModel(Qwen3Config(vocab_size=64), 1, is_tied=is_tied), dtype)

        def write(ids: mx.array, model: Qwen3LanguageModel = model) -> list[mx.array]:
            caches = [TokenCache(LENGTH + 1)]
            first, second = model(ids, caches), model(ids[:, :1], caches)
            return [mx.argmax(first[0]), mx.isfinite(first[0]).all(), second[0].astype(mx.float32)]

        census.trace("language model", write, mx.zeros((1, LENGTH), mx.int32))


def tables(length: int, *sizes: tuple[int, int]) -> tuple[mx.array, mx.array]:
    ids = [image_ids(*size, reference=k - 1 if k else None) for k, size in enumerate(sizes)]
    return FluxKlein.compute_rope(text_ids(length), mx.concatenate(ids, axis=1))


def steps(census: Census, dtype: mx.Dtype) -> None:
    """Every way of sampling, with batches of one and two rows."""
    model = hollow(FluxKlein(PARAMS), dtype)
    plan = plan_steps(flux2_sigmas(4, TOKENS), uses_cfg=True)
    reference = mx.zeros((1, TOKENS, PARAMS.in_channels))
    plain = partial(Denoiser, lambda: nullcontext(model), num_tokens=TOKENS)
    alone, edit = plain(tables(LENGTH, SIZE)), plain(tables(LENGTH, SIZE, SIZE), references=[reference])

    def sample(velocity: Callable[..., Any], x: mx.array, txt: mx.array, *rest: Any, rescale: float = 0.5) -> Any:
        cond, passes = velocity()
        guidance = Guidance(cond, passes, txt, txt, 3.0, rescale)
        return list(sample_euler(guidance, x, plan, *rest))

    def cached() -> tuple[Any, Any]:
        leader = CachedDenoiser(edit, lambda: FirstBlockCache(1.0))
        follower = CachedDenoiser(edit, lambda: FirstBlockCache(1.0, leader=leader.cache))
        return leader, sequential(leader, follower)

    def frozen(tokens: str, denoiser: Denoiser) -> Callable[[], tuple[Any, Any]]:
        def velocity() -> tuple[Any, Any]:
            cond, uncond = (FrozenDenoiser(denoiser, FrozenKV(tokens, TOKENS)) for _ in range(2))
            return cond, sequential(cond, uncond)

        return velocity

    def kept(x: mx.array, txt: mx.array) -> Any:
        kv = model.encode_reference_kv(reference, *tables(0, SIZE))
        reading = plain(tables(LENGTH, SIZE), reference_kv=kv)
        return [kv, sample(lambda: (reading, batched(reading)), x, txt)]

    def inpaint(x: mx.array, txt: mx.array) -> Any:
        mask = mx.zeros((1, TOKENS, 1))
        return sample(lambda: (alone, batched(alone)), add_noise(reference, x, 0.9), txt, MaskBlend(reference, x, mask))

    def tiled(x: mx.array, txt: mx.array) -> Any:
        tiling = divide(SIZE, SIZE[0] // 2)
        assert tiling is not None
        count = math.prod(tiling.size) // PIXELS_PER_TOKEN**2
        ropes = [FluxKlein.compute_rope(text_ids(LENGTH), ids) for ids in tiling.position_ids(SIZE)]
        denoisers = [Denoiser(lambda: nullcontext(model), rope, count) for rope in ropes[:2]]
        velocities = [Guidance(own, batched(own), txt, txt, 3.0) for own in denoisers]
        unpack, pack = partial(unpack_latents, height=SIZE[0], width=SIZE[1]), pack_latents
        follow = Following(unpack(x), *low_pass(SIZE, (SIZE[0] // 2, SIZE[1] // 2)), unpack, pack)
        return list(sample_euler(TiledVelocity(tiling, velocities * (len(tiling) // 2), follow), x, plan))

    # CFG makes two rows of one.
    x = mx.zeros((1, TOKENS, PARAMS.in_channels))
    txt = mx.zeros((1, LENGTH, PARAMS.txt_embed_dim), dtype)
    census.trace("step", partial(sample, lambda: (alone, sequential(alone, alone)), rescale=0.0), x, txt)
    census.trace("step in tiles", tiled, x, txt)
    census.trace("step with references", partial(sample, lambda: (edit, batched(edit))), x, txt)
    strong = replace(edit, bias=strength_bias(LENGTH + TOKENS, [TOKENS], [0.5]))
    census.trace("step with a reference's strength", partial(sample, lambda: (strong, batched(strong))), x, txt)
    regions, both = make_regions([(0, 0, 0.5, 1)], SIZE, LENGTH, TOKENS), mx.concatenate([txt, txt], axis=1)
    apart = replace(edit, rope=tables(2 * LENGTH, SIZE, SIZE), regions=regions)
    faint = replace(apart, bias=strength_bias(2 * LENGTH + TOKENS, [TOKENS], [0.5]))
    for parts in (apart, faint):
        census.trace("step with regions", partial(sample, lambda parts=parts: (parts, batched(parts))), x, both)
    census.trace("step with First Block Cache", partial(sample, cached), x, txt, answers=[False, True])
    for tokens, denoiser in (("text", alone), ("references", edit)):
        census.trace(f"step with frozen {tokens}", partial(sample, frozen(tokens, denoiser)), x, txt)
    census.trace("step with a KV cache", kept, x, txt)
    census.trace("inpainting", inpaint, x, txt)


def autoencoder(census: Census, dtype: mx.Dtype) -> None:
    """At a size of one tile, and at one of several."""
    model = hollow(AutoEncoder(AutoEncoderConfig.flux2()), dtype)
    preview = hollow(TinyDecoder(), dtype)
    for height, width in (SIZE, (64, 2048)):

        def decode_latents(latents: mx.array, size: Sequence[int] = (height, width)) -> Any:
            decoded = model.decoder(unpack_latents(model.bn.denormalize(latents), *size))
            return to_unit(decoded), mx.isfinite(decoded).all(), mx.isfinite(latents).all()

        def encode(image: mx.array) -> mx.array:
            return model.bn.normalize(pack_latents(model.encoder(image)))

        def start_from(z: mx.array, size: Sequence[int] = (height, width)) -> mx.array:
            return model.bn.normalize(pack_latents(resize_latents(z, size[0] // 8, size[1] // 8)))

        census.trace("decode", decode_latents, mx.zeros((1, height * width // 256, 128)))
        census.trace("encode", encode, mx.zeros((1, height, width, 3)))
        census.trace("start from latents", start_from, mx.zeros((2, 8, 8, 32)))

    def show(latents: mx.array) -> mx.array:
        z = unpack_latents(latents, *SIZE).astype(dtype)
        return mx.clip(preview(z)[0].astype(mx.float32), 0, 1)

    census.trace("preview", show, mx.zeros((1, TOKENS, 128)))


def noise(census: Census, _: mx.Dtype) -> None:
    for kind in ("torch", "mlx"):
        census.trace("noise", partial(initial_noise, 1, *SIZE, noise=kind))


# ---------------------------------------------------------------------------------------------------------- the weights

SPECS = [Quantization(bits, group) for bits in READ_BITS for group in AFFINE_GROUPS]
SPECS += [Quantization(*fixed, mode) for mode, fixed in FLOAT_MODES.items()]


def packing(census: Census, dtype: mx.Dtype) -> None:
    """Packing, products, their gradients, embeddings."""
    x, ids, weight = mx.zeros((2, 3, 256), dtype), mx.zeros((2, 3), mx.int32), mx.zeros((64, 256), dtype)
    for spec in SPECS:
        for packed_by in (quantize_weight, quantize_rtn):
            census.trace(f"packing to {spec}", partial(packed_by, spec=spec), weight)
        layer: Any = hollow(QuantizedLinear(Linear(256, 64), spec, quantize_rtn), dtype)
        table = QuantizedEmbedding(nn.Embedding(64, 256), spec, quantize_rtn)
        for module in (layer, table):  # the kinds of number that a file has them in
            kinds = [mx.uint32, *([mx.uint8] if spec.mode != "affine" else [dtype, dtype])]
            for name, kind in zip(("weight", "scales", "biases"), kinds, strict=False):
                module[name] = mx.zeros(module[name].shape, kind)
            mx.eval(module.parameters())
        for multiply in (layer.dense, layer.fused):

            def gradient(x: mx.array, multiply: Callable[..., mx.array] = multiply) -> mx.array:
                return mx.grad(lambda x: multiply(x).astype(mx.float32).sum())(x)

            census.trace(f"product with {spec}", multiply, x)
            census.trace(f"product with {spec}", partial(multiply, start=8, stop=24), x)
            census.trace(f"gradient of {spec}", gradient, x)
        census.trace(f"embedding in {spec}", lambda ids, table=table: table(ids).astype(dtype), ids)


def adapters(census: Census, dtype: mx.Dtype) -> None:
    """LoRA, LoHa, LoKr, each also as DoRA: beside a weight, and merged into it."""
    rank, side = 4, 64
    thin = {"down": (rank, side), "up": (side, rank)}
    loha = {"hada_w1_a": (side, rank), "hada_w1_b": (rank, side), "hada_w2_a": (side, rank), "hada_w2_b": (rank, side)}
    lokr = {"lokr_w1": (4, 4), "lokr_w2_a": (16, rank), "lokr_w2_b": (rank, 16)}
    x, weight = mx.zeros((2, 3, side), dtype), mx.zeros((side, side), dtype)
    for shapes in (thin, loha, lokr):
        for kind in DTYPES:
            for extra in ({}, {"magnitude": (side,)}):
                arrays = {name: mx.zeros(shape, kind) for name, shape in (shapes | extra).items()}
                layer = LoraLayer("layer", arrays, (("to_q", 0, side // 2), ("to_q", side // 2, side)), 0.5, ())
                ((_, delta),) = layer.deltas({"to_q": (side, side)}, 0.8)

                def merge(weight: mx.array, delta: Any = delta) -> mx.array:
                    own = weight.astype(mx.float32)
                    return (own + delta.weight_delta(own, 0, side)).astype(weight.dtype)

                census.trace(f"merging a {layer.form}", merge, weight)
                if extra:
                    census.trace(f"loading a {layer.form}", lambda w, d=delta: d.find_ratio(lambda *_: w), weight)
                delta.update(tree_map(lambda array: array.astype(dtype), delta.parameters()))
                census.trace(f"a {layer.form}", lambda x, d=delta: d(x, x[..., :56], x[..., :56], 8, side), x)


def formats(census: Census, dtype: mx.Dtype) -> None:
    """Weights as files have them, to arrays of a dtype."""
    rows, columns = 256, 256

    def read(weights: dict[str, Any], *traced: mx.array) -> Any:
        made = decode(weights | dict(zip(("layer.weight",), traced, strict=False)))
        return {name: array_of(cast(weight, dtype)) for name, weight in made.items()}

    for kind in DTYPES:
        census.trace("a cast", lambda weight: weight.astype(dtype), mx.zeros((rows, columns), kind))
    codes = mx.zeros((rows, columns), mx.uint8)
    for scale in (mx.ones(()), mx.ones((rows, 1)), mx.ones((rows // 128, columns // 128))):
        for name in ("F8_E4M3", "F8_E5M2"):
            census.trace("FP8", lambda w, s=scale, n=name: read({"layer.weight_scale": s}, _decoded(w, n)), codes)
        marked = {"layer.weight_scale": scale, "layer.comfy_quant": mark("int8_tensorwise")}
        census.trace("int8", partial(read, marked), mx.zeros((rows, columns), mx.int8))
        marked["layer.comfy_quant"] = mark("int8_tensorwise", 256)
        census.trace("int8, rotated", partial(read, marked), mx.zeros((rows, columns), mx.int8))
    tiles = {"layer.weight_scale": mx.zeros((rows, columns // 32), mx.uint8), "layer.comfy_quant": mark("mxfp8")}
    census.trace("MXFP8", lambda w: read(tiles, _decoded(w, "F8_E4M3")), codes)
    scales = {"layer.weight_scale": mx.ones((rows, columns // 8), mx.bfloat16), "layer.weight_scale_2": mx.ones(())}
    for name in ("nvfp4", "modelopt_nvfp4"):
        census.trace("NVFP4", partial(read, scales | {"layer.comfy_quant": mark(name)}), codes)
    for bits in AFFINE_BITS:
        packed = {f"layer.{name}": mx.zeros((rows, columns // 64), dtype) for name in ("scales", "biases")}
        words = mx.zeros((rows, columns * bits // 32), mx.uint32)
        census.trace("a packed autoencoder", lambda w, p=packed: dequantize_square({**p, "layer.weight": w}), words)


def gguf(census: Census, dtype: mx.Dtype) -> None:
    """Rows of GGUF's types as they are read; their layout is undone in NumPy."""
    from flux2_mlx.checkpoints.formats.gguf import _decode_tensor

    sizes = {0: 4 * 32, 1: 2 * 32, 30: 2 * 32, 2: 18, 3: 20, 8: 34}  # bytes of 32 values, by type

    for kind, size in sizes.items():

        def read(kind: int = kind, size: int = size) -> Any:
            raw = np.zeros((4, size * 2), np.uint8)
            made = _decode_tensor("layer.weight", (4, 64), kind, raw, None)
            return {name: tensor.load() if isinstance(tensor, LazyTensor) else tensor for name, tensor in made.items()}

        census.trace("GGUF", read)


# ---------------------------------------------------------------------------------------------------------- training


def training(census: Census, dtype: mx.Dtype) -> None:
    """A step of a run that uses everything; computed, since it looks at its loss. Not in float16, as the options."""
    if dtype == mx.float16:
        return
    params = FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=192, depth=1, depth_single=1)
    size = (32, 32)
    example = Example(Path("a.png"), "a fox", (Path("b.png"),), size, (size,))
    cache: Any = SimpleNamespace(
        length=8,
        dropped=0,
        latents=lambda *_: mx.zeros((1, 4, params.in_channels)),
        prompt_embeds=lambda _: mx.zeros((1, 8, params.txt_embed_dim), dtype),
    )
    for extra in ({"grad_checkpoint": False}, {"grad_checkpoint": True, "accumulate": 2}):
        options = TrainingOptions(
            data="data", output="out", dropout=0.5, ema=0.99, rank=2, batch_size=2, caption_dropout=0.5, **extra
        )

        def run(options: TrainingOptions = options) -> None:
            trainer = Trainer(hollow(FluxKlein(params), dtype), options, [example] * 2, cache, preserved=["a cat"])
            trainer.take_step()

        census.run("training", run)


STAGES = (text_encoder, language_model, steps, autoencoder, noise, packing, adapters, formats, gguf, training)


def take() -> Census:
    """The census of all stages in all dtypes."""
    census = Census()
    for dtype in DTYPES:
        for stage in STAGES:
            stage(census, dtype)
    return census


if __name__ == "__main__":
    found = sorted(take().places)
    ACCEPTED.write_text("".join(f"{operation}\n" for operation in found))
    print(f"{ACCEPTED}: {len(found)} operations")
