"""DAS (arXiv 2501.05803): tempered, twisted sequential Monte Carlo with gradient proposals.

    target        p(x0) exp(lam r(x0)), lam = 1 / alpha of the paper
    on the way    p(x_t) exp(w_t),  w_t = lam tau_t r(x0hat(x_t)),  tau_i = min((1 + gamma)^i - 1, 1), tau = 1 at x0
    proposal      q = N(mean(x_t) + std^2 lam tau_s grad w.r.t. x_t of r(x0hat(x_t)), std^2)
    weight        p(x_s | x_t) / q(x_s | x_t) exp(w_s - w_t)

gamma = 0.008 for 100 steps and 0.1 for 8 as published: tau reaches 1 after 87 % of the run, which is the default at
any length. Departures from the published code: whatever belongs to a particle is resampled with it (there the gradient
and the twist stay behind); resampling is inside a prompt's group and systematic; log Z is per prompt and unbiased in Z;
lam is in units of the reward's own spread unless `lam_units` is `raw`.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.pipelines.kernels import Gaussian
from t2i_align.prompts import Prompts
from t2i_align.smc import Weights, flat_index
from t2i_align.steering.base import Ctx, Steered, timed
from t2i_align.steering.gradients import limit, spread_over, step_gradient
from t2i_align.steering.tilt import Tilting


class Particles(NamedTuple):
    """All that belongs to B = P K particles at a row: `mean` (B, ...) of the next latent, `gradient` (B, ...) of the
    reward of its x0 prediction with respect to x, `twist` (B,) fp64, lam tau r of that reward.
    """

    mean: Tensor
    gradient: Tensor
    twist: Tensor

    def take(self, order: Tensor) -> Particles:
        """Those of `order` (B,), every tensor."""
        return Particles(*(tensor[order.to(tensor.device)] for tensor in self))


class DAS(Tilting):
    """Particles that are drawn towards higher rewards and weighted so that they still sample the target."""

    summary: ClassVar[str] = "particles proposed along the reward's gradient, weighted exactly"

    gamma: float | None = Field(None, gt=0, description="speed of tempering; null: full strength after 87 % of the run")
    resampling: Literal["systematic", "multinomial"] = Field("systematic", description="how offspring are drawn")
    clip: float | None = Field(
        None, gt=0, description="largest root mean square of a proposal's shift, in its standard deviations"
    )
    ess: float = Field(0.5, ge=0, le=1, description="resample below this share of effective particles; 1: always")

    def temper(self, rows: int) -> list[float]:
        """Strength tau at the rows + 1 levels of a run."""
        gamma = 2 ** (1 / (0.87 * rows)) - 1 if self.gamma is None else self.gamma
        return [min((1 + gamma) ** i - 1, 1.0) for i in range(rows)] + [1.0]

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Steer; the particles and their weights are the sample, `best` is a maximum over them."""
        with timed(ctx.cost):
            return self._run(ctx, prompts)

    @torch.no_grad()
    def _run(self, ctx: Ctx, prompts: Prompts) -> Steered:
        kernel, K = ctx.stochastic("das"), self.particles
        many, ids, shape = prompts.repeat(K), ctx.ids(prompts, K), (len(prompts), K)
        lam, tau = self.per_reward(ctx, prompts).repeat_interleave(K), self.temper(ctx.rows)
        cond = ctx.encode(prompts).repeat(K)
        x, weights = ctx.start(cond, ids), Weights.uniform(*shape)
        paid = torch.zeros(len(many), dtype=torch.float64)
        for row in range(ctx.rows):
            step, rewards, gradient = step_gradient(ctx, x, row, cond, kernel, many)
            weights, paid = pay(weights, lam * tau[row], rewards, paid)
            ess = weights.ess
            ancestors, weights = weights.resample(self.ess, ctx.uniforms(prompts, K, row), self.resampling)
            now = Particles(step.q.mean, gradient, paid).take(flat_index(ancestors))
            paid = now.twist
            x, ratio = propose(
                ctx, step.q._replace(mean=now.mean), now.gradient, lam * tau[row + 1], row, ids, self.clip
            )
            weights = weights.add(ratio.reshape(shape))
            ctx.log(row=row, ess=ess.tolist(), rewards=rewards.reshape(shape).tolist(), ancestors=ancestors.tolist())
        images, scores = ctx.judge(x, many)
        weights = weights.add((lam * scores.total.double() - paid).reshape(shape))
        ctx.log(row=ctx.rows, ess=weights.ess.tolist(), rewards=scores.total.reshape(shape).tolist())
        return ctx.finish(prompts, K, x, images, scores, weights.normalised, weights.log_normaliser)


def pay(weights: Weights, lam: Tensor, rewards: Tensor, paid: Tensor) -> tuple[Weights, Tensor]:
    """Weigh particles by twists lam r (B,) instead of those `paid` (B,) before.

    A group without any finite reward keeps what it has paid; other particles without one weigh nothing from here on.
    """
    shape = weights.log.shape
    twist = torch.where(lam == 0, 0.0, lam * rewards.double())
    usable = twist.reshape(shape).isfinite().any(1).repeat_interleave(shape[1])
    gain = torch.where(usable, twist - paid, 0.0)
    return weights.add(gain.reshape(shape)), torch.where(usable & twist.isfinite(), twist, paid)


def propose(
    ctx: Ctx, p: Gaussian, gradient: Tensor, lam: Tensor, row: int, ids: list[int], clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Next latents (B, ...) from the proposal of kernel `p`, and log p - log q of them, (B,) fp64 on the CPU.

    With g = lam gradient and n = x - mean: log p - log q = std^2 |g|^2 / 2 - g . n, where std > 0; for any g.
    """
    g = torch.where(p.std > 0, spread_over(lam, gradient) * gradient, 0.0)
    if clip is not None:
        size = clip * math.sqrt(g[0].numel())
        g = limit(p.std * g, size) / p.std.clamp(min=1e-12)
    shift = p.std.square() * g
    x = ctx.draw(p._replace(mean=p.mean + shift), row, ids)
    ratio = g * (0.5 * shift - (x.float() - p.mean))
    return x, ratio.flatten(1).sum(1).cpu().double()
