"""Tables as streams: read and written a few rows at a time, but for `.json`, which is one list."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from t2i_align.errors import T2IError

Row = dict[str, Any]
T = TypeVar("T")

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
BEYOND = "cells beyond the header"  # column of a csv row that has more of them: a text with a comma lacks quotes
BLOCK = 4096  # rows of a parquet row group, and in memory at once


def stream_table(path: Path, *, torn: bool = False, cells: str | None = None) -> Iterator[Row]:
    """Rows of a table, one after the other.

    Args:
        path: a file of one of `TABLES`; `.json` is a list of objects, or of texts, which get the column `text`.
        torn: leave out a last jsonl line that was cut short by a kill.
        cells: what to write before `/ROW/COLUMN` in the columns of a parquet file that hold images, so that
            `open_image` takes it; None leaves these columns out.

    Raises:
        T2IError: where it cannot be read.
    """
    kind = path.suffix.lower()
    if not path.is_file():
        raise T2IError(f"No such file: {path}.")
    if kind not in TABLES:
        raise T2IError(f"Expected a file ending in {', '.join(TABLES)} but got {path}.")
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, cells)
        elif kind == ".jsonl":
            yield from _read_jsonl(path, torn)
        elif kind == ".json":
            yield from _read_json(path)
        else:
            yield from _read_csv(path)
    except UnicodeDecodeError as error:
        raise T2IError(f"The file {path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise T2IError(f"Cannot read {path}: {error.strerror or error}.") from error


def _read_jsonl(path: Path, torn: bool) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
                row = json.loads(text) if text else {}
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                if torn and not file.read(1):
                    return
                if isinstance(error, UnicodeDecodeError):
                    raise
                raise T2IError(f"Line {number} of {path} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise T2IError(f"Expected line {number} of {path} to be a JSON object but got {text!r:.60}.")
            if row:
                yield row


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise T2IError(f"The file {path} is not JSON: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, (dict, str)) for row in rows):
        raise T2IError(f"Expected {path} to be a list of objects or of texts.")
    yield from ({"text": row} if isinstance(row, str) else row for row in rows)


def _read_csv(path: Path) -> Iterator[Row]:
    form: dict[str, Any] = {}
    if path.suffix.lower() == ".tsv":  # has no quoting: PartiPrompts' quotes belong to the prompts
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv.DictReader(file, restkey=BEYOND, **form)
        except csv.Error as error:
            raise T2IError(f"The file {path} is not a readable {path.suffix[1:]} table: {error}.") from error


def _read_parquet(path: Path, cells: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    held, number = parquet_columns(path).images, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in held]
            blocks = file.iter_batches(BLOCK, columns=names) if names else ()
            rows: Iterator[Row] = (row for block in blocks for row in block.to_pylist())
            for row in rows if names else ({} for _ in range(file.metadata.num_rows)):
                yield row if cells is None else row | {name: f"{cells}/{number}/{name}" for name in held}
                number += 1
    except pyarrow.ArrowException as error:
        raise T2IError(f"The file {path} is not a readable parquet file: {error}.") from error


class Columns(NamedTuple):
    """Of a parquet file: the names of all columns, of those that hold images as bytes, of those that hold text."""

    names: list[str]
    images: list[str]
    texts: list[str]
    rows: int


def parquet_columns(path: Path) -> Columns:
    """What a parquet file says of itself. Raises T2IError where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise T2IError(f"No such file: {path}.")
    try:
        about = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise T2IError(f"The file {path} is not a readable parquet file: {error}.") from error
    fields = list(about.schema.to_arrow_schema())
    held, texts = ([field.name for field in fields if holds(field.type)] for holds in (_holds_bytes, _holds_text))
    return Columns([field.name for field in fields], held, texts, about.num_rows)


def _holds_text(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


def _holds_bytes(kind: Any) -> bool:
    """Whether cells are bytes, or what the datasets library writes of images."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def write_table(rows: Iterable[Row], path: Path) -> None:
    """Write rows as `.jsonl`, `.csv` or `.parquet`: under another name first, then in place, safe against power cuts.

    Args:
        rows: gone through several times (to know all columns first), so no iterator.
        path: the file; its ending decides the format. A csv cell holds a list or mapping as JSON. A parquet column
            that mixes types, or that parquet has no type for, becomes text (lists and mappings JSON); one without
            values counts as numbers.
    """
    replace_safely(write_beside(rows, path), path)


def write_beside(rows: Iterable[Row], path: Path) -> Path:
    """The first half of `write_table`: write the rows beside `path`, which stays as it is; returns the file written."""
    temporary = path.with_name(path.name + ".tmp")
    _WRITERS[path.suffix.lower()](rows, temporary)
    return temporary


def replace_safely(temporary: Path, path: Path) -> None:
    """Move a written file into place so that after a power cut there is the old content or the new."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's new names to the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_line(row: Row) -> str:
    """A row as a line of jsonl; dates and other types of parquet files become text."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def printable(value: Any) -> Any:
    """The value with what UTF-8 cannot hold (bytes of odd file names, halves of surrogate pairs) escaped."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(name): printable(part) for name, part in value.items()}
    return [printable(part) for part in value] if isinstance(value, list) else value


def _write_jsonl(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(map(json_line, rows))


def _write_csv(rows: Iterable[Row], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        _csv_rows(rows, names, file)


def _csv_rows(rows: Iterable[Row], names: list[str], file: TextIO) -> None:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value


def _write_parquet(rows: Iterable[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = _kinds(rows)
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema(list(kinds.items()))) as writer:
        for block in blocks(rows, BLOCK):
            columns = {name: _column([row.get(name) for row in block], kind) for name, kind in kinds.items()}
            writer.write_table(pyarrow.table(columns))


def _kinds(rows: Iterable[Row]) -> dict[str, Any]:
    """The arrow type of each column."""
    import pyarrow

    kinds: dict[str, Any] = {}
    widened: dict[str, None] = {}
    for block in blocks(rows, BLOCK):
        for name in dict.fromkeys(name for row in block for name in row):
            before, kind = kinds.get(name, pyarrow.null()), _column([row.get(name) for row in block]).type
            kinds[name] = _wider(before, kind)
            if before != kind and pyarrow.null() not in (before, kind):
                widened[name] = None
    for block in blocks(rows, BLOCK) if widened else ():  # a type that holds two types may not hold all their values
        for name in widened:
            if _array([row.get(name) for row in block], kinds[name]) is None:
                kinds[name] = pyarrow.string()
    return {name: pyarrow.float64() if pyarrow.types.is_null(kind) else kind for name, kind in kinds.items()}


def _column(values: list[Any], kind: Any = None) -> Any:
    """An arrow column of the type `kind`, or of the one that fits; text where there is none."""
    import pyarrow

    column = _array(values, kind)
    if column is None or _is_unwritable(column.type):
        return pyarrow.array([None if value is None else str(_cell(value)) for value in values], pyarrow.string())
    return column


def _array(values: list[Any], kind: Any = None) -> Any:
    """An arrow array of the type `kind`, or of the one that fits; None where the values do not fit."""
    import pyarrow

    try:
        return pyarrow.array(values, kind)
    except (OverflowError, pyarrow.ArrowException):
        return None


def _is_unwritable(kind: Any) -> bool:
    """Whether it has a mapping without keys, which parquet cannot hold."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return not kind.num_fields or any(_is_unwritable(field.type) for field in kind)
    return types.is_list(kind) and _is_unwritable(kind.value_type)


def _wider(first: Any, second: Any) -> Any:
    """The type that holds both; text where there is none."""
    import pyarrow

    try:
        schemas = [pyarrow.schema([("x", kind)]) for kind in (first, second)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pyarrow.ArrowException:
        return pyarrow.string()


_WRITERS: dict[str, Callable[[Iterable[Row], Path], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block
