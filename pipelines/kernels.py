"""A reverse step as a value: `Gaussian`, the conversions to x0 and eps, and the kernels that make one of the other.

One formula covers epsilon, v and flow models: every kernel is mean = a x0 + b eps with a standard deviation, at the
levels (alpha_t, sigma_t) -> (alpha_s, sigma_s) of two neighbouring rows of a `Grid`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from t2i_align.errors import T2IError
from t2i_align.pipelines.grid import Level

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class Gaussian(NamedTuple):
    """Diagonal Gaussian over latents: `mean` (B, ...) fp32, `std` broadcastable to it."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Mean plus std times `noise`, for standard normal `noise` of the mean's shape."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of `x` (B, ...): (B,), nats per sample, summed over latent dimensions; 0 where std is 0."""
        std = self.std.expand_as(self.mean)
        safe = torch.where(std > 0, std, 1.0)
        nats = -0.5 * ((x.float() - self.mean) / safe).square() - safe.log() - 0.5 * math.log(2 * math.pi)
        return torch.where(std > 0, nats, 0.0).flatten(1).sum(1)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other): (B,), nats per sample; dimensions in which both have std 0 count 0."""
        mine, theirs = self.std.expand_as(self.mean), other.std.expand_as(self.mean)
        noisy = (mine > 0) & (theirs > 0)
        mine, theirs = torch.where(noisy, mine, 1.0), torch.where(noisy, theirs, 1.0)
        moved = ((self.mean - other.mean) / theirs).square()
        nats = 0.5 * ((mine / theirs).square() + moved - 1) - (mine / theirs).log()
        return torch.where(noisy, nats, 0.0).flatten(1).sum(1)


def per_dim(nats: Tensor, q: Gaussian) -> Tensor:
    """Nats per sample -> nats per latent dimension, the unit of published clip ranges (DDPO, D3PO, Flow-GRPO)."""
    return nats / q.mean[0].numel()


class Step(NamedTuple):
    """One guided denoising step: the estimates x0, eps (B, ...) and the Gaussian `q` of the next latent."""

    x0: Tensor
    eps: Tensor
    q: Gaussian


def join_steps(steps: list[Step]) -> Step:
    """The steps of chunks of samples at one row of the grid as one."""
    if len(steps) == 1:
        return steps[0]
    q = Gaussian(torch.cat([s.q.mean for s in steps]), steps[0].q.std)  # one row of the grid: one std
    return Step(torch.cat([s.x0 for s in steps]), torch.cat([s.eps for s in steps]), q)


def output_to_x0_eps(output: Tensor, x: Tensor, at: Level, prediction: str) -> tuple[Tensor, Tensor]:
    """Network output -> (x0, eps).

    Args:
        output: (B, ...) what the network predicts.
        x: (B, ...) the noisy latent it saw, x = alpha x0 + sigma eps.
        at: its noise level.
        prediction: `epsilon`; `v_prediction`, alpha eps - sigma x0 (arXiv 2202.00512), variance-preserving levels;
            `sample`, x0 itself; `flow`, eps - x0, linear levels.

    Raises:
        T2IError: another prediction type.
    """
    alpha, sigma = at
    if prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction == "v_prediction":
        return alpha * x - sigma * output, sigma * x + alpha * output
    if prediction == "sample":
        return output, (x - alpha * output) / sigma
    if prediction == "flow":
        return x - sigma * output, x + alpha * output
    raise T2IError(f"Expected a prediction type among {', '.join(PREDICTIONS)} but got {prediction!r}.")


def x0_eps_to_output(x0: Tensor, eps: Tensor, at: Level, prediction: str) -> Tensor:
    """(x0, eps) -> what a network of that prediction type puts out; the inverse of `output_to_x0_eps`."""
    alpha, sigma = at
    outputs = {
        "epsilon": lambda: eps,
        "v_prediction": lambda: alpha * eps - sigma * x0,
        "sample": lambda: x0,
        "flow": lambda: eps - x0,
    }
    if prediction not in outputs:
        raise T2IError(f"Expected a prediction type among {', '.join(PREDICTIONS)} but got {prediction!r}.")
    return outputs[prediction]()


@dataclass(frozen=True)
class Kernel:
    """How to step from one level to the next: `kernel(x0, eps, at, to) -> Gaussian`.

    `stochastic` says whether it adds noise; `linear_only` that it is defined on flow levels (alpha = 1 - sigma) alone.
    """

    name: str
    gaussian: Callable[[Tensor, Tensor, Level, Level], Gaussian]
    stochastic: bool
    linear_only: bool = False

    def __call__(self, x0: Tensor, eps: Tensor, at: Level, to: Level) -> Gaussian:
        """The Gaussian of the next latent, in fp32."""
        return self.gaussian(x0.float(), eps.float(), at, to)


def ddim(eta: float = 1.0) -> Kernel:
    """DDIM (arXiv 2010.02502, eq. 12 and 16); `eta` scales the standard deviation.

    std = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)
    mean = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps

    eta = 1 is the DDPM posterior, eta = 0 deterministic and, on flow levels, the Euler step.
    """
    if not 0 <= eta <= 1:
        raise T2IError(f"Expected eta in [0, 1] but got {eta}.")

    def gaussian(x0: Tensor, eps: Tensor, at: Level, to: Level) -> Gaussian:
        ratio = at.alpha * to.sigma / (to.alpha * at.sigma)
        return _towards(x0, eps, to, eta * to.sigma * (1 - ratio.square()).clamp(min=0).sqrt())

    return Kernel(f"ddim({eta:g})", gaussian, eta > 0)


def ode() -> Kernel:
    """The deterministic step of the probability-flow ODE: `ddim(0)`; on flow levels the Euler step."""
    return Kernel("ode", ddim(0).gaussian, False)


def cps(level: float = 0.7) -> Kernel:
    """Coefficients-preserving sampling, as in Flow-Factory: `ddim` with std = sigma_s sin(level pi / 2)."""
    if not 0 <= level <= 1:
        raise T2IError(f"Expected a noise level in [0, 1] but got {level}.")

    def gaussian(x0: Tensor, eps: Tensor, at: Level, to: Level) -> Gaussian:
        return _towards(x0, eps, to, math.sin(level * math.pi / 2) * to.sigma)

    return Kernel(f"cps({level:g})", gaussian, level > 0)


def flow_sde(level: float = 0.7) -> Kernel:
    """Flow-GRPO's SDE (arXiv 2505.05470): noise g = level sqrt(sigma / (1 - sigma)).

    mean = Euler + g^2 dt / (2 sigma) eps, std = g sqrt(-dt), dt = sigma_s - sigma_t < 0. At sigma = 1 the denominator
    uses the next level, as published.
    """

    def noise(at: Level, to: Level) -> Tensor:
        below = torch.where(at.sigma >= 1, to.sigma, at.sigma)
        return level * (at.sigma / (1 - below)).sqrt()

    return _sde(f"flow_sde({level:g})", level, noise)


def dance_sde(eta: float = 0.3) -> Kernel:
    """DanceGRPO's SDE (arXiv 2505.07818): as `flow_sde`, with constant noise g = eta."""
    return _sde(f"dance_sde({eta:g})", eta, lambda at, to: torch.full_like(at.sigma, eta))


KERNELS = {"ddim": ddim, "ode": ode, "cps": cps, "flow_sde": flow_sde, "dance_sde": dance_sde}


def load_kernel(spec: str | Kernel) -> Kernel:
    """A kernel from its text form, as configs have it: `ddim(1.0)`, `flow_sde(0.7)`, `ode`.

    Raises:
        T2IError: not a kernel; the message has the list.
    """
    if isinstance(spec, Kernel):
        return spec
    read = re.fullmatch(r"(\w+)(?:\(\s*([-+.\deE]*)\s*\))?", spec.strip())
    if read is None or read[1] not in KERNELS:
        known = ", ".join(KERNELS)
        raise T2IError(f"Expected a kernel such as ddim(1.0) among {known} but got {spec!r}.")
    try:
        return KERNELS[read[1]](*([float(read[2])] if read[2] else []))
    except (TypeError, ValueError) as error:
        raise T2IError(f"Expected a number in the kernel {spec!r}, where it takes one: {error}.") from error


def _sde(name: str, strength: float, noise: Callable[[Level, Level], Tensor]) -> Kernel:
    if strength < 0:
        raise T2IError(f"Expected a noise strength of 0 or more but got {strength}.")

    def gaussian(x0: Tensor, eps: Tensor, at: Level, to: Level) -> Gaussian:
        dt, g = to.sigma - at.sigma, noise(at, to)
        euler = to.alpha * x0 + to.sigma * eps
        return Gaussian(euler + g.square() * dt / (2 * at.sigma) * eps, g * (-dt).clamp(min=0).sqrt())

    return Kernel(name, gaussian, strength > 0, linear_only=True)


def _towards(x0: Tensor, eps: Tensor, to: Level, std: Tensor) -> Gaussian:
    """The Gaussian around alpha_s x0 whose noise, kept and new, adds up to sigma_s."""
    return Gaussian(to.alpha * x0 + (to.sigma.square() - std.square()).clamp(min=0).sqrt() * eps, std)
