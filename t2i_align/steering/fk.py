"""Feynman-Kac steering (arXiv 2501.06848): particles whose intermediate rewards decide which of them go on.

    target      p(x0) exp(lam r(x0))
    potentials  log G_t = lam (r_t - r_s)              `diff`, s the row scored before t, r = 0 before the first
                        = lam max(r_s for s up to t)   `max`
                        = lam sum(r_s for s up to t)   `sum`
    last step   log G_0 = lam r(x0) - (what the particle's line has paid), exact for every potential

r_t is the reward of the decoded x0 prediction at x_t, or a learned value of x_t. Departures from the published code,
which does not sample its target (its exact toy reaches a mean of .74, .72 and 4.40 instead of 1): weights are carried
in log space where a resampling is skipped; the last step pays the final reward; a reward weighs the latent it was
computed from, not its child; resampling is systematic; lam is in units of the reward's own spread unless `lam_units`
is `raw`; potentials along the way may be weaker than the last (`along`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.smc import Weights, flat_index
from t2i_align.steering.base import Ctx, Steered, Steering, Value, check_value, timed

# (lam, rewards r (P, K), memory) -> log potential; the memory is r before, the maximum so far, the sum so far
POTENTIALS: dict[str, Callable[[float | Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "diff": lambda lam, r, memory: (lam * (r if memory is None else r - memory), r),
    "max": lambda lam, r, memory: _twice(lam, r if memory is None else torch.maximum(r, memory)),
    "sum": lambda lam, r, memory: _twice(lam, r if memory is None else r + memory),
}


def _twice(lam: float | Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    return lam * memory, memory


class FK(Steering):
    """Feynman-Kac steering: resample particles by the rewards of their x0 predictions."""

    summary: ClassVar[str] = "particles resampled by the rewards of their x0 predictions"

    lam: float = Field(2.0, ge=0, description="inverse temperature of the target")
    lam_units: Literal["sd", "raw"] = Field(
        "sd", description="lam counts in standard deviations of the reward within a prompt, or in the reward's own unit"
    )
    spread: float | None = Field(
        None,
        gt=0,
        description="that standard deviation; null: that of the particles' first rewards",
    )
    potential: Literal["diff", "max", "sum"] = Field("diff", description="how rewards along the way are used")
    along: float | None = Field(
        None, ge=0, description="factor on lam for rewards along the way; null: 1, for `sum` 1 / their number"
    )
    rows: tuple[int, ...] | None = Field(
        None, description="rows of the grid at which rewards are computed; null: by `every`, `first` and `last`"
    )
    every: int | None = Field(
        None, gt=0, description="rows between two of them; null: a fifth of the run, as published"
    )
    first: float = Field(0.2, ge=0, le=1, description="share of the run before the first")
    last: float = Field(0.8, ge=0, le=1, description="share of the run before the last")
    resampling: Literal["systematic", "multinomial"] = Field("systematic", description="how offspring are drawn")
    ess: float = Field(0.5, ge=0, le=1, description="resample below this share of effective particles; 1: always")
    preview_scale: float = Field(1.0, gt=0, le=1, description="size of the latents that rewards along the way see")
    value: Value | str | None = Field(
        None, description="folder of a learned value function, or a callable, for rewards along the way; null: x0hat's"
    )

    _is_value = field_validator("value")(check_value)

    @model_validator(mode="after")
    def _ordered(self) -> FK:
        if self.first > self.last:
            raise ValueError(f"expected first <= last but got {self.first} > {self.last}")
        return self

    @property
    def keeps_lines(self) -> bool:
        return True

    def schedule(self, rows: int) -> tuple[int, ...]:
        """Rows of a run at which rewards are computed."""
        if self.rows is not None:
            return tuple(sorted({row % rows for row in self.rows}))
        every = self.every or max(1, round(rows / 5))
        return tuple(range(round(self.first * rows), min(rows, round(self.last * rows) + 1), every))

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Steer; the particles and their weights are the sample, `best` is a maximum over them."""
        with timed(ctx.cost):
            return self._run(ctx, prompts)

    @torch.no_grad()
    def _run(self, ctx: Ctx, prompts: Prompts) -> Steered:
        kernel, K = ctx.stochastic("fk"), self.particles
        many, ids = prompts.repeat(K), ctx.ids(prompts, K)
        cond = ctx.encode(prompts).repeat(K)
        x = start = ctx.start(cond, ids)
        streams = ctx.all_streams(ids)
        scheduled = self.schedule(ctx.rows)
        state, value = State(self, len(prompts), len(scheduled)), ctx.open_value(self.value)
        for row in range(ctx.rows):
            step = ctx.step(x, row, cond, kernel)
            mean = step.q.mean
            if row in scheduled:
                seen = ctx.rewards(step.x0, many, self.preview_scale) if value is None else value(x, row, cond).cpu()
                rewards = seen.reshape(-1, K)
                state.weigh(rewards)
                ess = state.weights.ess
                ancestors = state.resample(ctx.uniforms(prompts, K, row))
                ctx.log(row=row, ess=ess.tolist(), rewards=rewards.tolist(), ancestors=ancestors.tolist())
                order = flat_index(ancestors)
                mean, start = mean[order.to(mean.device)], start[order.to(mean.device)]
                streams = torch.cat([streams[order, :row], streams[:, row:]], 1)  # noise to come is each slot's own
            x = ctx.draw(step.q._replace(mean=mean), row, ids)
        images, scores = ctx.judge(x, many)
        state.finish(scores.total.reshape(-1, K))
        weights = state.weights
        ctx.log(row=ctx.rows, ess=weights.ess.tolist(), rewards=scores.total.reshape(-1, K).tolist())
        log_weight, log_normaliser = weights.normalised, weights.log_normaliser
        return ctx.finish(prompts, K, x, images, scores, log_weight, log_normaliser, start, streams)


class State:
    """The particles' weights, what each line has paid, and what its potential remembers; all (P, K)."""

    def __init__(self, settings: FK, groups: int, times: int) -> None:
        self.settings, self.weights = settings, Weights.uniform(groups, settings.particles)
        self.paid = torch.zeros_like(self.weights.log)
        self.memory: Tensor | None = None
        usual = 1 / max(1, times) if settings.potential == "sum" else 1.0
        self.along = usual if settings.along is None else settings.along
        known = 1.0 if settings.lam_units == "raw" else settings.spread
        lam = math.nan if known is None else settings.lam / known  # nan: not known yet
        self.lam = torch.full((groups, 1), lam, dtype=torch.float64)

    def weigh(self, rewards: Tensor) -> None:
        """Pay the potential of rewards (P, K) of x0 predictions; a group without any finite reward pays nothing."""
        rewards = rewards.double()
        self._learn_spread(rewards)
        gain, memory = POTENTIALS[self.settings.potential](self.along * self.lam.nan_to_num(), rewards, self.memory)
        usable = rewards.isfinite().any(1, keepdim=True)
        before = torch.zeros_like(rewards) if self.memory is None else self.memory
        self.memory = torch.where(usable, memory, before)
        gain = torch.where(usable, gain, 0.0)
        self.weights, self.paid = self.weights.add(gain), self.paid + gain

    def resample(self, uniforms: Tensor) -> Tensor:
        """Resample the groups that are due; every tensor of a particle goes with it. Returns ancestors (P, K)."""
        ancestors, self.weights = self.weights.resample(self.settings.ess, uniforms, self.settings.resampling)
        self.paid = self.paid.gather(1, ancestors)
        self.memory = None if self.memory is None else self.memory.gather(1, ancestors)
        return ancestors

    def finish(self, rewards: Tensor) -> None:
        """Pay for the final rewards (P, K) what the line has not paid yet: together lam r(x0)."""
        rewards = rewards.double()
        self._learn_spread(rewards)
        self.weights = self.weights.add(self.lam.nan_to_num() * rewards - self.paid)

    def _learn_spread(self, rewards: Tensor) -> None:
        """Bring lam to the unit of the rewards, for groups whose rewards (P, K) differ for the first time.

        Until then all weights are equal, so these particles are still the base's.
        """
        rewards = torch.where(rewards.isfinite(), rewards, math.nan)  # a learned value may be infinite
        mean = rewards.nanmean(1, keepdim=True)
        spread = (rewards - mean).square().nanmean(1, keepdim=True).sqrt()
        learnt = torch.where(spread > 0, self.settings.lam / spread, math.nan)
        self.lam = torch.where(self.lam.isnan(), learnt, self.lam)
