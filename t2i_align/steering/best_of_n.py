"""Best-of-n: draw n samples, keep the best, or one of them by its tilt exp(lam r).

KL(best of n || base) = log n - (n - 1) / n            for continuous rewards
chi^2(best of n || base) = n^2 / (2 n - 1) - 1
E[max of n], unbiased from M >= n sorted samples: sum_i C(i, n - 1) / C(M, n) r_(i), i = 0 ... M - 1
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.steering.base import Ctx, Steered, Steering, timed


class BestOfN(Steering):
    """Best-of-n, or with `lam` soft best-of-n."""

    summary: ClassVar[str] = "the best of n samples, or one drawn by its reward"

    lam: float | None = Field(
        None,
        ge=0,
        description="inverse temperature of the draw, in standard deviations of a prompt's rewards; null: argmax",
    )

    @property
    def keeps_lines(self) -> bool:
        return True

    @torch.no_grad()
    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Sample, score, weigh."""
        with timed(ctx.cost):
            K = self.particles
            many, ids = prompts.repeat(K), ctx.ids(prompts, K)
            cond = ctx.encode(prompts).repeat(K)
            x = ctx.sample(cond, ids)
            images, scores = ctx.judge(x, many)
            totals = scores.total.reshape(-1, K)
            ctx.log(row=ctx.rows, rewards=totals.tolist())
            lines = {"start": ctx.start(cond, ids), "streams": ctx.all_streams(ids)}
            return ctx.finish(prompts, K, x, images, scores, self.log_weight(totals), **lines)

    def log_weight(self, totals: Tensor) -> Tensor:
        """Log-weights (P, K) of rewards (P, K): all on the best, or the tilt."""
        totals = torch.where(totals.isfinite(), totals, math.nan).double()
        if self.lam is None:
            best = totals.nan_to_num(nan=-math.inf).argmax(1, keepdim=True)
            return torch.full_like(totals, -math.inf).scatter(1, best, 0.0)
        mean = totals.nanmean(1, keepdim=True)
        spread = (totals - mean).square().nanmean(1, keepdim=True).sqrt()
        tilt = torch.where(spread > 0, self.lam * (totals - mean) / spread, 0.0)
        return torch.where(totals.isfinite(), tilt, -math.inf)


def expected_best(rewards: Tensor, n: int) -> Tensor:
    """Unbiased estimate of the best of `n` from M >= n samples: rewards (..., M) -> (...)."""
    share = best_shares(rewards.shape[-1], n)
    return (rewards.double().sort(-1).values * share.to(rewards.device)).sum(-1)


def best_shares(M: int, n: int) -> Tensor:
    """Probability that the best of `n` of M samples is the i-th lowest of them: (M,), fp64."""
    if not 1 <= n <= M:
        raise ValueError(f"Expected n from 1 to the number of samples, {M}, but got {n}.")
    return torch.tensor([math.comb(i, n - 1) / math.comb(M, n) for i in range(M)], dtype=torch.float64)


def kl(n: int) -> float:
    """KL divergence of the best of `n` from the base, in nats; an upper bound where rewards tie."""
    return math.log(n) - (n - 1) / n


def chi_squared(n: int) -> float:
    """Chi-squared divergence of the best of `n` from the base."""
    return n * n / (2 * n - 1) - 1
