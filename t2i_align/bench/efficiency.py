"""How many images a method needs for the gain that GRPO ends with: where learning curves first cross a level.

Gains are those of the runs' looks: one set of held-out prompts and noise, whatever sampler training uses. Rewards of
training's own images would not do: each round has other prompts, which differ by more than a run gains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from t2i_align.bench.steering_report import estimate

if TYPE_CHECKING:
    from t2i_align.bench.training_report import Line

AGAINST = "grpo"
COMPARED = {"clip": ("refl", "draft", "alignprop"), "gold": ("ddpo", "d3po", "prdp", "vard")}
LAST = 3  # looks at the end of a curve whose mean is the gain that it ends with
FIFTH = 0.2  # of GRPO's images: what reward gradients should need at most
SHARES = (0.5, 1.0)  # of GRPO's gain

Result = dict[str, Any]
Points = list[tuple[float, float]]  # images, gain


class Need(NamedTuple):
    """Images (one number per seed, None where the level is not reached) that a method needs for a gain."""

    label: str
    reward: str
    gain: float
    seeds: list[int]
    images: list[float | None]
    budget: float

    def over(self, seeds: set[int]) -> tuple[float, bool]:
        """Mean over some seeds, with all of the budget for those that do not get there, and whether there are any."""
        mine = [value for seed, value in zip(self.seeds, self.images, strict=True) if seed in seeds]
        return fmean(self.budget if value is None else value for value in mine), None in mine

    @property
    def mean(self) -> float | None:
        """Over seeds; None where one of them does not get there."""
        known = [value for value in self.images if value is not None]
        return fmean(known) if len(known) == len(self.images) else None

    def __str__(self) -> str:
        if self.mean is None:
            missed = sum(value is None for value in self.images)
            return f"> {self.budget:.0f} ({missed} of {len(self.images)} seeds)"
        known = [value for value in self.images if value is not None]
        return f"{self.mean:.0f}" + (f" ({min(known):.0f} to {max(known):.0f})" if len(known) > 1 else "")


def learning_curve(run: Result) -> Points:
    """Images and gain of the trained reward at the looks of a run, from 0, 0 on."""
    looks = run["looks"]
    return [(look["images"], look["reward"] - looks[0]["reward"]) for look in looks]


def crossing(points: Points, level: float) -> float | None:
    """Where a curve, straight between its points, first reaches a level; None where it does not."""
    if points[0][1] >= level:
        return points[0][0]
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if high >= level:
            return before + (after - before) * (level - low) / (high - low)
    return None


def final_gain(line: Line) -> float:
    """The gain that a method ends with, over seeds and the last looks."""
    return fmean(value for run in line.runs for _, value in learning_curve(run)[-LAST:])


def needs(lines: Sequence[Line], share: float = 1.0) -> list[Need]:
    """What GRPO and the methods that are compared with it need for a share of GRPO's gain, by reward.

    Rewards on which GRPO was not run, or gained nothing, are left out.
    """
    found = []
    for reward, labels in COMPARED.items():
        mine = {line.label: line for line in lines if line.reward == reward}
        gain = share * final_gain(mine[AGAINST]) if AGAINST in mine else 0.0
        for label in (AGAINST, *labels) if gain > 0 else ():
            if label in mine:
                images = [crossing(learning_curve(run), gain) for run in mine[label].runs]
                seeds = [run["seed"] for run in mine[label].runs]
                found.append(Need(label, reward, gain, seeds, images, mine[label].mean("images")))
    return found


def need_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The cells of a table by column: images to shares of GRPO's gain, in brackets the least and the most by seed."""
    by_share = {share: needs(lines, share) for share in SHARES}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for share, found in by_share.items():
        for need in found:
            row = rows.setdefault((need.reward, need.label), {"reward": need.reward, "method": need.label})
            row[f"images to {share:.0%} of GRPO's gain"] = f"{need} for {need.gain:+.3f}"
    return [row for row in rows.values() if len(row) == 2 + len(SHARES)]


def need_findings(lines: Sequence[Line]) -> Iterator[str]:
    """What was expected of reward gradients and of VARD, and whether it holds."""
    found = {(need.reward, need.label): need for need in needs(lines)}
    for (reward, label), need in found.items():
        against = found[reward, AGAINST]
        if label == AGAINST or (reward == "gold" and label != "vard"):
            continue
        said = f"{label} needs {need} images for the {need.gain:+.3f} that grpo ends with on {reward}, grpo {against}"
        both = set(need.seeds) & set(against.seeds)
        share, most = None, math.inf
        if both and need.mean is not None:
            least, missed = against.over(both)
            share = need.over(both)[0] / least
            said += f": {'at most ' * missed}{share:.2f} of them" + " on the seeds of both" * (
                len(both) < len(against.seeds)
            )
            if len(both) > 2 and not missed:  # of two seeds it says nothing
                low, most = ratio_interval(need, against, both)
                said += f" (95 % interval over {len(both)} seeds: {low:.2f} to {most:.2f})"
        if reward == "clip":
            yield f"{said}. A fifth at most is {verdict(share, most, FIFTH, 'reached', 'not reached')}."
        else:
            yield f"{said}. Fewer than grpo's: {verdict(share, most, 1.0, 'yes', 'no')}."


def ratio_interval(need: Need, against: Need, seeds: set[int]) -> tuple[float, float]:
    """The 95 % interval of the ratio of images by seed, Student's t of its logarithm; all seeds get there."""
    mine, theirs = (dict(zip(each.seeds, each.images, strict=True)) for each in (need, against))
    logs = [math.log(max(1.0, mine[seed] or 0.0) / max(1.0, theirs[seed] or 0.0)) for seed in sorted(seeds)]
    mean, half = estimate(logs)
    return math.exp(mean - half), math.exp(mean + half)


def verdict(share: float | None, most: float, bound: float, yes: str, no: str) -> str:
    """Whether a share keeps within a bound, and whether the upper end of its interval does, too."""
    if share is None or share > bound:
        return no
    return yes if most <= bound or math.isinf(most) else f"{yes} on average, but not by the interval"
