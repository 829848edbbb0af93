"""D3PO: direct preference optimisation of every denoising step (arXiv 2311.13231).

    L_i = -log sigmoid(beta [log rho_w - log rho_l]),  log rho = per-dim log p_theta(x_s | x_t) - log p_ref(x_s | x_t)

The winner of a pair of images counts as better at every step; both start from one noise. log rho is clamped to
log(1 - e) ... log(1 + e), as the published code does. Departures: the clamp is on the log-ratio and the loss a
log-sigmoid; pairs without a preference are left out, where the published code still lets the optimiser step.

Preferences come from a reward, or from a person (`choices`): then images are those of a folder, drawn again as chains
by the weights that drew them, and every round goes through some of its prompts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from t2i_align.advantage import unequal_pairs
from t2i_align.choices import read_job
from t2i_align.errors import T2IError
from t2i_align.methods.base import OnPolicy, Rollout, SamplingSettings, Tools
from t2i_align.methods.replay import Replay
from t2i_align.pipelines.kernels import per_dim
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scores
from t2i_align.training import Ctx, Term


class D3POSettings(SamplingSettings):
    """Settings of D3PO."""

    group: int = Field(2, gt=1, description="images per prompt")
    shared_start: bool = Field(True, description="all images of a prompt start from one noise")
    beta: float = Field(0.1, gt=0, description="inverse temperature, on per-dimension log-ratios")
    clip: float | None = Field(0.1, gt=0, lt=1, description="clamp of the ratio; null for none")
    pairs: Literal["extremes", "all"] = Field(
        "extremes", description="best and worst of a prompt, or all unequal pairs"
    )
    reference: Literal["base", "previous"] = Field(
        "base", description="what log-ratios are against: the base, or the weights that drew the images"
    )
    choices: str | None = Field(
        None, description="folder of `generate --choices` with a person's choices.json, in the place of a reward"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_drawn(cls, data: Any) -> Any:
        """Take what decides images from the folder with choices; refuse other values."""
        if not isinstance(data, dict) or not isinstance(data.get("choices"), str):
            return data
        job = read_job(data["choices"])
        drawn = {name: getattr(job, name) for name in ("steps", "kernel", "shared_start")} | {"group": job.particles}
        wrong = [name for name, value in drawn.items() if data.get(name, value) != value]
        if wrong:
            said = ", ".join(f"{name} {drawn[name]}, not {data[name]}" for name in wrong)
            raise T2IError(f"The images of {data['choices']} have {said}: leave it out.")
        return drawn | data


class D3PO(OnPolicy):
    """Per-step direct preference optimisation."""

    settings: D3POSettings
    shardable: ClassVar[bool] = True

    @classmethod
    def refuse(cls, settings: D3POSettings, columns: Collection[str]) -> str | None:
        """A person's choices have no std."""
        if settings.choices is not None and settings.discount:
            return "method.discount: expected 0 for a person's choices, which have no std"
        return super().refuse(settings, columns)

    def __init__(self, settings: D3POSettings, policy: Policy, tools: Tools) -> None:
        super().__init__(settings, policy, tools)
        self.replay: Replay | None = None
        if settings.choices is not None:
            self.replay = Replay(settings.choices, policy, tools, settings.batch_size)

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, Tensor, Tensor]:
        """Images of the round, pairs (M, 2) of winner and loser in all processes, reference log-probs (B, N)."""
        if self.replay is not None:
            return self.chosen(ctx, prompts, self.replay)
        data = self.rollout(ctx, prompts)
        pairs = unequal_pairs(data.scores.total, data.group, extremes=self.settings.pairs == "extremes")
        before = data.traj.log_prob if self.settings.reference == "previous" else self.reference_log_prob(data.traj)
        return data, pairs, before

    def chosen(self, ctx: Ctx, prompts: Prompts, replay: Replay) -> tuple[Rollout, Tensor, Tensor]:
        """The same, of images that a person chose among; nothing has scored them."""
        rows, group = prompts.columns["row"], self.settings.group
        mine = ctx.world.share(len(rows))
        traj = replay.chains(rows[mine])
        unknown = torch.full((group * len(rows),), torch.nan)
        data = Rollout(traj, Scores(unknown, {}), group, mine.start * group)
        pairs = torch.tensor(
            [[place * group + i for i in pair] for place, row in enumerate(rows) for pair in replay.choices.pairs[row]]
        )
        previous = self.settings.reference == "previous"
        return data, pairs, self.reference_log_prob(traj, replay.drawn_by() if previous else None)

    def report(self, batch: Any) -> dict[str, float]:
        """As of any method; of a person's choices the numbers of images and pairs."""
        if self.replay is None:
            return super().report(batch)
        data, pairs, _ = batch
        return {"images": len(data.scores.total), "pairs": len(pairs)}

    def losses(self, ctx: Ctx, batch: tuple[Rollout, Tensor, Tensor]) -> Iterator[Term]:
        """One term per trained step and batch of pairs."""
        (data, pairs, before), s = batch, self.settings
        order = torch.randperm(len(pairs), generator=ctx.round_generator("order", ctx.update // s.minibatches))
        dealt = pairs[order][ctx.update % s.minibatches :: s.minibatches]
        here = dealt[:, 0] // len(data) == data.first // len(data)  # a prompt's images are all in one process
        mine, rows = dealt[here] - data.first, self.rows(data.traj)
        trust, counts = data.mine(data.trust), [True] * len(mine)
        if self.policy.sharded:  # processes make as many passes as the one with the most pairs
            idle = max(ctx.world.collect(len(mine))) - len(mine)
            mine, counts = torch.cat([mine, torch.tensor([[0, 1]]).expand(idle, 2)]), counts + [False] * idle
        size = max(1, s.batch_size // 2)
        for row in rows:
            for first in range(0, len(mine), size):
                both = mine[first : first + size].T.flatten()  # winners, then losers
                count = torch.tensor(counts[first : first + size], device=data.traj.x.device)
                q = self.step(data.traj, both, row)
                log_prob = q.log_prob(data.traj.x[both, row + 1])
                log_ratio = per_dim(log_prob - before[both, row], q)
                gap = self.gap(log_ratio)
                weight = trust[mine[first : first + size]].prod(1).to(gap) * count
                loss = (weight * preference_loss(gap, s.beta)).sum() / (len(dealt) * len(rows))
                stats = {"gap": gap[count], "agreed": (gap[count] > 0).float()}
                if s.clip is not None:
                    held = log_ratio.detach() != self.clamped(log_ratio.detach())
                    stats["clipped"] = held.float()[count.repeat(2)]
                if self.replay is None:  # else the policy is not the one that drew the images
                    stats["log_ratio"] = per_dim(log_prob - data.traj.log_prob[both, row], q)
                yield Term(loss, stats)

    def gap(self, log_ratio: Tensor) -> Tensor:
        """Log-ratios (2 M,) of winners, then losers -> their clamped difference (M,)."""
        win, lose = self.clamped(log_ratio).chunk(2)
        return win - lose

    def clamped(self, log_ratio: Tensor) -> Tensor:
        """Log-ratios within the clip."""
        clip = self.settings.clip
        return log_ratio if clip is None else log_ratio.clamp(math.log(1 - clip), math.log(1 + clip))


def preference_loss(gap: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta gap): ln 2 where policy and reference agree."""
    return -logsigmoid(beta * gap)
