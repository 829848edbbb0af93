"""VARD: the policy follows the gradient of a learned value function (arXiv 2505.15791).

    V      = argmin E (V(x_t, t, c) - r(x_0, c))^2,  so V(x_t, t, c) = E[r(x_0, c) | x_t, c]
    loss_t = -E_z V(mu_theta(x_t) + s_t z, t - 1, c) + eta KL(p_theta(. | x_t) || p_base(. | x_t)),  x_t detached

Every step gets a gradient of its own, and rewards need none: V alone is differentiated, and is taught anew from every
round's images. The paper's equations are not public; these are derived from its abstract. Where V = w . x the optimum
moves the mean by (s^2 / eta) w, the tilt of the base by exp(V / eta). `lookahead` backpropagates through so many steps
before V is asked. eta counts in standard deviations of the reward per nat. The step that ends the run is not trained:
below it V has nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from t2i_align.keys import key
from t2i_align.methods.base import OnPolicy, Rollout, SamplingSettings, Tools
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import noise_of
from t2i_align.pipelines.kernels import Gaussian
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.features import on_a_clip
from t2i_align.training import Ctx, Term, TrainingError
from t2i_align.values.critic import make_critic
from t2i_align.values.readers import Source
from t2i_align.values.value import ValueBlock


class VARDSettings(SamplingSettings):
    """Settings of VARD."""

    group: int = Field(4, gt=0, description="images per prompt")
    eta: float = Field(0.1, ge=0, description="weight of the KL to the base: standard deviations of the reward per nat")
    skip: int = Field(0, ge=0, description="noisiest steps that are not trained, at which the value knows too little")
    lookahead: int = Field(1, gt=0, description="steps that are backpropagated before the value is asked")
    warmup: int = Field(2, ge=0, description="first rounds, which teach the value alone; all: the base's value")
    refresh: int = Field(1, gt=0, description="rounds between two lessons of the value")
    value: ValueBlock = ValueBlock()


class VARD(OnPolicy):
    """Value-based dense fine-tuning."""

    settings: VARDSettings

    @classmethod
    def refuse(cls, settings: VARDSettings, columns: Any) -> str | None:
        """A value function that looks through a CLIP needs one that can be opened; some step has to be trained."""
        if settings.value.clip is not None:
            try:
                on_a_clip(settings.value.clip)
            except RewardError as error:
                return f"method.value.clip: {error}"
        trained = max(1, int(settings.trained_rows * settings.steps))
        if settings.value.net != "plugin":  # others have no value of finished latents
            trained = min(trained, settings.steps - 1)
        if settings.skip >= trained:
            return f"method.skip: expected fewer than the {trained} steps that are trained but got {settings.skip}"
        return super().refuse(settings, columns)

    def __init__(self, settings: VARDSettings, policy: Policy, tools: Tools) -> None:
        super().__init__(settings, policy, tools)
        if settings.value.net == "plugin" and not tools.reward.differentiable:
            raise TrainingError(
                f"Expected a differentiable reward for value.net=plugin but {tools.reward.name} is none: use features, "
                "conv or clip, which learn its value."
            )
        source = Source(tools.driver, settings.steps, tools.call, policy.reference)
        self.critic = make_critic(settings.value, source, tools.reward, settings.batch_size)

    def networks(self) -> list[nn.Module]:
        """The CLIP that the value function looks through; its own few layers are made in the first round."""
        tower = self.critic.source.tower
        return [] if tower is None else [tower.network]

    @property
    def still(self) -> int:
        """Updates of the warm-up."""
        return self.settings.warmup * self.updates

    def state(self) -> dict[str, Any]:
        """The value function with its optimiser, besides what all methods keep."""
        return super().state() | {"critic": self.critic.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        super().restore(state)
        self.critic.restore(state["critic"])

    def save(self, folder: Path) -> None:
        """Write `value/`: the value function as it is now, and how right it was."""
        self.critic.save(folder / "value")

    def report(self, batch: tuple[Rollout, dict[str, float]]) -> dict[str, float]:
        """Rewards, and how well they were predicted before they were learned from."""
        return super().report(batch) | batch[1]

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, dict[str, float]]:
        """Images of the round, and what to log of the value function, which has learned from them."""
        data, number = self.rollout(ctx, prompts), ctx.step // self.updates
        learn = number < self.settings.warmup or number % self.settings.refresh == 0
        return data, self.critic.observe(ctx, data, learn)

    def losses(self, ctx: Ctx, batch: tuple[Rollout, dict[str, float]]) -> Iterator[Term]:
        """One term per trained step and batch of samples."""
        (data, _), s = batch, self.settings
        if ctx.step // self.updates < s.warmup:
            return
        chunks, steps = self.chunks(ctx, len(data)), data.traj.steps
        rows = [row for row in self.rows(data.traj)[s.skip :] if row + 1 < steps or self.critic.ends]
        if not rows:
            raise TrainingError(
                f"Expected some of the {steps} steps to be trained but skip={s.skip} leaves none: lower method.skip or "
                "raise method.trained_rows."
            )
        share = 1 / (len(rows) * self.samples(ctx, chunks))
        for row in rows:
            for part in chunks:
                value, kl = self.ahead(ctx, data, part, row)
                yield Term((s.eta * kl - value).sum() * share, {"value": value, "kl_penalty": kl})

    def ahead(self, ctx: Ctx, data: Rollout, part: slice, row: int) -> tuple[Tensor, Tensor]:
        """Value (B,), in standard deviations of the reward, of what follows a row, and KL (B,) of the steps, nats."""
        cond, x = data.traj.cond[part], data.traj.x[part, row]
        kl = torch.zeros(len(x), device=x.device)
        end = min(row + self.settings.lookahead, data.traj.steps - (not self.critic.ends))
        ids = range(data.first + part.start, data.first + part.stop)
        for at in range(row, end):
            q = self._step(x, at, cond).q
            kl = kl + q.kl(self._base(x, at, cond))
            x = q.sample(noise_of(x, key(ctx.seed, "vard", ctx.step, row), ids, at))
        return self.critic.scaled(x, end, cond), kl

    def _base(self, x: Tensor, row: int, cond: Cond) -> Gaussian:
        """The base's step, with a graph where x has one."""
        with torch.set_grad_enabled(x.requires_grad), self.policy.reference():
            return self._step(x, row, cond).q
