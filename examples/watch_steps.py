"""Save what every step foresees, and stop early when a step takes too long."""

import argparse
import time

from flux2_mlx import Flux2Pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--model", default="klein-4b")
parser.add_argument("--size", type=int, default=1024)
parser.add_argument("--patience", type=float, default=600, help="seconds for one step")
arguments = parser.parse_args()

pipe = Flux2Pipeline.from_pretrained(arguments.model)
started = time.perf_counter()
for step in pipe.stream(arguments.prompt, width=arguments.size, height=arguments.size, seed=0):
    seconds = time.perf_counter() - started
    step.picture().save(f"step-{step.index}.png")
    print(f"step {step.index} of {step.steps}: noise left {step.sigma:.3f}, {seconds:.1f} s")
    if seconds > arguments.patience:
        break
    started = time.perf_counter()
