"""The options of a training run."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..adapters.keys import NAMES
from ..device import default_dtype
from ..errors import InputError
from ..fields import changed, option
from ..options import MODEL, CheckpointOptions
from .dataset import parse_data

TIMESTEPS = ("logit-normal", "uniform", "shifted", "four")
DECAYS = ("cosine", "constant")
DTYPES = ("bfloat16", "float32")  # gradients leave the range of float16
DATA, ADAPTER, OPTIMIZATION = "data and output", "LoRA", "optimization"
VALIDATION, RUN = "validation", "memory and speed"


@dataclass(frozen=True)
class TrainingOptions(CheckpointOptions):
    """The options of a training run; the command's flags have these names."""

    data: str | tuple[str, ...] = option(
        help="folder of images and captions; repeat it for several, which take turns by their weights (1)", group=DATA,
        metavar="FOLDER[:WEIGHT]", is_path=True,
        also=("--dataset", "--train-data-dir", "--instance-data-dir"),
    )  # fmt: skip
    output: str = option(
        help="folder of the run: LoRA, checkpoints, log and samples; it must not hold another run", group=DATA,
        metavar="FOLDER", is_path=True, also=("-o", "--output-dir"),
    )  # fmt: skip
    model: str = changed(
        CheckpointOptions, "model", "klein-base-4b", help="base model: a released one, a folder, a file, a Hub id or "
        "owner/name/file",
    )  # fmt: skip
    dtype: str | None = changed(
        CheckpointOptions, "dtype", None, choices=DTYPES, shown="bfloat16; float32 on a CPU", group=MODEL
    )
    resolution: int = option(
        512, "images are trained at N x N pixels at most, each in its own aspect", group=DATA, ge=64, le=2048
    )
    trigger: str = option("", "trigger word, prepended to every caption without it", group=DATA, metavar="WORD")
    caption_dropout: float = option(
        0.0,
        "share of the captions that are replaced by an empty one, which trains the unconditional pass of CFG",
        group=DATA,
        ge=0,
        le=1,
    )
    preserve: str | None = option(
        None, "captions, one a line, for which the LoRA must not change the model (differential output preservation); "
        "a step takes more than twice the time", group=DATA, metavar="FILE", is_path=True,
    )  # fmt: skip
    preserve_weight: float = option(5.0, "weight of the preservation loss", group=DATA, ge=1e-6, le=1e6)
    rank: int = option(16, "rank of the LoRA", group=ADAPTER, ge=1, le=1024, also=("--lora-rank", "--network-dim"))
    alpha: float | None = option(
        None, "alpha of the LoRA, whose output is scaled by alpha / rank", group=ADAPTER, ge=1e-6, le=1e6,
        shown="the rank", also=("--lora-alpha", "--network-alpha"),
    )  # fmt: skip
    targets: tuple[str, ...] = option(
        (),
        "layers to train, by parts of their paths, as to_q",
        group=ADAPTER,
        nargs="+",
        metavar="NAME",
        shown="all linear layers of the blocks",
    )
    dropout: float = option(0.0, "dropout on the inputs of the LoRA", group=ADAPTER, ge=0, le=0.99)
    ema: float = option(
        0.0,
        "decay of a moving average (EMA) of the LoRA, which is then the result; 0 is none",
        group=ADAPTER,
        ge=0,
        le=0.99999,
    )
    names: str = option("diffusers", "layer names in the written file", group=ADAPTER, choices=NAMES)
    steps: int = option(
        1000, "optimizer steps", group=OPTIMIZATION, ge=1, le=10**7, also=("--max-train-steps", "--iters")
    )
    batch_size: int = option(
        1, "images per pass; the images of a pass have one size", group=OPTIMIZATION, ge=1, le=1024,
        also=("--train-batch-size",),
    )  # fmt: skip
    accumulate: int = option(
        1, "passes per step (gradient accumulation); processes of mlx.launch share them", group=OPTIMIZATION, ge=1,
        le=1024, also=("--gradient-accumulation-steps",),
    )  # fmt: skip
    learning_rate: float = option(
        1e-4, "learning rate of AdamW after the warmup", group=OPTIMIZATION, ge=0, le=10, also=("--lr",)
    )
    weight_decay: float = option(0.01, "weight decay of AdamW", group=OPTIMIZATION, ge=0, le=10)
    warmup: int = option(
        20,
        "steps of linear warmup of the learning rate",
        group=OPTIMIZATION,
        ge=0,
        le=10**7,
        also=("--lr-warmup-steps",),
    )
    decay: str = option(
        "cosine", "learning rate after the warmup: cosine decay to 0 at the last step, or constant",
        group=OPTIMIZATION, choices=DECAYS, also=("--lr-scheduler",),
    )  # fmt: skip
    clip: float = option(
        1.0,
        "gradient clipping: largest norm of all gradients",
        group=OPTIMIZATION,
        ge=1e-9,
        le=1e9,
        also=("--max-grad-norm",),
    )
    timesteps: str = option(
        "logit-normal",
        "distribution of the noise levels (timesteps); four is the distilled models' four",
        group=OPTIMIZATION,
        choices=TIMESTEPS,
    )
    seed: int = option(
        0, "seed of noise, dropout, the order of images and the LoRA's start", group=OPTIMIZATION, ge=0, le=2**63 - 1
    )
    save_every: int = option(250, "steps between checkpoints", group=DATA, ge=1, le=10**7)
    validation_prompt: str | None = option(
        None, "generate an image of this prompt now and then", group=VALIDATION, metavar="PROMPT"
    )
    validation_image: tuple[str, ...] = option(
        (), "reference images for the validation prompt", group=VALIDATION, nargs="+", metavar="FILE", is_path=True
    )
    validate_every: int = option(250, "steps between validation images", group=VALIDATION, ge=1, le=10**7)
    validation_steps: int | None = option(
        None, "denoising steps of a validation image", group=VALIDATION, ge=1, le=1000, shown="25; distilled 4"
    )
    grad_checkpoint: bool = option(
        True, "gradient checkpointing: compute blocks again in the backward pass, less memory, a third more time",
        group=RUN, shown="on", also=("--gradient-checkpointing",),
    )  # fmt: skip

    def check_together(self) -> None:
        parse_data(self.data)
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
