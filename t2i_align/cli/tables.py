"""Tables for people: a box on a terminal, aligned untruncated columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence


def print_table(rows: Sequence[Mapping[str, object]], title: str = "") -> None:
    """Print rows that share their keys."""
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*names, title=title or None)
        for line in cells:
            table.add_row(*line)
        Console().print(table)
        return
    if title:
        print(title)
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    for line in [names, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
