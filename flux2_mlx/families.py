"""The released models, and what their checkpoints say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .models.config import refuse_changes, refuse_other_class

# The tokens that a prompt is padded or cut to, unless the tokenizer takes fewer or the caller says otherwise.
MAX_SEQUENCE_LENGTH = 512

# Released models, by the names that from_pretrained and --model take: their Hub ids.
RELEASED: dict[str, str] = {
    "klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "klein-base-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "klein-9b-kv": "black-forest-labs/FLUX.2-klein-9b-kv",
}
KV = "klein-9b-kv"  # the one that was trained to keep its references
NANO = "nano"  # a trained miniature, which is part of the package


def check_scheduler_config(config: Mapping[str, Any]) -> None:
    """Refuse a diffusers ``scheduler_config.json`` that asks for another sampling than FLUX.2 [klein]'s.

    Its shift, base_shift, max_shift and sequence lengths have no effect under dynamic shifting and are not looked at.

    Raises:
        CheckpointError: naming what differs.
    """
    refuse_other_class(config, "FlowMatchEulerDiscreteScheduler", "scheduler")
    expected = {"num_train_timesteps": 1000, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
    off = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    refuse_changes(config, {**expected, **dict.fromkeys(off, False), "shift_terminal": None}, "scheduler")
