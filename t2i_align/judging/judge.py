"""Scorers on preference sets and on the playground: one table a question, a page, and `results.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2i_align.data.images import open_image
from t2i_align.data.preferences import Preferences, Ranking
from t2i_align.judging.accuracy import Accuracy, accuracy
from t2i_align.judging.changes import CHANGES, allowed, write_words
from t2i_align.prompts import Prompts
from t2i_align.rewards import RewardError
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.diagnostics import stability, starc

CHUNK = 64  # images that are decoded together


class Judged(NamedTuple):
    """What was found of one scorer on one set.

    `flips`: share of the pairs of one prompt whose order turns, by change; None where no pair was left to turn.
    `fooled`: share of the rightly ordered pairs that turn when the prompt is written on the worse image.
    """

    scorer: str
    data: str
    accuracy: Accuracy
    flips: dict[str, float | None]
    fooled: float | None


class Images(NamedTuple):
    """The different images of a set, each with its prompt, and where the images of each ranking stand among them."""

    names: tuple[str, ...]
    prompts: Prompts
    places: tuple[tuple[int, ...], ...]


def judge(
    scorers: Sequence[Scorer], sets: Mapping[str, Preferences], *, limit: int | None = None, seed: int = 0
) -> tuple[list[Judged], dict[str, Tensor]]:
    """Judge scorers on preference sets.

    Args:
        scorers: what is judged; their networks decide the device.
        sets: preferences by name.
        limit: rankings of each set that are looked at, the first ones.
        seed: of the intervals.

    Returns:
        A row per scorer and set, and for each set the (K, K) STARC distances of the scorers.
    """
    rows, distances = [], {}
    for name, preferences in sets.items():
        rankings = [ranking for ranking in preferences.rankings if len(ranking.images) > 1][:limit]
        images = collect(rankings)
        scores = [score(scorer, images) for scorer in scorers]
        for scorer, values in zip(scorers, scores, strict=True):
            flips = {change: _flips(scorer, images, values, change) for change in CHANGES}
            margins, pairs, owner = _pairs(rankings, images, values)
            found = accuracy(margins, owner, seed)
            rows.append(Judged(scorer.name, name, found, flips, _fooled(scorer, images, values, margins, pairs)))
        distances[name] = starc(torch.stack(scores, 1), images.prompts)
    return rows, distances


def collect(rankings: Sequence[Ranking]) -> Images:
    """Every image of the rankings once for each prompt it stands under."""
    rows: dict[tuple[str, str], int] = {}
    places = [
        tuple(rows.setdefault((ranking.prompt, image), len(rows)) for image in ranking.images) for ranking in rankings
    ]
    return Images(tuple(image for _, image in rows), Prompts(tuple(text for text, _ in rows)), tuple(places))


def score(scorer: Scorer, images: Images, change: str = "", only: Sequence[int] | None = None) -> Tensor:
    """(N,) float64 scores of all images, or of some, after a change; "words" writes the prompt on them."""
    rows = range(len(images.names)) if only is None else only
    found: list[Tensor] = []
    for first in range(0, len(rows), CHUNK):
        chunk = list(rows[first : first + CHUNK])
        prompts = images.prompts[chunk]
        pictures = [open_image(images.names[row]) for row in chunk]
        if change == "words":
            pictures = [write_words(picture, text) for picture, text in zip(pictures, prompts.text, strict=True)]
        elif change:
            pictures = [CHANGES[change](picture) for picture in pictures]
        found.append(scorer.scores(pictures, prompts).total.detach().cpu().double())
    return torch.cat(found)


def _pairs(
    rankings: Sequence[Ranking], images: Images, scores: Tensor
) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """Margins (P,), the rows (better, worse), and the ranking's number, of all decided pairs."""
    pairs, owner = [], []
    for number, (ranking, places) in enumerate(zip(rankings, images.places, strict=True)):
        for i, better in enumerate(places):
            for j, worse in enumerate(places):
                if ranking.merits[i] > ranking.merits[j]:
                    pairs.append((better, worse))
                    owner.append(number)
    table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    margins = (scores[table[:, 0]] - scores[table[:, 1]]).numpy()
    return margins, pairs, np.array(owner, dtype=int)


def _flips(scorer: Scorer, images: Images, before: Tensor, change: str) -> float | None:
    rows = [row for row, text in enumerate(images.prompts.text) if allowed(change, text)]
    if not rows:
        return None
    try:
        return stability(before[rows], score(scorer, images, change, rows), images.prompts[rows]).flips
    except RewardError:  # no prompt has two different scores
        return None


def _fooled(
    scorer: Scorer, images: Images, before: Tensor, margins: np.ndarray, pairs: Sequence[tuple[int, int]]
) -> float | None:
    right = [pair for pair, margin in zip(pairs, margins, strict=True) if margin > 0]
    if not right:
        return None
    worse = sorted({worse for _, worse in right})
    after = dict(zip(worse, score(scorer, images, "words", worse).tolist(), strict=True))
    return float(np.mean([after[worse] > float(before[better]) for better, worse in right]))


def table(rows: Sequence[Judged]) -> list[dict[str, Any]]:
    """For people."""
    return [
        {
            "scorer": row.scorer,
            "set": row.data,
            "pairs": row.accuracy.pairs,
            "right": f"{_percent(row.accuracy.right)} [{_percent(row.accuracy.low)}, {_percent(row.accuracy.high)}]",
            "temperature": row.accuracy.temperature,
            "ECE": row.accuracy.error,
            "log loss": row.accuracy.log_loss,
            **{f"{change} flips": _percent(share) for change, share in row.flips.items()},
            "fooled by words": _percent(row.fooled),
        }
        for row in rows
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def write_results(
    folder: Path,
    rows: Sequence[Judged],
    distances: Mapping[str, Tensor],
    contrasts: Mapping[str, Mapping[str, Mapping[str, float]]],
    notes: Sequence[str],
) -> None:
    """Write `results.json` and `index.html` into a folder."""
    from t2i_align.report import write_report
    from t2i_align.runs import write_text

    names = list(dict.fromkeys(row.scorer for row in rows))
    matrices = {
        name: [[_finite(value) for value in line] for line in matrix.tolist()] for name, matrix in distances.items()
    }
    found = [row._asdict() | {"accuracy": {k: _finite(v) for k, v in row.accuracy._asdict().items()}} for row in rows]
    results = {"scorers": names, "sets": found, "starc": matrices, "captions": contrasts, "notes": list(notes)}
    write_text(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    captions = [
        {"scorer": name, **{sort: f"{_percent(said['right'])} of {said['scenes']}" for sort, said in sorts.items()}}
        for name, sorts in contrasts.items()
    ]
    write_report(
        folder / "index.html",
        "judging.html",
        rows=table(rows),
        names=names,
        matrices=matrices,
        captions=captions,
        notes=notes,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
