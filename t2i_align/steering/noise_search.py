"""Search over starting noise (arXiv 2501.09732): the sampler is a fixed map from noise to images, the reward a judge.

    random      round k doubles the noises tried: the best of 2^k independent draws
    zero order  round k tries neighbours z' of the best noise z so far, which stays unless one of them is better:
                z' = |z| (c u + sqrt(1 - c^2) w),  u = z / |z|, w a random unit vector orthogonal to u

So |z'| = |z| and cos(z, z') = c: the search never leaves the sphere. Where no neighbour is better, published code draws
a new base noise; here the pivot stays and the next round tries other neighbours.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.keys import generator, key
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.kernels import ode
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scores
from t2i_align.steering.base import Ctx, Steered, Steering, timed


class NoiseSearch(Steering):
    """Random or zero-order search; each particle is a search of its own."""

    summary: ClassVar[str] = "starting noise tried at random or around the best so far"

    particles: int = Field(1, gt=0, description="independent searches per prompt")
    search: Literal["zero_order", "random"] = Field("zero_order", description="where the next noises come from")
    rounds: int = Field(4, ge=0, description="rounds after the first noise; random: the best of 2^rounds")
    neighbours: int = Field(4, gt=0, description="noises per round of a zero-order search")
    cosine: float = Field(0.95, gt=-1, lt=1, description="between a noise and its neighbours")

    @property
    def keeps_lines(self) -> bool:
        return True

    @torch.no_grad()
    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Search; the noise of a stochastic kernel's steps stays what it is for the particle."""
        with timed(ctx.cost):
            K = self.particles
            ids, cond = ctx.ids(prompts, K), ctx.encode(prompts).repeat(K)
            z = ctx.start(cond, ids)
            best, scores = self._try(ctx, z, prompts.repeat(K), cond, ids)
            ctx.log(row=0, rewards=scores.total.reshape(-1, K, 1).tolist(), best=scores.total.reshape(-1, K).tolist())
            for round in range(1, self.rounds + 1):
                noises = self._noises(ctx, best["start"], cond, ids, round)
                M = len(noises) // len(ids)
                names = [i for i in ids for _ in range(M)]
                tried, judged = self._try(ctx, noises, prompts.repeat(K * M), cond.repeat(M), names)
                best, scores = _better(best, scores, tried, judged)
                totals = scores.total.reshape(-1, K)
                ctx.log(row=round, rewards=judged.total.reshape(-1, K, M).tolist(), best=totals.tolist())
            return ctx.finish(
                prompts, K, best["latents"], best["images"], scores, start=best["start"], streams=ctx.all_streams(ids)
            )

    def _try(
        self, ctx: Ctx, z: Tensor, prompts: Prompts, cond: Cond, ids: list[int]
    ) -> tuple[dict[str, Tensor], Scores]:
        """Sample from starting latents and judge: tensors of each sample by name, and the scores."""
        latents = ctx.denoise(z, cond, ids, ctx.kernel or ode())
        images, scores = ctx.judge(latents, prompts)
        return {"start": z, "latents": latents, "images": images}, scores

    def _noises(self, ctx: Ctx, pivots: Tensor, cond: Cond, ids: list[int], round: int) -> Tensor:
        """What a round tries: (B M, ...), particle-major."""
        if self.search == "random":
            numbers = range(2 ** (round - 1), 2**round)
            names = [key(name, "random", number) for name in ids for number in numbers]
            return ctx.driver.start(cond.repeat(len(numbers)), ctx.steps, ctx.seed, names)
        draws = [
            torch.randn(pivots.shape[1:], generator=generator(ctx.seed, "neighbour", name, round, m)).double()
            for name in ids
            for m in range(self.neighbours)
        ]
        pivots = pivots.repeat_interleave(self.neighbours, 0)
        return neighbour(pivots.cpu().double(), torch.stack(draws), self.cosine).to(pivots)


def neighbour(z: Tensor, directions: Tensor, cosine: float) -> Tensor:
    """Points (B, ...) as long as `z` (B, ...), at a cosine to it, towards `directions` (B, ...); fp64 for exactness."""
    flat, towards = z.flatten(1), directions.flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    unit = flat / norm
    towards = towards - (towards * unit).sum(1, keepdim=True) * unit
    towards = towards / towards.norm(dim=1, keepdim=True)
    return (norm * (cosine * unit + math.sqrt(1 - cosine**2) * towards)).reshape(z.shape)


def _better(
    best: dict[str, Tensor], scores: Scores, tried: dict[str, Tensor], judged: Scores
) -> tuple[dict[str, Tensor], Scores]:
    """For each particle the best of what it had and what it tried, M samples each; ties keep the former."""
    count = len(scores.total)
    totals = torch.cat([scores.total[:, None], judged.total.reshape(count, -1)], 1).nan_to_num(nan=-math.inf)
    pick = totals.argmax(1)
    M = totals.shape[1] - 1
    index = torch.where(pick == 0, torch.arange(count), count + torch.arange(count) * M + pick - 1)

    def taken(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new])[index.to(old.device)]

    parts = {name: taken(values, judged.parts[name]) for name, values in scores.parts.items()}
    std = None if scores.std is None or judged.std is None else taken(scores.std, judged.std)
    return {name: taken(best[name], tried[name]) for name in best}, Scores(
        taken(scores.total, judged.total), parts, std
    )
