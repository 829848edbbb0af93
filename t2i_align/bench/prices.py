"""What a backward pass, a decode and its backward cost, in network calls, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from t2i_align.prompts import Prompts
from t2i_align.steering.base import Cost, Ctx
from t2i_align.steering.gradients import latent_gradient, step_gradient

SAMPLES, REPEATS = 32, 8  # per timing


class Prices(NamedTuple):
    """Costs per sample in units of one guided network call without gradients, which takes `seconds`.

    `backward`: of a network call; `decode`: of a picture; `decode_backward`: through decoder and scorer, the scorer's
    forward pass included.
    """

    backward: float
    decode: float
    decode_backward: float
    seconds: float

    def charge(self, cost: Cost, rows: int) -> float:
        """A cost as a multiple of one plain sample: `rows` network calls and a decode. Scoring alone is not charged."""
        spent = cost.forwards + self.backward * cost.backwards
        spent += self.decode * cost.decodes + self.decode_backward * cost.decode_backwards
        return spent / self.sample(rows)

    def sample(self, rows: int) -> float:
        """A plain sample in network calls."""
        return rows + self.decode


def measure_prices(ctx: Ctx) -> Prices:
    """Time the parts of a run on its pipeline with its (differentiable) reward."""
    prompts = Prompts.of(["a red circle"] * SAMPLES)
    cond = ctx.encode(prompts)
    x, row = ctx.start(cond, list(range(SAMPLES))), ctx.rows // 2
    with torch.no_grad():
        x0 = ctx.step(x, row, cond, ctx.noisy).x0
        call = _seconds(lambda: ctx.step(x, row, cond, ctx.noisy))
        decode = _seconds(lambda: ctx.decode(x0))
    through_decoder = _seconds(lambda: latent_gradient(ctx, x0, prompts))
    whole = _seconds(lambda: step_gradient(ctx, x, row, cond, ctx.noisy, prompts))
    backward = max(0.0, whole - through_decoder - call)
    return Prices(backward / call, decode / call, max(0.0, through_decoder - decode) / call, call / SAMPLES)


def _seconds(function: Callable[[], Any]) -> float:
    function()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken)  # what disturbs a timing only ever adds to it
