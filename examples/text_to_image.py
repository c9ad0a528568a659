"""Draw a prompt, then the same prompt with other seeds: the text is encoded once."""

import argparse

from flux2_mlx import Flux2Pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--model", default="klein-4b")
parser.add_argument("--size", type=int, default=1024)
arguments = parser.parse_args()

pipe = Flux2Pipeline.from_pretrained(arguments.model, progress=True)
for seed in (1, 2, 3):
    result = pipe(arguments.prompt, width=arguments.size, height=arguments.size, seed=seed)
    result.images[0].save(f"seed-{seed}.png")
    print(seed, {part: round(seconds, 2) for part, seconds in result.seconds.items()})
