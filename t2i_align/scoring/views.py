"""What is read off a finished table, a row at a time: its summary, the best rows of each prompt, preference pairs."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_align.data.files import relative_path
from t2i_align.data.tables import stream_table, write_table

TableRow = dict[str, Any]
SHOWN_FAILURES = 10


@dataclass
class Numbers:
    """Mean, standard deviation (of the population) and extremes of a stream of numbers."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0  # summed squared distance to the mean (Welford)
    min: float = math.inf
    max: float = -math.inf

    def add(self, value: float) -> None:
        """Count a number in."""
        self.n += 1
        before = value - self.mean
        self.mean += before / self.n
        self.squares += before * (value - self.mean)
        self.min, self.max = min(self.min, value), max(self.max, value)

    def as_dict(self) -> dict[str, Any]:
        """`mean`, `sd`, `min`, `max`, `n`; empty without numbers."""
        if not self.n:
            return {}
        sd = math.sqrt(self.squares / self.n)
        return {"mean": self.mean, "sd": sd, "min": self.min, "max": self.max, "n": self.n}


@dataclass
class Summary:
    """Rows, rows with an error, the first of these, and the numbers of each score column."""

    rows: int = 0
    failed: int = 0
    failures: list[TableRow] = field(default_factory=list)
    scores: dict[str, Numbers] = field(default_factory=dict)


def read_scored(table: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    """Rows of a score table; csv cells become the numbers and nulls that they stand for."""
    for row in stream_table(table):
        numbers = {name: None if row.get(name) in (None, "") else float(row[name]) for name in columns}
        yield row | numbers | {"prompt": row.get("prompt") or None, "error": row.get("error") or None}


def summarise(rows: Iterable[TableRow], columns: Sequence[str]) -> Summary:
    """Go through a table once."""
    summary = Summary(scores={name: Numbers() for name in columns})
    for row in rows:
        summary.rows += 1
        if row["error"]:
            summary.failed += 1
            if len(summary.failures) < SHOWN_FAILURES:
                summary.failures.append(row)
        for name in columns:
            if row[name] is not None:
                summary.scores[name].add(row[name])
    return summary


def write_top(rows: Iterable[TableRow], path: Path, by: str, k: int) -> int:
    """Write the `k` best rows of each prompt by the column `by`, with their `rank` from 1; return their number.

    Rows without a prompt count as one prompt; of equal scores the earlier row is better. In memory at once: the rows
    that are written.
    """
    best: dict[str | None, list[tuple[float, int, TableRow]]] = {}
    for number, row in enumerate(rows):
        if row[by] is not None:
            heap = best.setdefault(row["prompt"], [])
            (heapq.heappush if len(heap) < k else heapq.heappushpop)(heap, (row[by], -number, row))
    ranked = [
        row | {"rank": rank} for heap in best.values() for rank, (_, _, row) in enumerate(sorted(heap)[::-1], start=1)
    ]
    write_table(ranked, path)
    return len(ranked)


def write_pairs(rows: Iterable[TableRow], path: Path, by: str, table: Path, min_gap: float = 0.0) -> int:
    """Write the best and the worst image of each prompt as preference pairs; return their number.

    The columns are `prompt`, `image_0`, `image_1`, `label_0`, `label_1` (1 preferred, 0 not, as in Pick-a-Pic), then
    `score_0`, `score_1`, `gap` (their difference, in the unit of `by`) and `reward`. The image that comes first in the
    table is image 0. Paths are relative to `path`. Prompts with a gap of 0 or below `min_gap` give no pair.
    """
    edges: dict[str, list[tuple[float, int, str]]] = {}  # best, worst
    for number, row in enumerate(rows):
        if row[by] is not None and row["prompt"] is not None:
            this = (row[by], number, row["image"])
            known = edges.setdefault(row["prompt"], [this, this])
            known[0] = this if this[0] > known[0][0] else known[0]
            known[1] = this if this[0] < known[1][0] else known[1]
    pairs = []
    for prompt, (best, worst) in edges.items():
        gap = best[0] - worst[0]
        if gap > 0 and gap >= min_gap:
            first, second = sorted((best, worst), key=lambda edge: edge[1])
            pairs.append(
                {
                    "prompt": prompt,
                    "image_0": rebase(first[2], table, path),
                    "image_1": rebase(second[2], table, path),
                    "label_0": int(first is best),
                    "label_1": int(second is best),
                    "score_0": first[0],
                    "score_1": second[0],
                    "gap": gap,
                    "reward": by,
                }
            )
    write_table(pairs, path)
    return len(pairs)


def rebase(image: str, table: Path, other: Path) -> str:
    """A path relative to a table, as one relative to another file."""
    if os.path.isabs(image) or table.parent.resolve() == other.parent.resolve():
        return image
    return relative_path(table.parent / image, other.parent)
