"""GRPO on denoising steps: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), MixGRPO (arXiv 2507.21802).

    A      = (r - group mean) / (std + eps), clamped
    rho_t  = exp(per-dim log p_theta(x_s | x_t) - log p_old(x_s | x_t))
    loss   = mean over samples and trained steps of max(-A rho, -A clip(rho)) + beta KL(p_theta || p_ref)

Which of the three it is depends on the settings: `kernel` (`flow_sde`, `dance_sde`, `cps`, on epsilon and v models
`ddim`), `spread` of the advantages, `window` of stochastic steps. Departures: the KL is the closed form, per dimension;
`kl_form: published` is Flow-GRPO's code, which leaves out the step length |dt|. Log-probs are fp32 and taken of the
stored, rounded latents, so that ratios are exactly 1 before the first update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.advantage import Spread, gdpo_advantage, group_advantage
from t2i_align.errors import T2IError
from t2i_align.methods.base import Rollout, outside, reward_weights, surrogate
from t2i_align.methods.policy_gradient import PolicyGradient, PolicyGradientSettings
from t2i_align.pipelines.kernels import Gaussian, Kernel, ode, per_dim
from t2i_align.prompts import Prompts
from t2i_align.training import Ctx, Term
from t2i_align.trajectory import Trajectory


class GRPOSettings(PolicyGradientSettings):
    """Settings of GRPO."""

    beta: float = Field(0.0, ge=0, description="weight of the KL to the base, in nats per dimension")
    kl_form: Literal["exact", "published"] = Field("exact", description="`published` leaves out the step length")
    spread: Spread = Field("group", description="standard deviation that advantages are divided by")
    ddof: int = Field(0, ge=0, le=1, description="its delta degrees of freedom")
    combine: Literal["sum", "gdpo"] = Field("sum", description="`gdpo` normalises each reward before they are summed")
    window: int | None = Field(None, gt=0, description="stochastic steps per round, a window that moves on; null: all")
    guard: bool = Field(False, description="GRPO-Guard's normalised ratio")

    @model_validator(mode="after")
    def _one_reward(self) -> GRPOSettings:
        if self.combine == "gdpo" and self.tokens is not None:
            raise T2IError("Expected combine: sum with tokens, with which an image serves one reward alone.")
        return self


class GRPO(PolicyGradient):
    """Clipped policy gradient with group advantages."""

    settings: GRPOSettings

    def kernels(self, ctx: Ctx) -> Kernel | list[Kernel]:
        """With a window the other steps follow the ODE; it moves on by its length, the last time by what is left."""
        width = self.settings.window
        if width is None:
            return self.kernel
        rows = self.tools.driver.grid(self.settings.steps, **self.tools.call).steps
        trained = min(self.trained(rows), max(1, rows - 1))  # the last step may have no noise
        places = -(-trained // width)
        first = min(ctx.step // self.updates % places * width, max(0, trained - width))
        return [self.kernel if first <= row < first + width else ode() for row in range(rows)]

    @property
    def kept_means(self) -> int:
        if not self.settings.guard:
            return 0
        return self.trained(self.tools.driver.grid(self.settings.steps, **self.tools.call).steps)

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, Tensor]:
        """Images of the round and the advantages (B, N) of their steps."""
        data = self.images(ctx, prompts)
        return data, data.mine(self.by_step(data, self.advantage(data)))

    def advantage(self, data: Rollout) -> Tensor:
        """Advantages (B,) of all processes' images of a round."""
        s, scores = self.settings, data.scores
        if s.combine == "gdpo":
            advantage = gdpo_advantage(scores.parts, reward_weights(self.tools.reward), data.group, s.advantage_clip)
        else:
            advantage = torch.zeros_like(scores.total)
            for rows in data.alike():
                rows = rows.to(advantage.device)
                some = group_advantage(scores.total[rows], data.group, s.spread, s.ddof, clip=s.advantage_clip)
                advantage[rows] = some
        return advantage

    def losses(self, ctx: Ctx, batch: tuple[Rollout, Tensor]) -> Iterator[Term]:
        """One term per trained step and batch of samples."""
        (data, advantages), s = batch, self.settings
        traj, rows, chunks = data.traj, self.rows(data.traj), self.chunks(ctx, len(data))
        share = 1 / (len(rows) * self.samples(ctx, chunks))
        for row in rows:
            for part in chunks:
                q = self.step(traj, part, row)
                advantage = advantages[part, row].to(q.mean.device)
                gap = per_dim(q.log_prob(traj.x[part, row + 1]) - traj.log_prob[part, row], q)
                ratio = (gap if data.means is None else guarded(gap, q, data.means[part, row])).exp()
                loss, stats = surrogate(ratio, advantage, s.clip), {"ratio": ratio, "clipped": outside(ratio, s.clip)}
                if s.beta:
                    kl = self.kl(traj, part, row, q)
                    loss, stats = loss + s.beta * kl, stats | {"kl_penalty": kl}
                yield Term(loss.sum() * share, stats)
        yield from self.expansion_terms(ctx, data)

    def kl(self, traj: Trajectory, part: slice, row: int, q: Gaussian) -> Tensor:
        """KL (B,) of this step to the base's, nats per dimension."""
        with torch.no_grad(), self.policy.reference():
            base = self.step(traj, part, row)
        kl = per_dim(q.kl(base), q)
        if self.settings.kl_form == "exact":
            return kl
        sigma = self.tools.driver.grid(self.settings.steps, **self.tools.call).sigma
        return kl * float(sigma[row] - sigma[row + 1])


def guarded(gap: Tensor, q: Gaussian, old: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio (arXiv 2510.22319): std (log rho + |mean - old mean|^2 / (2 std^2)), per dimension.

    Without the square, by which log rho is below 0 on average, and in one scale for all steps, clipping bites on both
    sides alike and at every step.

    Args:
        gap: (B,) log rho per dimension.
        q: the current step.
        old: (B, ...) means of the step that was taken, as they were before latents were rounded to their number type:
            squared, and over the variance, rounding alone would be beyond the clip.
    """
    std = q.std.flatten()[0]
    moved = (q.mean - old).square().flatten(1).mean(1)
    return std * (gap + moved / (2 * std.square()))
