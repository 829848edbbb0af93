"""Scale-free mixing: transforms of one scorer that make it comparable with others.

`rank` and `zscore` compare the images of one prompt within a call; `calibrated`, `log_sigmoid` and `par` compare an
image with samples of the base model for its prompt (`reference.py`), so that a score depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.compose import Composite, call_name, exact
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.reference import Reference, find_reference


def group_index(prompts: Prompts) -> Tensor:
    """(B,) long: which images have one prompt; groups are numbered in order of appearance."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(prompts.text))}
    return torch.tensor([numbers[text] for text in prompts.text])


def group_zscore(values: Tensor, group: Tensor, ddof: int = 0) -> tuple[Tensor, Tensor]:
    """Standardise (B,) values within groups (B,): (z, standard deviation), both (B,).

    A group without spread (one image, or all equal) has z = 0; NaN stays NaN and does not count.
    """
    precise = exact(values)  # float32 sums of equal numbers leave residues that would become z = 1
    group, valid = group.to(precise.device), ~precise.isnan()
    known, groups = precise.where(valid, 0.0), int(group.max()) + 1

    def total(rows: Tensor) -> Tensor:
        return rows.new_zeros(groups).index_add(0, group, rows)

    n = total(valid.double())
    off = torch.where(valid, known - (total(known) / n)[group], 0.0)
    variance = (total(off.square()) / (n - ddof).clamp(min=1))[group]
    spread = variance > 0
    std = torch.where(spread, variance.where(spread, 1.0).sqrt(), 0.0)
    z = torch.where(spread, off / std.where(spread, 1.0), 0.0 * off)
    return z.where(valid, torch.nan).to(values), std.to(values)


def group_rank(values: Tensor, group: Tensor) -> Tensor:
    """Ranks (B,) in [0, 1] within groups (B,): the share of the others that one beats, ties half; .5 alone.

    NaN stays NaN and does not count.
    """
    order = values.argsort(stable=True)  # NaN last
    order = order[group[order].argsort(stable=True)]
    sorted_values, sorted_group = values[order], group[order]
    new_group = torch.ones_like(group, dtype=torch.bool)
    new_group[1:] = sorted_group[1:] != sorted_group[:-1]
    new_value = new_group.clone()
    new_value[1:] |= sorted_values[1:] != sorted_values[:-1]
    place = torch.arange(len(values), device=values.device)
    first = place.where(new_group, 0).cummax(0).values  # where the row's group begins
    tie = new_value.long().cumsum(0) - 1
    ties = torch.zeros(len(values), device=values.device)
    average = ties.index_add(0, tie, (place - first).float()) / ties.index_add(0, tie, torch.ones_like(ties))
    valid = ~values.isnan()
    n = torch.zeros_like(group).index_add(0, group, valid.long())[sorted_group]
    share = torch.where(n > 1, average[tie] / (n - 1).clamp(min=1), 0.5)
    ranks = torch.empty_like(share).index_copy(0, order, share)
    return ranks.where(valid, torch.nan).to(values.dtype)


class Transform(Composite):
    """A function of one scorer's value: `transform` gives the new value and std."""

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        (scores,) = self.combined(measured, prompts)
        total, std = self.transform(scores.total, scores.std, prompts)
        return Scores(total, scores.parts, std)

    def transform(self, values: Tensor, std: Tensor | None, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class Rank(Transform):
    """Rank within the prompt's images of the call, in [0, 1]; ties share the average; no std."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__([scorer], call_name("rank", [scorer]))
        self.groupwise, self.differentiable, self.range = True, False, (0.0, 1.0)
        self.without_std = True

    def transform(self, values: Tensor, std: Tensor | None, prompts: Prompts) -> tuple[Tensor, None]:
        return group_rank(values, group_index(prompts).to(values.device)), None


class ZScore(Transform):
    """(r - mean) / sd over the prompt's images of the call; the std is divided by the sd.

    Args:
        scorer: what is standardised.
        ddof: 0 divides the squares by n, 1 by n - 1.
    """

    def __init__(self, scorer: Scorer, ddof: int = 0) -> None:
        options = {"ddof": int(ddof)} if ddof else {}
        super().__init__([scorer], call_name("zscore", [scorer], **options))
        self.groupwise, self.ddof = True, int(ddof)

    def transform(self, values: Tensor, std: Tensor | None, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        z, sd = group_zscore(values, group_index(prompts).to(values.device), self.ddof)
        return z, None if std is None else torch.where(sd > 0, std / sd.where(sd > 0, 1.0), 0.0)


class Clamp(Transform):
    """The value within [low, high]; outside, the std is 0 and no gradient passes.

    A reward that cannot grow beyond what good images have cannot be hacked beyond it either.
    """

    def __init__(self, scorer: Scorer, low: float = -float("inf"), high: float = float("inf")) -> None:
        if not low < high:
            raise RewardError(f"Expected low < high in clamp(...) but got {low} and {high}.")
        said = _changed(low=(float(low), -float("inf")), high=(float(high), float("inf")))
        super().__init__([scorer], call_name("clamp", [scorer], **said))
        self.low, self.high = float(low), float(high)
        self.range = (max(self.low, scorer.range[0]), min(self.high, scorer.range[1]))

    def transform(self, values: Tensor, std: Tensor | None, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        inside = (values >= self.low) & (values <= self.high)
        return values.clamp(self.low, self.high), None if std is None else std * inside


class Referred(Transform):
    """A transform that needs a `Reference`: given as `base`, or the calibration of the pipeline that `base` names."""

    def __init__(self, scorer: Scorer, base: Reference | str | None, name: str) -> None:
        super().__init__([scorer], name)
        self.reference = find_reference(base, scorer)
        self.needs_prompt = True

    def refuse(self, prompt: str) -> str | None:
        return super().refuse(prompt) or self.reference.refuse(prompt)


class Calibrated(Referred):
    """(r - median) / scale of the base samples of the prompt; scale = max(1.4826 MAD, half the global sd).

    The global sd is the root of the mean within-prompt variance of the reference: it keeps a prompt whose samples all
    score alike from dividing by 0.
    """

    def __init__(self, scorer: Scorer, base: Reference | str | None = None) -> None:
        super().__init__(scorer, base, call_name("calibrated", [scorer]))

    def transform(self, values: Tensor, std: Tensor | None, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        scale = self.reference.scale(prompts).to(values)
        return (values - self.reference.median(prompts).to(values)) / scale, None if std is None else std / scale


class LogSigmoid(Referred):
    """log sigmoid((r - r_ref) / scale), Wang et al., arXiv 2402.00742: a sum of these is an AND.

    Args:
        scorer: a reward.
        base: the reference.
        center: `mean` or a quantile in [0, 1] of the prompt's base samples. The paper's code takes .85.
        scale: `reference`, that of `calibrated`, or a number in the scorer's unit.
    """

    def __init__(
        self,
        scorer: Scorer,
        base: Reference | str | None = None,
        center: float | str = "mean",
        scale: float | str = "reference",
    ) -> None:
        if center != "mean" and not (isinstance(center, (int, float)) and 0 <= center <= 1):
            raise RewardError(f"Expected the centre of log_sigmoid to be mean or a quantile but got {center!r}.")
        said = _changed(center=(center, "mean"), scale=(_checked(scale, "log_sigmoid"), "reference"))
        super().__init__(scorer, base, call_name("log_sigmoid", [scorer], **said))
        self.center, self.scale = center, scale
        self.range = (-float("inf"), 0.0)

    def transform(self, values: Tensor, std: Tensor | None, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        reference = self.reference
        center = reference.mean(prompts) if self.center == "mean" else reference.quantile(prompts, float(self.center))
        scale = reference.scale(prompts).to(values) if self.scale == "reference" else float(self.scale)
        x = (values - center.to(values)) / scale
        return logsigmoid(x), None if std is None else std / scale * torch.sigmoid(-x)


class Par(Referred):
    """Mean over the base samples of sigmoid((r - r_ref) / scale): preference as reward, Fu et al., arXiv 2502.18770.

    Args:
        scorer: a reward.
        base: the reference.
        scale: a number in the scorer's unit, 1 for Bradley-Terry logits as published; `reference`, that of
            `calibrated`, for scorers that are none.
    """

    def __init__(self, scorer: Scorer, base: Reference | str | None = None, scale: float | str = 1.0) -> None:
        said = _changed(scale=(_checked(scale, "par"), 1.0))
        super().__init__(scorer, base, call_name("par", [scorer], **said))
        self.scale = scale
        self.range = (0.0, 1.0)

    def transform(self, values: Tensor, std: Tensor | None, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        scale = self.reference.scale(prompts).to(values)[:, None] if self.scale == "reference" else float(self.scale)
        win = torch.sigmoid((values[:, None] - self.reference.samples(prompts).to(values)) / scale)  # (B, K)
        slope = (win * (1 - win) / scale).nanmean(1)
        total = win.nanmean(1)  # samples that gave NaN do not count
        return total.where(~values.isnan(), torch.nan), None if std is None else std * slope


def _checked(scale: float | str, function: str) -> float | str:
    if scale != "reference" and not (isinstance(scale, (int, float)) and scale > 0):
        raise RewardError(f"Expected the scale of {function} to be 'reference' or a positive number but got {scale!r}.")
    return scale


def _changed(**options: tuple[Any, Any]) -> dict[str, Any]:
    """The options that are not at their default."""
    return {name: value for name, (value, default) in options.items() if value != default}
