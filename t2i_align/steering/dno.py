"""DNO (arXiv 2405.18881): the noise of a sampler of many steps, optimised for the reward.

    maximise over z   r(G(z)) + regularise log P(z)
    z                 the starting noise and that of every step (`noises="all"`), or the starting noise alone
    log P             `noise.concentration` of z in its order plus its mean over random permutations; at most -4 ln 2,
                      with no gradient there: likely noise is left alone
    by                100 steps of Adam, learning rate 0.01, gradient norm at most 1

Departures: no weight decay (AdamW's default shrinks the noise); each image of a batch has its own clip, best iterate
and stop; the clamp of pixels lets gradients through; permutations are keyed by the iteration. A reward without
gradients is served by `gradient="hybrid"`. Only the latents between steps are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.keys import generator
from t2i_align.pipelines.kernels import ode
from t2i_align.prompts import Prompts
from t2i_align.steering.base import Ctx, Steered, timed
from t2i_align.steering.noise import NoiseOptimisation, adam, climb, concentration


class DNO(NoiseOptimisation):
    """Direct noise optimisation. Without a kernel: the noisy one, deterministic steps where the start is all."""

    summary: ClassVar[str] = "the noise of many-step pipelines, optimised for the reward"

    iterations: int = Field(100, gt=0, description="evaluations of each sample; the first is the plain sample")
    lr: float = Field(0.01, gt=0, description="learning rate of Adam")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a sample's gradient; null: as it is")
    noises: Literal["all", "start"] = Field("all", description="what is optimised")
    regularise: float = Field(1.0, ge=0, description="weight of the noise's log-probability")
    width: int = Field(4, gt=0, description="numbers that its bounds read as one vector")
    permutations: int = Field(100, gt=0, description="orders in which they read the noise, besides its own")
    checkpointing: bool = Field(True, description="keep only the latents between steps, for one more forward pass")

    @property
    def keeps_lines(self) -> bool:
        return self.noises == "start"

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Optimise; the particles are the best iterates of different noises."""
        with timed(ctx.cost):
            K, every = self.particles, self.noises == "all"
            many, ids = prompts.repeat(K), ctx.ids(prompts, K)
            cond = ctx.encode(prompts).repeat(K)
            kernel = ctx.stochastic('dno (or noises="start")') if every else ctx.kernel or ode()
            start = ctx.start(cond, ids)
            noise = ctx.noise(start, ids) if kernel.stochastic else None
            z = start[:, None] if noise is None or not every else torch.cat([start[:, None].float(), noise], 1)

            def render(z: Tensor, who: list[int]) -> Tensor:
                steps = z[:, 1:] if every else None if noise is None else noise[who]
                return ctx.unroll(z[:, 0], cond[who], kernel, steps, self.checkpointing)

            def prior(z: Tensor, number: int) -> Tensor:
                return self.regularise * self.log_probability_gradient(z, ctx.seed, number)

            z, latents = climb(ctx, self, many, ids, z, render, prior, adam)
            images, scores = ctx.judge(latents, many)
            lines = {} if every else {"start": z[:, 0], "streams": ctx.all_streams(ids)}
            return ctx.finish(prompts, K, latents, images, scores, **lines)

    def log_probability(self, z: Tensor, seed: int, iteration: int) -> Tensor:
        """Bound of the log-probability of noise (B, ...): (B,), nats, -4 ln 2 or less."""
        flat, share = z.flatten(1), 1 / self.permutations
        total = concentration(flat, self.width)
        for order in self._orders(flat, seed, iteration):
            total = total + share * concentration(flat[:, order], self.width)
        return total

    @torch.enable_grad()
    def log_probability_gradient(self, z: Tensor, seed: int, iteration: int) -> Tensor:
        """Its gradient (B, ...), one order of the noise at a time in memory."""
        if not self.regularise:
            return torch.zeros_like(z)
        flat, share = z.detach().flatten(1).requires_grad_(), 1 / self.permutations
        (total,) = torch.autograd.grad(concentration(flat, self.width).sum(), flat)
        for order in self._orders(flat, seed, iteration):
            (more,) = torch.autograd.grad(concentration(flat[:, order], self.width).sum(), flat)
            total = total + share * more
        return total.reshape(z.shape)

    def _orders(self, flat: Tensor, seed: int, iteration: int) -> Iterator[Tensor]:
        """Permutations of the noise, the same for all samples."""
        for i in range(self.permutations):
            yield torch.randperm(flat.shape[1], generator=generator(seed, "order", iteration, i)).to(flat.device)
