"""`metrics.jsonl`: one row per `log_every` updates, means over them and over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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

    def add(self, stats: Mapping[str, Tensor | float]) -> None:
        """Count statistics in; of a tensor its mean, nothing of an empty one."""
        for name, value in stats.items():
            if isinstance(value, Tensor) and not value.numel():
                continue
            number = float(value.detach().float().mean()) if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step: int, **extra: float) -> dict[str, float]:
        """Write the means since the last row, and forget them."""
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


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of a jsonl file that are later than `step`."""
    if path.exists():
        write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
