"""ReNO (arXiv 2406.04312): the starting noise of a one-step or few-step pipeline, optimised for the reward.

    maximise over z   r(G(z)) + regularise [(d - 1) ln |z| - |z|^2 / 2]
    by                50 steps of SGD, Nesterov momentum 0.9, learning rate 5, gradient norm at most 0.1

The published objective is a weighted sum of scorers: give the reward as such a sum, `5 * hpsv2 + image_reward + 0.01 *
clip + 0.05 * pickscore` (learning rate 10 for pictures of 1024 pixels). The iterate with the best reward is kept.
Departures: each image of a batch has its own clip, best iterate and stop; the clamp of pixels lets gradients through;
noise between the steps of a few-step sampler is the same in all iterations, so that one function is maximised.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from t2i_align.pipelines.kernels import ode
from t2i_align.prompts import Prompts
from t2i_align.steering.base import Ctx, Steered, timed
from t2i_align.steering.noise import NoiseOptimisation, chi_gradient, climb, nesterov


class ReNO(NoiseOptimisation):
    """Reward-based noise optimisation.

    Without a kernel steps are deterministic, `ode()`, as one-step models are called; `cps(1)` is the sampler of
    consistency models at a few steps.
    """

    summary: ClassVar[str] = "the starting noise of few-step pipelines, optimised for the reward"

    regularise: float = Field(0.01, ge=0, description="weight of the log-density of the noise's norm")
    checkpointing: bool = Field(False, description="keep only the latents between steps, for one more forward pass")

    @property
    def keeps_lines(self) -> bool:
        return True

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Optimise; the particles are the best iterates of different starting noises."""
        with timed(ctx.cost):
            K = self.particles
            many, ids = prompts.repeat(K), ctx.ids(prompts, K)
            cond, kernel = ctx.encode(prompts).repeat(K), ctx.kernel or ode()
            start = ctx.start(cond, ids)
            noise = ctx.noise(start, ids) if kernel.stochastic else None

            def render(z: Tensor, who: list[int]) -> Tensor:
                fixed = None if noise is None else noise[who]
                return ctx.unroll(z, cond[who], kernel, fixed, self.checkpointing)

            z, latents = climb(
                ctx, self, many, ids, start, render, lambda z, _: self.regularise * chi_gradient(z), nesterov
            )
            images, scores = ctx.judge(latents, many)
            return ctx.finish(prompts, K, latents, images, scores, start=z, streams=ctx.all_streams(ids))
