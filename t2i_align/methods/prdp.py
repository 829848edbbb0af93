"""PRDP: the policy learns to predict reward differences (arXiv 2402.08714, appendix G).

    rh_i = mean over steps of log p_theta - log p_ref          (per dimension)
    l    = (rh_a - rh_b - (r_a - r_b) / beta)^2                 all pairs a, b of a prompt with r_a > r_b
    loss = mean over pairs of max(l, l of rh clipped per step to rh_old +- eps)

The minimum is p_ref exp(r / beta) / Z. Memory is that of one step: a first pass without gradients finds every pair's
residual, and with it the derivative of the loss by each step's log-ratio; a second pass backpropagates log-ratios
weighted by these derivatives, step by step. Departures: log-probs are means over dimensions, which the published eps
implies; pairs without a difference are left out, and a batch of ties has loss 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.advantage import unequal_pairs
from t2i_align.methods.base import OnPolicy, Rollout, SamplingSettings
from t2i_align.pipelines.kernels import per_dim
from t2i_align.prompts import Prompts
from t2i_align.training import Ctx, Term


class PRDPSettings(SamplingSettings):
    """Settings of PRDP."""

    beta: float = Field(3e-5, gt=0, description="KL weight of the objective, on per-dimension log-ratios")
    eps: float = Field(
        1e-4, gt=0, description="proximal clip of per-step, per-dimension log-ratios around the old ones"
    )


class Residual(NamedTuple):
    """The loss, and its derivative (B, N) by the per-step log-ratios."""

    loss: Tensor
    slope: Tensor


class PRDP(OnPolicy):
    """Reward-difference prediction."""

    settings: PRDPSettings
    shardable: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True

    @property
    def clip(self) -> float:
        return self.settings.eps

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, Tensor]:
        """Images of the round, and per-dimension log-ratios (B, N) of the old policy to the base."""
        data = self.rollout(ctx, prompts)
        return data, self._per_dim(data, data.traj.log_prob - self.reference_log_prob(data.traj))

    def losses(self, ctx: Ctx, batch: tuple[Rollout, Tensor]) -> Iterator[Term]:
        """One term per trained step and batch of samples."""
        data, old = batch
        rows, chunks = self.rows(data.traj), self.chunks(ctx, len(data))
        now = old.clone()
        if ctx.update:  # before the first update the policy is the old one
            with torch.no_grad():
                for part in chunks:
                    for row in rows:
                        now[part, row] = old[part, row] + self.moved(data, part, row)
        total = data.mine(data.scores.total)
        rewards = torch.full_like(total, float("nan"))
        for part in chunks:
            rewards[part] = total[part]  # samples of other minibatches make no pairs
        pairs = unequal_pairs(rewards, data.group)
        share = len(pairs) / max(1.0, ctx.world.total(len(pairs)))
        trust = data.mine(data.trust)[pairs].prod(1)
        residual = proximal(now[:, rows], old[:, rows], rewards, pairs, self.settings.beta, self.settings.eps, trust)
        every = self.policy.sharded  # processes must make the same passes
        alive = [(i, part) for i in range(len(rows)) for part in chunks if every or residual.slope[part, i].any()]
        if not alive:
            return
        # Of all log-ratios of the update: a batch in which all are clipped has no gradient, and so no term.
        over = torch.cat([((now - old)[part][:, rows].abs() > self.settings.eps).flatten() for part in chunks])
        for i, part in alive:
            moved = self.moved(data, part, rows[i])
            straight = (residual.slope[part, i] * (moved - moved.detach())).sum()  # 0, with the gradient of the loss
            stats = {"log_ratio": moved, "clipped": over.float().mean()}
            yield Term(share * (straight + residual.loss / len(alive)), stats)

    def moved(self, data: Rollout, part: slice, row: int) -> Tensor:
        """Per-dimension log-ratio (B,) of the current policy to the one that drew the images."""
        q = self.step(data.traj, part, row)
        return per_dim(q.log_prob(data.traj.x[part, row + 1]) - data.traj.log_prob[part, row], q)

    def _per_dim(self, data: Rollout, nats: Tensor) -> Tensor:
        return nats / data.traj.x[0, 0].numel()


def proximal(
    now: Tensor, old: Tensor, rewards: Tensor, pairs: Tensor, beta: float, eps: float, trust: Tensor | None = None
) -> Residual:
    """The loss of PRDP and its derivative.

    Args:
        now: (B, T) per-step log-ratios of the policy to the base.
        old: (B, T) those of the policy that drew the samples.
        rewards: (B,).
        pairs: (M, 2) indices a, b with r_a > r_b.
        beta: KL weight.
        eps: clip of `now` around `old`.
        trust: (M,) factors of the pairs' losses; 1 if None.
    """
    slope = torch.zeros_like(now)
    if not len(pairs):
        return Residual(now.new_zeros(()), slope)
    a, b = pairs.T.to(now.device)
    target = (rewards[a] - rewards[b]).to(now) / beta
    clipped = now.clamp(old - eps, old + eps)
    plain, near = ((rh[a] - rh[b] - target) for rh in (now.mean(1), clipped.mean(1)))
    use_plain = plain.square() >= near.square()
    steps, count = now.shape[1], len(pairs)
    weight = torch.ones_like(plain) if trust is None else trust.to(plain)
    for residual, alive in ((plain * use_plain, torch.ones_like(now)), (near * ~use_plain, (now - old).abs() < eps)):
        each = 2 * weight * residual / count / steps  # (M,) derivative by every step of a, minus that of b
        by_sample = torch.zeros_like(rewards, dtype=now.dtype).index_add(0, a, each).index_add(0, b, -each)
        slope += by_sample[:, None] * alive
    return Residual((weight * torch.maximum(plain.square(), near.square())).mean(), slope)
