"""Does a picture take what the plan says? python -m benchmarks.memory_plan FOLDER [--size 1024] [--memory streamed]

Writes a checkpoint of the true shapes into FOLDER, packed, in random weights (unless one is there), draws one step of a
picture with it, each stage within the limit that its own plan asks for, and holds the peak of every stage against that.
On the CPU backend it includes attention's scores, which a GPU does not write out; they are told apart. The text
encoder's seconds include loading it. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from benchmarks.common import TINY, machine, process_peak_gb
from flux2_mlx import AutoEncoder, Flux2Pipeline, FluxKlein, Quantization, Qwen3TextEncoder
from flux2_mlx import __file__ as package
from flux2_mlx.device import on_gpu, weights_of
from flux2_mlx.options import DTYPES
from flux2_mlx.quantization.layers import quantize
from flux2_mlx.quantization.packing import quantize_rtn
from flux2_mlx.quantization.recipes import mixed_precision
from flux2_mlx.runtime.plan import MODES
from flux2_mlx.runtime.released import released_modules

STEMS = {"text_encoder": "model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
PROMPT = "a red circle"
SHARD = 2**30  # bytes
WIDTHS = (12, 13, 8, 19, 10)  # of the table's columns
# Parts of a run, and their stages in the plan.
PARTS = {"text_encoder": "text encoder", "denoise": "transformer", "decode": "decoder"}


def write_checkpoint(folder: Path, modules: dict[str, nn.Module]) -> None:
    """A checkpoint in the diffusers layout with random weights of the modules' shapes and dtypes."""
    nano = Path(package).with_name("nano")
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(nano / name, folder / name)
    for part, module in modules.items():
        (folder / part).mkdir()
        config = module.params if isinstance(module, FluxKlein) else module.config
        (folder / part / "config.json").write_text(json.dumps(config.to_config()))
        weights = weights_of(module)
        names = sorted(weights, key=lambda name: [int(w) if w.isdecimal() else w for w in name.split(".")])
        shards: list[list[str]] = [[]]
        for name in names:  # as they stand in the model, so that a block is read from one shard or two
            if sum(weights[other].nbytes for other in shards[-1]) > SHARD:
                shards.append([])
            shards[-1].append(name)
        files = [f"{STEMS[part]}-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
        for file, own in zip(files, shards, strict=True):
            mx.save_safetensors(str(folder / part / file), {name: random(name, weights[name]) for name in own})
        index = {name: file for file, own in zip(files, shards, strict=True) for name in own}
        (folder / part / f"{STEMS[part]}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copyfile(nano / "model_index.json", folder / "model_index.json")


def random(name: str, like: mx.array) -> mx.array:
    if like.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, like.shape).astype(mx.uint32)
    if name.endswith("running_var") or ".norm" in name or "layernorm" in name:
        return mx.ones(like.shape, like.dtype)
    return (0.01 * mx.random.normal(like.shape)).astype(like.dtype)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="klein-4b")
    parser.add_argument("--quantize", default="4", metavar="BITS", help="uniform, as a file holds it (%(default)s)")
    parser.add_argument(
        "--pack", metavar="BITS", help="pack what a dense checkpoint (--quantize none) holds, on loading"
    )
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--memory", choices=MODES[1:], default="staged")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args(argv)
    made = {name: str(getattr(arguments, name)) for name in ("model", "quantize", "tiny")}
    note = arguments.folder / "made.json"
    if not note.exists():
        how = Quantization.parse(arguments.quantize)
        if arguments.tiny:
            params, text_config, image_config = TINY
            modules = Qwen3TextEncoder(text_config), FluxKlein(params), AutoEncoder(image_config)
        else:
            modules = released_modules(arguments.model, mx.bfloat16, {})
        if how is not None:
            for module in modules[:2]:
                quantize(module, mixed_precision(module, how), quantize_rtn)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(arguments.folder, dict(zip(STEMS, modules, strict=True)))
        note.write_text(json.dumps(made))  # last: the folder is whole
    elif json.loads(note.read_text()) != made:
        parser.error(f"{arguments.folder} has another checkpoint: {note.read_text()}")

    options = {"dtype": arguments.dtype, "memory": arguments.memory, "cache": False, "quantize": arguments.pack}
    plan = Flux2Pipeline.from_pretrained(arguments.folder, **options).plan(
        arguments.size, arguments.size, arguments.text_length
    )
    print(plan)
    pipe = Flux2Pipeline.from_pretrained(arguments.folder, progress=True, **options)
    stages = {stage.name: stage for stage in plan.stages}

    def allow(name: str) -> None:
        """What the stage's plan asks for, and no more: MLX uses what it may."""
        pipe.memory_limit = plan.peak if arguments.memory == "resident" else plan.needed(stages[name])

    allow("text encoder")
    start = time.perf_counter()
    pipe.encode([PROMPT], arguments.text_length)
    encoding, encoder_peak = time.perf_counter() - start, mx.get_peak_memory()
    allow("transformer")
    size = {"height": arguments.size, "width": arguments.size}
    step = next(pipe.stream(PROMPT, **size, num_steps=1, seed=0, max_sequence_length=arguments.text_length))
    allow("decoder")
    step.array()
    params = pipe.checkpoint.transformer
    tokens = arguments.text_length + (arguments.size // 16) ** 2
    scores = 0 if on_gpu() else params.num_heads * tokens**2 * pipe.dtype.size
    rows = {}
    heads = ("planned GB", "measured GB", "ratio", "without scores GB", "seconds")
    print(f"{'':16}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    for part, name in PARTS.items():
        stage = stages[name]
        if arguments.memory == "resident":
            planned = sum(other.weights for other in plan.stages) + stage.working
        else:
            planned = plan.needed(stage)
        measured, seconds = step.stats.peak_bytes.get(part, encoder_peak), step.stats.seconds.get(part, encoding)
        without = measured - (scores if part == "denoise" else 0)
        figures = {
            "planned_gb": planned / 1e9,
            "measured_gb": measured / 1e9,
            "ratio": measured / planned,
            "without_scores_gb": without / 1e9,
            "seconds": seconds,
        }
        rows[name] = figures
        print(
            f"{name:16}" + "".join(f"{value:{width}.3f}" for value, width in zip(figures.values(), WIDTHS, strict=True))
        )
    loading = step.stats.peak_bytes["load"] / plan.needed(replace(stages["transformer"], working=0))
    print(f"loading the transformer took {loading:.3f} of what stays of it in memory")
    variant = {name: str(value) for name, value in vars(arguments).items() if name != "folder"}
    report = {
        "benchmark": "memory_plan",
        "variant": variant,
        "stages": rows,
        "loading": loading,
    }
    print(json.dumps({**report, "process_peak_gb": process_peak_gb(), **machine()}))


if __name__ == "__main__":
    main()
