"""A scorer on held-out examples: pairwise accuracy with an interval, calibration, errors of scores."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from t2i_align.judging.accuracy import DRAWS, accuracy
from t2i_align.keys import key
from t2i_align.runs import append_jsonl, read_jsonl
from t2i_align.scorer_training.blocks import ScorerRun
from t2i_align.scorer_training.data import Examples, Pictures
from t2i_align.scorer_training.method import ScorerTraining
from t2i_align.training.checkpoints import State, write_best
from t2i_align.training.loop import Observer
from t2i_align.training.metrics import forget_after

EVALUATIONS = "evaluations.jsonl"
Values = NDArray[np.floating[Any]]


def margins(values: Tensor, examples: Examples, by_prompt: bool) -> tuple[Values, NDArray[np.integer[Any]]]:
    """Score of the better picture less that of the worse, (M,), and the number of the group, of all decided pairs.

    Args:
        values: scores (N,) of `examples.flat`.
        examples: with merits.
        by_prompt: compare all pictures of a prompt, not of a ranking alone: merits are scores on one scale.
    """
    _, prompts, merits, owner = examples.flat()
    if by_prompt:
        numbers = {text: number for number, text in enumerate(dict.fromkeys(prompts.text))}
        owner = torch.tensor([numbers[text] for text in prompts.text], dtype=torch.long)
    found, groups = [np.empty(0)], [np.empty(0, int)]
    order = owner.argsort(stable=True)
    for rows in order.split(owner.bincount().tolist()):
        better = (merits[rows][:, None] > merits[rows][None]).nonzero()
        gap = (values[rows][better[:, 0]] - values[rows][better[:, 1]]).double().numpy()
        found.append(gap)
        groups.append(np.full(len(gap), int(owner[rows[0]]) if len(rows) else 0))
    return np.concatenate(found), np.concatenate(groups)


def measure(values: Tensor, std: Tensor | None, examples: Examples, comparing: bool) -> dict[str, float]:
    """What scores (N,), and their std, are worth on examples.

    `accuracy` of `pairs`, with `low` and `high` of a 95 % interval, `log_loss` and `calibration_error`: see
    `judging/accuracy.py`. Of scores besides: `rmse`, `mae`, `pearson` and `spearman`, and of a std `within_std`, the
    share of targets within one std of the score, 0.683 for a Gaussian that is right.
    """
    gaps, groups = margins(values, examples, by_prompt=not comparing)
    found: dict[str, float] = {}
    if len(gaps):
        said = accuracy(gaps, groups)
        found = {
            "accuracy": said.right,
            "low": said.low,
            "high": said.high,
            "pairs": said.pairs,
            "log_loss": said.log_loss,
            "calibration_error": said.error,
        }
    if comparing:
        return found
    _, _, merits, _ = examples.flat()
    known = ~values.isnan()
    predicted, targets = values[known].double().numpy(), merits[known].double().numpy()
    off = predicted - targets
    found |= {"rmse": float(np.sqrt(np.square(off).mean())), "mae": float(np.abs(off).mean())}
    if np.ptp(predicted) > 0 and np.ptp(targets) > 0:
        ranks = rankdata(predicted), rankdata(targets)
        found |= {"pearson": float(np.corrcoef(predicted, targets)[0, 1])}
        found |= {"spearman": float(np.corrcoef(*ranks)[0, 1])}
    if std is not None:
        found["within_std"] = float((np.abs(off) <= std[known].double().numpy()).mean())
    return found


def gain(before: Tensor, after: Tensor, examples: Examples, comparing: bool) -> tuple[float, float, float]:
    """Difference of pairwise accuracy of two scorers on the same pairs, with a 95 % interval over rankings."""
    (one, groups), (other, _) = (margins(values, examples, not comparing) for values in (before, after))
    known = ~(np.isnan(one) | np.isnan(other))
    change = ((np.sign(other) - np.sign(one)) / 2)[known]
    _, row = np.unique(groups[known], return_inverse=True)
    if not len(row):
        return (math.nan,) * 3
    sums, counts = np.bincount(row, change), np.bincount(row).astype(float)
    rng = np.random.default_rng(key(0, "bootstrap"))
    drawn = (rng.integers(len(sums), size=len(sums)) for _ in range(DRAWS))
    low, high = np.quantile([sums[rows].sum() / counts[rows].sum() for rows in drawn], (0.025, 0.975))
    return float(change.mean()), float(low), float(high)


@dataclass
class HeldOut(Observer):
    """Measures a member every so many updates, into `evaluations.jsonl`; with `keep: best` into `best.pt`, too."""

    config: ScorerRun
    folder: Path
    method: ScorerTraining
    examples: Examples
    pictures: Pictures
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)

    def look(self, state: State) -> bool:
        """Measure if it is time; never ends the run."""
        path, every = self.folder / EVALUATIONS, self.config.evaluate.every
        if not self.rows:  # of an earlier session
            forget_after(path, state.step)
            self.rows = read_jsonl(path)
        due = state.step % every == 0 or state.step >= state.config.steps
        if due and all(row["step"] != state.step for row in self.rows):
            started = time.perf_counter()
            self.method.eval()
            with state.averaged():
                values, std = self.method.score(
                    self.examples, self.pictures, self.config.evaluate.batch_size, self.device
                )
            self.method.train()
            row = {"step": state.step, **measure(values, std, self.examples, self.config.comparing)}
            row["seconds"] = round(time.perf_counter() - started, 2)
            if self.config.evaluate.keep == "best" and self.best_of([*self.rows, row]) is row:
                write_best(self.folder, state)
            append_jsonl(path, [row])
            self.rows.append(row)
        return False

    @property
    def kept(self) -> dict[str, Any]:
        """The evaluation of the weights that are kept."""
        return self.best_of(self.rows) if self.config.evaluate.keep == "best" else self.rows[-1]

    def best_of(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The row with the most pairs in order or, of scores, the least error; the earlier of equal ones."""
        return max(rows, key=lambda row: row["accuracy"] if self.config.comparing else -row["rmse"])
