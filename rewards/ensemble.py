"""Ensembles of scorers, and what to do with uncertainty: Coste et al., arXiv 2310.02743; Ramé et al., arXiv 2401.12187.

The std of an ensemble is `sqrt(disagreement^2 + mean of the members' own variances)`, the law of total variance, where
disagreement is the standard deviation between the members. The members of `mean`, `worst` and `robust` must be in one
unit: standardise different scorers first, e.g. `mean(calibrated(a), calibrated(b))`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.compose import Composite, call_name, exact, merge, present, root, std_of
from t2i_align.rewards.expression import RewardError

Measured = Mapping[Scorer, tuple[Tensor, ...]]


def soft_min(values: Tensor, b: float) -> Tensor:
    """`-b log mean_i exp(-r_i / b)` over the first dimension, NaN left out: the minimum at b = 0, the mean at infinity.

    With Gaussian members of mean mu and std s it is mu - s^2 / (2 b).
    """
    valid = ~values.isnan()
    if b == 0:
        return values.where(valid, torch.inf).amin(0).where(valid.any(0), torch.nan)
    if b == math.inf:
        return values.nanmean(0)
    worst = -(values / b).where(valid, torch.inf)
    return (-b * (worst.logsumexp(0) - valid.sum(0).to(values).log())).where(valid.any(0), torch.nan)


class Ensemble(Composite):
    """Several scorers of one quantity; `reduce` makes one value of their (members, B) values, NaN left out."""

    function = ""

    def __init__(self, *scorers: Scorer, ddof: int = 0, **said: float) -> None:
        options = {**said, **({"ddof": int(ddof)} if ddof else {})}
        if len(scorers) < 2:
            raise RewardError(f"Expected {self.function}(...) to have 2 or more members but got {len(scorers)}.")
        super().__init__(scorers, call_name(self.function, scorers, **options))
        self.ddof, self.without_std = int(ddof), False
        self.range = (min(s.range[0] for s in scorers), max(s.range[1] for s in scorers))

    def combine(self, measured: Measured, prompts: Prompts) -> Scores:
        scored = self.combined(measured, prompts)
        values = torch.stack([scores.total for scores in scored])  # (members, B)
        valid = present(values, self.members)
        own = torch.stack([std_of(scores) for scores in scored]).where(valid, torch.nan).square().nanmean(0)
        return Scores(self.reduce(values), merge(scored), root(disagreement(values, self.ddof).square() + own))

    def reduce(self, values: Tensor) -> Tensor:
        raise NotImplementedError


def disagreement(values: Tensor, ddof: int = 0) -> Tensor:
    """Standard deviation over the first dimension, NaN left out; ddof 0 divides by n, 1 by n - 1; 0 for one member."""
    precise = exact(values)  # in float32 equal values can differ from their mean
    valid = ~precise.isnan()
    off = (precise - precise.nanmean(0)).where(valid, 0.0)
    variance = off.square().sum(0) / (valid.sum(0) - ddof).clamp(min=1)
    return root(variance).where(valid.any(0), torch.nan).to(values)


class Mean(Ensemble):
    """The members' mean."""

    function = "mean"

    def reduce(self, values: Tensor) -> Tensor:
        return values.nanmean(0)


class Worst(Ensemble):
    """The lowest member (WCO)."""

    function = "worst"

    def reduce(self, values: Tensor) -> Tensor:
        return soft_min(values, 0.0)


class Robust(Ensemble):
    """`nominal * mean + (1 - nominal) * worst`: reward-robust RLHF, arXiv 2409.15360."""

    function = "robust"

    def __init__(self, *scorers: Scorer, nominal: float = 0.5, ddof: int = 0) -> None:
        if not 0 <= nominal <= 1:
            raise RewardError(f"Expected nominal, the mean's share in robust(...), in [0, 1] but got {nominal}.")
        super().__init__(*scorers, ddof=ddof, nominal=float(nominal))
        self.nominal = float(nominal)

    def reduce(self, values: Tensor) -> Tensor:
        return self.nominal * values.nanmean(0) + (1 - self.nominal) * soft_min(values, 0.0)


class SoftMin(Composite):
    """`-b log mean_i exp(-r_i / b)`: between the worst member (b = 0) and their mean (b = inf); arXiv 2606.09073.

    For different goals rather than opinions on one, so its std is not disagreement: it is the members' own, taken as
    independent, weighted by the gradient.
    """

    def __init__(self, *scorers: Scorer, b: float = 0.5) -> None:
        if len(scorers) < 2 or not b >= 0:
            raise RewardError(f"Expected soft_min(...) to have 2 or more members and b >= 0 but got {b=}.")
        super().__init__(scorers, call_name("soft_min", scorers, b=float(b)))
        self.b = float(b)
        self.range = (min(s.range[0] for s in scorers), max(s.range[1] for s in scorers))

    def combine(self, measured: Measured, prompts: Prompts) -> Scores:
        scored = self.combined(measured, prompts)
        values = torch.stack([scores.total for scores in scored])
        valid = present(values, self.members)
        std = None
        if any(scores.std is not None for scores in scored):
            lowest = values == soft_min(values, 0.0)
            share = lowest / lowest.sum(0) if self.b == 0 else (-(values / self.b).where(valid, torch.inf)).softmax(0)
            stds = torch.stack([std_of(scores) for scores in scored])
            std = root((share * stds).where(valid, 0.0).square().sum(0))
        return Scores(soft_min(values, self.b), merge(scored), std)


class Pessimist(Composite):
    """A scorer with a std, scored below its mean; of several scorers, their `mean`. Keeps the std."""

    function = ""

    def __init__(self, *scorers: Scorer, ddof: int = 0, **said: float) -> None:
        if not scorers:
            raise RewardError(f"Expected {self.function}(...) to have a member but got none.")
        options = {**said, **({"ddof": int(ddof)} if ddof else {})}
        name = call_name(self.function, scorers, **options)
        super().__init__([scorers[0] if len(scorers) == 1 else Mean(*scorers, ddof=ddof)], name)
        if self.without_std:
            raise self._no_std()

    def _no_std(self) -> RewardError:
        return RewardError(
            f"{self.name!r} needs a std and its member has none: give it several members, a scorer that returns "
            "(mean, std), or consistent(...)."
        )

    def combine(self, measured: Measured, prompts: Prompts) -> Scores:
        (scores,) = self.combined(measured, prompts)
        if scores.std is None:
            raise self._no_std()
        return Scores(scores.total - self.penalty(scores.std), scores.parts, scores.std)

    def penalty(self, std: Tensor) -> Tensor:
        raise NotImplementedError


class LowerBound(Pessimist):
    """The lower confidence bound `mean - k * std`."""

    function = "lcb"

    def __init__(self, *scorers: Scorer, k: float = 1.0, ddof: int = 0) -> None:
        super().__init__(*scorers, ddof=ddof, k=float(k))
        self.k = float(k)

    def penalty(self, std: Tensor) -> Tensor:
        return self.k * std


class VariancePenalty(Pessimist):
    """`mean - weight * std^2` (UWO). ddof 0 as in the paper's best-of-n code; its PPO code has ddof 1."""

    function = "uwo"

    def __init__(self, *scorers: Scorer, weight: float = 0.1, ddof: int = 0) -> None:
        super().__init__(*scorers, ddof=ddof, weight=float(weight))
        self.weight = float(weight)

    def penalty(self, std: Tensor) -> Tensor:
        return self.weight * std.square()


def average_weights(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """A copy of the first model with the weighted mean of all models' weights (WARM, arXiv 2401.12187).

    Meaningful for fine-tunes of one start; for affine heads it is prediction averaging exactly.

    Args:
        models: modules of one architecture.
        weights: their shares, which sum to 1; equal if None.

    Raises:
        RewardError: names, shapes or integer buffers differ.
    """
    shares = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise RewardError(f"Expected {len(models)} weights that sum to 1 but got {shares}.")
    states = [model.state_dict() for model in models]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        different = next(name for s in shapes for name in s.keys() | shapes[0] if s.get(name) != shapes[0].get(name))
        raise RewardError(f"Expected models of one architecture to average but they differ in {different!r}.")
    mean = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            terms = [
                share * state[name].to(first.device, torch.float64) for share, state in zip(shares, states, strict=True)
            ]
            mean[name] = torch.stack(terms).sum(0).to(first.dtype)
        elif any(not torch.equal(first, state[name].to(first.device)) for state in states):
            raise RewardError(f"Expected models with the same {name!r} to average but it differs.")
        else:
            mean[name] = first
    averaged = copy.deepcopy(models[0])
    averaged.load_state_dict(mean)
    return averaged
