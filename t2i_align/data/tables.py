"""Tables as streams: `.jsonl`, `.csv` and `.parquet` files read and written a few rows at a time."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from t2i_align.errors import T2IError

Row = dict[str, Any]
T = TypeVar("T")

BLOCK = 4096  # rows of a parquet row group, and in memory at once


def stream_table(path: Path, *, torn: bool = False) -> Iterator[Row]:
    """Rows of a `.jsonl`, `.csv` or `.parquet` file, one after the other.

    Args:
        path: the file; columns of bytes in a parquet file are left out.
        torn: leave out a last jsonl line that was cut short by a kill.

    Raises:
        T2IError: where it cannot be read.
    """
    if not path.is_file():
        raise T2IError(f"No such file: {path}.")
    try:
        yield from _READERS[path.suffix.lower()](path, torn)
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


def _read_csv(path: Path, torn: bool) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for row in csv.DictReader(file):
                yield {name: value for name, value in row.items() if name is not None}  # None: cells beyond the header
        except csv.Error as error:
            raise T2IError(f"The file {path} is not a readable csv table: {error}.") from error


def _read_parquet(path: Path, torn: bool) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
            for batch in file.iter_batches(BLOCK, columns=names):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise T2IError(f"The file {path} is not a readable parquet file: {error}.") from error


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


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
