"""A live line per prompt while it is steered: step, effective particles, best reward so far."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from t2i_align.progress import LINE_EVERY

SHOWN = 48  # letters of a prompt


class LiveLines:
    """Show a window of prompts; on a terminal in place, elsewhere as plain lines now and then.

    Args:
        prompts: the window's.
        first: number of the first of them, from 0.
        total: prompts of the whole job.
        particles: per prompt.
    """

    def __init__(self, prompts: Sequence[str], first: int, total: int, particles: int) -> None:
        self.prompts, self.first, self.total, self.particles = list(prompts), first, total, particles
        self.best = [-math.inf] * len(prompts)
        self.ess: list[float | None] = [None] * len(prompts)
        self.step, self.spoke, self.began = 0, time.monotonic(), time.monotonic()
        self.live: Any = None

    def __enter__(self) -> LiveLines:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(self._text(), console=Console(stderr=True), transient=True)
            self.live.start()
        return self

    def __call__(self, row: dict[str, Any]) -> None:
        """Take in a row of the history as a method logs it; a row's number says how many steps were complete."""
        self.step = int(row.get("row", self.step))
        for at in range(len(self.prompts)):
            mine = slice_row(row, at, len(self.prompts))
            finite = [value for value in flatten(mine.get("rewards", [])) if math.isfinite(value)]
            self.best[at] = max([self.best[at], *finite])
            self.ess[at] = mine.get("ess", self.ess[at])
        if self.live is not None:
            self.live.update(self._text())
        elif time.monotonic() - self.spoke > LINE_EVERY:
            self._speak()

    def _line(self, at: int) -> str:
        prompt = self.prompts[at] if len(self.prompts[at]) <= SHOWN else self.prompts[at][: SHOWN - 3] + "..."
        said = f"[{self.first + at + 1}/{self.total}] {prompt}: step {self.step}"
        ess = self.ess[at]
        said += "" if ess is None else f", ESS {ess:.1f} of {self.particles}"
        return said + (f", best reward so far {self.best[at]:.4g}" if math.isfinite(self.best[at]) else "")

    def _text(self) -> Any:
        from rich.text import Text

        return Text("\n".join(self._line(at) for at in range(len(self.prompts))))

    def _speak(self) -> None:
        self.spoke = time.monotonic()
        for at in range(len(self.prompts)):
            print(self._line(at), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        if kind is None:
            self._speak()


def slice_row(row: dict[str, Any], at: int, prompts: int) -> dict[str, Any]:
    """What a row of a run's history says of one of its prompts: lists have one entry per prompt."""
    return {
        name: value[at] if isinstance(value, list) and len(value) == prompts else value for name, value in row.items()
    }


def flatten(values: Any) -> Iterator[float]:
    """The numbers of nested lists."""
    if isinstance(values, list):
        for value in values:
            yield from flatten(value)
    else:
        yield float(values)
