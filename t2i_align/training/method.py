"""What a training method is: it collects a batch and yields loss terms; `loop.fit` does everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from t2i_align.errors import T2IError
from t2i_align.keys import generator
from t2i_align.training.distributed import ALONE, World


class TrainingError(T2IError):
    """A run that cannot go on; the last checkpoint is kept."""


class Term(NamedTuple):
    """One summand of the loss (a scalar with its graph) and what to log of it.

    Of several processes each yields its own share: losses and gradients are summed over terms and processes. Statistics
    named `ratio` and `log_ratio`, of the policy to the one that drew the batch, must be 1 and 0 at a batch's first
    update; the loop checks it.
    """

    loss: Tensor
    stats: Mapping[str, Tensor | float]


@dataclass(frozen=True)
class Ctx:
    """What a method receives besides its data: `update` counts the optimiser updates on one collected batch."""

    seed: int
    step: int
    device: torch.device
    update: int = 0
    world: World = ALONE

    def generator(self, *parts: int | str) -> torch.Generator:
        """A generator keyed by this run, this step and `parts`."""
        return generator(self.seed, "step", self.step, *parts)

    def round_generator(self, *parts: int | str) -> torch.Generator:
        """The same, keyed by the step at which the batch was collected."""
        return generator(self.seed, "round", self.step - self.update, *parts)


class Method(nn.Module):
    """A training method: the parameters that require gradients are what `fit` trains and checkpoints."""

    @property
    def updates(self) -> int:
        """Optimiser updates on each collected batch."""
        return 1

    @property
    def still(self) -> int:
        """First updates, which leave the weights as they are."""
        return 0

    @property
    def clip(self) -> float | None:
        """How far ratios to the policy that drew a batch may go before they are clipped; None: any way."""
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights: numbers, strings and tensors in dicts and lists."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""

    def collect(self, ctx: Ctx, rows: Any) -> Any:
        """Turn a row batch into what `losses` needs, without gradients."""
        return rows

    def losses(self, ctx: Ctx, batch: Any) -> Iterator[Term]:
        """Yield loss terms; each is backpropagated before the next is asked for, so one graph is in memory."""
        raise NotImplementedError

    def report(self, batch: Any) -> dict[str, float]:
        """What to log of a collected batch, the same in all processes.

        `images`: how many were drawn; `invalid`: how many of them have a reward that is no number; `reward_spread`:
        the standard deviation of rewards that the method learns from.
        """
        return {}

    def save(self, folder: Path) -> None:
        """Write what a run has made besides the trained weights into its folder."""

    def check_term(self) -> None:
        """Called after each loss term: raise where the method left something behind, such as an open context."""
