"""The HTML gallery of a score table: histograms, images by score, best and worst of each prompt; one plain file."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from t2i_align.data.images import ImageError, open_image
from t2i_align.report import write_report
from t2i_align.scoring.views import Numbers, Summary, TableRow, summarise

THUMBNAIL = 176  # px, longest side
PIXEL_ART = 128  # px; images up to this size are embedded as they are
BINS = 40
FAILURES = 20


class Ends(NamedTuple):
    """Best and worst row of a prompt."""

    best: TableRow
    worst: TableRow

    def gap(self, by: str) -> float:
        """How far the two are apart."""
        return self.best[by] - self.worst[by]


def write_gallery(
    read: Callable[[], Iterable[TableRow]], table: Path, path: Path, columns: Sequence[str], by: str, limit: int = 100
) -> None:
    """Write the gallery of a table.

    Args:
        read: gives the rows anew at each call.
        table: where the rows' image paths start from.
        path: the HTML file.
        columns: score columns.
        by: the one to sort by.
        limit: images in each of the two parts: if the table has more, half from either end, and the prompts whose best
            and worst image differ most.
    """
    summary = summarise(read(), columns)
    head, tail, many = _by_score(read(), by, limit)
    prompts = heapq.nlargest(max(1, limit // 2), _ends(read(), by).items(), key=lambda item: item[1].gap(by))
    thumbnails: dict[str, str | None] = {}

    def card(row: TableRow) -> dict[str, Any]:
        image = row["image"]
        if image not in thumbnails:
            thumbnails[image] = _thumbnail(table.parent / image)
        said = {name: f"{row[name]:.4g}" for name in columns if row[name] is not None}
        return {"image": image, "source": thumbnails[image], "prompt": row["prompt"], "scores": said}

    write_report(
        path,
        "gallery.html",
        table=table.name,
        by=by,
        summary=summary,
        histograms=_histograms(read(), summary),
        head=[card(row) for row in head],
        tail=[card(row) for row in tail],
        many=many,
        prompts=[
            {"prompt": prompt, "gap": f"{ends.gap(by):.4g}", "best": card(ends.best), "worst": card(ends.worst)}
            for prompt, ends in prompts
        ],
        failures=summary.failures[:FAILURES],
    )


def _by_score(rows: Iterable[TableRow], by: str, limit: int) -> tuple[list[TableRow], list[TableRow], int]:
    """Rows by falling score: all in the first list if they are at most `limit`, else half from either end."""
    best: list[tuple[float, int, TableRow]] = []  # heaps: the first entry is the next to go
    worst: list[tuple[float, int, TableRow]] = []
    scored = 0
    for number, row in enumerate(rows):
        if row[by] is not None:
            scored += 1
            for heap, value in ((best, row[by]), (worst, -row[by])):
                (heapq.heappush if len(heap) < limit else heapq.heappushpop)(heap, (value, -number, row))
    falling = [row for _, _, row in sorted(best)[::-1]]
    if scored <= limit:
        return falling, [], scored
    rising = [row for _, _, row in sorted(worst)[::-1]]
    return falling[: limit - limit // 2], rising[: limit // 2][::-1], scored


def _ends(rows: Iterable[TableRow], by: str) -> dict[str, Ends]:
    """Best and worst row of every prompt with at least two different scores."""
    ends: dict[str, Ends] = {}
    for row in rows:
        if row[by] is not None and row["prompt"] is not None:
            best, worst = ends.get(row["prompt"], (row, row))
            ends[row["prompt"]] = Ends(row if row[by] > best[by] else best, row if row[by] < worst[by] else worst)
    return {prompt: pair for prompt, pair in ends.items() if pair.gap(by) > 0}


def _histograms(rows: Iterable[TableRow], summary: Summary) -> list[dict[str, Any]]:
    """For each score column its numbers and the heights, in [0, 1], of `BINS` bars between its extremes."""
    counts = {name: [0] * BINS for name in summary.scores}
    for row in rows:
        for name, numbers in summary.scores.items():
            if row[name] is not None:
                counts[name][_bin(row[name], numbers)] += 1
    return [
        {"name": name, "numbers": numbers.as_dict(), "bars": [count / max(counts[name]) for count in counts[name]]}
        for name, numbers in summary.scores.items()
        if numbers.n
    ]


def _bin(value: float, numbers: Numbers) -> int:
    width = numbers.max - numbers.min
    return min(BINS - 1, int(BINS * (value - numbers.min) / width)) if width else BINS // 2


def _thumbnail(path: Path) -> str | None:
    """A small copy as a `data:` address; None where the image cannot be read any more."""
    try:
        image = open_image(path)
    except ImageError:
        return None
    small = max(image.size) <= PIXEL_ART
    if not small:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", optimize=True, **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
