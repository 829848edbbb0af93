"""Files of large collections: sorted walks, numbered names in braces, members of tar shards, cells of parquet files."""

from __future__ import annotations

import io
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from t2i_align.errors import T2IError

GROUPS = 4  # columns of row groups that are kept: of two columns of pairs the last and the next
_READING = Lock()
INDICES = 8  # shards whose indices are kept; a shard of 10,000 members takes about 2 MB


class TarIndex(NamedTuple):
    """Members of a tar file in their order: name -> (offset of the data, size). `cut` says why it ends early."""

    members: dict[str, tuple[int, int]]
    cut: str | None


def walk(folder: Path) -> Iterator[Path]:
    """Files below `folder`, sorted by path; only one directory's names are in memory at a time."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise T2IError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    for entry in entries:
        if entry.is_dir():
            if not entry.is_symlink():  # as pathlib's rglob: no loops
                yield from walk(folder / entry.name)
        elif entry.is_file():
            yield folder / entry.name


def braces(pattern: str) -> list[str]:
    """`x-{008..010}.tar` -> three names; `{a,b}` -> two; several groups multiply; without braces the name itself.

    Raises:
        T2IError: numbers that fall.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise T2IError(f"Expected numbers that rise in braces but got {pattern}: write the smaller one first.")
        words = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    else:
        words = found[1].split(",")
    return [name for word in words for name in braces(pattern[: found.start()] + word + pattern[found.end() :])]


def relative_path(path: Path, folder: Path) -> str:
    """A path as one from a folder, right also where links lead to the folder or away before a `..`.

    The system follows links before it goes up, `os.path.relpath` does not. Other links stay in the path: what a shard
    is called must not change.
    """
    last = max((number for number, part in enumerate(path.parts, start=1) if part == ".."), default=0)
    return os.path.relpath(Path(*path.parts[:last]).resolve().joinpath(*path.parts[last:]), folder.resolve())


def split_member(path: str | Path) -> tuple[Path, str] | None:
    """`shards/000.tar/key.jpg` -> (`shards/000.tar`, `key.jpg`); None for a path that names no member of a tar."""
    text = str(path).replace(os.sep, "/")
    found = re.search(r"(.*?\.tar)/(.*)", text, re.IGNORECASE | re.DOTALL)
    return (Path(found[1]), found[2]) if found and Path(found[1]).is_file() else None


def file_state(path: str | Path) -> tuple[int, int] | None:
    """Size and time of change (ns) of the file, shard or table that `open_bytes` reads; None where there is no file."""
    cell = split_cell(path)
    file, *_ = cell or split_member(path) or (Path(path),)
    try:
        about = file.stat()
    except (OSError, ValueError):
        return None
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None


def open_bytes(path: str | Path) -> Path | io.BytesIO:
    """What Pillow opens: the path of a file, or the bytes of a member of a tar shard or of a cell of a parquet file.

    Raises:
        FileNotFoundError: no such member or cell.
    """
    cell = split_cell(path)
    if cell is not None:
        found = read_cell(*cell)
        return cell[0].parent / found if isinstance(found, str) else io.BytesIO(found)
    parts = split_member(path)
    return Path(path) if parts is None else io.BytesIO(read_member(*parts))


def split_cell(path: str | Path) -> tuple[Path, int, str] | None:
    """`table.parquet/12/jpg_0` -> (`table.parquet`, 12, `jpg_0`); None for a path that names no cell of a file."""
    text = str(path).replace(os.sep, "/")
    for found in re.finditer(r"\.parquet/(\d+)/", text, re.IGNORECASE):
        table, column = Path(text[: found.start(1) - 1]), text[found.end() :]
        if column and table.is_file():
            return table, int(found[1]), column
    return None


def read_cell(table: Path, row: int, column: str) -> bytes | str:
    """The bytes in a cell of a parquet file; of one as the datasets library writes images its bytes, or else its path.

    Raises:
        FileNotFoundError: no such cell, or one without bytes.
    """
    try:
        ends = _group_ends(table, table.stat().st_mtime_ns)
        group = next(i for i, end in enumerate(ends) if row < end)
        with _READING:  # decoders that want one group wait for one reader
            cells = _group(table, group, column, table.stat().st_mtime_ns)
        value = cells[row - (ends[group - 1] if group else 0)].as_py()
    except (KeyError, OSError, StopIteration) as error:
        raise FileNotFoundError(f"{table}/{row}/{column}") from error
    value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not value:
        raise FileNotFoundError(f"{table}/{row}/{column}")
    return value


@lru_cache(maxsize=INDICES)
def _group_ends(table: Path, changed: int) -> list[int]:
    """The number of rows up to the end of each row group."""
    import pyarrow.parquet

    about = pyarrow.parquet.read_metadata(table)
    return list(accumulate(about.row_group(i).num_rows for i in range(about.num_row_groups)))


@lru_cache(maxsize=GROUPS)
def _group(table: Path, group: int, column: str, changed: int) -> Any:
    """A column of a row group."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(table) as file:
        return file.read_row_group(group, columns=[column]).column(column)


def read_member(tar: Path, member: str) -> bytes:
    """The bytes of a member; fewer than it should have where the shard is cut short."""
    place = tar_index(tar).members.get(member)
    if place is None:
        raise FileNotFoundError(member)
    with tar.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def tar_index(tar: Path) -> TarIndex:
    """Where each member of an uncompressed tar file lies; read once per file and change.

    Raises:
        T2IError: not a tar file, or a compressed one, in which nothing can be found without unpacking all before it.
    """
    try:
        about = tar.stat()
    except OSError as error:
        raise T2IError(f"No such file: {tar}.") from error
    return _tar_index(tar, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=INDICES)
def _tar_index(tar: Path, changed: int, size: int) -> TarIndex:
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            try:
                for member in file:
                    if member.isfile():
                        name = posixpath.normpath(member.name).lstrip("/")
                        members[name] = (member.offset_data, member.size)
                    file.members = []  # type: ignore[attr-defined]  # tarfile keeps them all otherwise
            except (tarfile.TarError, OSError, EOFError) as error:
                return TarIndex(members, f"{tar} ends after {len(members)} members: {error}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise T2IError(f"Expected {tar} to be an uncompressed tar file but it cannot be read: {error}.") from error
    return TarIndex(members, None)
