"""ReFL (ImageReward, arXiv 2304.05977): the reward of the prediction of x0 at one of the last steps.

    loss = scale E[max(0, goal - r(decode(x0(x_t)), prompt))] + pretrain E[M on a data set], t in the last `window`

Steps before t have no graph; the one at t is the only network call that is differentiated. At the last step it is
`draft` with keep: 1. Departures: t is drawn per batch of samples, by its place in the round; see `reward_gradient.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.methods.reward_gradient import GradientSettings, Make, RewardGradient, Shape, Starts
from t2i_align.pipelines.cond import Cond
from t2i_align.training import Ctx


class ReFLSettings(GradientSettings):
    """Settings of ReFL."""

    loss: Shape = Field("margin", description="-r, max(0, goal - r) or |goal - r|")
    window: float = Field(0.25, gt=0, le=1, description="share of the steps, the last ones, in which one is drawn")


class ReFL(RewardGradient):
    """The reward of the prediction at one of the last steps."""

    settings: ReFLSettings

    def latents(self, ctx: Ctx, batch: Starts, part: slice) -> Iterator[Make]:
        """The prediction of x0 at the stop."""
        window = max(1, round(self.settings.window * self.total))
        g = ctx.generator("stop", batch.first + part.start)
        stop = self.total - 1 - int(torch.randint(window, (), generator=g))
        with torch.no_grad():
            x = self.sampled(batch, part, batch.x[part], range(stop))
        yield lambda: self.again(lambda x: self.predicted(x, stop, batch.cond[part]), x)

    def predicted(self, x: Tensor, row: int, cond: Cond) -> Tensor:
        """The estimate of x0 (B, ...) from a row."""
        return self.tools.driver.step(x, row, cond, self.settings.steps, self.sampler, **self.tools.call).x0
