"""All weights of a network as a policy, in shards over the processes of a run (FSDP2).

Each process keeps its share of every weight, gradient and moment. The whole weights of a block are gathered for its
forward and backward pass and given up after it, so all processes must make the same passes, in the same order. The base
(and an average) is a network of its own in shards, which contexts put in the trained one's place in the pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from t2i_align.policy.artefacts import write_full
from t2i_align.policy.path import PolicyError, Settings, lerp
from t2i_align.shards import copy_shards, own, whole


class ShardedWeights:
    """All weights of a pipeline's network in shards.

    Args:
        pipe: the pipeline.
        component: name of the network, which becomes FSDP2's.
        device: where it is trained, by a block at a time from where it lies, which may be main memory; None: there.

    Raises:
        PolicyError: there is one process alone, or weights that are no floating-point numbers (a quantised base).
    """

    kind = "full"

    def __init__(self, pipe: DiffusionPipeline, component: str, device: torch.device | None = None) -> None:
        if not distributed.is_initialized() or distributed.get_world_size() < 2:
            raise PolicyError(
                "Expected several processes, over which the weights are dealt out, but there is one: start them by "
                "`torchrun --nproc_per_node N -m t2i_align train ...`, or leave shard out."
            )
        self.pipe, self.component = pipe, component
        self.network: nn.Module = getattr(pipe, component)
        if not all(p.is_floating_point() for p in self.network.parameters()):
            raise PolicyError(
                f"Expected a {type(self.network).__name__} with floating-point weights, since all are trained."
            )
        self.network.requires_grad_(True)
        self.device = next(self.network.parameters()).device if device is None else device
        self.mesh = init_device_mesh(self.device.type, (distributed.get_world_size(),))
        self.blank = blank_of(self.network)  # for others like it
        shard(self.network, self.mesh)
        self.trainable: list[nn.Parameter] = list(self.network.parameters())
        self.start = self._twin()
        self.average: nn.Module | None = None
        self.gathered: dict[str, Tensor] = {}

    def reference(self) -> Settings:
        """The path of the starting weights."""
        return [(vars(self.pipe), self.component, self.start)]

    def averaged(self) -> Settings:
        """The path of the averaged weights; needs `update_average` before."""
        return [(vars(self.pipe), self.component, self.average)]

    @property
    def has_average(self) -> bool:
        """Whether there is an average yet."""
        return self.average is not None

    def update_average(self, decay: float) -> None:
        """Move the average: decay * average + (1 - decay) * weights."""
        if self.average is None:
            self.average = self._twin()
        lerp([own(p) for p in self.average.parameters()], [own(p) for p in self.trainable], 1 - decay)

    def gather(self, averaged: bool) -> bool:
        """Collect all weights, or their average, in the first process; whether this one is it. Collective."""
        network = self.average if averaged and self.average is not None else self.network
        first = distributed.get_rank() == 0
        for name, value in network.state_dict().items():
            values = whole(value).cpu()  # a weight at a time: the others keep none
            if first:
                self.gathered[name] = values
        return first

    def write(
        self, folder: Path, pipe: DiffusionPipeline, note: dict[str, Any], averaged: bool, dtype: torch.dtype | None
    ) -> None:
        """Write a pipeline folder with the weights that `gather` collected. Raises PolicyError for a dtype."""
        if dtype is not None:
            raise PolicyError("Expected no dtype= for full weights: choose it where the folder is opened.")
        network = copy.deepcopy(self.blank).to_empty(device="cpu")
        network.load_state_dict(self.gathered)
        self.gathered = {}
        stock = copy.copy(pipe)
        vars(stock)[self.component] = network
        write_full(folder, stock, note)

    def _twin(self) -> nn.Module:
        """A frozen network with the weights of now, in shards of its own."""
        twin = copy.deepcopy(self.blank).requires_grad_(False)
        shard(twin, self.mesh)
        twin.to_empty(device=self.device)
        copy_shards(self.network, twin)
        return twin


def blank_of(network: nn.Module) -> nn.Module:
    """A copy of a network whose weights and buffers take no memory, on no device even while it is made."""
    known: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()
    }
    known |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
    return copy.deepcopy(network, known)  # what is known it does not copy


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Deal a network's weights out over processes, block by block; gradients become means over them."""
    for module in (*blocks(network), network):
        # The network itself too, although its weights are needed first in the backward pass: values that change
        # between two forward passes must be gathered again.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The parts that are gathered one at a time: members of a network's own lists of modules."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
