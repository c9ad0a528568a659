"""Every way to draw from a picture, side by side in edits.png; with nano as it stands, no download."""

import argparse
import textwrap

from PIL import Image, ImageDraw

from flux2_mlx import Flux2Pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a blue circle left of a red star, white background")
parser.add_argument("--model", default="nano")
parser.add_argument("--size", type=int, default=128)
arguments = parser.parse_args()

size = arguments.size
pipe = Flux2Pipeline.from_pretrained(arguments.model, progress=True)
picture = pipe(arguments.prompt, width=size, height=size, seed=1).images[0]
ground = pipe("a small white diamond on a purple background", width=size, height=size, seed=2).images[0]
left = Image.new("L", picture.size)
left.paste("white", (0, 0, size // 2, size))
part = Image.new("L", picture.size)
part.paste("white", (0, size // 4, size // 2, size * 3 // 4))
half = picture.crop((0, 0, size // 2, size))
put = "put the star of the first image on the background of the second"

ways = {
    "a reference": ("make the circle green", {"image": picture}),
    "a mask: its left half": ("make the background yellow", {"init_image": picture, "mask": left}),
    "a smaller one, enlarged": ("make the circle green", {"init_image": picture, "mask": part, "mask_padding": 8}),
    "painted on, to the right": (
        "add a red star on the right",
        {"init_image": half, "expand": {"right": size // 2}},
    ),
    "begun from": ("a green circle left of a red star", {"init_image": picture, "strength": 0.75}),
    "guided": ("a large black cross, grey background", {"guidance": 1.5, "force_guidance": True}),
    "two references": (put, {"image": [picture, ground]}),
}
tiles = [("from words", arguments.prompt, picture)]
for name, (prompt, options) in ways.items():
    given = {} if "image" in options or "init_image" in options else {"width": size, "height": size}
    tiles.append((name, prompt, pipe(prompt, seed=1, **given, **options).images[0]))

columns, gap, text = 4, 8, 54
sheet = Image.new("RGB", (gap + columns * (size + gap), -(-len(tiles) // columns) * (size + text + gap)), "white")
draw = ImageDraw.Draw(sheet)
for k, (name, prompt, image) in enumerate(tiles):
    x, y = gap + k % columns * (size + gap), gap + k // columns * (size + text + gap)
    sheet.paste(image, (x, y))
    draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline="grey")
    lines = [f"{name}:", *textwrap.wrap(prompt, max(8, size // 6))]
    draw.multiline_text((x, y + image.height + 2), "\n".join(lines[:5]), fill="black", font_size=9, spacing=1)
sheet.save("edits.png")
print("edits.png")
