"""SVDD (arXiv 2408.08252): at every step draw candidates for the next latent and keep one by its value.

    candidates  x_s^m ~ p(x_s | x_t), m = 1 ... M
    kept        m with probability softmax(lam v(x_s^m) / spread), the highest value where lam is null
    value       v(x_s) = r(x0hat(x_s)), the reward of the decoded x0 prediction, or a learned value function

Nested importance sampling: particles never meet, so none is copied; biased at finite M and not corrected at the end.
lam = infinity, the published code's choice, overshoots any tilt of the base.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from t2i_align.keys import key
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.kernels import Kernel, Step
from t2i_align.prompts import Prompts
from t2i_align.smc import multinomial
from t2i_align.steering.base import Ctx, Steered, Steering, Value, check_value, timed


class SVDD(Steering):
    """Value-guided candidates: of `candidates` next latents each particle keeps one."""

    summary: ClassVar[str] = "each particle keeps one of several next latents by its value"

    particles: int = Field(1, gt=0, description="samples drawn per prompt, independent of each other")
    candidates: int = Field(8, gt=0, description="next latents per particle and step; 1: the base")
    lam: float | None = Field(None, ge=0, description="inverse temperature of the choice; null: the highest value")
    spread: float = Field(
        1.0, gt=0, description="standard deviation of the value in which lam counts; 1: the value's own unit"
    )
    every: int = Field(1, gt=0, description="rows of the grid between two choices")
    value: Value | str | None = Field(
        None, description="folder of a learned value function, or a callable; null: the reward of the x0 prediction"
    )
    preview_scale: float = Field(1.0, gt=0, le=1, description="size of the latents that rewards along the way see")

    _is_value = field_validator("value")(check_value)

    @property
    def keeps_lines(self) -> bool:
        return True

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Steer; all particles weigh the same."""
        with timed(ctx.cost):
            return self._run(ctx, prompts)

    @torch.no_grad()
    def _run(self, ctx: Ctx, prompts: Prompts) -> Steered:
        kernel, K = ctx.stochastic("svdd"), self.particles
        many, ids = prompts.repeat(K), ctx.ids(prompts, K)
        cond = ctx.encode(prompts).repeat(K)
        x = start = ctx.start(cond, ids)
        streams, step, value = ctx.all_streams(ids), None, ctx.open_value(self.value)
        for row in range(ctx.rows):
            step = ctx.step(x, row, cond, kernel) if step is None else step
            if self.candidates == 1 or row % self.every or not step.q.std.any():
                x, step = ctx.draw(step.q, row, ids), None
                continue
            drawn, names = self._candidates(ctx, step, row, ids)
            values, after = self._values(ctx, drawn, row + 1, cond, many, kernel, value)
            picked = self._pick(values.reshape(len(x), -1), ctx.uniforms(prompts, K, row).reshape(-1, 1))
            streams[:, row] = names.gather(1, picked)[:, 0]
            flat = (picked[:, 0] + self.candidates * torch.arange(len(x))).to(x.device)
            x, step = drawn[flat], None if after is None else _take(after, flat)
            ctx.log(
                row=row, rewards=values.reshape(len(prompts), K, -1).tolist(), picked=picked.reshape(-1, K).tolist()
            )
        images, scores = ctx.judge(x, many)
        ctx.log(row=ctx.rows, rewards=scores.total.reshape(-1, K).tolist())
        return ctx.finish(prompts, K, x, images, scores, start=start, streams=streams)

    def _candidates(self, ctx: Ctx, step: Step, row: int, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Next latents (B M, ...), particle-major, and the streams (B, M) of their noise; the first is the base's."""
        M = self.candidates
        own = ctx.streams(ids, row)
        names = [own[i] if m == 0 else key(own[i], "candidate", m) for i in range(len(ids)) for m in range(M)]
        q = step.q._replace(mean=step.q.mean.repeat_interleave(M, 0))
        return ctx.driver.draw(q, row, ctx.steps, ctx.seed, names), torch.tensor(names).reshape(-1, M)

    def _values(
        self, ctx: Ctx, x: Tensor, row: int, cond: Cond, many: Prompts, kernel: Kernel, value: Value | None
    ) -> tuple[Tensor, Step | None]:
        """Values (B M,) of candidates at a row, and the next steps from them where they had to be made."""
        M = self.candidates
        if row == ctx.rows:
            return ctx.rewards(x, many.repeat(M), preview=False), None
        if value is not None:
            return value(x, row, cond.repeat(M)).cpu(), None
        after = ctx.step(x, row, cond.repeat(M), kernel)
        return ctx.rewards(after.x0, many.repeat(M), self.preview_scale), after

    def _pick(self, values: Tensor, uniforms: Tensor) -> Tensor:
        """One candidate of each particle, (B, 1), of values (B, M); a value that is no number is never picked."""
        known = values.double().nan_to_num(nan=-math.inf, posinf=-math.inf)
        best = known.argmax(1, keepdim=True)
        if self.lam is None:
            return best
        logits = torch.where(known.isfinite(), self.lam * known / self.spread, -math.inf)
        shares = logits.softmax(1)  # nan where no value is a number: the first candidate
        return torch.where(shares.isnan().any(1, keepdim=True), best, multinomial(shares.nan_to_num(), uniforms))


def _take(step: Step, rows: Tensor) -> Step:
    """Some samples of a step."""
    return Step(step.x0[rows], step.eps[rows], step.q._replace(mean=step.q.mean[rows]))
