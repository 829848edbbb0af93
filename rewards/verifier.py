"""The gold reward of the playground: which of a caption's facts does a picture show?

Classical image analysis of the pixels alone: background from the border, foreground by distance to it, connected
components, colour by majority of the eroded inside, shape by overlap with each shape's template after both were
brought to the same area and centroid.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from t2i_align.data.images import to_tensors, to_uint8
from t2i_align.playground.grammar import OPPOSITE, SHAPES, CaptionError, Fact, Thing, facts
from t2i_align.playground.world import BACKGROUND_RGB, RGB, SIZE, shape_outline
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer

FOREGROUND = 40.0  # RGB distance to the background from which a pixel belongs to an object
COLOUR_RADIUS = 75.0  # RGB distance up to which a pixel has a colour of the palette
MIN_AREA = 20  # px; smaller components are specks, not objects (the smallest star covers 80)
MIN_OVERLAP = 0.78  # intersection over union with the best template, below which a shape is unknown
TEMPLATE, EXTENT = 40, 1.15  # templates are TEMPLATE^2 samples of [-EXTENT, EXTENT]^2 in units of sqrt(area)
BLUR = 1.1  # samples; what pixels and interpolation do to an object of radius 8-12

_PALETTE = np.array(list(RGB.values()), np.float32)
_BACKGROUNDS = np.array(list(BACKGROUND_RGB.values()), np.float32)


class Found(NamedTuple):
    """An object seen in a picture; `unknown` where colour or shape is none of the world's."""

    colour: str
    shape: str
    x: float
    y: float
    area: float
    overlap: float

    @property
    def thing(self) -> Thing:
        return Thing(self.colour, self.shape)


class Report(NamedTuple):
    """What a picture shows, against what its caption says."""

    checks: tuple[tuple[Fact, bool], ...]
    objects: tuple[Found, ...]
    background: str

    @property
    def score(self) -> float:
        """Fraction of the facts that hold."""
        return sum(holds for _, holds in self.checks) / len(self.checks)

    def __str__(self) -> str:
        marks = "; ".join(f"{'yes' if holds else 'NO'}: {fact}" for fact, holds in self.checks)
        seen = ", ".join(f"{f.thing} at ({f.x:.0f}, {f.y:.0f})" for f in self.objects) or "nothing"
        return f"{self.score:.2f} [{marks}] seen: {seen} on {self.background}"


class Verifier(Scorer):
    """Fraction of the prompt's facts that hold in the picture, in [0, 1]."""

    name = "verifier"
    needs_prompt = True
    range = (0.0, 1.0)
    without_std = True
    unit = "fraction of facts"
    summary = "the playground's gold reward: exact fact check of a caption"
    tolerance = 0.0

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        values = [report(pixels, prompt).score for pixels, prompt in zip(to_uint8(images), prompts.text, strict=True)]
        return torch.tensor(values, device=images.device)

    def explain(self, image: Any, prompt: str) -> str:
        return str(report(to_uint8(torch.stack(list(to_tensors(image))))[0], prompt))

    def refuse(self, prompt: str) -> str | None:
        try:
            facts(prompt)
        except CaptionError as error:
            return str(error)
        return None


def report(pixels: NDArray[np.uint8], prompt: str) -> Report:
    """Check a picture (H, W, 3) uint8 against a caption; other sizes are first reduced to 64x64.

    Raises:
        CaptionError: the grammar cannot read the prompt.
    """
    stated = facts(prompt)
    objects, background = look(pixels)
    return Report(tuple((fact, _holds(fact, objects, background)) for fact in stated), tuple(objects), background)


def look(pixels: NDArray[np.uint8]) -> tuple[list[Found], str]:
    """Find the objects of a picture and the name of its background (`unknown` where it is none of the three)."""
    if pixels.shape[:2] != (SIZE, SIZE):
        pixels = np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    rgb = pixels.astype(np.float32)
    border = np.concatenate(
        [rgb[:2].reshape(-1, 3), rgb[-2:].reshape(-1, 3), rgb[:, :2].reshape(-1, 3), rgb[:, -2:].reshape(-1, 3)]
    )
    ground = np.median(border, axis=0)
    distances = np.linalg.norm(_BACKGROUNDS - ground, axis=1)
    background = list(BACKGROUND_RGB)[int(distances.argmin())] if distances.min() < 60 else "unknown"

    labels, number = ndimage.label(np.linalg.norm(rgb - ground, axis=2) > FOREGROUND)
    objects = []
    for index, window in enumerate(ndimage.find_objects(labels, number), start=1):
        inside = labels[window] == index
        if inside.sum() >= MIN_AREA:
            objects.append(_identify(rgb, ground, window, inside))
    return objects, background


def _identify(
    rgb: NDArray[np.float32], ground: NDArray[np.float32], window: tuple[slice, slice], inside: NDArray[np.bool_]
) -> Found:
    """Colour, shape and place of one component."""
    patch = rgb[window]
    core = ndimage.binary_erosion(inside)
    core = core if core.sum() >= 5 else inside
    distances = np.linalg.norm(patch[core][:, None] - _PALETTE, axis=2)  # (pixels, colours)
    votes = np.bincount(distances.argmin(1)[distances.min(1) < COLOUR_RADIUS], minlength=len(RGB))
    best = int(votes.argmax())
    colour = list(RGB)[best] if votes[best] > core.sum() / 2 else "unknown"

    # How much of each pixel the object covers, from where its colour lies between the background's and its own.
    line = np.median(patch[core], axis=0) - ground
    partly = np.clip(((patch - ground) @ line) / max(float(line @ line), 1e-6), 0, 1) * ndimage.binary_dilation(inside)
    cover = np.zeros((SIZE, SIZE), np.float32)
    cover[window] = partly if line @ line > FOREGROUND**2 / 4 else inside  # no such line through a many-coloured blob
    area = float(cover.sum())
    y, x = ndimage.center_of_mass(cover)
    axis = np.linspace(-EXTENT, EXTENT, TEMPLATE) * np.sqrt(area)
    sampled = ndimage.map_coordinates(cover, np.meshgrid(y + axis, x + axis, indexing="ij"), order=1)
    templates = _templates()
    overlaps = np.minimum(sampled, templates).sum((1, 2)) / np.maximum(sampled, templates).sum((1, 2))
    best = int(overlaps.argmax())
    shape = SHAPES[best] if overlaps[best] >= MIN_OVERLAP else "unknown"
    return Found(colour, shape, float(x), float(y), area, float(overlaps[best]))


@lru_cache(maxsize=1)
def _templates() -> NDArray[np.float32]:
    """Coverage of each shape at unit area, centroid at 0: (shapes, TEMPLATE, TEMPLATE)."""
    fine = 8 * TEMPLATE
    templates = []
    for shape in SHAPES:
        outline = np.array(shape_outline(shape))
        nxt = np.roll(outline, -1, axis=0)
        cross = outline[:, 0] * nxt[:, 1] - nxt[:, 0] * outline[:, 1]
        centroid = ((outline + nxt) * cross[:, None]).sum(0) / (3 * cross.sum())
        unit = (outline - centroid) / np.sqrt(abs(cross.sum()) / 2)
        canvas = Image.new("L", (fine, fine))
        step = 2 * EXTENT / (TEMPLATE - 1)  # pixel centres of the template sit on its sample points
        corners = (unit + EXTENT + step / 2) / (TEMPLATE * step) * fine
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=255)
        reduced = np.asarray(canvas.resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX), np.float32) / 255
        templates.append(ndimage.gaussian_filter(reduced, BLUR))
    return np.stack(templates)


def _holds(fact: Fact, objects: list[Found], background: str) -> bool:
    if fact.kind == "object":
        return sum(found.thing == fact.thing for found in objects) >= fact.number
    if fact.kind == "count":
        return len(objects) == fact.number
    if fact.kind == "background":
        return background == fact.background
    return any(
        first is not second
        and first.thing == fact.thing
        and second.thing == fact.other
        and _relation(first, second) == fact.relation
        for first in objects
        for second in objects
    )


def _relation(first: Found, second: Found) -> str:
    """The relation along the axis on which the two centres lie further apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else OPPOSITE["left of"]
    return "above" if dy > 0 else OPPOSITE["above"]
