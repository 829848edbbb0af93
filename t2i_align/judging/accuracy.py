"""Agreement of a scorer with preferences: pairwise accuracy with an interval, and calibration of its differences.

The interval is a bootstrap over rankings, whose pairs are not independent. A difference of scores is calibrated as
P(better) = sigmoid(difference / temperature) (Bradley and Terry), with the temperature of the highest likelihood.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from t2i_align.keys import key

DRAWS = 1000
BINS = 10  # of confidence, from 1/2 to 1
STEEPEST = 1e4  # inverse temperature times the sd of the differences: where all pairs are right, there is no best one

Values = NDArray[np.floating[Any]]


class Accuracy(NamedTuple):
    """Share of decided pairs that a scorer orders as people do, ties half; NaN without pairs.

    `low`, `high`: 95 % interval over rankings. `temperature`: difference of scores at which the odds are e to 1;
    `error`: mean gap between confidence and accuracy (ECE); `log_loss`: nats a pair, 0.693 for a coin.
    """

    right: float
    low: float
    high: float
    pairs: int
    temperature: float
    error: float
    log_loss: float


def accuracy(margins: Values, rankings: NDArray[np.integer[Any]], seed: int = 0) -> Accuracy:
    """Judge differences of scores.

    Args:
        margins: (P,) score of the better image less that of the worse; NaN pairs are left out.
        rankings: (P,) number of the ranking a pair comes from.
        seed: of the bootstrap.
    """
    known = ~np.isnan(margins)
    margins, rankings = margins[known].astype(float), rankings[known]
    if not len(margins):
        return Accuracy(*(float("nan"),) * 3, 0, *(float("nan"),) * 3)
    right = (np.sign(margins) + 1) / 2
    _, row = np.unique(rankings, return_inverse=True)
    hits, counts = np.bincount(row, right), np.bincount(row).astype(float)
    rng = np.random.default_rng(key(seed, "bootstrap"))
    drawn = (rng.integers(len(hits), size=len(hits)) for _ in range(DRAWS))
    low, high = np.quantile([hits[rows].sum() / counts[rows].sum() for rows in drawn], (0.025, 0.975))
    slope = _slope(margins)
    sure = expit(slope * np.abs(margins))
    place = np.minimum((2 * BINS * (sure - 0.5)).astype(int), BINS - 1)
    gap = np.bincount(place, sure - right, BINS)
    loss = float(np.logaddexp(0, -slope * margins).mean())
    temperature = 1 / slope if slope else float("inf")
    return Accuracy(
        float(right.mean()),
        float(low),
        float(high),
        len(margins),
        temperature,
        float(np.abs(gap).sum() / len(margins)),
        loss,
    )


def _slope(margins: Values) -> float:
    """The inverse temperature of the highest likelihood, at least 0."""
    sd = float(np.sqrt(np.square(margins).mean()))
    if not sd or margins.sum() <= 0:  # the likelihood falls from 0 on
        return 0.0

    def loss(log_slope: float) -> float:
        return float(np.logaddexp(0, -np.exp(log_slope) * margins / sd).mean())

    found = minimize_scalar(loss, bounds=(np.log(1 / STEEPEST), np.log(STEEPEST)), method="bounded")
    return float(np.exp(found.x)) / sd
