"""Constraints with bounded Lagrange multipliers: "aesthetic up, clip not below its base value".

After Moskovitz et al., arXiv 2310.04373: multipliers follow gradient ascent in a bounded parametrisation, a sigmoid for
inequalities and a tanh for equalities, so that the mixed reward keeps its scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.compose import Composite, merge, present, root, std_of
from t2i_align.rewards.expression import LIMITS, RewardError
from t2i_align.rewards.reference import Reference, find_reference

EDGE = 10.0  # bound of the raw parameter: sigmoid(-10) = 5e-5 is off, and 10 / rate updates lead back


class Constraint:
    """`scorer >= bound` (`at_least`), `<=` (`at_most`) or `==` (`equals`), on average over a run's images.

    Args:
        scorer: what is constrained.
        kind: `at_least`, `at_most` or `equals`.
        bound: a number in the scorer's unit, or `base`: the mean of the base model's samples for the prompt.
        base: for `bound="base"`, a `Reference` or the pipeline that was calibrated.
    """

    def __init__(self, scorer: Scorer, kind: str, bound: float | str, base: Reference | str | None = None) -> None:
        if kind not in LIMITS:
            raise RewardError(f"Expected a constraint to be {', '.join(LIMITS)} but got {kind!r}.")
        self.scorer, self.kind = scorer, kind
        if isinstance(bound, str) and bound != "base":
            raise RewardError(f"Expected a constraint's bound to be a number or 'base' but got {bound!r}.")
        self.reference = find_reference(base, scorer) if isinstance(bound, str) else None
        self.bound = 0.0 if isinstance(bound, str) else float(bound)

    def slack(self, values: Tensor, prompts: Prompts) -> Tensor:
        """(B,) by how much each row meets the constraint, in the scorer's unit; negative where it does not."""
        bound = self.bound if self.reference is None else self.reference.mean(prompts).to(values)
        return bound - values if self.kind == "at_most" else values - bound


class Multipliers(nn.Module):
    """Lagrange multipliers in [0, most] for inequalities, [-most, most] for equalities; (M,).

    They are no parameters: no optimiser touches them, `ascend` does.
    """

    raw: Tensor
    equality: Tensor

    def __init__(self, kinds: Sequence[str], most: float = 10.0, start: float = 1.0, rate: float = 0.1) -> None:
        super().__init__()
        if not (0 < start < most and rate > 0):
            raise RewardError(f"Expected 0 < start < most and a positive rate but got {start=}, {most=}, {rate=}.")
        self.most, self.rate = most, rate
        self.register_buffer("equality", torch.tensor([kind == "equals" for kind in kinds]), persistent=False)
        first = torch.logit(torch.tensor(start / most)).clamp(-EDGE, EDGE)
        self.register_buffer("raw", torch.where(self.equality, 0.0, first))

    def forward(self) -> Tensor:
        """The multipliers (M,)."""
        return self.most * torch.where(self.equality, self.raw.tanh(), self.raw.sigmoid())

    @torch.no_grad()
    def ascend(self, slack: Tensor) -> None:
        """One step against the mean slacks (M,), in each scorer's unit; NaN leaves a multiplier as it is.

        The step is taken in the raw parameter without the sigmoid's slope, so that it does not stall at the bounds.
        """
        step = -self.rate * slack.to(self.raw)
        self.raw += torch.where(step.isnan(), 0.0, step)
        self.raw.clamp_(-EDGE, EDGE)


class Limited(Composite):
    """`(objective + sum_j lambda_j slack_j) / (1 + sum_j |lambda_j|)`; a run calls `update` to move the multipliers.

    The division changes no optimum for given multipliers and keeps the total's scale. Besides the raw parts there is a
    part `NAME.slack` for each constraint. The std is the objective's and the constraints', taken as independent. A
    member that gives NaN is left out of the row's sums, and a warning says so.

    Args:
        objective: what goes up.
        constraints: what must hold on average.
        most: bound of the multipliers.
        start: their first value (equalities start at 0).
        rate: of the dual ascent, per unit of slack.
    """

    def __init__(
        self,
        objective: Scorer,
        constraints: Sequence[Constraint],
        most: float = 10.0,
        start: float = 1.0,
        rate: float = 0.1,
    ) -> None:
        if not constraints:
            raise RewardError("Expected one or more constraints but got none.")
        said = [f"{limit.scorer.name} {limit.kind} {_bound(limit)}" for limit in constraints]
        super().__init__([objective, *(limit.scorer for limit in constraints)], f"{objective.name} | {'; '.join(said)}")
        self.constraints = tuple(constraints)
        self.slack_names = tuple(f"{limit.scorer.name}.slack" for limit in constraints)
        self.multipliers = Multipliers([limit.kind for limit in constraints], most, start, rate)
        self.needs_prompt = self.needs_prompt or any(limit.reference for limit in constraints)

    def part_names(self) -> tuple[str, ...]:
        return (*super().part_names(), *self.slack_names)

    def refuse(self, prompt: str) -> str | None:
        references = [limit.reference for limit in self.constraints if limit.reference]
        return super().refuse(prompt) or next((said for r in references if (said := r.refuse(prompt))), None)

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        scored = self.combined(measured, prompts)
        objective, *limited = scored
        slacks = torch.stack(
            [limit.slack(scores.total, prompts) for limit, scores in zip(self.constraints, limited, strict=True)]
        )  # (M, B)
        values = torch.cat([objective.total[None], slacks])
        valid = present(values, self.members)
        weights = torch.cat([slacks.new_ones(1), self.multipliers().to(slacks)])[:, None] * valid
        weights = weights / weights.abs().sum(0)  # 0 / 0, so NaN, where no member gave a number
        total = (weights * values.where(valid, 0.0)).sum(0)
        std = None
        if any(scores.std is not None for scores in scored):
            stds = torch.stack([std_of(scores) for scores in scored]).where(valid, 0.0)
            std = root((weights * stds).square().sum(0))
        return Scores(total, merge(scored) | dict(zip(self.slack_names, slacks, strict=True)), std)

    def update(self, scores: Scores) -> dict[str, float]:
        """Move the multipliers by a batch's scores (of all processes, where there are several); returns them by name.

        Their state is `self.multipliers.state_dict()`.
        """
        self.multipliers.ascend(torch.stack([scores.parts[name].detach().nanmean() for name in self.slack_names]))
        names = [limit.scorer.name for limit in self.constraints]
        return dict(zip(names, self.multipliers().tolist(), strict=True))


def _bound(limit: Constraint) -> str:
    return "base" if limit.reference else f"{limit.bound:g}"
