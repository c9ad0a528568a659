"""Does the full klein-4b draw what diffusers draws? A checkpoint of the true shapes in random bfloat16 weights, written
by diffusers, drawn by both in float32 from the same seed: levels of difference, seconds and peak memory of each.

    python -m benchmarks.parity FOLDER        # needs the dev extra, 17 GB of disk and 24 GB of memory

Each side runs in a process of its own, one stage in memory at a time. The checkpoint stays in FOLDER for another run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import child, print_json, print_row, process_peak_gb

PROMPT = "a red fox"
SEED = 7
TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "qwen3-tokenizer"


def write(folder: Path, size: int) -> None:
    """A klein-4b of random weights, by diffusers' own save_pretrained."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    transformer = Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        attention_head_dim=128,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    vae = AutoencoderKLFlux2()
    text_encoder = Qwen3ForCausalLM(config)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    pipe = Flux2KleinPipeline(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled=True)
    pipe.save_pretrained(folder)


def draw_with_diffusers(folder: Path, size: int) -> dict[str, float]:
    """Draw to FOLDER/diffusers.npy with diffusers in float32, the text encoder gone before the transformer comes."""
    import torch
    from diffusers import Flux2KleinPipeline
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    seconds = {}
    text_encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    start = time.perf_counter()
    with torch.no_grad():
        embeds = Flux2KleinPipeline._get_qwen3_prompt_embeds(text_encoder, tokenizer, PROMPT)
    seconds["text_encoder"] = time.perf_counter() - start
    del text_encoder
    gc.collect()
    pipe = Flux2KleinPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    options = {"height": size, "width": size, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
    image = pipe(prompt_embeds=embeds, generator=torch.Generator().manual_seed(SEED), **options).images[0]
    seconds["denoise and decode"] = time.perf_counter() - start
    np.save(folder / "diffusers.npy", image)
    return {**seconds, "process_peak_gb": process_peak_gb()}


def draw_with_mlx(folder: Path, size: int) -> dict[str, float]:
    """Draw to FOLDER/mlx.npy with this library in float32."""
    from flux2_mlx import Flux2Pipeline

    pipe = Flux2Pipeline.from_pretrained(folder, dtype="float32", cache=False)
    result = pipe(PROMPT, height=size, width=size, seed=SEED, output_type="np")
    np.save(folder / "mlx.npy", result.images[0])
    seconds = result.seconds
    both = seconds["denoise"] + seconds["decode"]
    return {
        "load": seconds["load"],
        "text_encoder": seconds["text_encoder"],
        "denoise and decode": both,
        "process_peak_gb": process_peak_gb(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--only", choices=("write", "diffusers", "mlx"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder, size = arguments.folder, arguments.size
    if arguments.only:
        sides = {"write": write, "diffusers": draw_with_diffusers, "mlx": draw_with_mlx}
        print(json.dumps(sides[arguments.only](folder, size)))
        return
    side = partial(child, "benchmarks.parity", str(folder), "--size", str(size), "--only")
    if not (folder / "model_index.json").is_file():
        side("write")
    figures = {}
    for name in ("diffusers", "mlx"):
        figures[name] = side(name)
        print_row(name, (f"{key} {value:.2f}" for key, value in figures[name].items()), width=30, first=10)
    theirs, ours = (np.load(folder / f"{name}.npy") for name in ("diffusers", "mlx"))
    levels = np.abs(np.round(ours * 255) - np.round(theirs * 255))
    comparison = {
        "relative_error": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
        "max_levels": int(levels.max()),
        "values_off": float((levels > 0).mean()),
        "std_levels": float(255 * theirs.std()),
    }
    print(comparison)
    Image.fromarray((ours * 255).round().astype(np.uint8)).save(folder / "mlx.png")
    print_json("parity", arguments, {"parts": figures, **comparison})


if __name__ == "__main__":
    main()
