"""Two images in a fresh process, each by a library's own pipeline: what benchmarks.compare runs for cold starts.

    python -m benchmarks.cold flux2_mlx '{"model": "klein-4b", "width": 512, ...}'

    python -m benchmarks.cold starts [CLONE ...]

Of starts: the CPU seconds of processes that import the library, print --help and draw nano's image, of this clone or of
several in turn: median and least of eleven.

Nothing but the library in question is imported, so this is a file of its own. Ends with a line of JSON: when the first
image was there (seconds of the system's clock), and how long the second took, of another prompt, with all loaded.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

PROMPTS = ("a red fox in the snow", "a blue bird on a branch")
# A function from a prompt to an image, and one that tells the peak of the memory for arrays in bytes.
Drawing = tuple[Callable[[str], Any], Callable[[], int | None]]


def with_flux2_mlx(options: dict[str, Any]) -> Drawing:
    import mlx.core as mx

    from flux2_mlx import Flux2Pipeline
    from flux2_mlx.runtime import residency

    if not options.get("read_ahead", True):  # of the next stage's files while one works
        patch.object(residency, "read_through", lambda *_: 0).start()
    cache = options.get("cache", False)
    dtypes = {"dtype": options["dtype"], "vae_dtype": options.get("vae_dtype")}
    pipe = Flux2Pipeline.from_pretrained(options["model"], **dtypes, cache=cache)
    size = {"height": options["height"], "width": options["width"], "max_sequence_length": options["text_length"]}
    return lambda prompt: pipe(prompt, **size, num_steps=options["steps"], guidance=1.0, seed=0), mx.get_peak_memory


def with_mflux(options: dict[str, Any]) -> Drawing:
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


def with_mlx_vlm(options: dict[str, Any]) -> Drawing:
    """As it comes but for two things: all of the text's tokens, as the others have them, and no tiles in the decoder,
    which change the image.
    """
    import mlx.core as mx
    from mlx_vlm.models.flux2.config import Flux2Variant
    from mlx_vlm.models.flux2.constants import ModelConfig
    from mlx_vlm.models.flux2.pipeline import Flux2Image

    ModelConfig.precision = mx.bfloat16 if options["dtype"] == "float16" else getattr(mx, options["dtype"])
    shapes = options["transformer"], options["text_encoder"]
    variant = Flux2Variant("klein", (), options["repo"], "klein", *shapes)
    folder = options["repo"] if Path(options["repo"]).is_dir() else None
    pipe = Flux2Image.from_pretrained(variant, model_path=folder, bucketed_seq_len=False, tiled_vae="off")
    size = {"height": options["height"], "width": options["width"], "max_sequence_length": options["text_length"]}

    def generate(prompt: str) -> None:
        mx.eval(pipe.generate_array(prompt, seed=0, steps=options["steps"], **size))

    return generate, mx.get_peak_memory


def with_torch(options: dict[str, Any]) -> Drawing:
    import torch
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(options["repo"], torch_dtype=getattr(torch, options["dtype"]))
    if torch.accelerator.is_available():
        pipe.to(torch.accelerator.current_accelerator())
    pipe.set_progress_bar_config(disable=True)
    call = {"height": options["height"], "width": options["width"], "num_inference_steps": options["steps"]}
    call |= {"max_sequence_length": options["text_length"], "guidance_scale": 1.0}
    return (
        lambda prompt: pipe(prompt=prompt, **call, generator=torch.Generator().manual_seed(0)),
        lambda: torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


LIBRARIES = {"flux2_mlx": with_flux2_mlx, "mflux": with_mflux, "mlx-vlm": with_mlx_vlm, "torch": with_torch}


STARTS = {
    "python": ("-c", ""),
    "import": ("-c", "from flux2_mlx import *; import flux2_mlx.generate, flux2_mlx.cli.session, flux2_mlx.cli.plan"),
    "help": ("-m", "flux2_mlx.generate", "--help"),
    "nano": ("-m", "flux2_mlx.generate", "a red circle", "--model", "nano", "--seed", "1", "--quiet"),
}


def measure_starts(clones: list[str], repeats: int = 11) -> dict[str, Any]:
    """(median, least) CPU seconds of each of STARTS, by clone; the clones in turn, their order alternating. The first
    round, which compiles sources and fills the cache of prompts, does not count.
    """
    seconds: dict[tuple[str, str], list[float]] = {(clone, name): [] for clone in clones for name in STARTS}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(repeats + 1):
            for clone, name in list(seconds)[:: (-1) ** k]:
                environment = {**os.environ, "PYTHONPATH": os.path.abspath(clone), "FLUX2_MLX_CACHE": folder}
                environment.pop("PYTHONDONTWRITEBYTECODE", None)
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(
                    [sys.executable, *STARTS[name]], cwd=folder, env=environment, capture_output=True, check=True
                )
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                seconds[clone, name] += [spent] * (k > 0)
    return {
        clone: {
            name: (round(statistics.median(found), 3), round(min(found), 3))
            for (own, name), found in seconds.items()
            if own == clone
        }
        for clone in clones
    }


def main() -> None:
    if sys.argv[1] == "starts":
        print(json.dumps(measure_starts(sys.argv[2:] or ["."])))
        return
    generate, peak = LIBRARIES[sys.argv[1]](json.loads(sys.argv[2]))
    generate(PROMPTS[0])
    first_at = time.time()
    start = time.perf_counter()
    generate(PROMPTS[1])
    second, array_bytes = time.perf_counter() - start, peak()
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = {"first_at": first_at, "second_s": second, "process_peak_gb": process / 1e9, "peak": array_bytes}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
