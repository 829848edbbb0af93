"""One method after another: each goes on from the noise that made the winners of the one before.

Under one kernel a sample is a function of its starting latents and its rows' noise. The first particle of a later stage
begins with the winner's, so that it starts where the earlier stage ended; other particles are draws of their own. The
winners of earlier stages stay in the running as particles of weight zero: a chain never ends below its best stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scores
from t2i_align.steering.base import Ctx, Line, Steered, Steering, SteeringError


class Chain(Steering):
    """Methods in turn, `stages=[{method: fk, particles: 8}, {method: reno}]`."""

    summary: ClassVar[str] = "methods in turn, each from the noise of the last one's winners"

    particles: int = Field(4, gt=0, description="of the first stage, unless it says so itself; of later ones 1")
    stages: tuple[dict[str, Any], ...] = Field(
        min_length=2, description="each the `method` and its settings, or the method's name alone"
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _read(cls, stages: Any) -> Any:
        from t2i_align.steering import method_name

        if not isinstance(stages, Sequence) or isinstance(stages, str):
            raise ValueError("expected a list of methods")
        named: list[Any] = []
        for stage in stages:
            if isinstance(stage, Steering):
                stage = {"method": method_name(stage), **stage.model_dump(exclude_unset=True)}
            named.append({"method": stage} if isinstance(stage, str) else stage)
            if not isinstance(named[-1], dict) or "method" not in named[-1]:
                raise ValueError(f"expected a stage such as {{method: fk, particles: 8}} but got {stage!r}")
        return named

    @property
    def methods(self) -> list[Steering]:
        """The stages as methods.

        Raises:
            SteeringError: no such method, or one whose particles a later stage cannot go on from.
            ConfigError: settings that it has not.
        """
        from t2i_align.steering import load_method

        drawn = [self.particles, *[1] * (len(self.stages) - 1)]
        made = [load_method(**{"particles": K, **stage}) for K, stage in zip(drawn, self.stages, strict=True)]
        for method, later in pairwise(made):
            if not method.keeps_lines:
                raise SteeringError(
                    f"Expected a stage before {type(later).__name__} whose particles come from noise alone, such as "
                    f"fk, svdd, best_of_n or noise_search, but got {type(method).__name__}."
                )
        return made

    @property
    def needs_gradient(self) -> bool:
        """Whether any stage needs gradients of the reward."""
        return any(method.needs_gradient for method in self.methods)

    @property
    def keeps_lines(self) -> bool:
        return self.methods[-1].keeps_lines

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Run the stages; the weighted sample is the last one's."""
        ctx = replace(ctx, kernel=ctx.noisy)
        firsts, result = ctx.ids(prompts, 1), None
        for method in self.methods:
            if result is not None:
                lines = _lines(result, result.best, firsts)
                ctx = replace(ctx, lines=lines)
            made = method(ctx, prompts)
            result = made if result is None else _with_winners(made, result)
        assert result is not None  # two stages at least
        return result


def _lines(result: Steered, picked: Tensor, names: Sequence[int]) -> dict[int, Line]:
    """How the picked particle of each prompt came about, by the name of the sample that goes on from it."""
    assert result.start is not None  # every stage but the last keeps them
    assert result.streams is not None
    starts = [starts[i] for starts, i in zip(result.start, picked.tolist(), strict=True)]
    streams = [tuple(streams[i].tolist()) for streams, i in zip(result.streams, picked.tolist(), strict=True)]
    return {name: Line(*line) for name, line in zip(names, zip(starts, streams, strict=True), strict=True)}


def _with_winners(made: Steered, before: Steered) -> Steered:
    """A result with the best particle of each prompt of an earlier one as one more particle, of weight zero."""
    P, K = made.log_weight.shape
    best = before.best
    own = torch.arange(P)

    def joined(later: Tensor, earlier: Tensor) -> Tensor:
        return torch.cat([later, earlier[own, best][:, None].to(later)], 1)

    def scored(later: Tensor, earlier: Tensor) -> Tensor:
        return joined(later.reshape(P, K), earlier.reshape(P, -1)).flatten()

    parts = {name: scored(made.scores.parts[name], before.scores.parts[name]) for name in made.scores.parts}
    std = None
    if made.scores.std is not None and before.scores.std is not None:
        std = scored(made.scores.std, before.scores.std)
    lines: dict[str, Tensor | None] = {"start": None, "streams": None}
    if made.start is not None and made.streams is not None and before.start is not None and before.streams is not None:
        lines = {"start": joined(made.start, before.start), "streams": joined(made.streams, before.streams)}
    return replace(
        made,
        images=joined(made.images, before.images),
        latents=joined(made.latents, before.latents),
        scores=Scores(scored(made.scores.total, before.scores.total), parts, std),
        log_weight=torch.cat([made.log_weight, torch.full((P, 1), -math.inf, dtype=torch.float64)], 1),
        **lines,  # type: ignore[arg-type]
    )
