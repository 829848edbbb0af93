"""`metrics.jsonl`: one row per `log_every` updates, means over them and over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2i_align.runs import append_jsonl, read_jsonl, write_jsonl
from t2i_align.training.distributed import ALONE, World


class Metrics:
    """Sums up statistics and writes a row of their means.

    Args:
        path: of the file; the first process writes it.
        world: the processes.
    """

    def __init__(self, path: Path, world: World = ALONE) -> None:
        self.path, self.world = path, world
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.unread: list[tuple[str, Tensor]] = []

    def add(self, stats: Mapping[str, Tensor | float]) -> None:
        """Take statistics, of a tensor its mean, nothing of an empty one; `settle` counts them in."""
        for name, value in stats.items():
            found = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if found.numel():
                self.unread.append((name, found.float().mean() if isinstance(value, Tensor) else found))

    def settle(self) -> None:
        """Count in what was added, by one reading for all of it."""
        numbers = read([value for _, value in self.unread])
        for (name, _), number in zip(self.unread, numbers, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1
        self.unread = []

    def write(self, step: int, **extra: float) -> dict[str, float]:
        """Write the means since the last row, and forget them."""
        self.settle()
        everyone = self.world.collect((self.sums, self.counts))
        names = dict.fromkeys(name for sums, _ in everyone for name in sums)
        row: dict[str, float] = {"step": step}
        for name in names:
            count = sum(counts.get(name, 0) for _, counts in everyone)
            row[name] = sum(sums.get(name, 0.0) for sums, _ in everyone) / count
        row |= extra
        if self.world.first:
            append_jsonl(self.path, [{name: _short(value) for name, value in row.items()}])
        self.sums, self.counts = {}, {}
        return row

    def forget_after(self, step: int) -> None:
        """Drop rows later than `step`, which a resumed run will write again."""
        if self.world.first:
            forget_after(self.path, step)


def read(values: Sequence[Tensor]) -> list[float]:
    """The numbers of tensors of one element each, of a kind all at once: every reading waits for the device."""
    kinds, found = [(value.device, value.dtype) for value in values], [0.0] * len(values)
    for kind in dict.fromkeys(kinds):
        mine = [place for place, other in enumerate(kinds) if other == kind]
        numbers = torch.stack([values[place].reshape(()) for place in mine]).tolist()
        for place, number in zip(mine, numbers, strict=True):
            found[place] = number
    return found


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of a jsonl file that are later than `step`."""
    if path.exists():
        write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
