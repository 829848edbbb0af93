"""Weighted particles: log-weights that are carried, resampling inside each prompt's group, the normaliser's estimate.

Weights live in log space and fp64, are reset only where a group is resampled, and a particle whose reward is not a
number weighs nothing. There are P groups (prompts) of K particles; all tensors of a particle are re-indexed together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Unnormalised log-weights `log` (P, K) in nats, fp64, and the log-normaliser `log_z` (P,) paid at resamplings."""

    log: Tensor
    log_z: Tensor

    @classmethod
    def uniform(cls, groups: int, particles: int) -> Weights:
        """Equal weights."""
        return cls(torch.zeros(groups, particles, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64))

    def add(self, nats: Tensor) -> Weights:
        """Multiply the weights by exp(nats) (P, K); nan counts as weight zero."""
        moved = self.log + torch.nan_to_num(nats.cpu().double(), nan=-math.inf, posinf=-math.inf)
        return self._replace(log=moved)

    @property
    def alive(self) -> Tensor:
        """Groups (P,) with a particle of positive weight."""
        return (self.log > -math.inf).any(1)

    @property
    def normalised(self) -> Tensor:
        """Log-weights (P, K) whose exponentials sum to 1 in each group; uniform where all are zero."""
        log = torch.where(self.alive[:, None], self.log, torch.zeros(()))
        return log - log.logsumexp(1, keepdim=True)

    @property
    def ess(self) -> Tensor:
        """Effective sample size (P,), from 1 to K: (sum w)^2 / sum w^2."""
        return (-(2 * self.normalised).logsumexp(1)).exp()

    @property
    def log_normaliser(self) -> Tensor:
        """Estimate (P,) of log Z, whose exponential is unbiased for the mean weight under the base."""
        return self.log_z + self.log.logsumexp(1) - math.log(self.log.shape[1])

    def resample(self, threshold: float, uniforms: Tensor, scheme: str = "systematic") -> tuple[Tensor, Weights]:
        """Resample the groups whose effective size is below `threshold` K.

        Args:
            threshold: share of K in [0, 1]; 1 resamples whenever weights differ, 0 never.
            uniforms: (P, K) draws in [0, 1), one stream per group; systematic resampling uses the first column.
            scheme: `systematic` (offspring floor(K w) or ceil(K w)) or `multinomial`.

        Returns:
            Ancestors (P, K) within each group, the identity where a group is left alone, and the weights: zero in
            groups that were resampled, carried in the others.
        """
        groups, particles = self.log.shape
        due = self.alive & (self.ess < threshold * particles * (1 - 1e-9))
        drawn = RESAMPLING[scheme](self.normalised.exp(), uniforms)
        ancestors = torch.where(due[:, None], drawn, torch.arange(particles))
        log_z = torch.where(due, self.log_normaliser, self.log_z)
        return ancestors, Weights(torch.where(due[:, None], torch.zeros(()), self.log), log_z)


def systematic(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Ancestors (P, K) by one uniform a group: offspring numbers are K w rounded down or up."""
    particles = weights.shape[1]
    points = (uniforms[:, :1].double() + torch.arange(particles)) / particles
    return _invert(weights, points)


def multinomial(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Ancestors (P, K), independent draws."""
    return _invert(weights, uniforms.double())


RESAMPLING = {"systematic": systematic, "multinomial": multinomial}


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """Indices (P, K) whose interval of the cumulated weights (P, K) holds each of the points (P, K)."""
    cumulated = weights.double().cumsum(1)
    cumulated = cumulated / cumulated[:, -1:]
    found = torch.searchsorted(cumulated, points.contiguous(), right=True)
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(1, keepdim=True)  # rounding never picks weight 0
    return torch.minimum(found, last)


def flat_index(ancestors: Tensor) -> Tensor:
    """Ancestors (P, K) within groups -> indices (P K,) into tensors of all particles, group-major."""
    groups, particles = ancestors.shape
    return (ancestors + particles * torch.arange(groups)[:, None]).flatten()
