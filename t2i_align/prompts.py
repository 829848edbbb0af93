"""`Prompts`: prompt texts plus named columns, one value a row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_align.errors import T2IError

TABLES = (".jsonl", ".csv", ".parquet")
PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Prompts(Sequence[str]):
    """A table of prompts.

    `text` has one string a row; each of `columns` (reference images, seeds, metadata) has one value a row.
    """

    text: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {name: len(values) for name, values in self.columns.items() if len(values) != len(self.text)}
        if wrong:
            raise T2IError(f"Expected {len(self.text)} values in every prompt column but got {wrong}.")

    @classmethod
    def of(cls, prompts: str | Sequence[str] | Prompts | None, rows: int | None = None) -> Prompts:
        """Make a table of what a user passed: one string serves all `rows`, a list must have as many.

        Raises:
            TypeError: not a string, a sequence of strings or a `Prompts`.
            T2IError: the number of prompts is not `rows`, or one cannot be written as UTF-8.
        """
        if isinstance(prompts, Prompts):
            table = prompts
        elif prompts is None or isinstance(prompts, str):
            table = cls((prompts or "",) * (1 if rows is None else rows))
        else:
            table = cls(tuple(prompts))
        wrong = [text for text in table.text if not isinstance(text, str)]
        if wrong:
            raise TypeError(f"Expected prompts to be strings but got {wrong[0]!r:.80}.")
        for text in dict.fromkeys(table.text):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair, as a cut JSON escape leaves it
                raise T2IError(f"Expected prompts to be UTF-8 text but got {text!r:.80}.") from error
        if rows is not None and len(table) != rows:
            raise T2IError(f"Expected one prompt for each of {rows} images but got {len(table)} prompts.")
        return table

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: Any) -> Any:  #  int -> str; slice or list of ints -> Prompts
        if isinstance(index, int):
            return self.text[index]
        rows = range(len(self))[index] if isinstance(index, slice) else [int(i) for i in index]
        return Prompts(
            tuple(self.text[i] for i in rows),
            {name: tuple(values[i] for i in rows) for name, values in self.columns.items()},
        )

    def __add__(self, other: Prompts) -> Prompts:
        """The rows of both, one after the other, with the columns that both have."""
        shared = [name for name in self.columns if name in other.columns]
        columns = {name: tuple(self.columns[name]) + tuple(other.columns[name]) for name in shared}
        return Prompts(self.text + other.text, columns)

    def repeat(self, times: int) -> Prompts:
        """Each row `times` times, group-major: a a b b."""
        return self[[i for i in range(len(self)) for _ in range(times)]]


def read_prompts(source: str | Path) -> Prompts:
    """Prompts of a file, or `source` itself as the one prompt.

    Args:
        source: a `.txt` (one prompt a line), `.jsonl`, `.csv` or `.parquet` file with a `prompt` column (or `caption`
            or `text`; other columns are kept), or a prompt.

    Raises:
        T2IError: a file that is missing, empty or has no prompts.
    """
    path = Path(source)
    if path.suffix.lower() not in (".txt", *TABLES):
        if path.suffix.lower() in (".json", ".tsv", ".yaml", ".yml", ".parq"):
            raise T2IError(f"Expected a prompt or a file ending in .txt, {', '.join(TABLES)} but got {source}.")
        if not str(source).strip():
            raise T2IError("Expected a prompt but got an empty text.")
        try:
            str(source).encode()
        except UnicodeEncodeError as error:
            raise T2IError(f"Expected the prompt to be UTF-8 text but got {source!r}.") from error
        return Prompts((str(source),))
    if path.suffix.lower() == ".txt":
        lines = read_text(path).splitlines()
        table = Prompts(tuple(line.strip() for line in lines if line.strip()))
    else:
        rows = read_table(path)
        column = find_column(rows, PROMPT_COLUMNS)
        if column is None:
            raise T2IError(f"Expected {path} to have a column {' or '.join(PROMPT_COLUMNS)} but it has none.")
        names = dict.fromkeys(name for row in rows for name in row if name != column)
        columns = {name: tuple(row.get(name) for row in rows) for name in names}
        table = Prompts(tuple(str(row.get(column) or "") for row in rows), columns)
    if not len(table):
        raise T2IError(f"The file {path} has no prompts.")
    return table


def read_prompt_file(path: str | Path) -> Prompts:
    """As `read_prompts`, where a file is meant.

    Raises:
        T2IError: no such file, not one of prompts, or empty.
    """
    if not Path(path).is_file():
        raise T2IError(f"No such file of prompts: {path}, seen from {Path.cwd()}.")
    if Path(path).suffix.lower() not in (".txt", *TABLES):
        raise T2IError(f"Expected a file of prompts ending in .txt, {', '.join(TABLES)} but got {path}.")
    return read_prompts(path)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a `.jsonl`, `.csv` or `.parquet` file. Raises T2IError where it cannot be read."""
    kind = path.suffix.lower()
    if not path.is_file():
        raise T2IError(f"No such file: {path}.")
    if kind == ".jsonl":
        rows = []
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise T2IError(f"Line {number} of {path} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise T2IError(f"Expected line {number} of {path} to be a JSON object but got {line!r:.60}.")
            rows += [row] if row else []
        return rows
    if kind == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(read_text(path))))
        except csv.Error as error:
            raise T2IError(f"The file {path} is not a readable csv table: {error}.") from error
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise T2IError(f"The file {path} is not a readable parquet file: {error}.") from error
    raise T2IError(f"Expected a file ending in {', '.join(TABLES)} but got {path}.")


def occurrences(prompts: Prompts) -> list[int]:
    """For each row, how many earlier rows have the same text."""
    seen: dict[str, int] = {}
    counts = []
    for text in prompts.text:
        counts.append(seen.get(text, 0))
        seen[text] = counts[-1] + 1
    return counts


def find_column(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """The first of `names` that the rows have."""
    return next((name for name in names if any(name in row for row in rows)), None)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Raises T2IError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise T2IError(f"No such file: {path}.") from error
    except UnicodeDecodeError as error:
        raise T2IError(f"The file {path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise T2IError(f"Cannot read {path}: {error.strerror}.") from error
