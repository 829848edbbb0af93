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

from t2i_align.data.preferences import Preferences, Ranking
from t2i_align.judging.accuracy import Accuracy, accuracy
from t2i_align.judging.changes import CHANGES, allowed
from t2i_align.judging.paraphrases import Paraphrases, paraphrases
from t2i_align.judging.samples import best_of
from t2i_align.judging.score import Images, collect, score
from t2i_align.prompts import Prompts
from t2i_align.rewards import RewardError
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.diagnostics import stability, starc


class Judged(NamedTuple):
    """What was found of one scorer on one set.

    `flips`: share of the pairs of one prompt whose order turns, by change of the images; None where no pair was left to
    turn. `reworded`: likewise under paraphrases of the prompt, by rule and over "all"; empty for a scorer that reads no
    prompt. `fooled`: share of the rightly ordered pairs that turn when the prompt is written on the worse image.
    """

    scorer: str
    data: str
    accuracy: Accuracy
    flips: dict[str, float | None]
    reworded: dict[str, float | None]
    fooled: float | None


class Verdicts(NamedTuple):
    """What was found of K scorers.

    `rows`: one a scorer and set. `distances`: (K, K) STARC distances by set, and by optimised part of the base's
    samples. `gains`: (K,) by which each scorer's mean rises from the base's samples to these, in sds within a prompt.
    """

    rows: list[Judged]
    distances: dict[str, Tensor]
    gains: dict[str, Tensor]


def judge(
    scorers: Sequence[Scorer],
    sets: Mapping[str, Preferences],
    *,
    limit: int | None = None,
    seed: int = 0,
    given: Paraphrases | None = None,
    base: str = "",
    optimised: Sequence[str] = (),
    best: int = 0,
) -> Verdicts:
    """Judge scorers on preference sets.

    Args:
        scorers: what is judged; their networks decide the device.
        sets: preferences by name.
        limit: rankings of each set that are looked at, the first ones.
        seed: of the intervals.
        given: paraphrases of prompts, besides those by rule.
        base: the set of samples that `gains` start from.
        optimised: the sets of samples that they lead to.
        best: n of the best-of-n by each scorer among these samples; 0 for none.
    """
    rows, distances = [], {}
    samples: dict[str, tuple[Prompts, Tensor]] = {}
    for name, preferences in sets.items():
        rankings = [ranking for ranking in preferences.rankings if len(ranking.images) > 1][:limit]
        images = collect(rankings)
        scores = torch.stack([score(scorer, images) for scorer in scorers], 1)
        for scorer, values in zip(scorers, scores.T, strict=True):
            flips = {change: _flips(scorer, images, values, change) for change in CHANGES}
            margins, pairs, owner = _pairs(rankings, images, values)
            found, words = accuracy(margins, owner, seed), _reworded(scorer, images, values, given)
            rows.append(Judged(scorer.name, name, found, flips, words, _fooled(scorer, images, values, margins, pairs)))
        samples[name] = images.prompts, scores
        if name == base and best:
            for scorer, values in zip(scorers, scores.T, strict=True):
                kept = best_of(values, images.places, best)
                samples[f"best of {best} by {scorer.name}"] = images.prompts[kept], scores[kept]
                optimised = (*optimised, f"best of {best} by {scorer.name}")
    distances = {name: starc(scores, prompts) for name, (prompts, scores) in samples.items()}
    gains = {name: _gains(samples[base], samples[name]) for name in optimised} if base else {}
    return Verdicts(rows, distances, gains)


def _gains(base: tuple[Prompts, Tensor], found: tuple[Prompts, Tensor]) -> Tensor:
    """(K,) mean over the prompts of both of how much scores (N, K) rise, in sds within a prompt of the base."""
    (before, spread), (after, _) = _moments(*base), _moments(*found)
    shared = [prompt for prompt in after if prompt in before]
    if not shared:
        return torch.full_like(spread, float("nan"))
    return torch.stack([after[prompt] - before[prompt] for prompt in shared]).nanmean(0) / spread


def _moments(prompts: Prompts, scores: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Means (K,) of each prompt, and the sd (K,) within prompts."""
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(prompts.text):
        rows.setdefault(text, []).append(row)
    means = {text: scores[mine].nanmean(0) for text, mine in rows.items()}
    off = scores - torch.stack([means[text] for text in prompts.text])
    return means, off.square().nanmean(0).sqrt()


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
    return _turned(before[rows], score(scorer, images, change, rows), images.prompts[rows])


def _reworded(scorer: Scorer, images: Images, before: Tensor, given: Paraphrases | None) -> dict[str, float | None]:
    """Flips by rule; a paraphrase that the scorer refuses is left out."""
    if not scorer.needs_prompt:
        return {}
    texts = {text: paraphrases(text, given) for text in dict.fromkeys(images.prompts.text)}
    said = [(row, rule, text) for row, prompt in enumerate(images.prompts.text) for rule, text in texts[prompt]]
    said = [(row, rule, text) for row, rule, text in said if not scorer.refuse(text)]
    if not said:
        return {}
    rows = [row for row, _, _ in said]
    after = score(scorer, images, only=rows, texts=[text for _, _, text in said])
    # Pairs are those of one prompt under one paraphrase.
    groups = Prompts(tuple(f"{images.prompts.text[row]}\n{rule}\n{text}" for row, rule, text in said))
    found = {}
    for name in (*dict.fromkeys(rule for _, rule, _ in said), "all"):
        mine = [place for place, (_, rule, _) in enumerate(said) if name in (rule, "all")]
        found[name] = _turned(before[[rows[place] for place in mine]], after[mine], groups[mine])
    return found


def _turned(before: Tensor, after: Tensor, prompts: Prompts) -> float | None:
    try:
        return stability(before, after, prompts).flips
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
            "right": _interval(row.accuracy),
            "temperature": row.accuracy.temperature if row.accuracy.pairs else None,  # inf where it is blind
            "ECE": _finite(row.accuracy.error),
            "log loss": _finite(row.accuracy.log_loss),
            **{f"{change} flips": _percent(share) for change, share in row.flips.items()},
            "paraphrase flips": _percent(row.reworded.get("all")),
            "fooled by words": _percent(row.fooled),
        }
        for row in rows
    ]


def _interval(found: Accuracy) -> str:
    if not found.pairs:
        return "-"
    return f"{_percent(found.right)} [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def write_results(
    folder: Path,
    verdicts: Verdicts,
    contrasts: Mapping[str, Mapping[str, Mapping[str, float]]],
    notes: Sequence[str],
) -> None:
    """Write `results.json` and `index.html` into a folder."""
    from t2i_align.report import write_report
    from t2i_align.runs import write_text

    rows = verdicts.rows
    names = list(dict.fromkeys(row.scorer for row in rows))
    matrices = {
        name: [[_finite(value) for value in line] for line in matrix.tolist()]
        for name, matrix in verdicts.distances.items()
    }
    gains = {name: [_finite(value) for value in line.tolist()] for name, line in verdicts.gains.items()}
    found = [row._asdict() | {"accuracy": {k: _finite(v) for k, v in row.accuracy._asdict().items()}} for row in rows]
    results = {"scorers": names, "sets": found, "starc": matrices, "gains": gains, "captions": contrasts}
    write_text(folder / "results.json", json.dumps(results | {"notes": list(notes)}, indent=2, allow_nan=False) + "\n")
    sorts = dict.fromkeys(sort for said in contrasts.values() for sort in said)
    captions = [
        {"scorer": name, **{s: f"{_percent(said[s]['right'])} of {said[s]['scenes']}" for s in sorts}}
        for name, said in contrasts.items()
    ]
    rules = dict.fromkeys(rule for row in rows for rule in row.reworded)
    reworded = [
        {"scorer": row.scorer, "set": row.data, **{rule: _percent(row.reworded.get(rule)) for rule in rules}}
        for row in rows
        if row.reworded
    ]
    write_report(
        folder / "index.html", "judging.html", rows=table(rows), names=names, matrices=matrices, captions=captions,
        reworded=reworded, gains=gains, notes=notes,
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
