"""DiffusionNFT (arXiv 2509.16117): reinforcement on the forward process, with the images of an older policy.

    r    = 1/2 + A / (2 c),  A = (reward - group mean) / std of all, clamped to +-c           in [0, 1]
    v+   = (1 - b) v_old + b v,   v- = (1 + b) v_old - b v
    loss = (c / b) [r l(v+) + (1 - r) l(v-)] + kl mean |v - v_ref|^2
    l(v) = mean |x0(v) - x0|^2 / sg(mean |x0(v) - x0|)                                   `adaptive`, else |v - target|^2
    old <- decay old + (1 - decay) policy,  decay = min(slope (rounds - after), most)

Good images pull the network towards them through v+, bad ones push it away through v-; the fixed point for labels r is
v_old + (2 / b) E[r (x) (v^+ - v_old)]. Images come from the old policy, by any solver, without guidance, and are noised
anew at each trained row of the sampler's grid. The old policy is the policy's average, so that LoRA and full weights
serve. Departures: outputs of epsilon and v networks are mixed like velocities; means and weights are taken in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.advantage import group_advantage
from t2i_align.methods.base import Rollout
from t2i_align.methods.forward import ForwardProcess, ForwardSettings, Noised, Times
from t2i_align.pipelines.kernels import output_to_x0_eps
from t2i_align.prompts import Prompts
from t2i_align.training import Ctx, Term

FLOOR = 1e-5  # of the adaptive weight's denominator


class NFTSettings(ForwardSettings):
    """Settings of DiffusionNFT."""

    b: float = Field(1.0, gt=0, description="how far v+ and v- reach; smaller ones pull less back to the old policy")
    adaptive: bool = Field(True, description="weigh errors of x0 by their own size, instead of errors of the output")
    kl: float = Field(1e-4, ge=0, description="weight of the squared distance to the base's output")
    advantage_clip: float = Field(5.0, gt=0, description="advantage at which an image counts as wholly good")
    slope: float = Field(1e-3, ge=0, description="by which the old policy's decay grows from round to round")
    after: int = Field(0, ge=0, description="rounds before it does")
    most: float = Field(0.5, ge=0, lt=1, description="largest decay of the old policy")
    times: ClassVar[Times] = "grid"  # type: ignore[misc]
    levels: ClassVar[int] = 1  # type: ignore[misc]


class NFT(ForwardProcess):
    """Negative-aware fine-tuning."""

    settings: NFTSettings
    averages: ClassVar[bool] = True

    @property
    def drawing(self) -> dict[str, Any]:
        """Without guidance."""
        return self.process.call

    def state(self) -> dict[str, Any]:
        """The old policy's weights."""
        return super().state() | {"old": [p.detach() for p in self._old()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        super().restore(state)
        if state["old"]:
            self.policy.update_average(0.0)  # there is one from now on
            for p, value in zip(self._old(), state["old"], strict=True):
                p.data.copy_(value)

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, Tensor]:
        """Images of the old policy, and r (B,) of this process's."""
        s = self.settings
        rounds = max(0, ctx.step // self.updates - s.after)
        self.policy.update_average(min(s.slope * rounds, s.most))
        with self.policy.averaged():
            data = self.rollout(ctx, prompts)
        advantage = group_advantage(data.scores.total, data.group, "global", clip=s.advantage_clip)
        return data, data.mine(0.5 + advantage / (2 * s.advantage_clip))

    def losses(self, ctx: Ctx, batch: tuple[Rollout, Tensor]) -> Iterator[Term]:
        """One term per trained row of the grid and batch of samples."""
        (data, good), s = batch, self.settings
        chunks, rows = self.chunks(ctx, len(data)), range(self.process.rows)
        share, trust = 1 / (len(rows) * self.samples(ctx, chunks)), data.mine(data.trust)
        for row in rows:
            for part in chunks:
                x0, cond = data.traj.x[part, -1], data.traj.cond[part]
                places = range(data.first + part.start, data.first + part.stop)
                eps = [torch.randn(x0.shape[1:], generator=ctx.generator("forward", i, row)) for i in places]
                noised = self.process.noised(x0, row, torch.stack(eps))
                with torch.no_grad():
                    with self.policy.averaged():
                        old = self.process.output(noised, cond)
                    with self.policy.reference():
                        base = self.process.output(noised, cond) if s.kl else old
                v = self.process.output(noised, cond)
                plus, minus = self.branches(noised, v, old)
                away = (v - base).square().flatten(1).mean(1)
                fit = mixed(plus, minus, good[part].to(v), s.b, s.advantage_clip)
                loss = trust[part].to(v) * fit + s.kl * away
                yield Term(loss.sum() * share, {"away": away, "moved": (v - old).square().mean()})

    def branches(self, noised: Noised, v: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """l(v+) and l(v-), (B,) each."""
        s = self.settings
        outputs = ((1 - s.b) * old + s.b * v, (1 + s.b) * old - s.b * v)
        if not s.adaptive:
            plus, minus = ((output - noised.target).square().flatten(1).mean(1) for output in outputs)
            return plus, minus
        prediction = self.tools.driver.prediction
        found = [output_to_x0_eps(output, noised.x, noised.level, prediction)[0] for output in outputs]
        plus, minus = (adaptive(x0, noised.x0) for x0 in found)
        return plus, minus

    def _old(self) -> list[Tensor]:
        """The weights of the old policy, none before the first round."""
        weights: Any = self.policy.weights
        if not weights.has_average:
            return []
        return list(weights.means) if weights.kind == "lora" else list(weights.average.values())


def adaptive(x0: Tensor, right: Tensor) -> Tensor:
    """Mean |x0 - right|^2 / mean |x0 - right| (B,); the denominator has no gradient."""
    off = (x0 - right).flatten(1)
    return off.square().mean(1) / off.detach().abs().mean(1).clamp(min=FLOOR)


def mixed(plus: Tensor, minus: Tensor, good: Tensor, b: float, scale: float) -> Tensor:
    """(scale / b) [r l(v+) + (1 - r) l(v-)] (B,)."""
    return scale / b * (good * plus + (1 - good) * minus)
