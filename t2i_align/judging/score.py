"""The images of a preference set, each once for its prompt, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t2i_align.data.images import open_image
from t2i_align.data.preferences import Ranking
from t2i_align.judging.changes import CHANGES, write_words
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer

CHUNK = 64  # images that are decoded together


class Images(NamedTuple):
    """The different images of a set, each with its prompt, and where the images of each ranking stand among them."""

    names: tuple[str, ...]
    prompts: Prompts
    places: tuple[tuple[int, ...], ...]


def collect(rankings: Sequence[Ranking]) -> Images:
    """Every image of the rankings once for each prompt it stands under."""
    rows: dict[tuple[str, str], int] = {}
    places = [
        tuple(rows.setdefault((ranking.prompt, image), len(rows)) for image in ranking.images) for ranking in rankings
    ]
    return Images(tuple(image for _, image in rows), Prompts(tuple(text for text, _ in rows)), tuple(places))


def score(
    scorer: Scorer,
    images: Images,
    change: str = "",
    only: Sequence[int] | None = None,
    texts: Sequence[str] | None = None,
) -> Tensor:
    """Scores of all images, or of some, after a change.

    Args:
        scorer: whose.
        images: of a set.
        change: one of `CHANGES`, or "words", which writes the prompt on them.
        only: rows; one may come twice.
        texts: read instead of the rows' prompts.

    Returns:
        (N,) float64.
    """
    rows = range(len(images.names)) if only is None else only
    table = images.prompts[list(rows)] if texts is None else Prompts(tuple(texts))
    found: list[Tensor] = []
    for first in range(0, len(rows), CHUNK):
        prompts = table[first : first + CHUNK]
        pictures = [open_image(images.names[row]) for row in rows[first : first + CHUNK]]
        if change == "words":
            pictures = [write_words(picture, text) for picture, text in zip(pictures, prompts.text, strict=True)]
        elif change:
            pictures = [CHANGES[change](picture) for picture in pictures]
        found.append(scorer.scores(pictures, prompts).total.detach().cpu().double())
    return torch.cat(found)
