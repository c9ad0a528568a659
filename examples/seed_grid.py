"""Draw a grid of schedules (columns) and seeds (rows) into one picture."""

import argparse

from PIL import Image

from flux2_mlx import Flux2Pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--model", default="klein-4b")
parser.add_argument("--size", type=int, default=512)
arguments = parser.parse_args()

schedules, seeds, size = ("flux2", "linear", "comfy"), (1, 2), arguments.size
pipe = Flux2Pipeline.from_pretrained(arguments.model, progress=True)
grid = Image.new("RGB", (len(schedules) * size, len(seeds) * size))
for column, schedule in enumerate(schedules):
    result = pipe(arguments.prompt, width=size, height=size, seed=seeds[0], num_images=len(seeds), schedule=schedule)
    for row, image in enumerate(result.images):
        grid.paste(image, (column * size, row * size))
grid.save("grid.png")
print(f"grid.png: columns {', '.join(schedules)}; rows are seeds {', '.join(map(str, seeds))}")
