"""The playground world: 64x64 scenes of coloured shapes, drawn deterministically, with captions and two splits.

The train split never shows four of the 24 colour-shape pairs, nor some (colour, relation, colour) triples; every
caption of the held-out split names one of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from t2i_align.keys import key
from t2i_align.playground.grammar import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    Caption,
    Kind,
    Thing,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIZE = 64  # px, width and height of every scene
OVERSAMPLING = 4  # scenes are drawn this much larger and reduced by a Lanczos filter: antialiasing
RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 40),
}
BACKGROUND_RGB = {"white": (245, 245, 245), "black": (18, 18, 18), "gray": (128, 128, 128)}
RADIUS: dict[Kind, tuple[float, float]] = {"single": (9, 17), "pair": (8, 12), "group": (8, 11)}  # px
KIND_SHARES: dict[Kind, float] = {"single": 0.30, "pair": 0.45, "group": 0.25}

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
HELDOUT_THINGS = frozenset(
    {Thing("red", "star"), Thing("green", "triangle"), Thing("blue", "circle"), Thing("orange", "square")}
)


class Placed(NamedTuple):
    """An object in a scene: its thing, centre and circumscribed radius in pixels."""

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn, and the caption that goes with it."""

    caption: Caption
    background: str
    objects: tuple[Placed, ...]
    arrangement: str = ""  # the relation the scene shows, whether or not the caption names it

    def descriptions(self) -> list[Caption]:
        """Every caption that is true of the scene, with and without its background."""
        things, number = self.caption.things, self.caption.number
        said = [(things, "")]
        if self.arrangement:
            mirrored = things[::-1]
            said += [(mirrored, ""), (things, self.arrangement), (mirrored, OPPOSITE[self.arrangement])]
        return [Caption(t, number, relation, bg) for t, relation in said for bg in ("", self.background)]

    def render(self) -> Image.Image:
        """Draw the scene: RGB, 64x64."""
        from PIL import Image, ImageDraw

        canvas = Image.new("RGB", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING), BACKGROUND_RGB[self.background])
        draw = ImageDraw.Draw(canvas)
        for placed in self.objects:
            outline = shape_outline(placed.thing.shape)
            points = [
                (OVERSAMPLING * (placed.x + placed.radius * u), OVERSAMPLING * (placed.y + placed.radius * v))
                for u, v in outline
            ]
            draw.polygon(points, fill=RGB[placed.thing.colour])
        return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def shape_outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape inside the unit circle, y pointing down; (0, 0) is where a scene places it."""
    if shape == "circle":
        return _regular(64, 1.0)
    if shape == "square":
        side = 0.86
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    if shape == "triangle":
        return [(0.0, -1.0), (math.cos(math.pi / 6), 0.6), (-math.cos(math.pi / 6), 0.6)]
    if shape == "star":
        outer, inner = _regular(5, 1.0), _regular(5, 0.44, math.pi / 5)
        return [point for pair in zip(outer, inner, strict=True) for point in pair]
    raise ValueError(f"Expected a shape among {', '.join(SHAPES)} but got {shape!r}.")


def _regular(corners: int, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * n / corners for n in range(corners)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def is_heldout_triple(colour: str, relation: str, other: str) -> bool:
    """Whether `colour relation other` is kept out of training; a triple and its mirror image go together."""
    if relation in ("right of", "below"):
        colour, relation, other = other, OPPOSITE[relation], colour
    first, second = COLOURS.index(colour), COLOURS.index(other)
    return (first + 2 * second + 3 * (relation == "above")) % 7 == 0


def _shows_heldout(things: tuple[Thing, ...], relation: str) -> bool:
    if any(thing in HELDOUT_THINGS for thing in things):
        return True
    return bool(relation) and is_heldout_triple(things[0].colour, relation, things[1].colour)


def split_of(caption: Caption) -> Split:
    """`heldout` where the caption names a combination that never occurs in training, else `train`."""
    return "heldout" if _shows_heldout(caption.things, caption.relation) else "train"


def sample_scene(seed: int, index: int, split: Split = "train", kind: Kind | None = None) -> Scene:
    """Scene number `index` of a split: a pure function of its arguments.

    Args:
        seed: names the data set.
        index: scene number, any non-negative int.
        split: `train` scenes show no held-out combination; `heldout` captions name one.
        kind: `single`, `pair` or `group`; by default drawn with `KIND_SHARES`.
    """
    rng = random.Random(key(seed, "scene", split, kind or "any", index))
    kind = kind or rng.choices(KINDS, [KIND_SHARES[k] for k in KINDS])[0]
    while True:
        scene = _draw_scene(rng, kind)
        if split == "heldout" and split_of(scene.caption) == "heldout":
            return scene
        if split == "train" and not _shows_heldout(scene.caption.things, scene.arrangement):
            return scene


def sample_scenes(n: int, seed: int, split: Split = "train") -> Iterator[Scene]:
    """The first `n` scenes of a split."""
    return (sample_scene(seed, index, split) for index in range(n))


def render_batch(scenes: list[Scene]) -> np.ndarray:
    """Draw scenes as one uint8 array (n, 64, 64, 3)."""
    import numpy as np

    return np.stack([np.asarray(scene.render()) for scene in scenes])


def _draw_scene(rng: random.Random, kind: Kind) -> Scene:
    background = rng.choice(BACKGROUNDS)
    named = background if rng.random() < 0.5 else ""
    if kind == "single":
        return _draw_single(rng, background, named)
    if kind == "group":
        return _draw_group(rng, background, named)
    return _draw_pair(rng, background, named)


def _draw_single(rng: random.Random, background: str, named: str) -> Scene:
    thing, radius = _thing(rng), rng.uniform(*RADIUS["single"])
    inside = (radius + 2, SIZE - 2 - radius)
    placed = Placed(thing, rng.uniform(*inside), rng.uniform(*inside), radius)
    return Scene(Caption((thing,), background=named), background, (placed,))


def _draw_group(rng: random.Random, background: str, named: str) -> Scene:
    thing, number = _thing(rng), rng.choice(list(NUMBERS))
    cells = sorted(rng.sample([(x, y) for y in (16, 48) for x in (16, 48)], number))
    objects = []
    for x, y in cells:
        radius = rng.uniform(*RADIUS["group"])
        jitter = SIZE / 4 - 2 - radius
        objects.append(Placed(thing, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter), radius))
    return Scene(Caption((thing,), number, background=named), background, tuple(objects))


def _draw_pair(rng: random.Random, background: str, named: str) -> Scene:
    first, second = _thing(rng), _thing(rng)
    while second == first:
        second = _thing(rng)
    relation = rng.choice(RELATIONS)
    objects = []
    for thing, near in ((first, relation in ("left of", "above")), (second, relation in ("right of", "below"))):
        radius = rng.uniform(*RADIUS["pair"])
        along = rng.uniform(radius + 2, SIZE / 2 - 2 - radius)
        along = along if near else SIZE - along
        across = SIZE / 2 + rng.uniform(-8, 8)  # less than any gap along the axis: the relation stays the dominant one
        x, y = (along, across) if relation in ("left of", "right of") else (across, along)
        objects.append(Placed(thing, x, y, radius))
    said = relation if rng.random() < 0.7 else ""
    return Scene(Caption((first, second), 1, said, named), background, tuple(objects), relation)


def _thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(COLOURS), rng.choice(SHAPES))
