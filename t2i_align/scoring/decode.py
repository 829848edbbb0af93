"""Decoding beside the model: threads read images ahead, in order, within a bound on pixels.

Threads suffice: Pillow lets go of the interpreter lock while it decodes, and nothing is copied between processes.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from threading import Condition
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from t2i_align.data.images import ImageError, decode_image
from t2i_align.errors import T2IError
from t2i_align.scoring.inputs import Row

AHEAD_PIXELS = 32_000_000  # decoded and waiting, about 100 MB
MAX_WORKERS = 8


class Decoded(NamedTuple):
    """A row and its picture (H, W, 3) uint8, or the reason why there is none."""

    row: Row
    pixels: NDArray[np.uint8] | None
    note: str | None = None
    error: str | None = None


class Decoder:
    """Decode rows in their order, up to `ahead` of them and `AHEAD_PIXELS` before they are asked for.

    `waited` counts the seconds in which the reader had to wait: time that the model stood still for images.
    """

    def __init__(self, workers: int | None, ahead: int, max_pixels: int | None = None) -> None:
        self.workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        self.ahead, self.max_pixels = max(ahead, self.workers), max_pixels
        self.waited = 0.0

    def __call__(self, tagged: Iterable[tuple[Any, Row]]) -> Generator[tuple[Any, Decoded], None, None]:
        """`(tag, row)` pairs -> `(tag, Decoded)` pairs in the same order."""
        gate, numbers, pending = _Gate(AHEAD_PIXELS), count(), deque[tuple[Any, Future[tuple[Decoded, int]]]]()
        iterator = iter(tagged)
        with ThreadPoolExecutor(self.workers, "decode") as pool:
            try:
                while True:
                    for tag, row in islice(iterator, self.ahead - len(pending)):
                        pending.append((tag, pool.submit(self._work, gate, next(numbers), row)))
                    if not pending:
                        return
                    tag, future = pending.popleft()
                    started = time.perf_counter()
                    decoded, pixels = future.result()
                    self.waited += time.perf_counter() - started
                    gate.leave(pixels)
                    yield tag, decoded
            finally:
                gate.open()
                pool.shutdown(wait=True, cancel_futures=True)

    def _work(self, gate: _Gate, number: int, row: Row) -> tuple[Decoded, int]:
        entered = []

        def enter(pixels: int) -> None:
            gate.enter(number, pixels)
            entered.append(pixels)

        try:
            return decode_row(row, self.max_pixels, enter), sum(entered)
        finally:
            if not entered:  # an image without a readable header lets the next one in
                gate.enter(number, 0)


class _Gate:
    """Lets images in by their number while the pixels inside are within the limit, or nothing is inside.

    Entering in order cannot lock up: all that is inside leaves before the image at the gate is asked for.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.inside, self.next, self.opened = limit, 0, 0, False
        self.changed = Condition()

    def enter(self, number: int, pixels: int) -> None:
        def may() -> bool:
            fits = not self.inside or self.inside + pixels <= self.limit
            return self.opened or (number == self.next and fits)

        with self.changed:
            self.changed.wait_for(may)
            self.inside += pixels
            self.next += 1
            self.changed.notify_all()

    def leave(self, pixels: int) -> None:
        with self.changed:
            self.inside -= pixels
            self.changed.notify_all()

    def open(self) -> None:
        """Let everything pass: the reader is gone."""
        with self.changed:
            self.opened = True
            self.changed.notify_all()


def decode_row(row: Row, max_pixels: int | None = None, before: Any = None) -> Decoded:
    """Open a row's image; what is wrong with it becomes its `error`."""
    if row.problem:
        return Decoded(row, None, error=row.problem)
    try:
        image, note = decode_image(row.image, max_pixels, before)
    except (ImageError, T2IError) as error:
        return Decoded(row, None, error=str(error))
    return Decoded(row, np.asarray(image), note)
