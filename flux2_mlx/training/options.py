"""The options of a training run."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..adapters.keys import NAMES
from ..device import default_dtype
from ..errors import InputError
from ..fields import changed, option
from ..options import MODEL, CheckpointOptions

TIMESTEPS = ("logit-normal", "uniform", "shifted", "four")
DECAYS = ("cosine", "constant")
DTYPES = ("bfloat16", "float32")  # float16 has not the range for gradients
DATA, ADAPTER, OPTIMIZATION = "data and output", "LoRA", "optimization"
VALIDATION, RUN = "validation", "memory and speed"


@dataclass(frozen=True)
class TrainingOptions(CheckpointOptions):
    """What decides a training run; the command's options have these names."""

    data: str = option(
        help="folder of pictures and captions", group=DATA, metavar="FOLDER", is_path=True,
        also=("--dataset", "--train-data-dir", "--instance-data-dir"),
    )  # fmt: skip
    output: str = option(
        help="folder of the run, which must not have one", group=DATA, metavar="FOLDER", is_path=True,
        also=("-o", "--output-dir"),
    )  # fmt: skip
    model: str = changed(
        CheckpointOptions, "model", "klein-base-4b", help="a base model: a released one, a folder, a file, a Hub id or "
        "owner/name/file",
    )  # fmt: skip
    dtype: str | None = changed(
        CheckpointOptions, "dtype", None, choices=DTYPES, shown="bfloat16; float32 on a CPU", group=MODEL
    )
    resolution: int = option(512, "pixels; pictures have at most its square", group=DATA, ge=64, le=2048)
    trigger: str = option("", "a word to stand before every caption that has it not", group=DATA, metavar="WORD")
    caption_dropout: float = option(
        0.0,
        "share of the captions that are left out, so that CFG has something to steer away from",
        group=DATA,
        ge=0,
        le=1,
    )
    preserve: str | None = option(
        None, "captions, one a line, for which the model is to stay as it was; more than twice the time", group=DATA,
        metavar="FILE", is_path=True,
    )  # fmt: skip
    preserve_weight: float = option(
        5.0, "what a change of these counts, beside what is learned", group=DATA, ge=1e-6, le=1e6
    )
    rank: int = option(16, "of the LoRA", group=ADAPTER, ge=1, le=1024, also=("--lora-rank", "--network-dim"))
    alpha: float | None = option(
        None, "the LoRA's change is scaled by alpha / rank", group=ADAPTER, ge=1e-6, le=1e6, shown="the rank",
        also=("--lora-alpha", "--network-alpha"),
    )  # fmt: skip
    targets: tuple[str, ...] = option(
        (),
        "layers to change, by parts of their paths",
        group=ADAPTER,
        nargs="+",
        metavar="NAME",
        shown="all of the blocks",
    )
    dropout: float = option(0.0, "share of a layer's inputs that its LoRA does not see", group=ADAPTER, ge=0, le=0.99)
    ema: float = option(
        0.0,
        "decay of a moving average of the weights, which is then the result; 0: none",
        group=ADAPTER,
        ge=0,
        le=0.99999,
    )
    names: str = option("diffusers", "of the layers in the written file", group=ADAPTER, choices=NAMES)
    steps: int = option(
        1000, "of the optimizer", group=OPTIMIZATION, ge=1, le=10**7, also=("--max-train-steps", "--iters")
    )
    batch_size: int = option(
        1, "pictures in a pass, as far as so many have one size", group=OPTIMIZATION, ge=1, le=1024,
        also=("--train-batch-size",),
    )  # fmt: skip
    accumulate: int = option(
        1, "passes in a step (gradient accumulation); processes of mlx.launch share them", group=OPTIMIZATION, ge=1,
        le=1024, also=("--gradient-accumulation-steps",),
    )  # fmt: skip
    learning_rate: float = option(1e-4, "of AdamW", group=OPTIMIZATION, ge=0, le=10, also=("--lr",))
    weight_decay: float = option(0.01, "of AdamW", group=OPTIMIZATION, ge=0, le=10)
    warmup: int = option(
        20, "steps in which the learning rate rises", group=OPTIMIZATION, ge=0, le=10**7, also=("--lr-warmup-steps",)
    )
    decay: str = option(
        "cosine", "of the learning rate then: towards 0 at the last step, or none", group=OPTIMIZATION, choices=DECAYS,
        also=("--lr-scheduler",),
    )  # fmt: skip
    clip: float = option(
        1.0, "largest norm of all gradients", group=OPTIMIZATION, ge=1e-9, le=1e9, also=("--max-grad-norm",)
    )
    timesteps: str = option("logit-normal", "how noise levels are drawn", group=OPTIMIZATION, choices=TIMESTEPS)
    seed: int = option(0, "of everything that is drawn at random", group=OPTIMIZATION, ge=0, le=2**63 - 1)
    save_every: int = option(250, "steps between checkpoints", group=DATA, ge=1, le=10**7)
    validation_prompt: str | None = option(None, "generate an image of this now and then", group=VALIDATION)
    validation_image: tuple[str, ...] = option(
        (), "reference images that it is edited from", group=VALIDATION, nargs="+", metavar="FILE", is_path=True
    )
    validate_every: int = option(250, "steps between these images", group=VALIDATION, ge=1, le=10**7)
    validation_steps: int | None = option(
        None, "denoising steps of these images", group=VALIDATION, ge=1, le=1000, shown="25; distilled 4"
    )
    grad_checkpoint: bool = option(
        True, "compute blocks again in the backward pass: less memory, a third more time", group=RUN, shown="on",
        also=("--gradient-checkpointing",),
    )  # fmt: skip

    def check_together(self) -> None:
        if self.validation_image and self.validation_prompt is None:
            raise InputError("validation_image belongs to validation_prompt, and none is given")


# Options that a resumed run may change.
RESUMABLE = {"output", "steps", "names", "save_every", "grad_checkpoint"}
RESUMABLE |= {"validation_prompt", "validation_image", "validate_every", "validation_steps"}


def training_dtype(dtype: str | None) -> str:
    """The dtype to train in where none is given: what the machine suits, but not float16."""
    if dtype is not None:
        return dtype
    return "float32" if default_dtype() == mx.float32 else "bfloat16"
