"""Samples of a model as a set to judge on: ranked by gold where there is one, else for distances between scorers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from t2i_align.data.preferences import Preferences, Ranking
from t2i_align.errors import T2IError
from t2i_align.judging.score import collect, score
from t2i_align.rewards.base import Scorer
from t2i_align.scoring import read_rows


def read_samples(source: str, gold: Scorer | None = None) -> Preferences:
    """Images of any input that `t2i-align score` reads, those of one prompt as one ranking.

    Args:
        source: folder or table of images with prompts.
        gold: whose scores rank the images of a prompt; without it all tie, and no pair is decided.

    Raises:
        T2IError: nothing to read, or no prompt with two images.
    """
    images: dict[str, list[str]] = {}
    problems = []
    for row in read_rows(source):
        problem = row.problem or (None if row.prompt else "no prompt")
        if problem or row.prompt is None:
            problems.append(f"{row.image}: {problem}")
        else:
            images.setdefault(row.prompt, []).append(str(row.image))
    alone = [prompt for prompt, files in images.items() if len(files) < 2]
    problems += [f"{prompt:.60}: a single image" for prompt in alone]
    rankings = [
        Ranking(prompt, tuple(files), (0.0,) * len(files)) for prompt, files in images.items() if prompt not in alone
    ]
    if not rankings:
        raise T2IError(f"Expected {source} to have several images of a prompt but it has none.")
    if gold is not None:
        found = collect(rankings)
        merits = score(gold, found).tolist()
        rankings = [
            ranking._replace(merits=tuple(merits[place] for place in places))
            for ranking, places in zip(rankings, found.places, strict=True)
        ]
    return Preferences(tuple(rankings), tuple(problems))


def best_of(scores: Tensor, places: Sequence[Sequence[int]], n: int) -> list[int]:
    """The rows that a best-of-n by these scores returns: the best of each n images of a prompt, in their order.

    Prompts whose images do not make two such samples have none; NaN is never the best.
    """
    values = scores.nan_to_num(nan=-float("inf")).tolist()
    return [
        max(rows[first : first + n], key=values.__getitem__)
        for rows in places
        if len(rows) >= 2 * n
        for first in range(0, len(rows) - n + 1, n)
    ]
