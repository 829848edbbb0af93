"""What commands print: tables for people (a box on a terminal, aligned untruncated columns elsewhere), and JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any


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


def print_json(value: Any, indent: int | None = None) -> None:
    """Print JSON; numbers that JSON does not know (NaN, infinities) as null."""
    print(json.dumps(_known(value), indent=indent, allow_nan=False))


def _known(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _known(inner) for name, inner in value.items()}
    return [_known(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
