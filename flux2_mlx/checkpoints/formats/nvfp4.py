"""NVFP4: two E2M1 codes a byte, an FP8 scale for every 16 values, and a float one for the tensor.

ComfyUI's files have the first code in the upper half of the byte, and the scales in tiles; ModelOpt's have it in the
lower half, and the scales row by row.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...errors import CheckpointError
from .marks import MARK, Format, StoredLayer, by_rows, untile

COMFYUI_MARK = "nvfp4"
MODELOPT_MARK = "modelopt_nvfp4"  # ModelOpt writes it into config.json; folder.Source marks its layers so

# The 16 values of E2M1: sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def matches(layer: StoredLayer) -> bool:
    return layer.mark in (COMFYUI_MARK, MODELOPT_MARK) or "weight_scale_2" in layer.scales


def decode(layer: StoredLayer) -> Any:
    weight, scales = layer.weight, layer.scales
    if weight.dtype != mx.uint8 or weight.ndim != 2 or not {"weight_scale", "weight_scale_2"} <= scales.keys():
        raise CheckpointError(
            f"{layer.name}: weight_scale_2 belongs to NVFP4, bytes with two scales, but the weight is {weight.dtype} "
            f"with {', '.join(scales) or 'none'}"
        )
    if layer.mark not in (COMFYUI_MARK, MODELOPT_MARK):
        raise CheckpointError(
            f"{layer.name} is NVFP4, but the file does not say in which of two layouts its scales are: neither a "
            f"{MARK} mark (ComfyUI) nor a quantization_config (ModelOpt) is there"
        )
    is_comfyui = layer.mark == COMFYUI_MARK
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    scale, blocks = scales["weight_scale"], -(-columns // 16)
    if is_comfyui:
        scale = untile(layer.name, scale, rows, blocks)
    elif scale.shape != (rows, blocks):
        raise CheckpointError(f"{layer.name}: scales {scale.shape} for {rows} x {columns} weights of NVFP4")
    tensor_scale = scales["weight_scale_2"].astype(mx.float32)
    if tensor_scale.size != 1:
        raise CheckpointError(f"{layer.name}: weight_scale_2 is {tensor_scale.shape}, and one number is expected")
    scale = mx.repeat(scale.astype(mx.float32) * tensor_scale.reshape(()), 16, axis=1)[:, :columns]

    def convert(weight: mx.array, scale: mx.array) -> mx.array:
        upper, lower = weight >> 4, weight & 15
        codes = mx.stack([upper, lower] if is_comfyui else [lower, upper], axis=-1).reshape(scale.shape)
        return mx.array(_E2M1)[codes] * scale

    return by_rows(weight, scale, convert)


NVFP4 = Format((COMFYUI_MARK, MODELOPT_MARK), matches, decode)
