"""The options of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import mlx.core as mx

from ..adapters.keys import NAMES
from ..device import default_dtype
from ..errors import InputError

TIMESTEPS = ("logit-normal", "uniform", "shifted", "four")
DECAYS = ("cosine", "constant")
DTYPES = ("bfloat16", "float32")  # float16 has not the range for gradients


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


# Options that a resumed run may change.
RESUMABLE = {"output", "steps", "names", "save_every", "grad_checkpoint"}
RESUMABLE |= {"validation_prompt", "validation_image", "validate_every", "validation_steps"}


def training_dtype(dtype: str | None) -> str:
    """The dtype to train in where none is given: what the machine suits, but not float16."""
    if dtype is not None:
        return dtype
    return "float32" if default_dtype() == mx.float32 else "bfloat16"
