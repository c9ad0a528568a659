"""Training LoRAs: the computation of a step, and the state that steps change.

    options, data set -> LatentCache (latents and prompt embeddings on disk) -> Trainer -> steps -> a LoRA

Rectified flow (Liu et al. 2022, Lipman et al. 2022): an image x0 and noise n are mixed at a noise level t of 0..1, and
the transformer learns to predict from (1 - t) x0 + t n the velocity n - x0. The random numbers of a step (noise levels,
noise, dropout) and its images depend on the seed and the step's number alone. So a run resumed from a checkpoint, or
shared by processes, computes the same numbers as one that was never stopped, or ran alone.

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
from ..collectives import all_sum, sum_tree
from ..device import synchronize
from ..errors import CheckpointError, InputError
from ..models.flux2 import FluxKlein
from ..sampling.latents import image_ids, text_ids
from .adapter import add_adapters
from .dataset import Example, PassSampler, Size
from .latent_cache import LatentCache, save_arrays, sized_images
from .losses import draw_timesteps, flow_loss, learning_rate_at, predict_velocity
from .options import RESUMABLE, TrainingOptions
from .recompute import checkpoint_block, named_arrays

# ---------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class StepReport:
    """The figures of a step.

    Attributes:
        step: the steps done, this one included.
        loss: the mean over the step's images.
        learning_rate: the one of this step.
        norm: the norm of all gradients, before clipping.
        images: the images of the step, in all processes.
        preservation_loss: the mean squared change of the velocities for preserved captions; 0 without any.
    """

    step: int
    loss: float
    learning_rate: float
    norm: float
    images: int
    preservation_loss: float


class Trainer:
    """The state of a training run.

    Args:
        model: the transformer, its weights loaded; the LoRA is attached to it.
        cache: latents and prompt embeddings of all examples and preserved captions.
        preserved: captions for which the model should stay as it was: with them, it learns to predict for the pass's
            noised images the velocity that it predicts without the LoRA.
        group: the processes that share a step's passes, if there are several.

    Attributes:
        step: the steps done.
        adapters: the trained adapters, by the paths of their layers.
        average: the exponential moving average (EMA) of their parameters; empty without ``options.ema``.

    Raises:
        InputError: for a target that is in no layer's path, or passes that the processes cannot share evenly.
    """

    def __init__(
        self,
        model: FluxKlein,
        options: TrainingOptions,
        examples: Sequence[Example],
        cache: LatentCache,
        preserved: Sequence[str] = (),
        group: mx.distributed.Group | None = None,
    ):
        processes = 1 if group is None else group.size()
        if options.accumulate % processes:
            raise InputError(
                f"{processes} processes cannot share the {options.accumulate} passes of a step; accumulate must be a "
                f"multiple of {processes}"
            )
        self.model, self.options, self.examples, self.cache = model, options, examples, cache
        self.preserved, self.group = preserved, group
        self.batches = PassSampler(examples, options.batch_size, options.seed)
        self.adapters = add_adapters(model, options)
        if options.grad_checkpoint:
            model.block_runner = checkpoint_block
        # torch's AdamW corrects the bias of the first steps; MLX's does so on request.
        self.optimizer = optim.AdamW(options.learning_rate, weight_decay=options.weight_decay, bias_correction=True)
        self.optimizer.init(model.trainable_parameters())
        self.average = self._parameters() if options.ema else {}
        self.step = 0
        self._gradients = nn.value_and_grad(model, lambda weight, *inputs: weight * flow_loss(model, *inputs))

    def take_step(self) -> StepReport:
        """Take one step of the optimizer.

        Raises:
            FloatingPointError: for a loss or gradients that are not finite; the parameters stay as they were.
        """
        options, first = self.options, self.step * self.options.accumulate
        passes = {number: self.batches[number] for number in range(first, first + options.accumulate)}
        images = sum(map(len, passes.values()))
        rank, processes = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        loss, preservation_loss, gradients = mx.array(0.0), mx.array(0.0), None
        self.model.train()
        for number in list(passes)[rank::processes]:
            self._seed_dropout(number)
            inputs, share = self.inputs(number), len(passes[number]) / images
            pass_loss, pass_gradients = self._gradients(share, *inputs)
            loss = loss + pass_loss
            gradients = pass_gradients if gradients is None else tree_map(mx.add, gradients, pass_gradients)
            mx.eval(loss, gradients)
            if self.preserved:
                inputs = self._preservation_inputs(number, inputs)
                pass_loss, pass_gradients = self._gradients(share * options.preserve_weight, *inputs)
                preservation_loss = preservation_loss + pass_loss / options.preserve_weight
                gradients = tree_map(mx.add, gradients, pass_gradients)
                mx.eval(preservation_loss, gradients)
        if self.group is not None:
            loss, preservation_loss = all_sum(mx.stack([loss, preservation_loss]), self.group)
            gradients = sum_tree(gradients, self.group)
        gradients, norm = optim.clip_grad_norm(gradients, options.clip)
        mx.eval(loss, gradients, norm)
        loss_value, norm_value = float(np.array(loss)), float(np.array(norm))
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {loss_value:g} and the norm of its gradients {norm_value:g}; try a "
                "lower learning rate"
            )
        rate = learning_rate_at(self.step, options)
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.model, gradients)
        self.step += 1
        if options.ema:
            # A smaller decay early on, as in TensorFlow's ExponentialMovingAverage, or the start would outweigh it.
            decay = min(options.ema, (1 + self.step) / (10 + self.step))
            self.average = {
                name: decay * self.average[name] + (1 - decay) * array for name, array in self._parameters().items()
            }
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, self.average)
        synchronize()  # nothing that a GPU failed to compute is saved
        return StepReport(self.step, loss_value, rate, norm_value, images, float(np.array(preservation_loss)))

    def inputs(self, number: int) -> tuple[Any, ...]:
        """The arguments of flow_loss after the model in pass ``number``: always the same for the same number."""
        options = self.options
        examples = [self.examples[k] for k in self.batches[number]]
        rng = np.random.default_rng([options.seed, 1, number])
        shape, count = examples[0].shape, len(examples)
        latents = [[self.cache.latents(*sized) for sized in sized_images(example)] for example in examples]
        clean, *references = (mx.concatenate(list(column)) for column in zip(*latents, strict=True))
        timesteps = draw_timesteps(options.timesteps, rng, count, clean.shape[1])
        noise = rng.standard_normal(clean.shape, np.float32)
        is_dropped = rng.random(count) < options.caption_dropout
        captions = ["" if dropped else example.caption for dropped, example in zip(is_dropped, examples, strict=True)]
        txt = mx.concatenate([self.cache.prompt_embeds(caption) for caption in captions])
        return (
            clean,
            mx.array(noise),
            mx.array(timesteps.astype(np.float32)),
            mx.concatenate(references, axis=1) if references else None,
            txt,
            self.rope(shape),
        )

    def _preservation_inputs(self, number: int, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of a pass with preserved captions, and as target the model's velocities without the LoRA."""
        clean, noise, timesteps, references, _, rope = inputs
        rng = np.random.default_rng([self.options.seed, 3, number])
        captions = rng.choice(np.array(self.preserved, object), len(clean))
        txt = mx.concatenate([self.cache.prompt_embeds(caption) for caption in captions])
        inputs = clean, noise, timesteps, references, txt, rope
        for adapter in self.adapters.values():
            adapter.enabled = False
        target = predict_velocity(self.model, *inputs)
        mx.eval(target)
        for adapter in self.adapters.values():
            adapter.enabled = True
        return *inputs, target

    def _seed_dropout(self, number: int) -> None:
        """Give each adapter its dropout key of pass ``number``."""
        seed = int(np.random.default_rng([self.options.seed, 2, number]).integers(2**63))
        keys = mx.random.split(mx.random.key(seed), len(self.adapters))
        for key, adapter in zip(keys, self.adapters.values(), strict=True):
            adapter.set_dropout_key(key)

    @contextmanager
    def generating(self) -> Iterator[FluxKlein]:
        """The model as it generates: without dropout, with the moving average where there is one."""
        trained = self._parameters()
        self.model.eval()
        self.model.load_weights(list(self.ema_or_current().items()), strict=False)
        try:
            yield self.model
        finally:
            self.model.load_weights(list(trained.items()), strict=False)

    def ema_or_current(self) -> dict[str, mx.array]:
        """The parameters to save and generate with: the moving average with ``options.ema``, else the current ones."""
        return self.average or self._parameters()

    def save_lora(self, path: Path) -> None:
        """Write the LoRA in the dtype of the model's activations.

        Raises:
            InputError: for a failure to write.
        """
        arrays, dtype = self.ema_or_current(), self.model.dtype
        layers = {layer: (arrays[f"{layer}.deltas.0.down"], arrays[f"{layer}.deltas.0.up"]) for layer in self.adapters}
        alpha = self.options.rank if self.options.alpha is None else self.options.alpha
        written, metadata = lora_arrays(layers, alpha, self.options.names)
        save_arrays(path, {name: array.astype(dtype) for name, array in written.items()}, metadata)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, path: Path, fingerprint: str) -> None:
        """Write a checkpoint of the run: parameters, optimizer, moving average, step, options.

        Args:
            fingerprint: the data set's; see dataset.fingerprint.

        Raises:
            InputError: for a failure to write.
        """
        note = {"step": self.step, "options": self.options.metadata(), "data": fingerprint}
        save_arrays(path, self._state(), {"flux2_mlx_training": json.dumps(note)})

    def load(self, path: Path, fingerprint: str) -> None:
        """Resume from a checkpoint that save wrote.

        Raises:
            CheckpointError: for another kind of file, or a damaged one.
            InputError: for another data set, or other options than RESUMABLE ones.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                note = json.loads((file.metadata() or {})["flux2_mlx_training"])
            arrays = cast("dict[str, mx.array]", mx.load(str(path)))
            step, options, data = int(note["step"]), dict(note["options"]), note["data"]
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path} is no checkpoint of a training run, or is damaged ({error})") from None
        now = self.options.metadata()
        changed = [name for name in now if name not in RESUMABLE and options.get(name) != now[name]]
        if changed:
            listed = ", ".join(f"{name} ({options.get(name)!r}, now {now[name]!r})" for name in changed)
            raise InputError(f"{path} was trained with other options: {listed}; give another output to begin anew")
        if data != fingerprint:
            raise InputError(f"{path} was trained on other images or captions than the data has now")
        expected = self._state()
        if {name: (array.shape, array.dtype) for name, array in arrays.items()} != {
            name: (array.shape, array.dtype) for name, array in expected.items()
        }:
            raise CheckpointError(f"{path} has arrays of another LoRA")
        parts: dict[str, dict[str, mx.array]] = {"parameters": {}, "optimizer": {}, "average": {}}
        for name, array in arrays.items():
            part, key = name.split("/")
            parts[part][key] = array
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
        position_ids = [image_ids(*size, reference=k - 1 if k else None) for k, size in enumerate(shape)]
        ids = mx.concatenate(position_ids, axis=1)
        text = text_ids(self.cache.length)[:, self.cache.dropped :]
        return FluxKlein.compute_rope(text, ids, params.axes_dims_rope, params.rope_theta)
