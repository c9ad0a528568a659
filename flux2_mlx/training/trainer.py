"""Training LoRAs: what a step computes, and the state that steps change.

options, data set -> Encoded (latents and prompt embeddings on disk) -> Trainer -> steps -> a LoRA

Rectified flow (Liu et al. 2022, Lipman et al. 2022): a picture x0 and noise n are mixed at a level t of 0..1, and the
transformer is to say from (1 - t) x0 + t n which way leads from picture to noise, n - x0. What a step draws at random
(levels, noise, dropout) and which pictures it sees depends on the seed and its number alone, so that a run that goes on
from a checkpoint, or is shared by processes, has the numbers of one that was never stopped, or ran alone.

References: Hu et al. 2021 (LoRA), Esser et al. 2024 (logit-normal levels), Loshchilov and Hutter 2019 (AdamW), and
ai-toolkit's differential output preservation (https://github.com/ostris/ai-toolkit).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from PIL import Image
from safetensors import SafetensorError, safe_open

from .._version import __version__
from ..adapters.lora import LINEAR, NAMES, linear_shape, lora_arrays
from ..checkpoints.checkpoint import few
from ..disk_cache import digest_of
from ..imaging.files import open_image, to_pil, to_unit, written_beside
from ..models.config import CheckpointError, InputError
from ..models.flux2 import FluxKlein
from ..pipeline import Flux2Pipeline
from ..runtime.activations import default_dtype, encoder_bytes, stage_dtype, within
from ..sampling.latents import PIXELS_PER_TOKEN, image_ids, initial_noise, pack_latents, text_ids, unpack_latents
from ..sampling.samplers import empirical_mu, euler_step, flux2_sigmas, guide, shift_sigmas
from .dataset import Batches, Example, Size, fitted

TIMESTEPS = ("logit-normal", "uniform", "shifted", "four")
SHIFT_STEPS = 50  # of the base models' schedule, whose shift "shifted" takes
FEW_STEPS = 4  # of the distilled models' schedule, whose levels "four" takes
DECAYS = ("cosine", "constant")
DTYPES = ("bfloat16", "float32")  # float16 has not the range for gradients
ENCODED_AT_ONCE = 16  # captions
BLOCKS = re.compile(r"(single_)?transformer_blocks\.")

# ---------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class TrainingOptions:
    """What decides a training run; the command's options have these names.

    Attributes:
        data: folder of the data set; see dataset.
        output: folder of the run.
        model, revision, transformer, text_encoder, vae, tokenizer, distilled, kv_cache, quantize,
            quantize_text_encoder, group_size, dtype: as Flux2Pipeline.from_pretrained takes them.
        resolution: pixels; the pictures have at most its square.
        trigger: a word that stands before every caption that has it not.
        steps: of the optimizer.
        batch_size: pictures in a pass, where so many have one size.
        accumulate: passes in a step, which processes share.
        rank, alpha: of the LoRA; its change is scaled by alpha / rank, and alpha is the rank unless given.
        targets: parts of the paths of the layers that it changes; unless given, all layers of the blocks.
        dropout: share of a layer's inputs that its LoRA does not see.
        learning_rate, weight_decay: of AdamW.
        warmup: steps in which the learning rate rises to its full height.
        decay: what it does then: "cosine" falls towards 0 at the last step, "constant" stays.
        clip: the largest norm of all gradients together.
        timesteps: how noise levels are drawn, one of TIMESTEPS.
        caption_dropout: share of the captions that are left out, for guidance to have something to lead away from.
        preserve: file of captions, one a line, for which the model is to stay as it was.
        preserve_weight: what a change of these counts, beside what is learned.
        ema: 0, or the decay of a moving average of the weights, which is then what is written and drawn with.
        grad_checkpoint: compute blocks again in the backward pass, which saves memory and costs a third of the time.
        seed: of everything that is drawn at random.
        names: of the written file's layers, one of adapters.NAMES.
        save_every: steps between checkpoints.
        validation_prompt, validation_image: what is drawn to look at, and the pictures that it is edited from.
        validate_every: steps between such pictures.
        validation_steps: that they are drawn in; unless given, 4 for distilled models and 25 for base models.
    """

    data: str
    output: str
    model: str = "klein-base-4b"
    revision: str | None = None
    transformer: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    distilled: bool | None = None
    kv_cache: bool | None = None
    quantize: int | str | None = None
    quantize_text_encoder: int | str | None = None
    group_size: int | None = None
    dtype: str | None = None
    resolution: int = 512
    trigger: str = ""
    steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 20
    decay: str = "cosine"
    clip: float = 1.0
    timesteps: str = "logit-normal"
    caption_dropout: float = 0.0
    preserve: str | None = None
    preserve_weight: float = 5.0
    ema: float = 0.0
    grad_checkpoint: bool = True
    seed: int = 0
    names: str = "diffusers"
    save_every: int = 250
    validation_prompt: str | None = None
    validation_image: tuple[str, ...] = ()
    validate_every: int = 250
    validation_steps: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)
            self._check(field.name, str(field.type), getattr(self, field.name))
        for name, allowed in (("timesteps", TIMESTEPS), ("decay", DECAYS), ("names", NAMES), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.validation_image and self.validation_prompt is None:
            raise InputError("validation_image belongs to validation_prompt, and none is given")

    @staticmethod
    def _check(name: str, kind: str, value: Any) -> None:
        """Refuse a value of another type than its field's, or out of its bounds."""
        if value is None and "None" in kind:
            return
        kinds = kind.removesuffix(" | None").split(" | ")
        fits = any(type(value) in _KINDS[own][0] for own in kinds)
        if isinstance(value, tuple):
            fits = fits and all(isinstance(part, str) for part in value)
        bounds = ""
        if name in _BOUNDS:
            low, high = _BOUNDS[name]
            fits, bounds = fits and low <= value <= high, f" from {low:g} to {high:g}"
        if not fits:
            what = " or ".join(_KINDS[own][1] for own in kinds)
            raise InputError(f"{name} must be {what}{bounds}, got {value!r}")

    def metadata(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# Types of values by the fields' types, and what messages call them.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "tuple[str, ...]": ((tuple,), "a list of strings"),
}
_BOUNDS: dict[str, tuple[float, float]] = {
    "resolution": (64, 2048),
    "steps": (1, 10**7),
    "batch_size": (1, 1024),
    "accumulate": (1, 1024),
    "rank": (1, 1024),
    "alpha": (1e-6, 1e6),
    "dropout": (0, 0.99),
    "learning_rate": (0, 10),
    "weight_decay": (0, 10),
    "warmup": (0, 10**7),
    "clip": (1e-9, 1e9),
    "caption_dropout": (0, 1),
    "preserve_weight": (1e-6, 1e6),
    "ema": (0, 0.99999),
    "seed": (0, 2**63 - 1),
    "save_every": (1, 10**7),
    "validate_every": (1, 10**7),
    "validation_steps": (1, 1000),
}
# What a run that goes on may have otherwise than it began.
FREE = {"output", "steps", "names", "save_every", "grad_checkpoint"}
FREE |= {"validation_prompt", "validation_image", "validate_every", "validation_steps"}

# ---------------------------------------------------------------------------------------------------- mathematics


def draw_timesteps(kind: str, rng: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """Noise levels within 0..1 (count,) by one of TIMESTEPS: the logistic function of standard normal numbers (Esser et
    al. 2024), uniform ones, those shifted as the base models' schedule shifts its levels for so many image tokens, or
    the four that distilled models draw such a picture with, and know little besides.
    """
    if kind == "logit-normal":
        return 1 / (1 + np.exp(-rng.standard_normal(count)))
    if kind == "four":
        return rng.choice(flux2_sigmas(FEW_STEPS, tokens)[:-1], count)
    levels = rng.random(count)
    if kind == "shifted":
        return np.array(shift_sigmas(levels.tolist(), empirical_mu(tokens, SHIFT_STEPS)))
    return levels


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Of the step after ``step`` steps: it rises linearly for ``warmup`` steps, then falls along half a cosine."""
    full, warmup = options.learning_rate, min(options.warmup, options.steps)
    if step < warmup:
        return full * (step + 1) / warmup
    if options.decay == "constant":
        return full
    return full * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup))) / 2


def flow_loss(
    model: FluxKlein,
    clean: mx.array,
    noise: mx.array,
    timesteps: mx.array,
    references: mx.array | None,
    txt: mx.array,
    rope: tuple[mx.array, mx.array],
    target: mx.array | None = None,
) -> mx.array:
    """The mean squared error of the velocity that a model says of a noised picture: float32.

    Args:
        clean: (B, S, 128) tokens of the pictures.
        noise: likewise.
        timesteps: (B,) noise levels, 0..1.
        references: (B, R, 128) tokens of pictures that are seen as they are.
        txt: (B, L, D) prompt embeddings.
        rope: of text, picture and references; see FluxKlein.compute_rope.
        target: the velocity (B, S, 128) that is right; unless given, noise - clean.
    """
    velocity = noised_velocity(model, clean, noise, timesteps, references, txt, rope)
    return mx.square(velocity - (noise - clean if target is None else target)).mean()


def noised_velocity(
    model: FluxKlein,
    clean: mx.array,
    noise: mx.array,
    timesteps: mx.array,
    references: mx.array | None,
    txt: mx.array,
    rope: tuple[mx.array, mx.array],
) -> mx.array:
    """What a model says of a noised picture: (B, S, 128) in float32; arguments as flow_loss takes them."""
    t = timesteps[:, None, None]
    x = (1 - t) * clean + t * noise
    img = x if references is None else mx.concatenate([x, references], axis=1)
    return model.forward_with_rope(img, txt, timesteps, *rope)[:, : clean.shape[1]].astype(mx.float32)


class Adapter(nn.Module):
    """A LoRA that is trained: down (R, inputs) and up (outputs, R), in float32, computed with in the dtype of x.

    down is drawn as torch draws a linear layer's weight, uniform within 1 / sqrt(inputs); up is zero, so that nothing
    is changed to begin with.
    """

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__()
        bound = inputs**-0.5
        self.down = mx.random.uniform(-bound, bound, (rank, inputs), key=key)
        self.up = mx.zeros((outputs, rank))
        self._scale, self._dropout, self._key = scale, dropout, key
        self._is_off = False

    def __call__(self, x: mx.array, base: mx.array, out: mx.array, start: int, stop: int | None) -> mx.array:
        """As adapters.LowRank."""
        if self._is_off:
            return out
        if self.training and self._dropout:
            # By a key of its own: blocks that are computed again must leave out the same.
            kept = mx.random.bernoulli(1 - self._dropout, x.shape, key=self._key)
            x = mx.where(kept, x / (1 - self._dropout), mx.zeros_like(x))
        thin = (x @ self.down.astype(x.dtype).T) * self._scale
        return mx.addmm(out, thin, self.up[start:stop].astype(x.dtype).T)


def targeted(model: FluxKlein, targets: Sequence[str]) -> dict[str, Any]:
    """The linear layers whose path has one of the targets as a part, as "to_q", "attn" or "transformer_blocks.0" are;
    without targets all of the blocks'.

    Raises:
        InputError: for a target that no layer has, with one that is near.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LINEAR)}
    found: dict[str, Any] = {}
    for target in targets:
        own = {path: layer for path, layer in layers.items() if f".{target}." in f".{path}."}
        if not own:
            parts = {part for path in layers for part in path.split(".") if not part.isdecimal()}
            near = difflib.get_close_matches(target, sorted(parts), n=1) or sorted(parts)
            raise InputError(f"no layer has {target!r} in its path; there are {few(near, 8)}")
        found |= own
    wanted = found if targets else {path: layer for path, layer in layers.items() if BLOCKS.match(path)}
    return {path: layer for path, layer in layers.items() if path in wanted}


def adapter_size(model: FluxKlein, options: TrainingOptions) -> int:
    """Numbers in the LoRA that add_adapters makes."""
    return options.rank * sum(sum(linear_shape(layer)) for layer in targeted(model, options.targets).values())


def add_adapters(model: FluxKlein, options: TrainingOptions) -> dict[str, Adapter]:
    """Let the targeted layers of a model learn a LoRA, and nothing else of it; by their paths."""
    model.freeze()
    layers = targeted(model, options.targets)
    keys = mx.random.split(mx.random.key(options.seed), len(layers))
    alpha = options.rank if options.alpha is None else options.alpha
    adapters = {}
    for key, (path, layer) in zip(keys, layers.items(), strict=True):
        adapters[path] = Adapter(*linear_shape(layer), options.rank, alpha / options.rank, options.dropout, key)
        layer.deltas = [adapters[path]]
    return adapters


def run_again(block: nn.Module, *arguments: Any, method: str = "__call__", may_end: bool = False) -> Any:
    """As models.blocks.run_block, but the backward pass computes the block again, instead of keeping what is inside.

    One block after another: its computing again waits for the gradient of its outputs, and the block before it for the
    gradients of its weights. MLX's own checkpointing leaves the order open, and then holds the insides of several.
    """
    weights, inputs = _named(block.trainable_parameters()), _named(arguments)
    count = len(weights)

    def forward(*arrays: mx.array) -> list[mx.array]:
        block.update(tree_unflatten(list(zip(weights, arrays[:count], strict=True))) if weights else {})
        given = dict(zip(inputs, arrays[count:], strict=True))
        out = getattr(block, method)(*tree_map_with_path(lambda name, _: given.get(name), arguments))
        return list(out) if isinstance(out, tuple) else [out]

    checkpointed = mx.custom_function(forward)

    @checkpointed.vjp
    def backward(arrays: Any, cotangents: Any, _: Any) -> list[mx.array]:
        _, gradients = mx.vjp(forward, mx.depends(list(arrays), list(cotangents)), list(cotangents))
        own, passed_on = gradients[:count], gradients[count:]
        return [*own, *mx.depends(passed_on, own)] if own else gradients

    out: Any = checkpointed(*weights.values(), *inputs.values())
    return tuple(out) if len(out) > 1 else out[0]


def _named(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their names in it."""
    return {name: array for name, array in cast("list[tuple[str, Any]]", tree_flatten(tree)) if array is not None}


# ---------------------------------------------------------------------------------------------------- what is cached


class Encoded:
    """Latents and prompt embeddings of what is trained on, in files, so that neither encoder stays in memory.

    Args:
        folder: of the files, each named by all that it depends on.
    """

    def __init__(self, pipe: Flux2Pipeline, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.length = pipe.tokenizer.default_length
        self._files: dict[Any, Path] = {}

    def prompt(self, text: str) -> mx.array:
        """Embeddings (1, L, D)."""
        return _read(self._prompt_file(text))

    def picture(self, path: Path, size: Size) -> mx.array:
        """Clean tokens (1, S, 128) of a picture at a size, float32."""
        return _read(self._picture_file(path, size)).astype(mx.float32)

    def encode(self, prompts: Iterable[str], pictures: Iterable[tuple[Path, Size]]) -> Iterator[int]:
        """Encode what is not there yet; then unload what it took.

        Yields:
            how many more are done.

        Raises:
            FloatingPointError: where an encoder's output is not finite.
        """
        texts, sized = list(dict.fromkeys(prompts)), list(dict.fromkeys(pictures))
        new = [text for text in texts if not _is_whole(self._prompt_file(text))]
        yield len(texts) - len(new)
        for k in range(0, len(new), ENCODED_AT_ONCE):
            part = new[k : k + ENCODED_AT_ONCE]
            for text, embeds in zip(part, self.pipe.encode(part), strict=True):
                _write(self._prompt_file(text), embeds)
            yield len(part)
        self.pipe.encode(new[-1:])  # which keeps the latest alone
        self.pipe.unload("text_encoder")
        autoencoder, config = self.pipe.autoencoder, self.pipe.checkpoint.autoencoder
        for path, size in sized:
            file = self._picture_file(path, size)
            if not _is_whole(file):
                working = encoder_bytes(config, *size, stage_dtype("autoencoder", self.pipe.dtype))
                with within(self.pipe.memory_limit, working):
                    latents = autoencoder.encoder(fitted(open_image(path), size))
                    _write(file, autoencoder.bn.normalize(pack_latents(latents)))
            yield 1
        self.pipe.unload("autoencoder")

    def _prompt_file(self, text: str) -> Path:
        if text not in self._files:
            checkpoint = self.pipe.checkpoint
            source, tokenizer = checkpoint.sources["text_encoder"], checkpoint.tokenizer / "tokenizer.json"
            how = self.pipe.quantize.get("text_encoder")
            key = self._made_by(), source.config, how, self.length, text
            self._files[text] = self.folder / f"{digest_of([*source.files, tokenizer], key)}.safetensors"
        return self._files[text]

    def _picture_file(self, path: Path, size: Size) -> Path:
        if (path, size) not in self._files:
            source = self.pipe.checkpoint.sources["vae"]
            files = [*source.files, *([source.decoder] if source.decoder else [])]
            key = self._made_by(), source.config, size, hashlib.sha256(path.read_bytes()).hexdigest()
            self._files[path, size] = self.folder / f"{digest_of(files, key)}.safetensors"
        return self._files[path, size]

    def _made_by(self) -> tuple[str, ...]:
        return __version__, str(mx.default_device()), str(self.pipe.dtype)


def pictures_of(example: Example) -> list[tuple[Path, Size]]:
    """An example's picture and references, each with the size that it is seen at."""
    return list(zip((example.picture, *example.references), example.shape, strict=True))


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy"):  # MLX reads past the end of a file that was cut short
            return True
    except (OSError, SafetensorError):
        return False


def _write(path: Path, array: mx.array) -> None:
    if not mx.isfinite(array).all().item():
        raise FloatingPointError("an encoder's output is not finite; check the checkpoint's files")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path, {"array": array}, {})


def _read(path: Path) -> mx.array:
    return cast("dict[str, mx.array]", mx.load(str(path)))["array"]


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file over the one before it, never half of one.

    Raises:
        InputError: for a full disk or another failure to write.
    """
    with written_beside(path) as temporary:
        mx.save_safetensors(str(temporary), dict(arrays), dict(metadata))
        temporary.replace(path)


# ---------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Progress:
    """A finished step.

    Attributes:
        step: how many are done.
        loss: its mean over the step's pictures.
        learning_rate: that it was taken with.
        norm: of its gradients, before they were clipped.
        pictures: that it has seen, in all processes.
        change: the mean squared change of the velocities for captions that are preserved, 0 where there are none.
    """

    step: int
    loss: float
    learning_rate: float
    norm: float
    pictures: int
    change: float


class Trainer:
    """The state of a training run.

    Args:
        model: the transformer, its weights loaded; it learns a LoRA in place.
        encoded: has all of the examples, and the captions to preserve.
        preserved: captions for which the model is to stay as it was: of each pass's noised pictures, it is to say with
            them what it says without the LoRA.
        group: the processes that share a step's passes, if there are several.

    Attributes:
        step: how many are done.
        adapters: what is trained, by the paths of the layers.
        average: the moving average of their arrays, if there is one.

    Raises:
        InputError: for targets that no layer has, or passes that the processes cannot share evenly.
    """

    def __init__(
        self,
        model: FluxKlein,
        options: TrainingOptions,
        examples: Sequence[Example],
        encoded: Encoded,
        preserved: Sequence[str] = (),
        group: mx.distributed.Group | None = None,
    ):
        processes = 1 if group is None else group.size()
        if options.accumulate % processes:
            raise InputError(
                f"{processes} processes cannot share the {options.accumulate} passes of a step; accumulate must be a "
                f"multiple of {processes}"
            )
        self.model, self.options, self.examples, self.encoded = model, options, examples, encoded
        self.preserved, self.group = preserved, group
        self.batches = Batches(examples, options.batch_size, options.seed)
        self.adapters = add_adapters(model, options)
        if options.grad_checkpoint:
            model._run = run_again
        # torch's AdamW corrects the bias of the first steps; MLX's does so where it is asked to.
        self.optimizer = optim.AdamW(options.learning_rate, weight_decay=options.weight_decay, bias_correction=True)
        self.optimizer.init(model.trainable_parameters())
        self.average = self._parameters() if options.ema else {}
        self.step = 0
        self._gradients = nn.value_and_grad(model, lambda share, *given: share * flow_loss(model, *given))

    def take_step(self) -> Progress:
        """One step of the optimizer.

        Raises:
            FloatingPointError: where loss or gradients are not finite; the weights stay as they were.
        """
        options, first = self.options, self.step * self.options.accumulate
        passes = {number: self.batches[number] for number in range(first, first + options.accumulate)}
        pictures = sum(map(len, passes.values()))
        rank, processes = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        loss, change, gradients = mx.array(0.0), mx.array(0.0), None
        self.model.train()
        for number in list(passes)[rank::processes]:
            self._draw_dropout(number)
            given, share = self.inputs(number), len(passes[number]) / pictures
            own, found = self._gradients(share, *given)
            loss = loss + own
            gradients = found if gradients is None else tree_map(mx.add, gradients, found)
            mx.eval(loss, gradients)
            if self.preserved:
                own, found = self._gradients(share * options.preserve_weight, *self._preserving(number, given))
                change = change + own / options.preserve_weight
                gradients = tree_map(mx.add, gradients, found)
                mx.eval(change, gradients)
        if self.group is not None:
            loss, change = mx.distributed.all_sum(mx.stack([loss, change]), group=self.group)
            gradients = tree_map(lambda array: array * processes, nn.average_gradients(gradients, self.group))
        gradients, norm = optim.clip_grad_norm(gradients, options.clip)
        mx.eval(loss, gradients, norm)
        told, size = float(np.array(loss)), float(np.array(norm))
        if not (math.isfinite(told) and math.isfinite(size)):
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {told:g} and the norm of its gradients {size:g}; try a lower "
                "learning rate"
            )
        rate = learning_rate_at(self.step, options)
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.model, gradients)
        self.step += 1
        if options.ema:
            # Early on the average of few: TensorFlow's ExponentialMovingAverage does so too.
            decay = min(options.ema, (1 + self.step) / (10 + self.step))
            self.average = {
                name: decay * self.average[name] + (1 - decay) * array for name, array in self._parameters().items()
            }
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, self.average)
        return Progress(self.step, told, rate, size, pictures, float(np.array(change)))

    def inputs(self, number: int) -> tuple[Any, ...]:
        """What pass ``number`` is given, as flow_loss takes it after the model; the same whenever it is asked for."""
        options = self.options
        examples = [self.examples[k] for k in self.batches[number]]
        rng = np.random.default_rng([options.seed, 1, number])
        shape, count = examples[0].shape, len(examples)
        pictures = [[self.encoded.picture(*sized) for sized in pictures_of(example)] for example in examples]
        clean, *references = (mx.concatenate(list(column)) for column in zip(*pictures, strict=True))
        timesteps = draw_timesteps(options.timesteps, rng, count, clean.shape[1])
        noise = rng.standard_normal(clean.shape, np.float32)
        is_dropped = rng.random(count) < options.caption_dropout
        captions = ["" if dropped else example.caption for dropped, example in zip(is_dropped, examples, strict=True)]
        txt = mx.concatenate([self.encoded.prompt(caption) for caption in captions])
        return (
            clean,
            mx.array(noise),
            mx.array(timesteps.astype(np.float32)),
            mx.concatenate(references, axis=1) if references else None,
            txt,
            self._rope(shape),
        )

    def _preserving(self, number: int, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same pass with captions that are preserved, and the velocities of the model without the LoRA."""
        clean, noise, timesteps, references, _, rope = given
        rng = np.random.default_rng([self.options.seed, 3, number])
        captions = rng.choice(np.array(self.preserved, object), len(clean))
        txt = mx.concatenate([self.encoded.prompt(caption) for caption in captions])
        given = clean, noise, timesteps, references, txt, rope
        for adapter in self.adapters.values():
            adapter._is_off = True
        target = noised_velocity(self.model, *given)
        mx.eval(target)
        for adapter in self.adapters.values():
            adapter._is_off = False
        return *given, target

    def _draw_dropout(self, number: int) -> None:
        """Give each adapter the key of what it leaves out in pass ``number``."""
        seed = int(np.random.default_rng([self.options.seed, 2, number]).integers(2**63))
        keys = mx.random.split(mx.random.key(seed), len(self.adapters))
        for key, adapter in zip(keys, self.adapters.values(), strict=True):
            adapter._key = key

    def draw(
        self, prompt: str, references: Sequence[tuple[Path, Size]], size: Size, steps: int, guidance: float
    ) -> Image.Image:
        """Draw a picture with what has been learned, of encoded prompt and references, by the official schedule.

        Args:
            guidance: 1 draws without.
        """
        pipe, (height, width) = self.encoded.pipe, size
        seen = [self.encoded.picture(*reference) for reference in references]
        txt, away = self.encoded.prompt(prompt), self.encoded.prompt("")
        rope = self._rope((size, *(shape for _, shape in references)))
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)

        def velocity(x: mx.array, txt: mx.array, sigma: float) -> mx.array:
            v = self.model.forward_with_rope(mx.concatenate([x, *seen], axis=1), txt, mx.array([sigma]), *rope)
            return v[:, :tokens].astype(mx.float32)

        trained = self._parameters()
        self.model.eval()
        self.model.load_weights(list(self.learned().items()), strict=False)
        try:
            x = initial_noise(self.options.seed, height, width, self.model.params.in_channels)
            for sigma, sigma_next in pairwise(flux2_sigmas(steps, tokens)):
                v = velocity(x, txt, sigma)
                if guidance > 1:
                    mx.eval(v)  # or intermediates of both passes would be in memory
                    v = guide(v, velocity(x, away, sigma), guidance)
                x = euler_step(x, v, sigma, sigma_next)
                mx.eval(x)
        finally:
            self.model.load_weights(list(trained.items()), strict=False)
        latents = unpack_latents(pipe.autoencoder.bn.denormalize(x), height, width)
        picture = to_pil(np.array(to_unit(pipe.autoencoder.decoder(latents))[0]))
        pipe.unload("autoencoder")
        return picture

    def learned(self) -> dict[str, mx.array]:
        """The arrays that are the result: the moving average where there is one."""
        return self.average or self._parameters()

    def save_lora(self, path: Path) -> None:
        """Write the LoRA, in the dtype that it was computed with.

        Raises:
            InputError: for a failure to write.
        """
        arrays, dtype = self.learned(), self.model._dtype
        layers = {layer: (arrays[f"{layer}.deltas.0.down"], arrays[f"{layer}.deltas.0.up"]) for layer in self.adapters}
        alpha = self.options.rank if self.options.alpha is None else self.options.alpha
        written, metadata = lora_arrays(layers, alpha, self.options.names)
        save_arrays(path, {name: array.astype(dtype) for name, array in written.items()}, metadata)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, path: Path, fingerprint: str) -> None:
        """Write all that going on takes.

        Args:
            fingerprint: of the data set; see dataset.

        Raises:
            InputError: for a failure to write.
        """
        note = {"step": self.step, "options": self.options.metadata(), "data": fingerprint}
        save_arrays(path, self._state(), {"flux2_mlx_training": json.dumps(note)})

    def load(self, path: Path, fingerprint: str) -> None:
        """Go on from what save wrote.

        Raises:
            CheckpointError: for a file that is none, or damaged.
            InputError: for another data set, or options that would change the numbers.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                note = json.loads((file.metadata() or {})["flux2_mlx_training"])
            arrays = cast("dict[str, mx.array]", mx.load(str(path)))
            step, options, data = int(note["step"]), note["options"], note["data"]
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is no checkpoint of a training run, or is damaged ({error})") from None
        now = self.options.metadata()
        changed = [name for name in now if name not in FREE and options.get(name) != now[name]]
        if changed:
            told = ", ".join(f"{name} ({options.get(name)!r}, now {now[name]!r})" for name in changed)
            raise InputError(f"{path} was trained with other options: {told}; give another output to begin anew")
        if data != fingerprint:
            raise InputError(f"{path} was trained on other pictures or captions than {self.options.data} has now")
        expected = self._state()
        if {name: (array.shape, array.dtype) for name, array in arrays.items()} != {
            name: (array.shape, array.dtype) for name, array in expected.items()
        }:
            raise CheckpointError(f"{path} has arrays of another LoRA")
        parts: dict[str, dict[str, mx.array]] = {"parameters": {}, "optimizer": {}, "average": {}}
        for name, array in arrays.items():
            part, own = name.split("/")
            parts[part][own] = array
        self.model.load_weights(list(parts["parameters"].items()), strict=False)
        self.optimizer.state = tree_map_with_path(lambda name, _: parts["optimizer"][name], self.optimizer.state)
        self.average, self.step = parts["average"], step
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, self.average)

    def _state(self) -> dict[str, mx.array]:
        named = {f"parameters/{name}": array for name, array in self._parameters().items()}
        named |= {f"optimizer/{name}": array for name, array in _named(self.optimizer.state).items()}
        return named | {f"average/{name}": array for name, array in self.average.items()}

    def _parameters(self) -> dict[str, mx.array]:
        return _named(self.model.trainable_parameters())

    def _rope(self, shape: Sequence[Size]) -> tuple[mx.array, mx.array]:
        params = self.model.params
        grids = [image_ids(*size, reference=k - 1 if k else None) for k, size in enumerate(shape)]
        ids = mx.concatenate(grids, axis=1)
        return FluxKlein.compute_rope(text_ids(self.encoded.length), ids, params.axes_dims_rope, params.rope_theta)


def training_dtype(dtype: str | None) -> str:
    """The dtype to train in where none is given: what the machine suits, but not float16."""
    if dtype is not None:
        return dtype
    return "float32" if default_dtype() == mx.float32 else "bfloat16"
