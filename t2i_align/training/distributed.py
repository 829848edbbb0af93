"""Several processes of one training, as `accelerate launch` or `torchrun` start them.

Each process draws its share of a round's prompts and backpropagates its share of the loss; gradients are summed in one
reduction per update, rewards are gathered before anything is made of them. All random numbers are keyed by global
positions, so that a run on several processes is the run on one, but for rounding.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from t2i_align.errors import T2IError
from t2i_align.shards import is_shard, own

PATIENCE = timedelta(hours=2)  # others wait while the first process evaluates
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run: number `rank` of `count`, `local` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def join(cls) -> World:
        """The world that `RANK`, `WORLD_SIZE` and `LOCAL_RANK` name; without them this process is alone.

        Small tensors of rewards go through gloo wherever the networks are; gradients on GPUs through NCCL. The GPU of
        this process becomes the current one, on which FSDP2 and bitsandbytes put weights.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, count, local = (int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True))
        gpus = torch.cuda.device_count() if count > 1 and torch.cuda.is_available() else 0
        if local < gpus:
            torch.cuda.set_device(local)
        if count > 1 and not distributed.is_initialized():
            # Where processes outnumber GPUs they are on the CPU, and NCCL must not connect.
            mine = torch.device("cuda", local) if int(os.environ.get("LOCAL_WORLD_SIZE", count)) <= gpus else None
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            distributed.init_process_group(backend, timeout=PATIENCE, device_id=mine)
        return cls(rank, count, local)

    def leave_at_exit(self) -> None:
        """Let the processes part once this one ends; for runs that ended well, since NCCL waits for all to do it."""
        if self.count > 1:
            atexit.unregister(_leave)
            atexit.register(_leave)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` things. Raises T2IError unless all parts are equal."""
        if count % self.count:
            raise T2IError(
                f"Expected a number of prompts per round that {self.count} processes can share equally but got {count}."
            )
        size = count // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def gather(self, values: Tensor) -> Tensor:
        """Rows (B, ...) of all processes, in their order; every process has as many."""
        if self.count == 1:
            return values
        mine = values.detach().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(parts, mine)
        return torch.cat(parts).to(values.device)

    def total(self, number: float) -> float:
        """The sum of a number over all processes."""
        if self.count == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        distributed.all_reduce(value)
        return value.item()

    def collect(self, value: T) -> list[T]:
        """A picklable value of each process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """Add up the gradients of all processes, in one reduction; a weight without one counts as zero.

        Of weights in shards FSDP2 has taken the mean in each backward pass.
        """
        if self.count == 1:
            return
        everything = list(weights)
        for p in everything:
            if is_shard(p) and p.grad is not None:
                own(p.grad).mul_(self.count)
        weights = [p for p in everything if not is_shard(p)]
        if not weights:
            return
        for p in weights:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten().float() for p in weights if p.grad is not None])
        distributed.all_reduce(flat)
        for p, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
            p.grad = part.view_as(p).to(p)

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors of one number type, in place, the values that they have in the first process."""
        if self.count == 1:
            return
        places = [tensor.detach() for tensor in tensors]
        flat = torch.cat([place.flatten() for place in places])
        distributed.broadcast(flat, src=0)
        for place, part in zip(places, flat.split([place.numel() for place in places]), strict=True):
            place.copy_(part.view_as(place))

    def once(self, action: Callable[[], T], together: bool = False) -> T:
        """Do something in the first process while the others wait; its picklable result, or its refusal, in all.

        Args:
            action: what to do.
            together: do it in all processes, as weights in shards need; `action` then sees to it that one writes.

        Raises:
            T2IError: what `action` raised.
        """
        if self.count == 1:
            return action()
        said: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first or together:
            try:
                said = [action(), None]
            except (T2IError, OSError) as error:
                failure, said = error, [None, str(error)]
        distributed.broadcast_object_list(said, src=0)
        if failure is not None:
            raise failure
        if said[1] is not None:
            raise T2IError(said[1])
        return said[0]


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


ALONE = World()
