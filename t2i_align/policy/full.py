"""All weights of a network as a policy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from t2i_align.policy.artefacts import write_full
from t2i_align.policy.path import PolicyError, Settings, lerp


class FullWeights:
    """All weights of a network, with frozen copies that contexts put in their place.

    Args:
        network: trained in its own number type. Its starting weights are copied: training takes their memory once
            more, and once more again for an average.
        users: modules that use its weights, itself among them (a ControlNet may share some).

    Raises:
        PolicyError: weights that are no floating-point numbers (a quantised base).
    """

    kind = "full"

    def __init__(self, network: nn.Module, users: Iterable[nn.Module]) -> None:
        others = sorted({str(p.dtype) for p in network.parameters() if not p.is_floating_point()})
        if others or not list(network.parameters()):
            raise PolicyError(
                f"Expected a {type(network).__name__} with floating-point weights, since all are trained, but it has "
                f"{', '.join(others) or 'none'}: train a LoRA."
            )
        network.requires_grad_(True)
        self.trainable = list(network.parameters())
        self.start = self._copy()
        self.places = [
            (module._parameters, name, id(p))  # tied weights have several
            for module in {id(module): module for user in users for module in user.modules()}.values()
            for name, p in module._parameters.items()
            if id(p) in self.start
        ]
        self.average: dict[int, nn.Parameter] = {}

    def reference(self) -> Settings:
        """The path of the starting weights."""
        return self._path(self.start)

    def averaged(self) -> Settings:
        """The path of the averaged weights; needs `update_average` before."""
        return self._path(self.average)

    @property
    def has_average(self) -> bool:
        """Whether there is an average yet."""
        return bool(self.average)

    def update_average(self, decay: float) -> None:
        """Move the average: decay * average + (1 - decay) * weights."""
        self.average = self.average or self._copy()
        lerp([self.average[id(p)] for p in self.trainable], self.trainable, 1 - decay)

    def write(
        self, folder: Path, pipe: DiffusionPipeline, note: dict[str, Any], averaged: bool, dtype: torch.dtype | None
    ) -> None:
        """Write a pipeline folder with the weights that are in force. Raises PolicyError for a dtype."""
        if dtype is not None:
            raise PolicyError("Expected no dtype= for full weights: choose it where the folder is opened.")
        write_full(folder, pipe, note)

    def _copy(self) -> dict[int, nn.Parameter]:
        return {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.trainable}

    def _path(self, copies: dict[int, nn.Parameter]) -> Settings:
        for p in self.trainable:
            mine = copies[id(p)]
            if mine.device != p.device or mine.dtype != p.dtype:  # the network has moved
                mine.data = mine.data.to(p)
        return [(parameters, name, copies[p]) for parameters, name, p in self.places]
