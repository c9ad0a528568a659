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

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_map_with_path
from safetensors import SafetensorError, safe_open

from ..adapters.keys import lora_arrays
from ..errors import CheckpointError, InputError
from ..models.flux2 import FluxKlein
from ..sampling.latents import image_ids, text_ids
from .adapter import add_adapters
from .dataset import Batches, Example, Size
from .latent_cache import Encoded, pictures_of, save_arrays
from .losses import draw_timesteps, flow_loss, learning_rate_at, noised_velocity
from .options import FREE, TrainingOptions
from .recompute import checkpoint_block, named_arrays

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
            model.block_runner = checkpoint_block
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
            self.rope(shape),
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

    @contextmanager
    def generating(self) -> Iterator[FluxKlein]:
        """The model as it generates: without dropout, with the moving average where there is one."""
        trained = self._parameters()
        self.model.eval()
        self.model.load_weights(list(self.learned().items()), strict=False)
        try:
            yield self.model
        finally:
            self.model.load_weights(list(trained.items()), strict=False)

    def learned(self) -> dict[str, mx.array]:
        """The arrays that are the result: the moving average where there is one."""
        return self.average or self._parameters()

    def save_lora(self, path: Path) -> None:
        """Write the LoRA, in the dtype that it was computed with.

        Raises:
            InputError: for a failure to write.
        """
        arrays, dtype = self.learned(), self.model.dtype
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
        named |= {f"optimizer/{name}": array for name, array in named_arrays(self.optimizer.state).items()}
        return named | {f"average/{name}": array for name, array in self.average.items()}

    def _parameters(self) -> dict[str, mx.array]:
        return named_arrays(self.model.trainable_parameters())

    def rope(self, shape: Sequence[Size]) -> tuple[mx.array, mx.array]:
        """Tables of text, image and references, by the (height, width) of each."""
        params = self.model.params
        grids = [image_ids(*size, reference=k - 1 if k else None) for k, size in enumerate(shape)]
        ids = mx.concatenate(grids, axis=1)
        return FluxKlein.compute_rope(text_ids(self.encoded.length), ids, params.axes_dims_rope, params.rope_theta)
