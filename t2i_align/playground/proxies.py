"""How well a proxy reward agrees with gold: on tiny-sd's pictures of held-out prompts, and on captions gone wrong."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata

from t2i_align.data.images import contact_sheet
from t2i_align.keys import key
from t2i_align.playground.grammar import KINDS, parse
from t2i_align.playground.judged import Judged
from t2i_align.playground.measure import MEASURING_SEED, false_caption
from t2i_align.playground.world import sample_scenes
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.verifier import report

FACTS = ("object", "count", "relation", "background")
Values = NDArray[np.floating[Any]]


def score_samples(scorer: Scorer, samples: Judged) -> tuple[Values, Values | None]:
    """Scores of all pictures and, where the scorer has one, their std: (P, K) each."""
    images = samples.images(slice(None)).flatten(0, 1)
    scores = scorer.scores(images, Prompts(tuple(samples.prompts)).repeat(samples.gold.shape[1]))
    std = None if scores.std is None else scores.std.numpy().reshape(samples.gold.shape)
    return scores.total.numpy().reshape(samples.gold.shape), std


def agreement(scores: Values, gold: Values) -> dict[str, float | int | None]:
    """How scores (P, K) order the pictures of each prompt against gold (P, K).

    `pairwise`: share of the pairs of one prompt with different gold that the scores order alike (a tie counts half);
    `pearson`, `spearman`: mean over prompts whose pictures differ in gold; `pairs`, `prompts`: how many there are.
    """
    difference = gold[:, :, None] - gold[:, None, :]
    pairs = difference > 0
    order = np.sign(scores[:, :, None] - scores[:, None, :])[pairs]
    varied = [row for row in range(len(gold)) if np.ptp(gold[row]) > 0 and np.ptp(scores[row]) > 0]
    pearson = [np.corrcoef(scores[row], gold[row])[0, 1] for row in varied]
    spearman = [np.corrcoef(rankdata(scores[row]), rankdata(gold[row]))[0, 1] for row in varied]
    return {
        "pairwise": _mean((order + 1) / 2),
        "pearson": _mean(np.array(pearson)),
        "spearman": _mean(np.array(spearman)),
        "pairs": len(order),
        "prompts": len(varied),
    }


def measure_proxy(scorer: Scorer, samples: Judged) -> dict[str, Any]:
    """The agreement table of a scorer: over all, by kind of prompt, and with each sort of fact instead of gold.

    A scorer with a std also gets `std`: the mean std of the margins of wrongly and of rightly ordered pairs, and the
    pairwise accuracy on the half of the pairs that is surer, by margin over std, and on the other half.
    """
    scores, std = score_samples(scorer, samples)
    kinds = np.array([parse(prompt).kind for prompt in samples.prompts])
    table: dict[str, Any] = {"all": agreement(scores, samples.gold)}
    table |= {kind: agreement(scores[kinds == kind], samples.gold[kinds == kind]) for kind in KINDS}
    for sort, values in _facts(samples).items():
        rows = ~np.isnan(values[:, 0])
        table[f"fact: {sort}"] = agreement(scores[rows], values[rows])
    if std is not None:
        table["std"] = _confidence(scores, std, samples.gold)
    return table


def _facts(samples: Judged) -> dict[str, Values]:
    """For each sort of fact the share of them that holds: (P, K), NaN where a prompt states none."""
    shares = {sort: np.full(samples.gold.shape, np.nan) for sort in FACTS}
    for row, prompt in enumerate(samples.prompts):
        for number, pixels in enumerate(samples.pixels[row]):
            checks = report(pixels, prompt).checks
            for sort in FACTS:
                held = [holds for fact, holds in checks if fact.kind == sort]
                if held:
                    shares[sort][row, number] = fmean(held)
    return shares


def _confidence(scores: Values, std: Values, gold: Values) -> dict[str, float | None]:
    pairs = gold[:, :, None] > gold[:, None, :]
    margin = (scores[:, :, None] - scores[:, None, :])[pairs]
    spread = np.hypot(std[:, :, None], std[:, None, :])[pairs]
    right, ratio = margin > 0, np.abs(margin) / spread
    sure = ratio > np.median(ratio) if len(ratio) else right
    return {
        "std_of_wrong_pairs": _mean(spread[~right]),
        "std_of_right_pairs": _mean(spread[right]),
        "pairwise_sure_half": _mean(right[sure]),
        "pairwise_unsure_half": _mean(right[~sure]),
    }


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def measure_captions(scorer: Scorer, scenes: int = 1000, seed: int = MEASURING_SEED) -> dict[str, dict[str, float]]:
    """How often a drawn held-out scene scores higher with its caption than with one false fact, by sort of fact."""
    images, captions, sorts = [], [], []
    for index, scene in enumerate(sample_scenes(scenes, seed, "heldout")):
        false, changed = false_caption(scene.caption, random.Random(key(seed, "heldout", index)))
        images.append(scene.render())
        captions += [str(scene.caption), str(false)]
        sorts.append(changed[0].kind)
    twice = [image for image in images for _ in range(2)]
    scores = scorer.scores(twice, captions).total.reshape(-1, 2)
    right: dict[str, list[bool]] = {}
    for sort, (true_score, false_score) in zip(sorts, scores.tolist(), strict=True):
        right.setdefault(sort, []).append(true_score > false_score)
    right["all"] = [value for values in right.values() for value in values]
    return {sort: {"right": fmean(values), "scenes": len(values)} for sort, values in right.items()}


def measure_swaps(scorer: Scorer, scenes: int = 1000, seed: int = MEASURING_SEED) -> dict[str, float]:
    """How often a scene of two things scores higher with its caption than with one whose two colours change places.

    The words are the same, so that only a scorer that binds a colour to its shape does better than a coin. Ties are
    not right. NaN where no scene has two things of different colours and shapes.
    """
    images, captions = [], []
    for scene in sample_scenes(scenes, seed, "heldout"):
        things = scene.caption.things
        if len(things) < 2 or things[0].colour == things[1].colour or things[0].shape == things[1].shape:
            continue
        one, other = things
        swapped = (one._replace(colour=other.colour), other._replace(colour=one.colour))
        images += [scene.render()] * 2
        captions += [str(scene.caption), str(replace(scene.caption, things=swapped))]
    if not images:
        return {"right": math.nan, "scenes": 0}
    true_score, false_score = scorer.scores(images, captions).total.reshape(-1, 2).T
    return {"right": float((true_score > false_score).float().mean()), "scenes": len(true_score)}


def mistakes(scorer: Scorer, samples: Judged, number: int = 8, sheet: Path | None = None) -> list[dict[str, Any]]:
    """The prompts on which the scorer is most wrong: its favourite picture, and the one gold prefers by most.

    Args:
        scorer: what is judged.
        samples: pictures with gold.
        number: of prompts.
        sheet: PNG to write: a row per prompt, the scorer's favourite on the left.
    """
    scores, _ = score_samples(scorer, samples)
    favourite, best = scores.argmax(1), samples.gold.argmax(1)
    rows = np.arange(len(scores))
    regret = samples.gold[rows, best] - samples.gold[rows, favourite]
    worst = sorted(rows, key=lambda row: (-regret[row], row))[:number]
    found = []
    for row in worst:
        shown = {"favourite": favourite[row], "better": best[row]}
        values = {
            name: {"score": round(float(scores[row, i]), 4), "gold": round(float(samples.gold[row, i]), 4)}
            for name, i in shown.items()
        }
        found.append({"prompt": samples.prompts[row], **values})
    if sheet is not None:
        pictures = [Image.fromarray(samples.pixels[row, i]) for row in worst for i in (favourite[row], best[row])]
        contact_sheet(pictures, 2, labels=[samples.prompts[row] for row in worst], zoom=3).save(sheet)
    return found
