"""Reward hacking in finished runs: gold and proxy over d = sqrt(KL), with the fits of Gao et al., arXiv 2210.10760.

    gain(d) = d (alpha - beta log d)        RL's form; alpha: what a little optimisation gains, beta: how it is undone

Everything is read from the runs' `evaluations.jsonl`. Gains count in standard deviations of the scores of the images at
step 0, so that gold and proxy share an axis. KL is that of chains of denoising steps, an upper bound of the images'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_align.errors import T2IError
from t2i_align.rewards.diagnostics import Curve, fit_overoptimisation
from t2i_align.runs import read_jsonl
from t2i_align.training.blocks import TRAINED

FEWEST = 3  # evaluations away from the base that a fit of two numbers needs
COLUMNS, WIDTH, HEIGHT = 3, 3.4, 2.6  # panels in a row, inches of one
GOLD, PROXY = "#b8860b", "#3b6ea5"


class Optimised(NamedTuple):
    """A run's path: `d` (n,) in sqrt(nats), gains (n,) of gold and proxy in base standard deviations, fits."""

    name: str
    d: Tensor
    gold: Tensor
    proxy: Tensor
    gold_fit: Curve
    proxy_fit: Curve

    def row(self) -> dict[str, Any]:
        """For people: how far, what was gained, how much of the best gold is left at the end, where gold turns."""
        best, last = float(self.gold.max()), float(self.gold[-1])
        return {
            "run": self.name,
            "KL": float(self.d[-1] ** 2),
            "proxy gain": float(self.proxy[-1]),
            "gold gain": last,
            "best gold gain": best,
            "kept": last / best if best > 0 else None,
            "alpha": self.gold_fit.alpha,
            "beta": self.gold_fit.beta,
            "fit R2": self.gold_fit.r2(self.d, self.gold),
            "peak KL": peak_of(self.gold_fit, self.d),
        }


def peak_of(curve: Curve, d: Tensor) -> float | None:
    """The KL at which a fitted gold turns; None beyond the largest of d (n,), sqrt(KL), that was seen."""
    if curve.beta <= 0 or curve.alpha / curve.beta - 1 > math.log(float(d.max())):
        return None
    return curve.peak[0] ** 2


def read_run(folder: str | Path, gold: str) -> Optimised:
    """The path of a run.

    Args:
        folder: of a run.
        gold: a scorer that it watched.

    Raises:
        T2IError: not a run's folder, no such scorer, or too few evaluations.
    """
    folder = Path(folder)
    if not (folder / "evaluations.jsonl").is_file():
        raise T2IError(f"Expected {folder} to be the folder of a run, with evaluations.jsonl.")
    start, *rows = read_jsonl(folder / "evaluations.jsonl") or [{"scores": {}}]
    if TRAINED not in start["scores"]:
        raise T2IError(f"Expected evaluations of the trained reward in {folder} but got none: nothing to hold gold to.")
    if gold not in start["scores"]:
        raise T2IError(f"The run {folder} watched {', '.join(start['scores'])}, not {gold!r}.")
    rows = [row for row in rows if row["kl"] > 0]
    if len(rows) < FEWEST:
        raise T2IError(
            f"Expected {FEWEST} or more evaluations after the first in {folder} but got {len(rows)}: evaluate oftener."
        )
    d = torch.tensor([row["kl"] for row in rows], dtype=torch.float64).sqrt()
    gains = {}
    for name in (gold, TRAINED):
        scores = torch.tensor(start["scores"][name], dtype=torch.float64).flatten()
        known = scores[scores.isfinite()]
        spread = float(known.std(correction=0))
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        gains[name] = (values - start[name]) / (spread if spread > 0 else 1.0)
    fits = {name: fit_overoptimisation(d, values, best_of_n=False) for name, values in gains.items()}
    return Optimised(folder.name, d, gains[gold], gains[TRAINED], fits[gold], fits[TRAINED])


def plot_runs(runs: Sequence[Optimised], path: Path) -> None:
    """A panel per run: gold and proxy over sqrt(KL), points measured, lines fitted."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    lines = -(-len(runs) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH, lines * HEIGHT), layout="constrained", dpi=110)
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for axes, run in zip(panels, runs, strict=False):
        at = torch.linspace(1e-3, float(run.d.max()), 100, dtype=torch.float64)
        for label, values, fit, color in (
            ("gold", run.gold, run.gold_fit, GOLD),
            ("proxy", run.proxy, run.proxy_fit, PROXY),
        ):
            axes.plot(run.d, values, ".", color=color, label=label)
            axes.plot(at, fit.at(at), color=color, linewidth=1)
        axes.axhline(0, color="#b0b7bf", linewidth=1)
        axes.set_title(run.name, fontsize=8, parse_math=False)
        axes.set_xlabel("sqrt(KL)", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    for axes in panels[len(runs) :]:
        axes.set_visible(False)
    figure.savefig(path)


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"
