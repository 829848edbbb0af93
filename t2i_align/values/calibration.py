"""Is a value function right? Its predictions against final rewards, by noise level.

Predictions are made of a round's images before the value function learns from them, so that all of them are new to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
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
    """Calibration of predictions (n, rows) for rewards (n,), in one unit; images without one of them are left out."""
    known = rewards.isfinite() & predicted.isfinite().all(1)
    p, r = predicted[known].double(), rewards[known].double()[:, None]
    off_p, off_r = p - p.mean(0), r - r.mean(0)
    spread_p, spread_r = off_p.square().mean(0), off_r.square().mean(0)
    both = (off_p * off_r).mean(0)
    slope = torch.where(spread_p > 0, both / spread_p, 0.0)
    correlation = torch.where(spread_p * spread_r > 0, both / (spread_p * spread_r).sqrt(), 0.0)
    r2 = 1 - (p - r).square().mean(0) / spread_r.clamp(min=1e-12)
    bias = (p - r).mean(0)
    points = [torch.tensor(reliability(p[:, row], r[:, 0]), dtype=torch.float64) for row in range(p.shape[1])]
    error = [float((groups[:, 2] * (groups[:, 0] - groups[:, 1]).abs()).sum()) for groups in points]
    columns = zip(correlation.tolist(), r2.tolist(), slope.tolist(), bias.tolist(), error, strict=True)
    return [Calibration(row, *numbers) for row, numbers in enumerate(columns)]


def within_prompts(predicted: Tensor, rewards: Tensor, group: int) -> list[float]:
    """Correlation of predictions (n, rows) with rewards (n,), both less their means over a prompt's `group` images.

    What steering and training live on: which of a prompt's images is better. A value function that only knows which
    prompts are hard has 0 here. Prompts with an image without a reward are left out.
    """
    r, p = rewards.double().reshape(-1, group), predicted.double().reshape(-1, group, predicted.shape[1])
    known = r.isfinite().all(1) & p.isfinite().flatten(1).all(1)
    p, r = p[known], r[known]
    off_p, off_r = (p - p.mean(1, keepdim=True)).flatten(0, 1), (r - r.mean(1, keepdim=True)).flatten()
    return [row.correlation for row in calibrate(off_p, off_r)]


def reliability(predicted: Tensor, rewards: Tensor) -> list[tuple[float, float, float]]:
    """Of groups of images with similar predictions (n,): mean prediction, mean reward, share of the images."""
    groups = predicted.argsort().chunk(BINS)
    return [(float(predicted[g].mean()), float(rewards[g].mean()), len(g) / len(predicted)) for g in groups]


def plot_calibration(predicted: Tensor, rewards: Tensor, path: Path) -> None:
    """A panel per noise level, noisiest first: mean rewards over mean predictions of groups of images; r2 by row."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    known = rewards.isfinite() & predicted.isfinite().all(1)
    p, r = predicted[known].double(), rewards[known].double()
    rows = p.shape[1]
    lines = -(-(rows + 1) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * SIZE, lines * SIZE), layout="constrained", dpi=110)
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    found = calibrate(p, r)
    low, high = float(r.quantile(0.02)), float(r.quantile(0.98))
    for row, axes in zip(range(rows), panels, strict=False):
        means = [means[:2] for means in reliability(p[:, row], r)]
        axes.plot([low, high], [low, high], color=GRAY, linewidth=1)
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
