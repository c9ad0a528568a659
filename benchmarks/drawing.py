"""Two pictures in a fresh process, each by a library's own pipeline: what benchmarks.peers runs for cold starts.

    python -m benchmarks.drawing flux2_mlx '{"model": "klein-4b", "width": 512, ...}'

Nothing but the library in question is imported. Ends with a line of JSON: when the first picture was there (seconds of
the system's clock), and how long the second took, of another prompt, with everything loaded.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPTS = ("a red fox in the snow", "a blue bird on a branch")


def with_flux2_mlx(options: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], int | None]]:
    """A function from a prompt to a picture, and one that tells the peak of the memory for arrays in bytes."""
    import mlx.core as mx

    from flux2_mlx import Flux2Pipeline

    pipe = Flux2Pipeline.from_pretrained(options["model"], dtype=options["dtype"], cache=False)
    size = {"height": options["height"], "width": options["width"]}
    return lambda prompt: pipe(prompt, **size, num_steps=options["steps"], guidance=1.0, seed=0), mx.get_peak_memory


def with_mflux(options: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], int | None]]:
    import copy

    import mlx.core as mx
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux2.variants import Flux2Klein

    half = options["dtype"] == "float16"
    ModelConfig.precision = mx.bfloat16 if half else getattr(mx, options["dtype"])
    config = copy.copy(ModelConfig.flux2_klein_4b())
    config.transformer_overrides, config.text_encoder_overrides = options["transformer"], options["text_encoder"]
    pipe = Flux2Klein(model_path=options["repo"], model_config=config, compute_precision=mx.float16 if half else None)
    size = {"height": options["height"], "width": options["width"]}
    return lambda prompt: pipe.generate_image(0, prompt, options["steps"], **size), mx.get_peak_memory


def with_torch(options: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], int | None]]:
    import torch
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(options["repo"], torch_dtype=getattr(torch, options["dtype"]))
    if torch.accelerator.is_available():
        pipe.to(torch.accelerator.current_accelerator())
    pipe.set_progress_bar_config(disable=True)
    call = {"height": options["height"], "width": options["width"], "num_inference_steps": options["steps"]}
    return (
        lambda prompt: pipe(prompt=prompt, **call, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)),
        lambda: torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


LIBRARIES = {"flux2_mlx": with_flux2_mlx, "mflux": with_mflux, "torch": with_torch}


def main() -> None:
    draw, peak = LIBRARIES[sys.argv[1]](json.loads(sys.argv[2]))
    draw(PROMPTS[0])
    first_at = time.time()
    start = time.perf_counter()
    draw(PROMPTS[1])
    second, array_bytes = time.perf_counter() - start, peak()
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = {"first_at": first_at, "second_s": second, "process_peak_gb": process / 1e9}
    print(json.dumps({**report, "peak_gb": None if array_bytes is None else array_bytes / 1e9}))


if __name__ == "__main__":
    main()
