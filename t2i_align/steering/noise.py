"""Optimising noise: every sample of a batch climbs by itself, with its own clip, best iterate and stop.

Shared by `reno` and `dno`; and the two ways to keep noise likely:

    chi            log-density of the norm |z| of d normal numbers, (d - 1) ln |z| - |z|^2 / 2, highest at sqrt(d - 1)
    concentration  z as m rows of k numbers, row mean e and second moment C, spectral norm: log-probability bounds
                   -m |e|^2 / (2 k)  and  -m / 2 max(sqrt(1 + |C - I|) - 1 - sqrt(k / m), 0)^2,
                   each at most -ln 2 (DNO, arXiv 2405.18881), for z in its order and for random permutations of it
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.steering.base import Ctx, Steering, SteeringError, chunks
from t2i_align.steering.gradients import Queries, latent_gradient, limit, pull, rms, spread_over

Render = Callable[[Tensor, list[int]], Tensor]  # noise of some samples (b, ...), which ones -> their final latents
Prior = Callable[[Tensor, int], Tensor]  # noise (b, ...), iteration -> gradient of its log-density, (b, ...)
Update = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]  # see `nesterov`


class NoiseOptimisation(Steering):
    """Base of methods that optimise noise by the reward's gradient."""

    iterations: int = Field(50, gt=0, description="evaluations of each sample; the first is the plain sample")
    lr: float = Field(5.0, gt=0, description="learning rate")
    clip: float | None = Field(0.1, gt=0, description="largest norm of a sample's gradient; null: as it is")
    patience: int | None = Field(None, gt=0, description="stop a sample after so many evaluations without a new best")
    target: float | None = Field(None, description="stop a sample whose reward reaches this")
    gradient: Literal["exact", "hybrid"] = Field(
        "exact", description="of the reward: its own, or estimated from its values (for any scorer)"
    )
    queries: int = Field(16, gt=0, description="pairs of scored pictures per estimate, for `hybrid`")
    query_size: float = Field(0.1, gt=0, description="standard deviation of the moves between them")
    query_space: Literal["latent", "image"] = Field("latent", description="what is moved")

    @property
    def needs_gradient(self) -> bool:
        return self.gradient == "exact"


def nesterov(gradient: Tensor, first: Tensor, second: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step direction (b, ...) of SGD with Nesterov momentum 0.9, and the new state.

    Args:
        gradient: (b, ...).
        first: state of the same shape, zeros at the start.
        second: state that only `adam` has.
        number: of the update, from 1.
    """
    first = 0.9 * first + gradient
    return gradient + 0.9 * first, first, second


def adam(gradient: Tensor, first: Tensor, second: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of Adam (betas 0.9 and 0.999), without weight decay, which would shrink the noise."""
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient.square()
    scale = (second / (1 - 0.999**number)).sqrt() + 1e-8
    return first / (1 - 0.9**number) / scale, first, second


def climb(
    ctx: Ctx,
    settings: NoiseOptimisation,
    prompts: Prompts,
    ids: list[int],
    z: Tensor,
    render: Render,
    prior: Prior,
    update: Update,
) -> tuple[Tensor, Tensor]:
    """Maximise reward plus log-density of each sample's noise; keep the iterate with the highest reward alone.

    A sample that has reached its `target`, lost its `patience` or scored no number leaves the batch.

    Args:
        ctx: the run.
        settings: of the optimisation.
        prompts: B rows.
        ids: B names of random streams.
        z: (B, ...) noise to start from.
        render: makes final latents, with their graph.
        prior: the log-density's gradient.
        update: `nesterov` or `adam`.

    Returns:
        Each sample's best noise (B, ...), fp32, and the latents (B, ...) it became.
    """
    z = z.detach().float().clone()
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    active = torch.arange(len(z))
    best, best_z, best_latents = torch.full((len(z),), -math.inf), z.clone(), None
    shown, stale = torch.full((len(z),), math.nan), torch.zeros(len(z), dtype=torch.long)
    for number in range(settings.iterations):
        rewards, latents, gradient = evaluate(ctx, settings, prompts, ids, z[active], active, number, render)
        best_latents = latents.clone() if best_latents is None else best_latents
        better = rewards > best[active]
        improved = active[better]
        best[improved], best_z[improved], best_latents[improved] = rewards[better], z[improved], latents[better]
        stale[active] += 1
        stale[improved] = 0
        shown[active] = rewards
        log_progress(ctx, number, shown, best, len(active), rms(z), settings.particles)
        active, gradient = going(settings, active, rewards, stale, gradient)
        if not len(active) or number == settings.iterations - 1:
            break
        gradient = limit(gradient + prior(z[active], number), settings.clip)
        move, first[active], second[active] = update(gradient, first[active], second[active], number + 1)
        z[active] += settings.lr * move
    assert best_latents is not None
    return best_z, best_latents


def evaluate(
    ctx: Ctx,
    settings: NoiseOptimisation,
    prompts: Prompts,
    ids: list[int],
    z: Tensor,
    active: Tensor,
    number: int,
    render: Render,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (b,), final latents (b, ...) and the rewards' gradient (b, ...) of the `active` samples' noise z."""
    parts = []
    for rows in chunks(len(z), ctx.max_batch):
        who = active[rows].tolist()
        queries = None
        if settings.gradient == "hybrid":
            names = [ids[i] for i in who]
            in_images = settings.query_space == "image"
            queries = Queries(settings.queries, settings.query_size, in_images, names, number)
        with torch.enable_grad():
            part = z[rows].detach().requires_grad_()
            latents = render(part, who)
        rewards, gradient = latent_gradient(ctx, latents, prompts[who], queries)
        parts.append((rewards, latents.detach(), pull(latents, part, gradient)))
    rewards, latents, gradient = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return rewards, latents, gradient


def going(
    settings: NoiseOptimisation, active: Tensor, rewards: Tensor, stale: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the active samples go on, and their gradients."""
    on = rewards.isfinite()
    if settings.patience is not None:
        on &= stale[active] < settings.patience
    if settings.target is not None:
        on &= rewards < settings.target
    return active[on], gradient[on.to(gradient.device)]


def log_progress(
    ctx: Ctx, number: int, rewards: Tensor, best: Tensor, active: int, size: Tensor, particles: int
) -> None:
    """A row of the history; `energy`, |z|^2 / d, leaves 1 where the noise leaves the shell of likely noise."""
    shape = (-1, particles)
    energy = size.square().cpu().reshape(shape).tolist()
    rows = {"rewards": rewards.reshape(shape).tolist(), "best": best.reshape(shape).tolist(), "energy": energy}
    ctx.log(row=number, active=active, **rows)


def chi(z: Tensor) -> Tensor:
    """Log-density of the norms of noise (B, ...) but for a constant: (B,), nats."""
    norm = z.flatten(1).norm(dim=1)
    return (z[0].numel() - 1) * norm.log() - norm.square() / 2


def chi_gradient(z: Tensor) -> Tensor:
    """Gradient of `chi`, (B, ...)."""
    square = z.flatten(1).square().sum(1)
    return spread_over((z[0].numel() - 1) / square - 1, z) * z


def concentration(z: Tensor, width: int) -> Tensor:
    """Sum of the two log-probability bounds of noise (B, d), read as rows of `width` numbers: (B,), nats, <= -2 ln 2.

    Raises:
        SteeringError: fewer than `width` numbers.
    """
    m = z.shape[1] // width
    if not m:
        raise SteeringError(
            f"Expected at least {width} numbers of noise per sample to judge how likely they are but got {z.shape[1]}: "
            "use regularise=0 or a smaller width."
        )
    rows = z[:, : m * width].reshape(len(z), m, width)
    mean = -m * rows.mean(1).square().sum(1) / (2 * width)
    moment = rows.transpose(1, 2) @ rows / m - torch.eye(width, device=z.device)
    excess = (1 + torch.linalg.eigvalsh(moment).abs().amax(1)).sqrt() - 1 - math.sqrt(width / m)
    covariance = -m / 2 * excess.clamp(min=0).square()
    return mean.clamp(max=-math.log(2)) + covariance.clamp(max=-math.log(2))
