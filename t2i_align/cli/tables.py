"""What commands print: tables for people (a box on a terminal, aligned untruncated columns elsewhere), and JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2i_align.config import Settings


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


def print_settings(kind: type[Settings]) -> None:
    """Print the settings of a method: names as `key=value` words have them, defaults, and what they are."""
    print_table(list(settings_rows(kind)))


def settings_rows(kind: type[Settings], above: str = "") -> Iterator[dict[str, object]]:
    """A row per setting, those of blocks within as `block.name`."""
    from typing import get_args

    from pydantic_core import PydanticUndefined

    from t2i_align.config import Settings

    for name, field in kind.model_fields.items():
        blocks = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        block = next((k for k in blocks if issubclass(k, Settings)), None)
        default: Any = field.get_default(call_default_factory=True)
        if block is not None and default is not None:
            yield from settings_rows(block, f"{above}{name}.")
            continue
        said = "(needed)" if default is PydanticUndefined else _yaml(default)
        yield {"setting": f"{above}{name}", "default": said, "what it is": field.description or ""}
        if block is not None:
            yield from settings_rows(block, f"{above}{name}.")


def _yaml(value: Any) -> str:
    """A default as a config has it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
