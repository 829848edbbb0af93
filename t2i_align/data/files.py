"""Files of large collections: sorted walks, numbered names in braces, members of tar shards."""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from t2i_align.errors import T2IError

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
    """`x-{008..010}.tar` -> three names; `{a,b}` -> two; several groups multiply; without braces the name itself."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last = int(span[1]), int(span[2])
        words = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    else:
        words = found[1].split(",")
    return [name for word in words for name in braces(pattern[: found.start()] + word + pattern[found.end() :])]


def split_member(path: str | Path) -> tuple[Path, str] | None:
    """`shards/000.tar/key.jpg` -> (`shards/000.tar`, `key.jpg`); None for a path that names no member of a tar."""
    head, separator, member = str(path).replace(os.sep, "/").partition(".tar/")
    return (Path(head + ".tar"), member) if separator and Path(head + ".tar").is_file() else None


def open_bytes(path: str | Path) -> Path | io.BytesIO:
    """What Pillow opens: the path of a file, or the bytes of a member of a tar shard.

    Raises:
        FileNotFoundError: no such member.
    """
    parts = split_member(path)
    return Path(path) if parts is None else io.BytesIO(read_member(*parts))


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
