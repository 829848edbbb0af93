"""Gradient guidance on the x0 prediction: each sample climbs the reward's gradient while it is drawn.

    universal   (arXiv 2302.07121)  eps' = eps - sigma lam grad w.r.t. x_t of r(x0hat(x_t)), the kernel does the rest
    dps         (arXiv 2209.14687)  x_s = its draw + lam grad;  lam is the paper's zeta for r = -|y - A(x0)|

Both are per sample (the public DPS takes its norm over the batch). The gradient is taken at the guided output. Neither
samples the tilt exp(lam r) but in the limit of small steps and linear rewards: r(x0hat) is too sure of itself at high
noise, so that means overshoot and variances collapse, far more under a deterministic kernel. `das` corrects that.
`jacobian="cheap"` skips the backward pass through the network.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.keys import generator, key
from t2i_align.pipelines.kernels import Gaussian, Kernel, Step
from t2i_align.prompts import Prompts
from t2i_align.steering.base import Ctx, Steered, timed
from t2i_align.steering.gradients import limit, spread_over, step_gradient
from t2i_align.steering.tilt import Tilting


class Guidance(Tilting):
    """Guidance by a reward's gradient."""

    summary: ClassVar[str] = "samples that climb the reward's gradient while they are drawn"

    form: Literal["universal", "dps"] = Field("universal", description="what the gradient moves: the score or the draw")
    jacobian: Literal["exact", "cheap"] = Field("exact", description="through the network, or its scale alone")
    clip: float | None = Field(None, gt=0, description="largest root mean square of a move of eps, or of the draw")
    first: float = Field(0.0, ge=0, le=1, description="share of the run before guidance begins")
    last: float = Field(1.0, ge=0, le=1, description="share of the run after which it ends")
    recurrence: int = Field(1, gt=0, description="times each step is done, with noise put back in between")

    @model_validator(mode="after")
    def _ordered(self) -> Guidance:
        if self.first >= self.last:
            raise ValueError(f"expected first < last but got {self.first} >= {self.last}")
        return self

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Sample with guidance; all particles weigh the same."""
        with timed(ctx.cost):
            return self._run(ctx, prompts)

    @torch.no_grad()
    def _run(self, ctx: Ctx, prompts: Prompts) -> Steered:
        kernel, K = ctx.noisy, self.particles
        many, ids = prompts.repeat(K), ctx.ids(prompts, K)
        lam = self.per_reward(ctx, prompts).repeat_interleave(K)
        cond = ctx.encode(prompts).repeat(K)
        x = ctx.start(cond, ids)
        for row in range(ctx.rows):
            if not self.first * ctx.rows <= row < self.last * ctx.rows:
                x = ctx.draw(ctx.step(x, row, cond, kernel).q, row, ids)
                continue
            for again in reversed(range(self.recurrence)):
                step, rewards, gradient = step_gradient(ctx, x, row, cond, kernel, many, self.jacobian)
                names = ids if again == 0 else [key(i, "again", again) for i in ids]
                below = ctx.draw(self.guide(ctx, step, gradient, lam, row, kernel), row, names)
                x = below if again == 0 else renoise(ctx, below, row, names)
            ctx.log(row=row, rewards=rewards.reshape(-1, K).tolist())
        images, scores = ctx.judge(x, many)
        ctx.log(row=ctx.rows, rewards=scores.total.reshape(-1, K).tolist())
        return ctx.finish(prompts, K, x, images, scores)

    def guide(self, ctx: Ctx, step: Step, gradient: Tensor, lam: Tensor, row: int, kernel: Kernel) -> Gaussian:
        """The Gaussian of the next latent, moved by lam (B,) times the gradient (B, ...)."""
        grid, move = ctx.driver.grid(ctx.steps), spread_over(lam, gradient) * gradient
        size = None if self.clip is None else self.clip * math.sqrt(gradient[0].numel())
        if self.form == "dps":
            return step.q._replace(mean=step.q.mean + limit(move, size))
        here, there = grid.level(row, gradient), grid.level(row + 1, gradient)
        move = limit(here.sigma * move, size)
        # x = alpha x0 + sigma eps stays; pure noise (alpha = 0) says nothing of x0, so nothing can be asked of it.
        x0 = step.x0 + torch.where(here.alpha > 0, here.sigma / here.alpha * move, 0.0)
        return kernel(x0, step.eps - move, here, there)


def renoise(ctx: Ctx, below: Tensor, row: int, ids: list[int]) -> Tensor:
    """Latents at a row, (B, ...), drawn given those of the next: x_t | x_s of the noising process."""
    grid = ctx.driver.grid(ctx.steps)
    here, there = grid.level(row, below), grid.level(row + 1, below)
    ratio = here.alpha / there.alpha
    std = (here.sigma.square() - (ratio * there.sigma).square()).clamp(min=0).sqrt()
    draws = [torch.randn(below.shape[1:], generator=generator(ctx.seed, "renoise", i, row)) for i in ids]
    return (ratio * below.float() + std * torch.stack(draws).to(below.device)).to(below.dtype)
