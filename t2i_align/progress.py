"""Progress: a bar on a terminal, plain untruncated lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LINE_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Count towards `total`; use as a context manager.

    Args:
        total: how many units make the whole.
        label: what is being done.
        start: units done before (a resumed run).
        shown: False for a process whose progress another one shows.
        batch: units that are made together, though counted one by one; a rate amid them would be far too low.
    """

    def __init__(self, total: int, label: str, start: int = 0, shown: bool = True, batch: int = 1) -> None:
        self.total, self.label, self.start, self.shown, self.batch = total, label, start, shown, batch
        self.done, self.began, self.spoke = start, time.monotonic(), 0.0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self.bar = RichProgress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, completed=self.start, numbers="")
        return self

    def update(self, done: int, **numbers: float) -> None:
        """Say that `done` units are complete, with numbers worth seeing."""
        self.done = done
        text = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, numbers=text)
            return
        whole = (done - self.start) % self.batch == 0 and time.monotonic() - self.spoke > LINE_EVERY
        if self.shown and (whole or done >= self.total):
            self.spoke = time.monotonic()
            rate = (done - self.start) / max(1e-9, self.spoke - self.began)
            left = (self.total - done) / rate if rate else 0.0
            line = f"{self.label}: {done}/{self.total}, {rate:.3g}/s, {left / 60:.1f} min left"
            print(line + (f", {text}" if text else ""), file=sys.stderr, flush=True)

    def advance(self, units: int = 1, **numbers: float) -> None:
        """Say that `units` more are complete."""
        self.update(self.done + units, **numbers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
