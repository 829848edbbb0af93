"""DRaFT (arXiv 2309.17400) and AlignProp (arXiv 2310.03739): the reward of the finished image through the last K steps.

    draft      K fixed: 1 is cheapest, the number of steps full backpropagation
    draft-lv   `lv` n > 0, K = 1: the finished latents are noised to the last level n times, and the last step from
               there keeps its graph: n gradients of one image, less noisy than the one of its own last step
    alignprop  K drawn per batch of samples: U(1, T), or T - int(N(0.84 T, 0.1 T)) as in the published code, which is
               redrawn until some step, and not every one, is kept

Steps before have no graph, and x_K none: a step is built from detached predictions only. Departures: of DRaFT-LV the
chain's own last step, whose part in the paper's average was not found, has no graph; AlignProp's published code
denormalises pictures twice, so that its reward sees washed-out ones; see `reward_gradient.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from t2i_align.methods.reward_gradient import GradientSettings, Make, RewardGradient, Starts
from t2i_align.training import Ctx


class DRaFTSettings(GradientSettings):
    """Settings of DRaFT."""

    kernel: str | None = Field("ode", description="reverse steps; null: ddim(1.0), on flow models flow_sde(0.7)")
    keep: int = Field(1, gt=0, description="K, the last steps that keep their graph")
    lv: int = Field(0, ge=0, description="n of DRaFT-LV, with keep: 1; 0 for none")


class AlignPropSettings(GradientSettings):
    """Settings of AlignProp."""

    keep: Literal["uniform", "gaussian"] | PositiveInt = Field(
        "uniform", description="K: drawn from U(1, T), or N(0.16 T, 0.1 T), or fixed"
    )
    lv: ClassVar[int] = 0


class DRaFT(RewardGradient):
    """The reward of the finished image through the last K steps."""

    settings: DRaFTSettings

    @classmethod
    def refuse(cls, settings: Any, columns: Any) -> str | None:
        """DRaFT-LV keeps one step."""
        if settings.lv and settings.keep != 1:
            return f"method.lv: expected keep: 1 beside it but got {settings.keep}"
        return super().refuse(settings, columns)

    def latents(self, ctx: Ctx, batch: Starts, part: slice) -> Iterator[Make]:
        """The finished latents, or those of the last step from fresh noise."""
        kept, draws = self.kept(ctx, batch.first + part.start), self.settings.lv
        with torch.no_grad():
            x = self.sampled(batch, part, batch.x[part], range(self.total if draws else self.total - kept))
        last = range(self.total - kept, self.total)
        if not draws:
            yield partial(self.sampled, batch, part, x, last)
        for number in range(draws):
            yield partial(self.sampled, batch, part, self.noised(ctx, batch, part, x, number), last)

    def kept(self, ctx: Ctx, place: int) -> int:
        """K of the batch of samples that starts at a place."""
        return min(self.settings.keep, self.total)

    def noised(self, ctx: Ctx, batch: Starts, part: slice, x: Tensor, number: int) -> Tensor:
        """Finished latents at the last level of the grid again, with fresh noise."""
        eps = [torch.randn(x.shape[1:], generator=ctx.generator("lv", i, number)) for i in batch.ids(part)]
        return self.process.noised(x, self.total - 1, torch.stack(eps)).x


class AlignProp(DRaFT):
    """DRaFT with a random number of kept steps."""

    settings: AlignPropSettings  # type: ignore[assignment]

    def kept(self, ctx: Ctx, place: int) -> int:
        """K of the batch of samples that starts at a place."""
        keep, most, g = self.settings.keep, self.total, ctx.generator("truncate", place)
        if isinstance(keep, int):
            return min(keep, most)
        if keep == "uniform":
            return 1 + int(torch.randint(most, (), generator=g))
        drawn = 0
        while not 0 < drawn <= max(1, most - 1):  # redrawn as published: of 50 steps, 1 to 49
            drawn = most - int(0.84 * most + 0.1 * most * float(torch.randn((), generator=g)))
        return drawn
