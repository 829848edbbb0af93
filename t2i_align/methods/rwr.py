"""Reward-weighted regression (arXiv 2302.12192; RAFT, arXiv 2304.06767): supervised training on one's own good images.

    w_i  = exp(r_i / beta) / mean over the prompt's images of exp(r / beta)          `select: weights`
    w_i  = images / best for the `best` best images of a prompt, else 0             `select: best`
    loss = mean of w M,  M the denoising error at a random level

On images of the base the minimum of the first is p_base exp(r / beta) / Z, without a KL to weigh: beta alone says how
far it goes. On images of the policy (`images: policy`) every round tilts what the last one left. The cheap baseline:
no log-probs, no reference passes, any solver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.methods.base import Rollout
from t2i_align.methods.forward import ForwardProcess, ForwardSettings
from t2i_align.prompts import Prompts
from t2i_align.training import Ctx, Term


class RWRSettings(ForwardSettings):
    """Settings of reward-weighted regression."""

    beta: float = Field(1.0, gt=0, description="temperature of the weights, in the unit of the reward")
    select: Literal["weights", "best"] = Field("weights", description="weigh all images, or train on the best alone")
    best: int = Field(1, gt=0, description="images of a prompt that `select: best` trains on")
    images: Literal["policy", "base"] = Field("policy", description="whose images are trained on")


class RWR(ForwardProcess):
    """Regression on rewarded images."""

    settings: RWRSettings

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, Tensor]:
        """Images of the round and the weights (B,) of this process's."""
        s = self.settings
        with self.policy.reference() if s.images == "base" else nullcontext():
            data = self.rollout(ctx, prompts)
        rewards = data.scores.total.reshape(-1, data.group)
        weights = tilted(rewards, s.beta) if s.select == "weights" else best_of(rewards, s.best)
        return data, data.mine(weights.flatten() * data.trust.to(weights))

    def losses(self, ctx: Ctx, batch: tuple[Rollout, Tensor]) -> Iterator[Term]:
        """One term per noise level and batch of samples, those of weight 0 left out."""
        (data, weights), s = batch, self.settings
        chunks = self.chunks(ctx, len(data))
        share = 1 / (s.levels * self.samples(ctx, chunks))
        for part in chunks:
            rows = part.start + weights[part].nonzero()[:, 0].cpu()
            for number in range(s.levels) if len(rows) else ():
                noised = self.process.keyed(ctx, data.traj.x[rows, -1], (data.first + rows).tolist(), number)
                error = self.process.error(noised, data.traj.cond[rows.tolist()])
                yield Term((weights[rows].to(error) * error).sum() * share, {"error": error})


def tilted(rewards: Tensor, beta: float) -> Tensor:
    """exp(r / beta) (P, K), scaled to a mean of 1 per row; a reward that is no number has weight 0."""
    logits = (rewards.cpu().double() / beta).nan_to_num(nan=-torch.inf)
    return (logits.softmax(1).nan_to_num(nan=0.0) * rewards.shape[1]).float().to(rewards.device)


def best_of(rewards: Tensor, count: int) -> Tensor:
    """K / count for the `count` largest of each row (P, K), else 0; a reward that is no number is never among them."""
    known = ~rewards.isnan()
    count = min(count, rewards.shape[1])
    order = rewards.cpu().double().nan_to_num(nan=-torch.inf).topk(count, 1).indices.to(rewards.device)
    chosen = torch.zeros_like(rewards).scatter(1, order, 1.0)
    return chosen * known * rewards.shape[1] / count
