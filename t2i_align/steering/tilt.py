"""How strongly a reward tilts the samples: exp(lam r), lam in units of the reward's own spread."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.keys import key
from t2i_align.prompts import Prompts
from t2i_align.steering.base import Ctx, Steering


class Tilting(Steering):
    """Base of methods that follow a reward's gradient from the first step and so must know its unit before."""

    lam: float = Field(2.0, ge=0, description="inverse temperature of the target")
    lam_units: Literal["sd", "raw"] = Field(
        "sd", description="lam counts in standard deviations of the reward within a prompt, or in the reward's own unit"
    )
    spread: float | None = Field(None, gt=0, description="that standard deviation; null: that of `pilot` plain samples")
    pilot: int = Field(8, ge=2, description="plain samples per prompt that measure the spread, where it is not given")

    @property
    def needs_gradient(self) -> bool:
        return True

    def per_reward(self, ctx: Ctx, prompts: Prompts) -> Tensor:
        """The tilt lam per unit of the reward, (P,) fp64; 0, with a warning, where plain samples all score alike."""
        known = 1.0 if self.lam_units == "raw" or not self.lam else self.spread
        if known is not None:
            return torch.full((len(prompts),), self.lam / known, dtype=torch.float64)
        ids = [key(i, "pilot") for i in ctx.ids(prompts, self.pilot)]
        plain = ctx.sample(ctx.encode(prompts).repeat(self.pilot), ids)
        rewards = ctx.rewards(plain, prompts.repeat(self.pilot), preview=False).double().reshape(-1, self.pilot)
        mean = rewards.nanmean(1, keepdim=True)
        spread = (rewards - mean).square().nanmean(1).sqrt()
        if not bool((spread > 0).all()):
            warnings.warn("Plain samples of a prompt score alike: it is not steered; pass spread=.", stacklevel=2)
        return torch.where(spread > 0, self.lam / spread, 0.0)
