"""How long does each stage take, and how much memory? Text encoder, one step, decode, each loaded alone.

python -m benchmarks.stages --model klein-4b                 # a checkpoint
python -m benchmarks.stages --random 4b --size 512           # the same shapes in random weights, no download
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from benchmarks.common import TINY, header, loaded, machine, measure, process_peak_gb, randomized
from flux2_mlx import (
    AutoEncoder,
    AutoEncoderConfig,
    FluxKlein,
    FluxKleinParams,
    Qwen3Config,
    Qwen3TextEncoder,
    image_ids,
    open_checkpoint,
    text_ids,
)
from flux2_mlx.checkpoints.load import load_autoencoder, load_text_encoder, load_transformer
from flux2_mlx.device import default_dtype, stage_dtype
from flux2_mlx.options import DTYPES

RANDOM = {
    "4b": (FluxKleinParams.klein_4b(), Qwen3Config(), AutoEncoderConfig.flux2()),
    "9b": (FluxKleinParams.klein_9b(), Qwen3Config.qwen3_8b(), AutoEncoderConfig.flux2()),
    "tiny": TINY,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a released name, a folder or a Hub id")
    source.add_argument("--random", choices=RANDOM, help="random weights in the shapes of this model")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--size", type=int, help="width and height")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after the first; 0 times the first alone")
    arguments = parser.parse_args()
    width, height = arguments.size or arguments.width, arguments.size or arguments.height
    dtype = DTYPES[arguments.dtype] if arguments.dtype else default_dtype()

    text_dtype, image_dtype = stage_dtype("text_encoder", dtype), stage_dtype("autoencoder", dtype)

    stages: dict[str, Callable[[], nn.Module]]
    if arguments.model:
        checkpoint = open_checkpoint(arguments.model)
        params, text_config, image_config = checkpoint.transformer, checkpoint.text_encoder, checkpoint.autoencoder
        stages = {
            "text_encoder": lambda: loaded(load_text_encoder(checkpoint, text_dtype)),
            "step": lambda: loaded(load_transformer(checkpoint, dtype)),
            "decode": lambda: loaded(load_autoencoder(checkpoint, image_dtype)),
        }
    else:
        params, text_config, image_config = RANDOM[arguments.random]
        stages = {
            "text_encoder": lambda: randomized(Qwen3TextEncoder(text_config), text_dtype),
            "step": lambda: randomized(FluxKlein(params), dtype),
            "decode": lambda: randomized(AutoEncoder(image_config), image_dtype),
        }

    length = arguments.text_length
    ids = mx.random.randint(0, text_config.vocab_size, (1, length))
    txt = mx.random.normal((1, length, params.txt_embed_dim))
    x = mx.random.normal((1, height * width // 256, params.in_channels))
    z = mx.random.normal((1, height // 8, width // 8, image_config.latent_channels))
    cos, sin = FluxKlein.compute_rope(
        text_ids(length), image_ids(height, width), params.axes_dims_rope, params.rope_theta
    )
    mx.eval(ids, txt, x, z)

    def work(stage: str, module: nn.Module) -> Callable[[], mx.array]:
        if stage == "text_encoder":
            return lambda: module(ids, mx.ones_like(ids))
        if stage == "step":
            return lambda: module.forward_with_rope(x, txt, mx.array([0.7]), cos, sin)
        return lambda: module.decoder(z)

    header()
    figures = {}
    for stage, build in stages.items():
        module = build()
        figures[stage] = measure(stage, work(stage, module), arguments.repeats)
        del module
        mx.clear_cache()
    print(
        json.dumps(
            {
                "benchmark": "stages",
                "weights": checkpoint.name if arguments.model else f"random {arguments.random}",
                "size": [width, height],
                "text_length": length,
                "dtype": str(dtype).removeprefix("mlx.core."),
                "stages": figures,
                "process_peak_gb": process_peak_gb(),
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
