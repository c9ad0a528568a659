"""What a key of an adapter file is that no layer here takes: another model's, of another form, of no such block."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import groupby

from ..families import PARTS
from ..models.names.common import block_count

Find = Callable[[str], str | None]
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoders?|te\d?|lora_te\d?)[._].*")
_MODELS = (
    (
        r".*(img_mod|txt_mod|single_blocks[._]\d+[._]modulation|norm1|vector_in|[._]ff[._]net|[._]proj_mlp|"
        r"ff_context[._]net|single_transformer_blocks[._]\d+[._](norm[._]linear|proj_out))",
        "by their names FLUX.1's",
    ),
    (r".*guidance_(in|embedder)", "by their names FLUX.2-dev's"),
    (r".*(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)", "by their names Stable Diffusion's"),
)
# Of forms that are not read: how their keys end, after PEFT's and LyCORIS's sources.
_FORMS = (
    (r"boft_\w+", "BOFT"),
    (r"oft_(R|blocks|diag)|rescale", "OFT"),
    (r"ia3_l|on_input", "IA3"),
    (r"vera_\w+", "VeRA"),
    (r"hra_\w+", "HRA"),
    (r"fourierft_\w+", "FourierFT"),
    (r"waveft_\w+", "WaveFT"),
    (r"vblora_\w+", "VB-LoRA"),
    (r"randlora_\w+", "RandLoRA"),
    (r"gralora_\w+", "GraLoRA"),
    (r"(bone|miss)_\w+", "MiSS"),
    (r"shira_\w+", "SHiRA"),
    (r"road_\w+", "RoAd"),
    (r"c3a_\w+", "C3A"),
    (r"(a1|a2|b1|b2|bm1|bm2)", "GLoRA"),
    (r"(p|q)_layer|lambda_layer", "T-LoRA"),
    (r"lora_mid|lokr_t1|lora_embedding_[AB]", "LoRA of a convolution or an embedding"),
    (r"set_weight|reshape_weight", "ComfyUI's whole weights"),
)
_BLOCK = re.compile(r".*?(double_blocks|single_blocks|single_transformer_blocks|transformer_blocks)[._](\d+)[._]")
_WEIGHTS = ("weight", "bias", "scale", "scales", "biases", "weight_scale", "input_scale", "comfy_quant")


def _reason(key: str, layers: Mapping[str, object], adapted: bool, find: Find) -> str:
    """Why a key is not used; ``adapted``: it has an adapter's matrix, of a form that is read."""
    if TEXT_ENCODER.fullmatch(key):
        return "by their names a text encoder's, which FLUX.2 [klein] takes as it is"
    for pattern, whose in _MODELS:
        if re.match(pattern, key):
            return whose
    block = _BLOCK.match(key)
    if block:
        count = block_count(layers, block[1])
        if len(block[2]) > 6 or int(block[2]) >= count:
            return f"by their names blocks that this model does not have ({block[1]} are {count})"
    for pattern, form in _FORMS:
        if re.search(rf"\.({pattern})(\.\w+)?(\.weight)?$", key):
            return f"of a form that is not read ({form})"
    if not adapted:
        module, _, kind = key.rpartition(".")
        return "a layer's whole weights" if kind in _WEIGHTS and find(module) else "of a form that is not known"
    return "by their names of no layer that these blocks have" if block else "of an unknown layer"


def explain(keys: Mapping[str, bool], layers: Mapping[str, object], find: Find) -> Iterable[tuple[str, list[str]]]:
    """Reasons and the keys, sorted, that are not used for them.

    Args:
        keys: whether each has an adapter's matrix, of a form that is read.
        layers: every name of a layer that is known.
        find: gives the name that a file's name of a layer stands for, or None.
    """
    reasons = sorted((_reason(key, layers, adapted, find), key) for key, adapted in keys.items())
    for reason, group in groupby(reasons, key=lambda found: found[0]):
        yield reason, [key for _, key in group]


def checkpoint_part(keys: Collection[str]) -> tuple[str, str] | None:
    """(label, option) of the part of a model that a file holds whole, or None."""
    for part in PARTS.values():
        if part.names.are_in(keys):
            return part.label, f"--{part.key.replace('_', '-')}"
    return None
