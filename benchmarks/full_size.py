"""Does the true klein-4b fit and run here? Its full shapes in random weights, prompt to picture, one stage in memory at
a time, and a bound on the memory of the whole process.

    python -m benchmarks.full_size
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.common import TINY, machine, process_peak_gb, randomized
from flux2_mlx import (
    AutoEncoder,
    AutoEncoderConfig,
    FluxKlein,
    FluxKleinParams,
    Qwen3Config,
    Qwen3TextEncoder,
    image_ids,
    text_ids,
    unpack_latents,
)
from flux2_mlx.imaging.preprocess import to_unit
from flux2_mlx.sampling.latents import initial_noise
from flux2_mlx.sampling.samplers import euler_step
from flux2_mlx.sampling.schedules import flux2_sigmas

LIMIT_GB = 22 * 2**30 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that the script runs")
    arguments = parser.parse_args()
    size, dtype = arguments.size, getattr(mx, arguments.dtype)
    if arguments.tiny:
        params, text_config, image_config = TINY
    else:
        params, text_config, image_config = FluxKleinParams.klein_4b(), Qwen3Config(), AutoEncoderConfig.flux2()

    rows: dict[str, Any] = {}

    def finish(part: str, start: float) -> None:
        rows[part] = {"seconds": time.perf_counter() - start, "peak_gb": mx.get_peak_memory() / 1e9}
        print(f"{part:24}{rows[part]['seconds']:10.2f} s{rows[part]['peak_gb']:10.2f} GB", flush=True)
        mx.clear_cache()
        mx.reset_peak_memory()

    start = time.perf_counter()
    text_encoder = randomized(Qwen3TextEncoder(text_config), dtype)
    finish("make text encoder", start)
    start = time.perf_counter()
    mask = mx.concatenate([mx.ones((1, 15), mx.int32), mx.zeros((1, 497), mx.int32)], axis=1)
    txt = text_encoder(mx.random.randint(0, text_config.vocab_size, (1, 512)), mask)
    mx.eval(txt)
    del text_encoder
    finish("encode 512 tokens", start)

    start = time.perf_counter()
    transformer = randomized(FluxKlein(params), dtype)
    finish("make transformer", start)
    start = time.perf_counter()
    x = initial_noise(0, size, size)
    cos, sin = FluxKlein.compute_rope(text_ids(512), image_ids(size, size))
    for sigma, sigma_next in pairwise(flux2_sigmas(arguments.steps, x.shape[1])):
        x = euler_step(x, transformer.forward_with_rope(x, txt, mx.array([sigma]), cos, sin), sigma, sigma_next)
        mx.eval(x)
    del transformer
    finish(f"{arguments.steps} steps of {size} x {size}", start)

    start = time.perf_counter()
    autoencoder = randomized(AutoEncoder(image_config), dtype)
    image = to_unit(autoencoder.decoder(unpack_latents(autoencoder.bn.denormalize(x), size, size)))
    mx.eval(image)
    finish("decode", start)

    pixels = np.array(image)
    if pixels.shape != (1, size, size, 3) or not np.isfinite(pixels).all() or pixels.std() == 0:
        raise SystemExit(f"the picture is wrong: {pixels.shape}, std {pixels.std()}")
    peak = process_peak_gb()
    if peak > LIMIT_GB:
        raise SystemExit(f"the process took {peak:.2f} GB, more than {LIMIT_GB:.2f}")
    print(f"process peak {peak:.2f} GB")
    report = {"benchmark": "full_size", "size": size, "steps": arguments.steps, "dtype": arguments.dtype, "parts": rows}
    print(json.dumps({**report, "process_peak_gb": peak, **machine()}))


if __name__ == "__main__":
    main()
