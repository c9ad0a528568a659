"""Refusals of calls whose values are each right, with the reason and the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.language import find_language_model
from .errors import InputError
from .inputs import Size
from .options import BatchOptions


def check_reuse(reuse: str, guidance: float, checkpoint: Checkpoint, *, has_references: bool) -> None:
    """Refuse to freeze what this model, or this call, does not have, or would lose too much by.

    Raises:
        InputError: with the reason.
    """
    name = checkpoint.name
    if not checkpoint.is_distilled:
        raise InputError(
            f"reuse is for the few steps of distilled models, and {name} is a base model, whose many steps have "
            "step_cache (--step-cache)"
        )
    if guidance > 1:
        raise InputError(f"reuse is for distilled models without CFG, and guidance is {guidance:g}")
    if reuse == "references" and not has_references:
        raise InputError("reuse of references belongs to image (--image), and none is given")
    if checkpoint.has_kv_cache and has_references:
        more = (
            "" if reuse == "references" else ", and reuse of the text beside them costs too much of the image's quality"
        )
        raise InputError(f"{name} caches its references already (KV cache), as klein-9b-kv does{more}")


def check_room(
    peak: Callable[[Sequence[Size]], int], size: Size, references: Sequence[Size], needed: int, limit: int
) -> None:
    """Refuse more references than there is memory for. An image that is itself too large, or with the first ones that
    it cannot do without, is warned of later.

    Args:
        peak: bytes with these references.
        needed: how many of the first references cannot be left out.

    Raises:
        InputError: with the number that fits.
    """
    wanted = peak(references)
    if wanted <= limit:
        return
    fitting = [count for count in range(needed, len(references)) if peak(references[:count]) <= limit]
    if fitting:
        height, width = size
        raise InputError(
            f"{len(references) - needed} references and an image of {width} x {height} need about "
            f"{wanted / 1e9:.2f} GB of memory, and there are {limit / 1e9:.2f}; the first {fitting[-1] - needed} fit"
        )


def check_enhance(batch: BatchOptions, checkpoint: Checkpoint, *, has_embeds: bool, shares_cfg: bool) -> None:
    """Refuse to write prompts out where there are none, or where it cannot be; what it needs is fetched.

    Raises:
        InputError: with the way out.
    """
    if not batch.enhance:
        return
    if has_embeds:
        raise InputError("enhance writes prompts out, and prompt_embeds are given in their place; give one of them")
    if shares_cfg:
        raise InputError(
            "two processes that share the passes of CFG might write different prompts; write one out before, with "
            "flux2-generate --enhance or pipe.enhance, and give that"
        )
    find_language_model(checkpoint)


def check_group(is_seeded: bool, guidance: float) -> None:
    """Refuse what two processes cannot share.

    Raises:
        InputError: with the way out.
    """
    if not is_seeded:
        raise InputError("two processes that share the passes of CFG need the same seed, and none is given")
    if guidance <= 1:
        raise InputError(
            "two processes share the passes of CFG, and there is no CFG; they can share images: --jobs FILE"
        )


def refuse_to(*_: Any, **__: Any) -> NoReturn:
    """Raise an InputError that names this library's way to a device and a dtype: diffusers' pipe.to(...)."""
    raise InputError(
        "MLX computes on the GPU where there is one, so leave .to(...) out; mx.set_default_device chooses another "
        "device, and from_pretrained(..., dtype=) the dtype"
    )
