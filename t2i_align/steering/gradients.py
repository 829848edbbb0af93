"""Gradients of rewards, through scorer, decoder and network one after the other.

Between two of them every sample's gradient is brought to unit size and scaled back at the end, so that half precision
neither under- nor overflows, and the graph of the first is freed before that of the next is walked. Without a
differentiable reward the slope of the reward is estimated from its values (zero-order), and the rest stays exact: the
hybrid gradient of DNO (arXiv 2405.18881).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t2i_align.keys import generator
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.kernels import Kernel, Step, join_steps
from t2i_align.prompts import Prompts
from t2i_align.steering.base import Ctx, SteeringError, chunks

SCORER_SCALE = 256.0  # of the loss inside scorers in half precision; a power of two costs no digits


class Queries(NamedTuple):
    """Zero-order estimate of a reward's slope: `pairs` of values at +- `size` along normal directions.

    slope = mean of (r(y + size u) - r(y - size u)) / (2 size) u, u ~ N(0, I), for y the latents or the pictures.
    `ids` name the samples' random streams, `iteration` the draw.
    """

    pairs: int
    size: float
    of_images: bool
    ids: Sequence[int]
    iteration: int

    def direction(self, seed: int, like: Tensor, number: int) -> Tensor:
        """Direction u of a pair, (B, ...), one stream per sample."""
        draws = [generator(seed, "query", i, self.iteration, number) for i in self.ids]
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in draws]).to(like.device)

    def take(self, rows: slice) -> Queries:
        """Those of some samples."""
        return self._replace(ids=self.ids[rows])


def spread_over(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample (B,), shaped and placed to broadcast with `like` (B, ...), fp32."""
    return values.to(like.device, torch.float32).reshape(-1, *[1] * (like.ndim - 1))


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample (B, ...): (B,), fp32."""
    return x.float().flatten(1).square().mean(1).sqrt()


def pull(output: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """A gradient (B, ...) with respect to `output` as one with respect to `at`: (B, ...), fp32.

    Samples must not depend on each other. What is not finite counts as zero, for the whole sample.
    """
    size = rms(gradient)
    size = torch.where(size.isfinite() & (size > 0), size, 1.0)
    unit = (gradient.float() / spread_over(size, gradient)).nan_to_num(0.0, 0.0, 0.0)
    (pulled,) = torch.autograd.grad(output, at, unit.to(output.dtype))
    pulled = pulled.float() * spread_over(size, pulled)
    return torch.where(spread_over(pulled.flatten(1).isfinite().all(1), pulled).bool(), pulled, 0.0)


def latent_gradient(
    ctx: Ctx, latents: Tensor, prompts: Prompts, queries: Queries | None = None, preview: bool = False
) -> tuple[Tensor, Tensor]:
    """Rewards (B,) of latents (B, ...), on the CPU, and their gradient (B, ...), `ctx.decode_batch` at a time.

    Args:
        ctx: the run.
        latents: as `driver.decode` takes them.
        prompts: B rows.
        queries: estimate the reward's slope from its values; None: it is differentiable.
        preview: decode by the small decoder, if there is one.

    Raises:
        SteeringError: the reward compares images, or passes no gradient.
    """
    if ctx.reward.groupwise:
        raise SteeringError(
            f"Expected a reward of each image by itself but {ctx.reward.name} compares the images of a prompt: use a "
            "method without gradients (best_of_n, fk)."
        )
    rewards, gradients = [], []
    for rows in chunks(len(latents), ctx.decode_batch):
        some = None if queries is None else queries.take(rows)
        if some is not None and not some.of_images:
            reward, gradient = _latent_slope(ctx, latents[rows].detach(), prompts[rows], some)
        else:
            reward, gradient = _through_decoder(ctx, latents[rows].detach(), prompts[rows], some, preview)
        rewards.append(reward)
        gradients.append(gradient)
    return torch.cat(rewards), torch.cat(gradients)


@torch.enable_grad()
def _through_decoder(
    ctx: Ctx, latents: Tensor, prompts: Prompts, queries: Queries | None, preview: bool
) -> tuple[Tensor, Tensor]:
    latents = latents.requires_grad_()
    images = ctx.decode(latents, preview=preview)
    if queries is None:
        rewards, slope = _image_slope(ctx, images.detach(), prompts)
    else:
        rewards, slope = _estimate(ctx, images.detach(), prompts, queries)
    ctx.cost.decode_backwards += len(latents)
    return rewards, pull(images, latents, slope)


def _image_slope(ctx: Ctx, images: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and their gradient with respect to pixels."""
    images = images.float().requires_grad_()
    total = ctx.score(images, prompts).total
    if not total.requires_grad:
        raise SteeringError(
            f"Expected a differentiable reward but the scores of {ctx.reward.name} have no gradient: use a method "
            'without gradients, or gradient="hybrid" where there is one.'
        )
    (slope,) = torch.autograd.grad(total, images, torch.full_like(total, SCORER_SCALE))
    return total.detach().cpu(), slope / SCORER_SCALE


@torch.no_grad()
def _estimate(ctx: Ctx, images: Tensor, prompts: Prompts, queries: Queries) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and an estimate of their slope in pixel space."""
    slope = torch.zeros_like(images, dtype=torch.float32)
    for number in range(queries.pairs):
        u = queries.direction(ctx.seed, images, number)
        step = queries.size * u
        ends = [ctx.score(moved.clamp(0, 1), prompts).total for moved in (images + step, images - step)]
        slope += _along(ends[0] - ends[1], u, queries)
    return ctx.score(images, prompts).total.cpu(), slope


@torch.no_grad()
def _latent_slope(ctx: Ctx, latents: Tensor, prompts: Prompts, queries: Queries) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and an estimate of their slope in latent space."""
    slope = torch.zeros_like(latents, dtype=torch.float32)
    for number in range(queries.pairs):
        u = queries.direction(ctx.seed, latents, number)
        ends = [
            ctx.rewards(latents + (sign * queries.size * u).to(latents), prompts, preview=False) for sign in (1, -1)
        ]
        slope += _along(ends[0] - ends[1], u, queries)
    return ctx.rewards(latents, prompts, preview=False), slope


def _along(difference: Tensor, u: Tensor, queries: Queries) -> Tensor:
    difference = torch.where(difference.isfinite(), difference, 0.0)
    return spread_over(difference / (2 * queries.size * queries.pairs), u) * u


def step_gradient(
    ctx: Ctx, x: Tensor, row: int, cond: Cond, kernel: Kernel, prompts: Prompts, jacobian: str = "exact"
) -> tuple[Step, Tensor, Tensor]:
    """One reverse step with the rewards (B,) of its x0 predictions and their gradient (B, ...) with respect to x.

    `jacobian` of x0 with respect to x: `exact`, through the network, or `cheap`, alpha / (alpha^2 + sigma^2), which
    is exact where data are N(0, I). Holding eps constant would make it 1 / alpha, too large by (alpha^2 + sigma^2) /
    alpha^2 there: on variance-preserving levels by 1 / abar.
    """
    steps, rewards, gradients = [], [], []
    for rows in chunks(len(x), ctx.max_batch):
        part = x[rows].detach().requires_grad_(jacobian == "exact")
        with torch.set_grad_enabled(jacobian == "exact"):
            step = ctx.step(part, row, cond[rows], kernel)
        reward, gradient = latent_gradient(ctx, step.x0, prompts[rows], preview=True)
        if jacobian == "exact":
            ctx.cost.backwards += len(part)
            gradient = pull(step.x0, part, gradient)
        else:
            at = ctx.driver.grid(ctx.steps).level(row, x)
            gradient = gradient * (at.alpha / (at.alpha.square() + at.sigma.square()))
        steps.append(Step(step.x0.detach(), step.eps.detach(), step.q._replace(mean=step.q.mean.detach())))
        rewards.append(reward)
        gradients.append(gradient)
    return join_steps(steps), torch.cat(rewards), torch.cat(gradients)


def limit(move: Tensor, size: float | None) -> Tensor:
    """Moves (B, ...), each shrunk to a Euclidean norm of at most `size`; None: as they are."""
    if size is None:
        return move
    norm = rms(move) * math.sqrt(move[0].numel())
    return move * spread_over((size / (norm + 1e-6)).clamp(max=1), move)
