"""Output folders: made, resumed or refused in one place; `config.yaml` and `environment.json` beside the results."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from t2i_align.config import Settings, load_config
from t2i_align.errors import T2IError

T = TypeVar("T", bound=Settings)

LIBRARIES = (
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors"),
    *("huggingface_hub", "numpy", "scipy", "pillow", "pyarrow", "pydantic", "xformers", "bitsandbytes"),
)
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"


class FolderError(T2IError):
    """An output folder that is in the way."""


def home_of(source: Any) -> str | None:
    """The folder of the run whose `config.yaml` this is; None for any other config."""
    home = Path(source).parent if isinstance(source, (str, Path)) and Path(source).name == CONFIG else None
    return str(home) if home is not None and (home / ENVIRONMENT).is_file() else None


def open_folder(
    folder: str | Path,
    config: Settings,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    free: Mapping[str, Collection[str]] | None = None,
) -> Path:
    """Make a run's folder and write `environment.json` and `config.yaml` into it; a kill at any moment leaves it ours.

    Args:
        folder: where results go.
        config: the resolved settings of the job.
        resume: go on in an existing folder, if its settings are the same; None for a job that cannot.
        overwrite: delete an existing folder first; only one that an earlier run of ours made.
        free: by block of settings, those that may be others when a job goes on.

    Raises:
        FolderError: the folder holds something, and neither `resume` nor `overwrite` applies.
    """
    folder = Path(folder)
    check_folder(folder, config, resume=resume, overwrite=overwrite, free=free)
    if overwrite and folder.exists():
        _empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite or not (folder / CONFIG).is_file():
        write_text(folder / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    write_text(folder / CONFIG, config.to_yaml())
    return folder


def check_folder(
    folder: str | Path,
    config: Settings,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    free: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Raise what `open_folder` would, and change nothing."""
    folder = Path(folder)
    if resume and overwrite:
        raise FolderError("Expected --resume or --overwrite but got both.")
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"Expected {folder} to be a folder but it is a file.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (resume or overwrite):
        ways = "" if resume is None else "--resume to go on or "
        raise FolderError(f"{folder} already holds files; pass {ways}--overwrite to replace them.")
    if _just_begun(folder):
        return
    before = _read_ours(folder, type(config))
    if before is None:
        raise FolderError(f"{folder} was not written by this command, so it is neither resumed nor replaced.")
    if overwrite:
        return
    changed = [
        text
        for name in type(config).model_fields
        for text in _changes(name, getattr(before, name), getattr(config, name), (free or {}).get(name, ()))
    ]
    if changed:
        raise FolderError(
            f"{folder} was made with other settings ({', '.join(changed)}): repeat them to resume, or choose "
            "another folder."
        )


def _just_begun(folder: Path) -> bool:
    """Whether a kill came while the folder was made, before it had its settings."""
    names = {path.name for path in folder.iterdir()}
    first = {ENVIRONMENT, f"{ENVIRONMENT}.tmp", f"{CONFIG}.tmp"}
    return names <= first and (ENVIRONMENT not in names or _has_our_environment(folder))


def _has_our_environment(folder: Path) -> bool:
    try:
        written = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and "t2i_align" in written


def folder_problems(folder: Path, name: str = "out") -> Iterator[str]:
    """Why a folder cannot be written, if it cannot; `name`: of the setting that names it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        yield f"{name}: expected a folder but {there} is a file"
        return
    try:
        with TemporaryFile(dir=there):  # permissions alone say nothing of a disk that cannot be written, or to root
            pass
    except OSError as error:
        yield f"{name}: the folder {there} cannot be written ({error.strerror})"


def _read_ours(folder: Path, kind: type[T]) -> T | None:
    """The settings of the job of this kind that made the folder, or None if none did."""
    try:
        before = load_config(kind, folder / CONFIG)
    except (OSError, ValueError):
        return None
    return before if _has_our_environment(folder) else None


def _changes(name: str, before: Any, now: Any, free: Collection[str] = ()) -> list[str]:
    """What differs between two settings, or between those of a block that may not change."""
    if isinstance(before, Settings) and type(before) is type(now):
        inner = [n for n in type(before).model_fields if n not in free]
        return [text for n in inner for text in _changes(f"{name}.{n}", getattr(before, n), getattr(now, n))]
    return [] if before == now else [f"{name}: {before!r} there, {now!r} here"]


def _empty(folder: Path) -> None:
    """Delete what is in the folder; the folder itself may be a link or the current one.

    What says that it is ours stays until it is written anew, so that a kill on the way leaves a folder of ours.
    """
    for path in folder.iterdir():
        if path.name in (CONFIG, ENVIRONMENT):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a run."""
    return {
        "t2i_align": metadata.version("t2i-align") if _installed("t2i-align") else "not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: readers see the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    # Split at line feeds alone: `splitlines` also splits at separators that JSON strings may hold. A last line that
    # was cut inside a character becomes unreadable JSON, and is left out like any other cut line.
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    rows: list[dict[str, Any]] = []
    if lines == [""]:
        return rows
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break
            raise T2IError(f"Line {number + 1} of {path} is not JSON: {error}.") from error
    return rows


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a jsonl file and flush them to the system."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_to_jsonl(rows))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a jsonl file atomically."""
    write_text(path, _to_jsonl(rows))


def _to_jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
