"""The captions of the playground: writing them, reading them, and the facts they state.

a red circle [on a white background]
a red circle left of a blue square       (also: right of, above, below, and)
two | three | four green stars
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from t2i_align.errors import T2IError

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
BACKGROUNDS = ("white", "black", "gray")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}

Kind = Literal["single", "pair", "group"]
KINDS: tuple[Kind, ...] = ("single", "pair", "group")


class CaptionError(T2IError):
    """A text the grammar cannot read."""


class Thing(NamedTuple):
    """What an object is: `Thing("red", "circle")`."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


class Fact(NamedTuple):
    """One checkable statement of a caption.

    `object`: at least `number` objects are a `thing`; a group of three states it for 1, 2 and 3.
    `count`: exactly `number` objects in the image.
    `relation`: some `thing` stands in `relation` to some `other`.
    `background`: its colour.
    """

    kind: Literal["object", "count", "relation", "background"]
    thing: Thing | None = None
    number: int = 0
    relation: str = ""
    other: Thing | None = None
    background: str = ""

    def __str__(self) -> str:
        if self.kind == "object":
            return f"{self.thing} present" if self.number == 1 else f"{self.number} x {self.thing} present"
        if self.kind == "count":
            return f"exactly {self.number} object{'s' if self.number > 1 else ''}"
        if self.kind == "relation":
            return f"{self.thing} {self.relation} {self.other}"
        return f"{self.background} background"


@dataclass(frozen=True)
class Caption:
    """A caption as a value: one thing (`number` 1), a group of equal things (2-4), or two things."""

    things: tuple[Thing, ...]
    number: int = 1
    relation: str = ""
    background: str = ""

    @property
    def kind(self) -> Kind:
        if len(self.things) == 2:
            return "pair"
        return "single" if self.number == 1 else "group"

    def __str__(self) -> str:
        if self.kind == "group":
            text = f"{NUMBERS[self.number]} {self.things[0]}s"
        else:
            text = f" {self.relation or 'and'} ".join(f"{_article(str(thing))} {thing}" for thing in self.things)
        return text + (f" on a {self.background} background" if self.background else "")

    def facts(self) -> tuple[Fact, ...]:
        """Everything the caption states, each fact checkable on its own."""
        return tuple(self._facts())

    def _facts(self) -> Iterator[Fact]:
        if self.kind == "pair" and self.things[0] != self.things[1]:
            yield from (Fact("object", thing, 1) for thing in self.things)
            yield Fact("count", number=2)
        else:
            number = self.number * len(self.things)
            yield from (Fact("object", self.things[0], n) for n in range(1, number + 1))
            yield Fact("count", number=number)
        if self.relation:
            yield Fact("relation", self.things[0], relation=self.relation, other=self.things[1])
        if self.background:
            yield Fact("background", background=self.background)


def _article(text: str) -> str:
    return "an" if text[0] in "aeiou" else "a"


_THING = rf"(?:an?) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_BODY = re.compile(
    rf"(?:{_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?"
    rf"|({'|'.join(NUMBERS.values())}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s)"
    rf"(?: on an? ({'|'.join(BACKGROUNDS)}) background)?"
)
_WORDS = {
    *("a", "an", "and", "on", "background", "of", "left", "right", "above", "below"),
    *(*COLOURS, *SHAPES, *BACKGROUNDS, *NUMBERS.values()),
    *(shape + "s" for shape in SHAPES),
}


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted."""
    return sorted(_WORDS)


def parse(text: str) -> Caption:
    """Read a caption; `a`/`an`, `gray`/`grey`, letter case and a final full stop do not matter.

    Raises:
        CaptionError: the text is not a caption; the message names the words that could not be read.
    """
    words = re.sub(r"\bgrey\b", "gray", text.strip().lower().rstrip(".").strip()).split()
    match = _BODY.fullmatch(" ".join(words))
    if match is None:
        unknown = [word for word in words if word not in _WORDS]
        what = (
            f"the words {', '.join(map(repr, unknown))} are not in its vocabulary"
            if unknown
            else f"the words are known but not in this order: {' '.join(words)!r}"
        )
        raise CaptionError(
            f"Expected a playground caption such as 'a red circle left of a blue square' or 'two green stars on a "
            f"white background', but got {text!r}: {what}."
        )
    colour, shape, relation, colour2, shape2, number, group_colour, group_shape, background = match.groups()
    background = background or ""
    if number:
        count = next(n for n, word in NUMBERS.items() if word == number)
        return Caption((Thing(group_colour, group_shape),), count, background=background)
    if relation is None:
        return Caption((Thing(colour, shape),), background=background)
    things = (Thing(colour, shape), Thing(colour2, shape2))
    return Caption(things, 1, "" if relation == "and" else relation, background)


def facts(text: str) -> tuple[Fact, ...]:
    """The facts a caption states; raises `CaptionError` like `parse`."""
    return parse(text).facts()
