"""Tensors that lie in shards over several processes (FSDP2's `DTensor`), and plain ones, alike.

What gathers or deals out is collective: all processes must call it, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether this process has a part of it only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_write(tensor: Tensor, write: bool) -> Tensor:
    """What goes into a file: a plain tensor as it is, one in shards gathered into main memory where `write`.

    A tensor at a time is whole on the devices; what other processes return is nothing of use. Collective.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    found = tensor.full_tensor()
    return found.cpu() if write else found.new_empty(0)


def own(tensor: Tensor) -> Tensor:
    """This process's part, which shares memory with the tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def dealt(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the same shards as another; a plain one's as it is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def copy_shards(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give a network the weights and buffers of another one in the same shards."""
    pairs = [*zip(source.parameters(), target.parameters(), strict=True)]
    pairs += zip(source.buffers(), target.buffers(), strict=True)  # type: ignore[arg-type]
    for values, place in pairs:
        own(place).copy_(own(values))
