"""What methods on finished images share: the forward process, in which latents are noised and the network is trained.

    x_t = alpha x0 + sigma eps,   M = mean over dimensions of |network(x_t) - target|^2

`target` is what the network predicts: eps, v, x0, or eps - x0 on flow models. No guidance acts here: the network itself
is trained. Noise and levels are keyed by an image's place in the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.methods.base import OnPolicy, SamplingSettings, Tools
from t2i_align.pipelines.catalog import guidance_keyword
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import At, Driver, OnStep
from t2i_align.pipelines.grid import Level, Point
from t2i_align.pipelines.kernels import load_kernel, x0_eps_to_output
from t2i_align.policy import Policy
from t2i_align.training import Ctx
from t2i_align.trajectory import Trajectory

NATIVE = "native"
Times = Literal["uniform", "grid"]


class ForwardSettings(SamplingSettings):
    """How images are drawn, and noised again."""

    solver: str = Field(NATIVE, description="of drawn images: native, the scheduler's own, or a kernel such as ode")
    kernel: str | None = Field(None, description="reverse steps of the KL that evaluations show; null: as for grpo")
    times: Times = Field("uniform", description="noise levels: all that the network was trained on, or the sampler's")
    levels: int = Field(1, gt=0, description="noise levels per image and update")
    shared_start: ClassVar[bool] = False  # type: ignore[misc]  # solvers add no noise of their own: all would be equal


class Noised(NamedTuple):
    """Latents x (B, ...) at levels `at` (numbers: `level`), and what the network should say of them."""

    x: Tensor
    at: At
    level: Level
    x0: Tensor
    target: Tensor


class Forward:
    """The forward process of a driver's pipeline.

    Args:
        driver: of the pipeline.
        steps: of the run whose grid counts.
        rows: how many of its rows, the noisiest, are levels of `times="grid"`.
        times: where levels come from.
        call: keywords of the pipeline's `__call__`; guidance is turned off.
    """

    def __init__(self, driver: Driver, steps: int, rows: int, times: Times, call: dict[str, Any]) -> None:
        self.driver, self.steps, self.rows, self.times = driver, steps, rows, times
        self.call = call | unguided(driver)

    def at(self, generators: Sequence[torch.Generator]) -> At:
        """A level for each sample."""
        grid = self.driver.grid(self.steps, **self.call)
        # At timestep 0 a flow is clean, and says nothing; the first one of other schedulers is not.
        low, high = (0, self.rows) if self.times == "grid" else (int(grid.linear), len(grid.trained))
        drawn = torch.tensor([int(torch.randint(low, high, (), generator=g)) for g in generators])
        return drawn if self.times == "grid" else grid.at(drawn)

    def noised(self, x0: Tensor, at: At, eps: Tensor) -> Noised:
        """Latents x0 (B, ...) with noise eps (B, ...) at a level, or one per sample."""
        x0, eps = x0.float(), eps.to(x0.device)
        level = self.driver.grid(self.steps, **self.call).level(at, x0)
        target = x0_eps_to_output(x0, eps, level, self.driver.prediction)
        return Noised(level.alpha * x0 + level.sigma * eps, at, level, x0, target)

    def keyed(self, ctx: Ctx, x0: Tensor, places: Sequence[int], number: int) -> Noised:
        """Noised latents whose level and noise are keyed by the samples' places; equal places share both."""
        generators = {place: ctx.generator("forward", place, number) for place in dict.fromkeys(places)}
        at = self.at(list(generators.values()))
        eps = [torch.randn(x0.shape[1:], generator=g) for g in generators.values()]
        order = torch.tensor([list(generators).index(place) for place in places])
        at = Point(*(part[order] for part in at)) if isinstance(at, Point) else torch.as_tensor(at)[order]
        return self.noised(x0, at, torch.stack(eps)[order])

    def output(self, noised: Noised, cond: Cond) -> Tensor:
        """What the network says, (B, ...), fp32, with its graph."""
        return self.driver.predict(noised.x, noised.at, cond, self.steps, **self.call).float()

    def error(self, noised: Noised, cond: Cond) -> Tensor:
        """M (B,): the mean squared error of the network."""
        return (self.output(noised, cond) - noised.target).square().flatten(1).mean(1)


class ForwardProcess(OnPolicy):
    """Base of methods that learn from finished images by the forward process."""

    settings: ForwardSettings

    def __init__(self, settings: ForwardSettings, policy: Policy, tools: Tools) -> None:
        super().__init__(settings, policy, tools)
        rows = self.trained(tools.driver.grid(settings.steps, **tools.call).steps)
        self.process = Forward(tools.driver, settings.steps, rows, settings.times, tools.call)
        if settings.solver != NATIVE:
            load_kernel(settings.solver)

    @property
    def drawing(self) -> dict[str, Any]:
        """Keywords of the pipeline for images of the round."""
        return self.tools.call

    def draw(self, ctx: Ctx, cond: Cond, seed: int, ids: list[int], on_step: OnStep | None = None) -> Trajectory:
        """The last latents of a round's images alone, by any solver: chains of no steps."""
        s, driver = self.settings, self.tools.driver
        if s.solver == NATIVE:
            x = driver.solve(cond, s.steps, seed, s.batch_size, ids, **self.drawing)
        else:
            kernel = load_kernel(s.solver)
            x = driver.rollout(cond, s.steps, kernel, seed, batch_size=s.batch_size, ids=ids, **self.drawing).x[:, -1]
        return finished(x, cond)


def finished(x: Tensor, cond: Cond) -> Trajectory:
    """Latents (B, ...) as chains of no steps."""
    return Trajectory(x[:, None], torch.zeros(len(x), 0), (), cond)


def unguided(driver: Driver) -> dict[str, Any]:
    """Keywords that turn classifier-free guidance (a network with one built in has none to turn off) and PAG off."""
    built_in = bool(getattr(driver.network.config, "guidance_embeds", False))
    off = {"pag_scale": 0.0} if built_in else {guidance_keyword(driver.pipe): 1.0, "pag_scale": 0.0}
    return {keyword: value for keyword, value in off.items() if keyword in driver.accepts}
