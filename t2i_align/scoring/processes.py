"""Several processes of one job, as `accelerate launch` or `torchrun` start them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from t2i_align.errors import T2IError

PATIENCE = timedelta(days=14)  # the first process to finish waits for the last


@dataclass(frozen=True)
class Processes:
    """This process among those of the job: number `rank` of `count`, `local` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """Read `RANK`, `WORLD_SIZE` and `LOCAL_RANK`, which launchers set; without them this process is alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, count, local = (int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True))
        return cls(rank, count, local)

    @property
    def first(self) -> bool:
        """Whether this is the process that prepares, merges and speaks."""
        return self.rank == 0

    def once(self, action: Callable[[], None]) -> None:
        """Do something in the first process while the others wait; where it is refused, it is refused in all.

        Raises:
            T2IError: what `action` raised.
        """
        refused: list[str | None] = [None]
        if self.first:
            try:
                action()
            except (T2IError, OSError) as error:
                refused = [str(error)]
                if self.count == 1:
                    raise
        if self.count > 1:
            self._group().broadcast_object_list(refused, src=0)
        if refused[0] is not None:
            raise T2IError(refused[0])

    def sum(self, number: int) -> int:
        """The sum of all processes' numbers; waits until all are here."""
        numbers = [number]
        if self.count > 1:
            numbers *= self.count
            self._group().all_gather_object(numbers, number)
        return sum(numbers)

    def _group(self) -> Any:
        import torch.distributed as distributed

        if not distributed.is_initialized():  # gloo: only a few words are exchanged, wherever the models are
            distributed.init_process_group("gloo", timeout=PATIENCE)
            atexit.register(distributed.destroy_process_group)  # its threads must not outlive the interpreter
        return distributed
