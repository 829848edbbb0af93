"""Elastic Reset (arXiv 2312.07551): against drift, the policy falls back to its average and the average to the start.

    every n updates:  theta <- average,  average <- theta_0;  in between the average follows theta with `decay`

What was learned quickly, and so is likely to be hacked, is lost; what lasted is kept. The optimiser's moments belong to
the weights that are left and start anew. The average is its own, not that of `train.ema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class ElasticReset:
    """The start and the average of some weights.

    Args:
        weights: by name, as they are at the start of the run.
        every: updates between resets.
        decay: of the average.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], every: int, decay: float) -> None:
        self.weights, self.every, self.decay = weights, every, decay
        self.start = {name: p.detach().clone() for name, p in weights.items()}
        self.average = {name: p.clone() for name, p in self.start.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the weights."""
        current = [p.detach() for p in self.weights.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - self.decay)

    def due(self, step: int, updates: int) -> bool:
        """Whether a reset comes after `step` updates: at the end of the first round at or after each multiple."""
        return step % updates == 0 and step // self.every > (step - updates) // self.every

    @torch.no_grad()
    def reset(self, optimizer: torch.optim.Optimizer) -> None:
        """Fall back."""
        for name, p in self.weights.items():
            p.copy_(self.average[name])
            self.average[name].copy_(self.start[name])
        optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"start": self.start, "average": self.average}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        for mine, saved in ((self.start, state["start"]), (self.average, state["average"])):
            for name, values in saved.items():
                mine[name].copy_(values)
