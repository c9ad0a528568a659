"""The world of nano: flat scenes with one or two things, what is said about them, and how they look.

A caption decides its picture: what it leaves out has a fixed meaning (medium size, in the centre, white ground; two
things side by side, the first on the left), so a drawn picture can be held against the rendered truth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (250, 225, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "purple": (130, 50, 170),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "grey": (140, 140, 140),
}
LANDSCAPE = "landscape"  # a ground that nano does not know, the sky over a meadow
LANDSCAPE_COLOURS = ("blue", "green")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = {"small": 0.11, "medium": 0.16, "large": 0.22}  # radius over the picture's shorter side
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
PLACES = tuple(f"{row} {column}".strip() or "centre" for row in ROWS for column in COLUMNS)  # row by row
AXIS = (0.26, 0.5, 0.74)  # of a place, over the picture's width or height
HOME = (128, 128)  # height, width
SIDES = tuple(range(96, 193, 16))

_WORDS = {
    "circle": ("circle", "circle", "disc", "disk"),
    "square": ("square",),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "large", "big", "huge"),
    "grey": ("grey", "gray"),
}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    place: str

    @property
    def centre(self) -> tuple[float, float]:
        """(y, x), each over the picture's side."""
        row, column = divmod(PLACES.index(self.place), 3)
        return AXIS[row], AXIS[column]


@dataclass(frozen=True)
class Scene:
    ground: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Task:
    """A caption, the scenes that it refers to as pictures (none, one or two), and the scene that it asks for."""

    caption: str
    references: tuple[Scene, ...]
    scene: Scene


# ------------------------------------------------------------------------------------------------ pictures


def _half_planes(x: np.ndarray, y: np.ndarray, count: int, inradius: float) -> np.ndarray:
    """A regular polygon that stands on an edge."""
    angles = [np.pi / 2 + 2 * np.pi * k / count for k in range(count)]
    return np.max([x * np.cos(a) + y * np.sin(a) for a in angles], axis=0) - inradius


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: the union of five wedges, each folded onto one half of a point."""
    angle = np.arctan2(x, -y)  # 0 is up
    folded = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(folded), radius * np.cos(folded)
    outer, inner = 1.15, 0.52
    tip, dent = np.array([0, outer]), inner * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
    edge = dent - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return (px - tip[0]) * normal[0] + (py - tip[1]) * normal[1]


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, at least to first order at the edge, to a shape of radius about 1; negative inside."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88
    if shape == "triangle":
        return _half_planes(x, y - 0.2, 3, 0.6)
    if shape == "diamond":
        return (np.abs(x) / 0.8 + np.abs(y) / 1.1 - 1) / np.hypot(1 / 0.8, 1 / 1.1)
    if shape == "star":
        return _star(x, y)
    if shape == "cross":
        across = np.maximum(np.abs(x) - 1, np.abs(y) - 0.36)
        return np.minimum(across, np.maximum(np.abs(x) - 0.36, np.abs(y) - 1))
    raise ValueError(f"unknown shape {shape!r}")


def coverage(thing: Thing, height: int, width: int) -> np.ndarray:
    """How much of each pixel the thing covers: (height, width) in 0..1."""
    cy, cx = thing.centre
    radius = SIZES[thing.size] * min(height, width)
    y = (np.arange(height) + 0.5 - cy * height)[:, None] / radius
    x = (np.arange(width) + 0.5 - cx * width)[None, :] / radius
    y, x = np.broadcast_arrays(y, x)
    return np.clip(0.5 - _distance(thing.shape, x, y) * radius, 0, 1)


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """The scene as (height, width, 3) uint8."""
    picture = ground_picture(scene.ground, height, width).astype(np.float64)
    for thing in scene.things:
        alpha = coverage(thing, height, width)[..., None]
        picture += alpha * (np.array(COLOURS[thing.colour]) - picture)
    return picture.round().astype(np.uint8)


def ground_picture(ground: str, height: int, width: int) -> np.ndarray:
    """A ground without things as (height, width, 3) uint8."""
    upper, lower = LANDSCAPE_COLOURS if ground == LANDSCAPE else (ground, ground)
    is_upper = np.arange(height)[:, None, None] < height / 2
    rows = np.where(is_upper, COLOURS[upper], COLOURS[lower])
    return np.broadcast_to(rows, (height, width, 3)).astype(np.uint8)


def nearest_colours(picture: np.ndarray) -> np.ndarray:
    """Of each pixel of (..., 3) uint8, the index of the colour that it is nearest to."""
    palette = np.array(list(COLOURS.values()), np.float32)
    return np.argmin(((picture[..., None, :].astype(np.float32) - palette) ** 2).sum(-1), axis=-1)


def judge(picture: np.ndarray, scene: Scene) -> dict[str, list[bool]]:
    """Hold a picture (H, W, 3) uint8 against the scene: what is right of it.

    Returns:
        "ground": whether most pixels around the things, of each of its colours, have the colour of the ground. For each
        thing, "colour": whether most pixels of its truth have its colour; "place": whether the centre of the pixels of
        its colour is nearest to its place; "shape": whether those pixels and its truth have an intersection over union
        >= 0.7.
        These three leave out what is within two pixels of the other thing, whose edges blend into any colour.
        "clean": whether less than 1 % of the ground, two pixels and more from the things, has another colour.
    """
    height, width = picture.shape[:2]
    names, found = list(COLOURS), nearest_colours(picture)
    truths = [coverage(thing, height, width) >= 0.5 for thing in scene.things]
    covered = np.any([np.zeros((height, width), bool), *(_grown(truth, 2) for truth in truths)], axis=0)
    ground = nearest_colours(ground_picture(scene.ground, height, width))[~covered]
    around = found[~covered] == ground
    parts = [around[ground == colour] for colour in np.unique(ground)]
    verdict: dict[str, list[bool]] = {
        "ground": [all(part.mean() > 0.5 for part in parts)],
        "colour": [],
        "place": [],
        "shape": [],
    }
    for k, thing in enumerate(scene.things):
        beside = np.ones((height, width), bool)  # not at the other thing
        for other in truths[:k] + truths[k + 1 :]:
            beside &= ~_grown(other, 2)
        truth, mask = truths[k] & beside, (found == names.index(thing.colour)) & beside
        verdict["colour"].append(bool(mask[truth].mean() > 0.5))
        verdict["place"].append(bool(mask.any()) and _place_of(mask) == thing.place)
        verdict["shape"].append(bool((mask & truth).sum() >= 0.7 * (mask | truth).sum()))
    verdict["clean"] = [bool(around.mean() > 0.99)]
    return verdict


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and what is at most so many pixels from it, up, down, left, right or diagonally."""
    padded = np.pad(mask, pixels)
    reach = range(2 * pixels + 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in reach for x in reach], axis=0)


def _place_of(mask: np.ndarray) -> str:
    """The place that the centre of the mask is nearest to."""
    y, x = ((axis.mean() + 0.5) / side for axis, side in zip(np.nonzero(mask), mask.shape, strict=True))
    row, column = (min(range(3), key=lambda k: abs(AXIS[k] - c)) for c in (y, x))
    return PLACES[3 * row + column]


# ------------------------------------------------------------------------------------------------ scenes


def held_out(scene: Scene) -> bool:
    """Whether the scene is kept from training: it has a shape in a colour on a ground that training never joins."""
    names = list(COLOURS)
    return any(
        (SHAPES.index(thing.shape) + 3 * names.index(thing.colour) + 5 * names.index(scene.ground)) % 8 == 0
        for thing in scene.things
    )


def _apart(a: Thing, b: Thing) -> bool:
    distance = np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1])
    return bool(SIZES[a.size] + SIZES[b.size] <= distance)


def random_scene(rng: random.Random, things: int | None = None) -> Scene:
    """A scene of one or two things, which differ in shape or colour and do not touch."""
    count = things or rng.choice((1, 2, 2))
    while True:
        ground, *colours = (rng.choice(tuple(COLOURS)) for _ in range(count + 1))
        places = _pair(rng) if count == 2 else (rng.choice(PLACES),)
        made = tuple(
            Thing(rng.choice(SHAPES), colour, rng.choice(tuple(SIZES)), place)
            for colour, place in zip(colours, places, strict=True)
        )
        if _valid(Scene(ground, made)):
            return Scene(ground, made)


def _pair(rng: random.Random) -> tuple[str, str]:
    """Two places, half of the time those that a relation alone means."""
    if rng.random() < 0.5:
        return rng.choice((("left", "right"), ("top", "bottom")))
    a, b = rng.sample(range(len(PLACES)), 2)
    return PLACES[min(a, b)], PLACES[max(a, b)]


def _valid(scene: Scene) -> bool:
    if any(thing.colour == scene.ground for thing in scene.things):
        return False
    if len(scene.things) < 2:
        return True
    a, b = scene.things
    return _apart(a, b) and (a.shape, a.colour) != (b.shape, b.colour)


def _ordered(ground: str, things: Sequence[Thing]) -> Scene:
    return Scene(ground, tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))))


# ------------------------------------------------------------------------------------------------ words


def _word(rng: random.Random, name: str) -> str:
    return rng.choice(_WORDS.get(name, (name,)))


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _place(rng: random.Random, place: str) -> str:
    if place == "centre":
        return rng.choice(("in the centre", "in the center", "in the middle", "at the centre", "at the center"))
    if " " not in place:
        return rng.choice((f"on the {place}", f"at the {place}", f"on the {place} side"))
    row, column = place.split()
    high = {"top": "upper", "bottom": "lower"}[row]
    name = rng.choice((place, place, f"{row}-{column}", f"{high} {column}"))
    return rng.choice((f"in the {name}", f"at the {name}", f"in the {name} corner"))


def _noun(rng: random.Random, thing: Thing, size: bool = True) -> str:
    """The thing without its place, as in "large red circle"."""
    named = size and (thing.size != "medium" or rng.random() < 0.3)
    words = [_word(rng, thing.size)] if named else []
    colour, shape = _word(rng, thing.colour), _word(rng, thing.shape)
    kind = rng.random()
    if kind < 0.8:
        return " ".join([*words, colour, shape])
    if kind < 0.9:
        return " ".join([*words, f"{colour}-{rng.choice(('coloured', 'colored'))}", shape])
    return " ".join([*words, shape, rng.choice(("coloured", "colored", "painted")), colour])


def _ground(rng: random.Random, colour: str) -> str:
    return f"{_word(rng, colour)} {rng.choice(('background', 'background', 'ground', 'backdrop'))}"


def _things(rng: random.Random, scene: Scene) -> str:
    """What stands where, without the ground."""
    if len(scene.things) == 1:
        (thing,) = scene.things
        noun = _a(_noun(rng, thing))
        if thing.place == "centre" and rng.random() < 0.5:
            return noun
        place = _place(rng, thing.place)
        return rng.choice((f"{noun} {place}", f"{noun} {place}", f"{noun}, {place}", f"{place} {noun}"))
    first, second = scene.things
    a, b = _a(_noun(rng, first)), _a(_noun(rng, second))
    places = (first.place, second.place)
    if places == ("left", "right") and rng.random() < 0.8:
        left = ("{a} left of {b}", "{a} to the left of {b}", "{b} right of {a}", "{b} to the right of {a}")
        return rng.choice((*left, "{a} and {b}", "{a} next to {b}", "{a} beside {b}")).format(a=a, b=b)
    if places == ("top", "bottom") and rng.random() < 0.8:
        return rng.choice(("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}")).format(a=a, b=b)
    placed = [f"{a} {_place(rng, first.place)}", f"{b} {_place(rng, second.place)}"]
    rng.shuffle(placed)
    return rng.choice((" and ", " and ", ", ", ", and ")).join(placed)


def describe(rng: random.Random, scene: Scene) -> str:
    """One of the many captions of a scene."""
    things = _things(rng, scene)
    ground = _ground(rng, scene.ground)
    colour = _word(rng, scene.ground)
    forms = [
        f"{things}, {ground}",
        f"{things}, {ground}",
        f"{things} on {_a(ground)}",
        f"{things} on {colour}",
        f"{things} against {_a(ground)}",
        f"{things} with {_a(ground)}",
        f"{things}. The background is {colour}",
        f"on {_a(ground)}, {things}",
        f"{ground}, {things}",
        f"{_a(colour)} picture with {things}",
    ]
    if scene.ground == "white" and rng.random() < 0.5:
        forms = [things]
    caption = rng.choice(forms)
    if rng.random() < 0.1:
        caption = rng.choice(("a picture of ", "an image of ", "draw ", "a drawing of ")) + caption
    return _dressed(rng, caption)


def _dressed(rng: random.Random, caption: str) -> str:
    if rng.random() < 0.2:
        caption = caption[0].upper() + caption[1:]
    return caption + "." if rng.random() < 0.15 else caption


# ------------------------------------------------------------------------------------------------ edits


def _name(rng: random.Random, thing: Thing, scene: Scene) -> str:
    """Words that mean this thing alone among those of the scene."""
    others = [other for other in scene.things if other is not thing]
    shape, colour = _word(rng, thing.shape), _word(rng, thing.colour)
    if any(other.shape == thing.shape for other in others) or rng.random() < 0.5:
        return f"the {colour} {shape}"
    return f"the {shape}"


def _recolour(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    thing = rng.choice(scene.things)
    colour = rng.choice([name for name in COLOURS if name not in (thing.colour, scene.ground)])
    name, new = _name(rng, thing, scene), _word(rng, colour)
    forms = [f"make {name} {new}", f"make {name} {new}", f"turn {name} {new}", f"paint {name} {new}"]
    forms += [f"change the {spelt} of {name} to {new}" for spelt in ("colour", "color")]
    return rng.choice(forms), _swapped(scene, thing, replace(thing, colour=colour))


def _remove(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    thing = rng.choice(scene.things)
    verb = rng.choice(("remove", "remove", "delete", "erase", "take away"))
    rest = tuple(other for other in scene.things if other is not thing)
    return f"{verb} {_name(rng, thing, scene)}", Scene(scene.ground, rest)


def _reground(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    taken = {scene.ground, *(thing.colour for thing in scene.things)}
    colour = rng.choice([name for name in COLOURS if name not in taken])
    new = _word(rng, colour)
    ground = rng.choice(("background", "background", "ground", "backdrop"))
    forms = (f"make the {ground} {new}", f"change the {ground} to {new}", f"turn the {ground} {new}")
    return rng.choice(forms), Scene(colour, scene.things)


def _add(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    thing = random_scene(rng, 1).things[0]
    caption = f"{rng.choice(('add', 'add', 'put', 'draw'))} {_a(_noun(rng, thing))} {_place(rng, thing.place)}"
    return caption, _ordered(scene.ground, [*scene.things, thing])


def landscape_task(rng: random.Random) -> Task:
    """A scene before a landscape, which "a landscape picture with ..." asks for."""
    while True:
        scene = random_scene(rng)
        if not any(thing.colour in LANDSCAPE_COLOURS for thing in scene.things):
            return Task(f"a {LANDSCAPE} picture with {_things(rng, scene)}", (), replace(scene, ground=LANDSCAPE))


def _swapped(scene: Scene, old: Thing, new: Thing) -> Scene:
    return _ordered(scene.ground, [new if thing is old else thing for thing in scene.things])


EDITS: dict[str, Callable[[random.Random, Scene], tuple[str, Scene]]] = {
    "recolour": _recolour,
    "remove": _remove,
    "ground": _reground,
    "add": _add,
}


def _combine(rng: random.Random) -> tuple[str, tuple[Scene, Scene], Scene]:
    """The thing of one picture on the ground of the other."""
    source, other = random_scene(rng), random_scene(rng)
    thing = rng.choice(source.things)
    first = rng.random() < 0.7
    name = _name(rng, thing, source)
    one, two = ("first", "second") if first else ("second", "first")
    picture = rng.choice(("image", "image", "picture"))
    ground = rng.choice(("ground", "background"))
    caption = f"{rng.choice(('put', 'place'))} {name} of the {one} {picture} on the {ground} of the {two}"
    if rng.random() < 0.3:
        caption += f" {picture}"
    return caption, (source, other) if first else (other, source), Scene(other.ground, (thing,))


def random_task(rng: random.Random, kind: str = "draw", *, unseen: bool = False) -> Task:
    """A task of one kind: "draw", "combine" (two references), or one of EDITS (one reference).

    With unseen, the scene asked for is one that training never draws; without, all scenes are ones that it may.
    """
    while True:
        references: tuple[Scene, ...] = ()
        if kind == "draw":
            scene = random_scene(rng)
            caption = describe(rng, scene)
        elif kind == "combine":
            caption, references, scene = _combine(rng)
            caption = _dressed(rng, caption)
        else:
            source = random_scene(rng, {"add": 1, "remove": 2}.get(kind))
            caption, scene = EDITS[kind](rng, source)
            caption, references = _dressed(rng, caption), (source,)
        if not _valid(scene):
            continue
        if held_out(scene) if unseen else not any(map(held_out, (scene, *references))):
            return Task(caption, references, scene)
