"""Is a value function right? Its predictions against final rewards, by noise level.

Predictions are made of a round's images before the value function learns from them, so that all of them are new to it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

COLUMNS, SIZE, BINS = 4, 2.2, 8  # panels in a row, inches of one, groups of equal size in a reliability curve
BLUE, GRAY = "#3b6ea5", "#b0b7bf"


class Calibration(NamedTuple):
    """Of one row of the grid. `r2`: 1 - mean squared error / variance, 1 for perfect, 0 for the mean; `slope` of the
    reward over the prediction, 1 where a difference of values means what it says; `bias`: mean of prediction - reward;
    `error`: mean distance of predicted and real means over groups of images with similar predictions.
    """

    row: int
    correlation: float
    r2: float
    slope: float
    bias: float
    error: float


def calibrate(predicted: Tensor, rewards: Tensor) -> list[Calibration]:
    """Calibration of predictions (n, rows) for rewards (n,), in one unit.

    Images without a reward are left out, and of a row those without a prediction; nan if none is left.
    """
    return [_row(row, *_known(predicted[:, row], rewards)) for row in range(predicted.shape[1])]


def _known(predicted: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """What both have a number of."""
    known = rewards.isfinite() & predicted.isfinite()
    return predicted[known].double(), rewards[known].double()


def _row(row: int, p: Tensor, r: Tensor) -> Calibration:
    if not len(p):
        return Calibration(row, *[math.nan] * 5)
    off_p, off_r = p - p.mean(), r - r.mean()
    spread_p, spread_r, both = off_p.square().mean(), off_r.square().mean(), (off_p * off_r).mean()
    slope = float(both / spread_p) if spread_p > 0 else 0.0
    correlation = float(both / (spread_p * spread_r).sqrt()) if spread_p * spread_r > 0 else 0.0
    r2 = float(1 - (p - r).square().mean() / spread_r.clamp(min=1e-12))
    error = sum(share * abs(mean - real) for mean, real, share in reliability(p, r))
    return Calibration(row, correlation, r2, slope, float((p - r).mean()), error)


def within_prompts(predicted: Tensor, rewards: Tensor, group: int) -> list[float]:
    """Correlation of predictions (n, rows) with rewards (n,), both less their means over a prompt's `group` images.

    What steering and training live on: which of a prompt's images is better. A value function that only knows which
    prompts are hard has 0 here. Prompts with an image without a number are left out.
    """
    r = rewards.double().reshape(-1, group)
    p = predicted.double().reshape(-1, group, predicted.shape[1])
    off_p, off_r = p - p.mean(1, keepdim=True), r - r.mean(1, keepdim=True)  # nan throughout where one is
    return [row.correlation for row in calibrate(off_p.flatten(0, 1), off_r.flatten())]


def reliability(predicted: Tensor, rewards: Tensor) -> list[tuple[float, float, float]]:
    """Of groups of images with similar predictions (n,): mean prediction, mean reward, share of the images."""
    groups = predicted.argsort().chunk(BINS) if len(predicted) else ()
    return [(float(predicted[g].mean()), float(rewards[g].mean()), len(g) / len(predicted)) for g in groups]


def plot_calibration(predicted: Tensor, rewards: Tensor, path: Path) -> None:
    """A panel per noise level, noisiest first: mean rewards over mean predictions of groups of images; r2 by row."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    rows = predicted.shape[1]
    lines = -(-(rows + 1) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * SIZE, lines * SIZE), layout="constrained", dpi=110)
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    found = calibrate(predicted, rewards)
    known = rewards[rewards.isfinite()].double()
    low, high = (float(known.quantile(q)) for q in (0.02, 0.98))
    for row, axes in zip(range(rows), panels, strict=False):
        axes.plot([low, high], [low, high], color=GRAY, linewidth=1)
        means = [means[:2] for means in reliability(*_known(predicted[:, row], rewards))]
        if means:
            axes.plot(*zip(*means, strict=True), ".-", color=BLUE)
        axes.set_title(f"row {row}: corr. {found[row].correlation:.2f}, error {found[row].error:.2f}", fontsize=7)
        axes.set(xlim=(low, high), ylim=(low, high))
    panels[rows].plot([each.r2 for each in found], ".-", color=BLUE)
    panels[rows].axhline(0, color=GRAY, linewidth=1)
    panels[rows].set_title("r2 by row, noisiest first", fontsize=7)
    for axes in panels:
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[rows + 1 :]:
        axes.set_visible(False)
    figure.savefig(path)
