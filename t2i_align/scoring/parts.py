"""The unfinished job on disk: finished chunks of rows, each written once, whole or not at all.

`OUT.partial/job.json` says what decides the table, and so whose job it is; `part-RANK.jsonl` is only ever appended to,
a chunk at a time: one line `{"chunk", "rows", "bytes", "crc"}`, then the rows. A chunk counts once all its bytes are on
the disk and their checksum holds; what a kill or a power cut left behind the last such chunk is cut off.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from t2i_align.data.tables import json_line, sync_folder
from t2i_align.errors import T2IError
from t2i_align.runs import write_text

JOB = "job.json"


class Place(NamedTuple):
    """Where a chunk's rows lie."""

    file: Path
    offset: int
    size: int
    rows: int


class Parts:
    """The folder of an unfinished job; `done` maps chunk numbers to places. Made by `create`, opened by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / JOB).read_text(encoding="utf-8"))
        self.job, self.chunk = about["job"], about["chunk"]
        self.done: dict[int, Place] = {}
        for path in sorted(folder.glob("part-*.jsonl")):
            for number, place in _chunks(path):
                self.done.setdefault(number, place)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All rows in the order of the input; may be gone through again."""
        for number in sorted(self.done):
            place = self.done[number]
            with place.file.open("rb") as file:
                file.seek(place.offset)
                for line in file.read(place.size).splitlines():  # bytes are split at line feeds and returns alone
                    yield json.loads(line)

    def __len__(self) -> int:
        return sum(place.rows for place in self.done.values())


class Writer:
    """Appends chunks to the part of one process; a context manager.

    Raises:
        T2IError: another process writes there.
    """

    def __init__(self, parts: Parts, rank: int) -> None:
        self.parts, self.path = parts, parts.folder / f"part-{rank:05d}.jsonl"
        self.file: BinaryIO = self.path.open("ab")
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.file.close()
                raise T2IError(f"Another process is at work on {parts.folder}: wait for it, or end it.") from error
        ends = [place.offset + place.size for place in parts.done.values() if place.file == self.path]
        self.file.truncate(max(ends, default=0))
        sync_folder(parts.folder)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Write a finished chunk through to the disk."""
        content = "".join(map(json_line, rows)).encode()
        about = {"chunk": number, "rows": len(rows), "bytes": len(content), "crc": zlib.crc32(content)}
        head = json_line(about).encode()
        offset = self.file.seek(0, os.SEEK_END)
        self.file.write(head + content)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.parts.done[number] = Place(self.path, offset + len(head), len(content), len(rows))


def _chunks(path: Path) -> Iterator[tuple[int, Place]]:
    """The whole chunks at the head of a part."""
    with path.open("rb") as file:
        while head := file.readline():
            try:
                about = json.loads(head)
                content = file.read(about["bytes"])
                if len(content) != about["bytes"] or zlib.crc32(content) != about["crc"]:
                    return
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                return
            yield about["chunk"], Place(path, file.tell() - len(content), len(content), about["rows"])


def is_unfinished(folder: Path) -> bool:
    """Whether a job's chunks lie there."""
    return (folder / JOB).is_file()


def create(folder: Path, job: Any, chunk: int) -> None:
    """Begin a job: an empty folder, then its name, so that a job that has a name has a folder fit for it."""
    discard(folder)
    folder.mkdir(parents=True)
    write_text(folder / JOB, json.dumps({"job": job, "chunk": chunk}) + "\n")
    sync_folder(folder)


def discard(folder: Path) -> None:
    """Delete a job; its name goes first, so that a kill half-way leaves nothing that could be resumed."""
    if folder.is_dir():
        (folder / JOB).unlink(missing_ok=True)
        for path in (*folder.glob("part-*.jsonl"), *folder.glob(f"{JOB}.tmp")):
            path.unlink()
        folder.rmdir()
