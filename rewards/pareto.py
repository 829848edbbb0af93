"""Pareto selection among K rewards: dominance, fronts, crowding, hypervolume, and Parrot's batch-wise selection.

`values` is (N, K), larger is better. A row with NaN is dominated by all others: it lies on no front.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.compose import Composite, call_name, merge
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.mixing import group_index, group_zscore


def dominance(values: Tensor) -> Tensor:
    """(N, N) bool: row a dominates column b: at least as good in every reward and better in one.

    A finite row dominates every row with NaN; rows with NaN dominate nothing. Memory is O(N^2), whatever K.
    """
    known = ~values.isnan().any(1)
    filled = values.where(known[:, None], -torch.inf)
    as_good = torch.ones(len(values), len(values), dtype=torch.bool, device=values.device)
    better = ~as_good
    for reward in filled.unbind(1):
        as_good &= reward[:, None] >= reward[None, :]
        better |= reward[:, None] > reward[None, :]
    return (as_good & better) | (known[:, None] & ~known[None, :])


def non_dominated(values: Tensor) -> Tensor:
    """(N,) bool: the rows that no row dominates; equal rows all survive."""
    return ~dominance(values).any(0) & ~values.isnan().any(1)


def fronts(values: Tensor) -> Tensor:
    """(N,) long: 0 for the non-dominated rows, 1 for those that only these dominate, and so on; NaN rows come last."""
    dominates = dominance(values)
    left = dominates.sum(0)  # how many of the remaining rows dominate each row
    front = torch.full((len(values),), -1, device=values.device)
    number = 0
    while (front < 0).any():
        now = (left == 0) & (front < 0)
        front[now] = number
        left = left - dominates[now].sum(0)
        number += 1
    return front


def crowding_distance(values: Tensor, front: Tensor | None = None) -> Tensor:
    """(N,) NSGA-II's crowding distance (Deb et al. 2002) within each front; infinite at a front's extremes.

    Per reward, the gap between a row's two neighbours over the front's span; a reward without span adds nothing.
    """
    front = fronts(values) if front is None else front
    distance = torch.zeros(len(values), dtype=values.dtype, device=values.device)
    for number in front.unique():
        rows = (front == number).nonzero()[:, 0]
        ordered, order = values[rows].sort(dim=0)  # (n, K)
        gaps = torch.full_like(ordered, torch.inf)
        gaps[1:-1] = ordered[2:] - ordered[:-2]
        span = ordered[-1] - ordered[0]
        gaps = torch.where(span > 0, gaps / span.where(span > 0, 1.0), 0.0 if len(rows) > 2 else torch.inf)
        distance[rows] = torch.zeros_like(gaps).scatter(0, order, gaps).sum(1)
    return distance.where(~values.isnan().any(1), 0.0)


def hypervolume_2d(values: Tensor, worst: Tensor) -> Tensor:
    """The exact area (a scalar) that the rows of values (N, 2) dominate above the point worst (2,)."""
    if values.shape[1] != 2:
        raise RewardError(f"Expected values (N, 2) for the 2-D hypervolume but got {tuple(values.shape)}.")
    above = (values - worst)[(values > worst).all(1)]
    if not len(above):
        return values.new_zeros(())
    x, order = above[:, 0].sort(descending=True)
    reach = above[order, 1].cummax(0).values  # the highest among rows at least as far right
    return (x * torch.diff(reach, prepend=reach.new_zeros(1))).sum()


def expected_front(n: int, rewards: int) -> float:
    """Expected number of non-dominated rows among n with independent continuous rewards.

    E_1(n) = 1, E_K(n) = sum_{i <= n} E_{K-1}(i) / i.
    """
    sizes = torch.ones(n, dtype=torch.float64)
    for _ in range(rewards - 1):
        sizes = (sizes / torch.arange(1, n + 1)).cumsum(0)
    return float(sizes[-1])


def parrot_rewards(values: Tensor, prompts: Prompts | None = None, standardise: bool = False) -> Tensor:
    """Parrot's batch-wise selection (arXiv 2401.05675): `r_k / |P|` for rows of the non-dominated set P, else 0.

    Args:
        values: (B, K) rewards.
        prompts: B rows; P is taken within the images of one prompt. One set for all rows if None.
        standardise: z-score each reward within its prompt first (ddof 0). As published, rewards enter raw: with no
            baseline, an all-positive one partly just makes every survivor more likely.

    Returns:
        (B, K); the loss is minus its sum over rows with weights `sum_t log p`.
    """
    group = torch.zeros(len(values), dtype=torch.long) if prompts is None else group_index(prompts)
    group = group.to(values.device)
    survives = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for rows in _rows_by_group(group):
        survives[rows] = non_dominated(values[rows])
    size = torch.zeros(int(group.max()) + 1, dtype=values.dtype, device=values.device)
    size = size.index_add(0, group, survives.to(values.dtype))[group]
    if standardise:
        values = torch.stack([group_zscore(reward, group)[0] for reward in values.unbind(1)], 1)
    return torch.where(survives[:, None], values / size.clamp(min=1)[:, None], 0.0)


def select(values: Tensor, n: int) -> Tensor:
    """(n,) rows to keep: whole fronts in order, and of the one that does not fit the least crowded (NSGA-II)."""
    if not 0 < n <= len(values):
        raise RewardError(f"Expected to select 1 to {len(values)} rows but got {n}.")
    front = fronts(values)
    order = crowding_distance(values, front).argsort(descending=True, stable=True)
    return order[front[order].argsort(stable=True)][:n]


class Pareto(Composite):
    """Pareto rank of several scorers among the prompt's images of the call: minus the front, ties by crowding.

    `-front + c / (2 + 2 c)` with the crowding distance c: a better front always wins, by half a point or more. It does
    not change under increasing transforms of a member but for the ties.
    """

    def __init__(self, *scorers: Scorer) -> None:
        if len(scorers) < 2:
            raise RewardError(f"Expected pareto(...) to have 2 or more members but got {len(scorers)}.")
        super().__init__(scorers, call_name("pareto", scorers))
        self.groupwise, self.differentiable, self.range = True, False, (-float("inf"), 0.5)
        self.without_std = True

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        scored = self.combined(measured, prompts)
        values = torch.stack([scores.total for scores in scored], 1).detach()
        total = torch.empty(len(values), device=values.device)
        for rows in _rows_by_group(group_index(prompts).to(values.device)):
            front = fronts(values[rows])
            crowding = crowding_distance(values[rows], front)
            total[rows] = 0.5 * torch.where(crowding == torch.inf, 1.0, crowding / (1 + crowding)) - front
        return Scores(total.where(~values.isnan().any(1), torch.nan), merge(scored))


def _rows_by_group(group: Tensor) -> list[Tensor]:
    return [(group == number).nonzero()[:, 0] for number in range(int(group.max()) + 1)]
