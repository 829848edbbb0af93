"""`Trajectory`: what a rollout leaves behind, enough to replay every step of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from t2i_align.pipelines.cond import Cond


@dataclass(frozen=True)
class Trajectory:
    """B chains of N steps, group-major.

    `x`: (B, N + 1, ...) latents in the type the network sees, noisiest first. `log_prob`: (B, N) nats per sample of
    each step under the network that made it, 0 where the kernel adds no noise. `stochastic`: rows whose kernel adds
    noise. `cond`: what the network was told.
    """

    x: Tensor
    log_prob: Tensor
    stochastic: tuple[int, ...]
    cond: Cond

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.log_prob.shape[1]
