"""The LoRA adapters of a policy: one is trained, others are forward paths beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.policy.artefacts import write_lora
from t2i_align.policy.lora import Layers, adapter_names, adapter_weights, inject, layers_of, put_weights
from t2i_align.policy.path import PolicyError, Settings, exchange, lerp


class Adapters:
    """The adapters of one policy in a network; the first is trained, the base and all others are frozen.

    Adapters that are active before (a pipeline's own `load_lora_weights`) stay so: they belong to the base.

    Args:
        network: where peft puts the adapters.
        name: the trained adapter.
        layers: where it goes, with rank and alpha.
        seed: of its starting weights.
        weights: what it starts with instead, if not empty.

    Raises:
        PolicyError: LoRA weights are fused into the base, so that none would act.
    """

    kind = "lora"

    def __init__(self, network: nn.Module, name: str, layers: Layers, seed: int, weights: Mapping[str, Tensor]) -> None:
        self.network, self.name, self.names = network, name, [name]
        self.found: tuple[list[str], list[BaseTunerLayer]] = ([], [])
        if any(layer.merged for layer in self.layers):
            raise PolicyError("Expected a pipeline without fused LoRA weights: call its unfuse_lora() first.")
        self.below = self._active()
        self._add(name, layers, seed)
        if weights:
            put_weights(network, name, weights)
        network.requires_grad_(False)
        self.trainable, self.means = list(self.weights(name).values()), list[nn.Parameter]()
        for p in self.trainable:
            p.requires_grad_(True)
        exchange(self.path([*self.below, name]))

    @property
    def layers(self) -> list[BaseTunerLayer]:
        """Layers with adapters, looked for again whenever adapters have come or gone."""
        names = adapter_names(self.network)
        if self.found[0] != names:
            self.found = (names, [layer for layer in self.network.modules() if isinstance(layer, BaseTunerLayer)])
        return self.found[1]

    def path(self, names: list[str]) -> Settings:
        """The path on which these adapters act."""
        values = (("_active_adapter", names), ("_disable_adapters", False))
        return [(layer.__dict__, key, value) for layer in self.layers for key, value in values]

    def reference(self) -> Settings:
        """The path of the base alone."""
        return self.path(self.below)

    def adapter(self, name: str) -> Settings:
        """The path of the base and one adapter. Raises PolicyError for a name that is not there."""
        return self.path([*self.below, self.known(name)])

    def averaged(self) -> Settings:
        """The path of the averaged adapter; needs `update_average` before."""
        return self.path([*self.below, self.average])

    @property
    def average(self) -> str:
        """Name of the adapter that holds the average of the trained one."""
        return f"{self.name}_average"

    @property
    def has_average(self) -> bool:
        """Whether there is an average yet."""
        return self.average in adapter_names(self.network)

    def update_average(self, decay: float) -> None:
        """Move the averaged adapter: decay * average + (1 - decay) * weights, of A and B each."""
        if not self.has_average:
            self._add(self.average, self.shape(self.name))
            self.copy(self.name, self.average)
            self.means = list(self.weights(self.average).values())
        lerp(self.means, self.trainable, 1 - decay)

    def add(self, name: str, layers: Layers, seed: int = 0) -> None:
        """Add a new frozen adapter."""
        self._add(name, layers, seed)
        self.names.append(name)

    def copy(self, source: str, target: str) -> None:
        """Give one adapter the weights of another. Raises PolicyError unless layers, ranks and alphas are the same."""
        if self.shape(source) != self.shape(target):
            raise PolicyError(
                f"Expected adapters of the same layers, ranks and alphas but {source} and {target} differ."
            )
        put_weights(self.network, target, self.weights(source))

    def write(
        self, folder: Path, pipe: DiffusionPipeline, note: dict[str, Any], averaged: bool, dtype: torch.dtype | None
    ) -> None:
        """Write the trained or the averaged adapter (see `artefacts`), in fp32 if dtype is None."""
        weights = self.weights(self.average if averaged else self.name)
        note = note | {"adapter": self.name}
        write_lora(folder, pipe, self.network, note, self.shape(self.name), weights, dtype or torch.float32)

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The weights of an adapter, see `adapter_weights`."""
        return adapter_weights(self.network, name)

    def shape(self, name: str) -> Layers:
        """Ranks and alphas of an adapter."""
        return layers_of(self.network, name)

    def known(self, name: str) -> str:
        """The name, if there is such an adapter; PolicyError otherwise."""
        if name not in self.names:
            raise PolicyError(f"No adapter {name!r}; there are {', '.join(self.names)}.{nearest(name, self.names)}")
        return name

    def refuse_inactive(self) -> None:
        """Raise PolicyError where others have taken the trained adapter out of the forward path."""
        if self.name not in self._active():
            raise PolicyError(
                f"Expected the adapter {self.name!r} to be active but the network uses "
                f"{', '.join(self._active()) or 'none'}: load other LoRA before the policy is made."
            )

    def _active(self) -> list[str]:
        on = [layer for layer in self.layers if not layer.disable_adapters]
        return list(on[0].active_adapters) if on else []

    def _add(self, name: str, layers: Layers, seed: int = 0) -> None:
        """Put an adapter into the network, and undo what peft does besides: it makes it active and trainable."""
        if not re.fullmatch(r"[A-Za-z]\w*", name) or hasattr(nn.ModuleDict, name):
            raise PolicyError(
                f"Expected an adapter's name to be letters, digits and _, and no method, but got {name!r}."
            )
        if name in adapter_names(self.network):
            raise PolicyError(f"The network already has an adapter {name!r}: choose another name.")
        active, trained = self._active(), {id(p) for p in self.network.parameters() if p.requires_grad}
        try:
            inject(self.network, name, layers, seed)
        finally:
            exchange(self.path(active))
            for p in self.network.parameters():
                p.requires_grad_(id(p) in trained)
