"""DDPO with importance sampling (arXiv 2305.13301).

    A_i  = (r_i - mean) / (std + 1e-6) of the prompt's last rewards over the run; of the batch until there are enough
    loss = mean over samples and steps of max(-A rho, -A clip(rho, 1 - e, 1 + e)),  e = 1e-4 on per-dim log-probs

Guidance acts in sampling and in training alike. Departures: minibatches are batches of the rollout in random order, not
single samples, and timesteps are not shuffled (an update adds up the gradients of all of them), so that ratios are
exactly 1 at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.advantage import PromptTracker
from t2i_align.errors import T2IError
from t2i_align.methods.base import Rollout, Tools, outside, surrogate
from t2i_align.methods.policy_gradient import PolicyGradient, PolicyGradientSettings
from t2i_align.pipelines.kernels import per_dim
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.training import Ctx, Term


class DDPOSettings(PolicyGradientSettings):
    """Settings of DDPO."""

    group: int = Field(1, gt=0, description="images per prompt")
    buffer: int = Field(16, gt=0, description="rewards remembered per prompt")
    min_count: int = Field(16, gt=0, description="rewards of a prompt before its own statistics are used")

    @model_validator(mode="after")
    def _enough(self) -> DDPOSettings:
        if self.buffer < self.min_count:
            raise T2IError(
                f"Expected a buffer of min_count={self.min_count} rewards at least, or a prompt's own statistics are "
                f"never used, but got {self.buffer}."
            )
        return self


class DDPO(PolicyGradient):
    """Clipped policy gradient with per-prompt statistics over the run."""

    settings: DDPOSettings

    def __init__(self, settings: DDPOSettings, policy: Policy, tools: Tools) -> None:
        super().__init__(settings, policy, tools)
        self.tracker = PromptTracker(settings.buffer, settings.min_count)

    def state(self) -> dict[str, Any]:
        """The tracker's rewards."""
        return super().state() | {"tracker": self.tracker.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the tracker's rewards."""
        super().restore(state)
        self.tracker.load_state_dict(state["tracker"])

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, Tensor]:
        """Images of the round and the advantages (B, N) of their steps."""
        data = self.images(ctx, prompts)
        texts = list(self.labelled(ctx, prompts, len(prompts)).repeat(data.group).text)
        total = data.scores.total.cpu()
        advantage = torch.zeros(len(total))
        for rows in data.alike():
            some = [texts[row] for row in rows.tolist()]
            advantage[rows] = self.tracker.advantage(some, total[rows], clip=self.settings.advantage_clip)
        return data, data.mine(self.by_step(data, advantage))

    def losses(self, ctx: Ctx, batch: tuple[Rollout, Tensor]) -> Iterator[Term]:
        """One term per trained step and batch of samples."""
        (data, advantages), s = batch, self.settings
        traj, rows, chunks = data.traj, self.rows(data.traj), self.chunks(ctx, len(data))
        share = 1 / (len(rows) * self.samples(ctx, chunks))
        for row in rows:
            for part in chunks:
                q = self.step(traj, part, row)
                ratio = per_dim(q.log_prob(traj.x[part, row + 1]) - traj.log_prob[part, row], q).exp()
                loss = surrogate(ratio, advantages[part, row].to(ratio), s.clip)
                yield Term(loss.sum() * share, {"ratio": ratio, "clipped": outside(ratio, s.clip)})
        yield from self.expansion_terms(ctx, data)
