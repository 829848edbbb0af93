"""`Grid`: the noise levels of a sampling run, read from any scheduler after it has set its timesteps.

x_t = alpha x0 + sigma eps. Schedulers of the DDIM, Euler and DPM families are read in variance-preserving space
(alpha^2 + sigma^2 = 1; a k-diffusion level s becomes alpha = 1 / sqrt(1 + s^2), sigma = s alpha), flow schedulers in
their own, linear one (alpha = 1 - sigma).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_align.errors import T2IError

READABLE = {
    "alphas_cumprod": "DDIM DDPM PNDM LCM TCD CogVideoXDDIM",
    "sigmas": (
        "EulerDiscrete EulerAncestralDiscrete HeunDiscrete DPMSolverMultistep DPMSolverSinglestep UniPCMultistep "
        "DEISMultistep LMSDiscrete"
    ),
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM",
}
_KIND = {f"{name}Scheduler": kind for kind, names in READABLE.items() for name in names.split()}


class SchedulerError(T2IError):
    """A scheduler whose noise levels cannot be read."""


class Level(NamedTuple):
    """A noise level: x = alpha x0 + sigma eps; scalars, or one value per sample shaped to broadcast against x."""

    alpha: Tensor
    sigma: Tensor


class Point(NamedTuple):
    """Noise levels off the grid: timestep, alpha and sigma, scalars or one per sample (B,).

    `row`: the row of the grid whose interval t lies in, t_row >= t > t_(row + 1).
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    row: Tensor


class Grid(NamedTuple):
    """N rows of a sampling run, noisiest first.

    `t`: (N,) timesteps as the pipeline's loop sees them. `alpha`, `sigma`: (N + 1,) float64; row i leads from level i
    to level i + 1, and the last level is where the run ends (sigma 0 for most schedulers). `linear` says that
    alpha = 1 - sigma (flow matching), otherwise alpha^2 + sigma^2 = 1. `trained`: float64 alpha at the timesteps
    0, 1, 2, ... that the network was trained on.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    linear: bool
    trained: Tensor

    @property
    def steps(self) -> int:
        """Number of rows."""
        return len(self.t)

    def level(self, at: int | Tensor | Point, like: Tensor) -> Level:
        """The level of a row or point, or of one per sample (B,), in fp32, shaped to broadcast with `like` (B, ...)."""
        if isinstance(at, Point):
            picked = [at.alpha, at.sigma]
        else:
            picked = [values[torch.as_tensor(at, device=values.device)] for values in (self.alpha, self.sigma)]
        shape = (-1, *[1] * (like.ndim - 1)) if picked[0].ndim else ()
        return Level(*(values.to(like.device, torch.float32).reshape(shape) for values in picked))

    def at(self, t: float | Tensor) -> Point:
        """A timestep, or one per sample (B,), that need not be on the grid.

        alpha is interpolated linearly between the timesteps that the network was trained on. Rows of the grid come out
        as themselves, but for schedulers that place rows between those timesteps or round them (Karras sigmas).

        Raises:
            SchedulerError: outside the timesteps of training.
        """
        wanted = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        last = len(self.trained) - 1
        if not bool(((wanted >= 0) & (wanted <= last)).all()):
            raise SchedulerError(f"Expected timesteps from 0 to {last} but got {t}.")
        below = wanted.floor().long().clamp(max=last - 1)
        alpha = torch.lerp(self.trained[below], self.trained[below + 1], wanted - below)
        sigma = 1 - alpha if self.linear else (1 - alpha.square()).clamp(min=0).sqrt()
        row = ((self.t.double() >= wanted[..., None]).sum(-1) - 1).clamp(min=0)
        whole = bool((wanted == wanted.round()).all())
        return Point(wanted.to(self.t.dtype if whole else torch.float32), alpha, sigma, row)


def read_grid(scheduler: Any) -> Grid:
    """The grid of a diffusers scheduler on which `set_timesteps` has been called.

    Rows that a scheduler repeats for its own higher order (PNDM, Heun) appear once.

    Raises:
        SchedulerError: the scheduler is none of `READABLE`.
    """
    kind = scheduler_kind(scheduler)
    if kind == "alphas_cumprod":
        return _read_alphas(scheduler)
    t, sigmas = scheduler.timesteps.cpu(), scheduler.sigmas.cpu().double()
    keep = torch.cat([torch.tensor([True]), sigmas[1 : len(t)] != sigmas[: len(t) - 1]])
    t, levels = t[keep], torch.cat([sigmas[: len(t)][keep], sigmas[-1:]])
    if kind == "flow" and levels[0] > 1 + 1e-6:
        raise SchedulerError(
            f"Expected flow-matching levels from 1 to 0 but {type(scheduler).__name__} starts at {float(levels[0]):g}: "
            "its pipeline uses another parameterisation (Cosmos)."
        )
    if is_linear(kind, scheduler.config):
        trained = torch.linspace(1, 0, scheduler.config.num_train_timesteps + 1, dtype=torch.float64)
        return Grid(t, 1 - levels, levels, True, trained)
    alpha = (1 + levels.square()).rsqrt()
    return Grid(t, alpha, levels * alpha, False, scheduler.alphas_cumprod.cpu().double().sqrt())


def scheduler_kind(scheduler: Any) -> str:
    """How the noise levels of a scheduler are stored: `alphas_cumprod`, `sigmas` or `flow`.

    Raises:
        SchedulerError: it is none of the list in the message.
    """
    for base in type(scheduler).__mro__:
        if base.__name__ in _KIND:
            return _KIND[base.__name__]
    known = ", ".join(sorted(name.removesuffix("Scheduler") for name in _KIND))
    raise SchedulerError(f"Expected a scheduler among {known} but got {type(scheduler).__name__}.")


def is_linear(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of a kind with this config has the levels of flow matching, alpha = 1 - sigma."""
    return kind == "flow" or bool(config.get("use_flow_sigmas", False))


def is_linear_file(config: Mapping[str, Any]) -> bool | None:
    """The same of a scheduler's config on disk; None for a scheduler that is none of `READABLE`."""
    kind = _KIND.get(str(config.get("_class_name")))
    return None if kind is None else is_linear(kind, config)


def prediction_type(scheduler: Any) -> str:
    """What the network behind a scheduler predicts: `epsilon`, `v_prediction`, `sample` or `flow`."""
    if scheduler_kind(scheduler) == "flow":
        return "flow"
    named = scheduler.config.get("prediction_type", "epsilon")
    return "flow" if named == "flow_prediction" else named


def _read_alphas(scheduler: Any) -> Grid:
    """Schedulers that store alphas_cumprod: levels at their timesteps, then their own last level.

    The next level is that of the next timestep. DDIM itself steps down by a fixed number of training steps, which is
    the same for its `leading` and `trailing` spacings.
    """
    if scheduler.config.get("skip_prk_steps") is False:
        raise SchedulerError("Expected a PNDM scheduler with skip_prk_steps=True but its Runge-Kutta rows are on.")
    t = scheduler.timesteps.cpu()
    keep = torch.cat([torch.tensor([True]), t[1:] != t[:-1]])
    t = t[keep]
    last = getattr(scheduler, "final_alpha_cumprod", torch.ones(()))
    trained = scheduler.alphas_cumprod.cpu().double()
    squares = torch.cat([trained[t.long()], last.cpu().double()[None]])
    return Grid(t, squares.sqrt(), (1 - squares).clamp(min=0).sqrt(), False, trained.sqrt())
