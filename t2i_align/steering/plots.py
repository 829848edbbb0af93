"""`history.png`: what happened to one prompt's particles: rewards, effective sample size, ancestry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

GRAY, BLUE, RED = "#b0b7bf", "#3b6ea5", "#b3261e"
WIDTH, HEIGHT = 7.0, 2.2  # inches of one panel

History = Sequence[dict[str, Any]]


def plot_history(history: History, path: Path, title: str = "", unit: str = "reward") -> None:
    """Draw one prompt's history (see `live.slice_row`): a panel for each thing that the method records.

    `rewards`: (K,) or, of several tries per particle, (K, M) a row; `ess`: a number; `ancestors`: (K,).
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    stages = _stages(history)
    rows = [row for stage in stages for row in stage]
    rewards = [(row["row"], np.array(row["rewards"], dtype=float)) for row in rows if "rewards" in row]
    sizes = [(row["row"], float(row["ess"])) for row in rows if "ess" in row]
    lines = [found for stage in stages if (found := [row for row in stage if "ancestors" in row])]
    panels = [bool(rewards), bool(sizes), bool(lines)]
    figure = Figure(figsize=(WIDTH, HEIGHT * max(1, sum(panels))), layout="constrained", dpi=110)
    axes = iter(np.atleast_1d(figure.subplots(max(1, sum(panels)), 1, sharex=True)))
    if rewards:
        _draw_rewards(next(axes), rewards, unit)
    if sizes:
        _draw_sizes(next(axes), sizes, max((len(found[0]["ancestors"]) for found in lines), default=None))
    if lines:
        ancestry = next(axes)
        for found in lines:
            _draw_ancestry(ancestry, found)
    figure.suptitle(title, fontsize=9, parse_math=False)  # "$20, now $10" is a price
    figure.savefig(path)


def _stages(history: History) -> list[list[dict[str, Any]]]:
    """The rows of a chain's stages, which count their steps anew; here each goes on where the one before ended."""
    stages: list[list[dict[str, Any]]] = []
    start = end = before = 0
    for row in history:
        if not stages or row["row"] <= before:
            stages.append([])
            start = end
        before, end = row["row"], start + row["row"]
        stages[-1].append(row | {"row": end})
    return stages


def _draw_rewards(axes: Any, rewards: list[tuple[int, Any]], unit: str) -> None:
    best, highest = [], -np.inf
    for row, values in rewards:
        flat = values[np.isfinite(values)].ravel()
        axes.plot([row] * len(flat), flat, ".", color=GRAY, markersize=4)
        highest = max(highest, flat.max(initial=-np.inf))
        best.append(highest)
    means = [values[np.isfinite(values)].mean() if np.isfinite(values).any() else np.nan for _, values in rewards]
    rows = [row for row, _ in rewards]
    axes.plot(rows, means, color=BLUE, marker=".", label="mean")
    axes.plot(rows, best, color=RED, marker=".", label="best so far")
    axes.set_ylabel(unit if len(unit) < 24 else "reward", fontsize=8, parse_math=False)
    _finish(axes, legend=True)


def _draw_sizes(axes: Any, sizes: list[tuple[int, float]], particles: int | None) -> None:
    axes.plot(*zip(*sizes, strict=True), ".-", color=BLUE)
    axes.set_ylim(0, (particles or max(size for _, size in sizes)) * 1.05)
    axes.set_ylabel("effective particles", fontsize=8)
    _finish(axes)


def _draw_ancestry(axes: Any, lines: History) -> None:
    """From each resampling of a stage to the next a line from parent to child; in red those that reach the end."""
    ancestors = [np.array(row["ancestors"], dtype=int) for row in lines]
    alive = np.ones(len(ancestors[-1]), dtype=bool)
    for at in range(len(ancestors) - 1, -1, -1):
        left, right = lines[at]["row"], lines[at + 1]["row"] if at + 1 < len(lines) else lines[at]["row"] + 1
        for child, parent in enumerate(ancestors[at]):
            colour, order = (RED, 2) if alive[child] else (GRAY, 1)
            axes.plot([left, right], [parent, child], color=colour, linewidth=0.9, zorder=order)
        before = np.zeros_like(alive)
        before[ancestors[at][alive]] = True
        alive = before
    axes.set_ylabel("particle", fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    _finish(axes)


def _finish(axes: Any, legend: bool = False) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=7, frameon=False)
