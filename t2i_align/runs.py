"""Output folders: made, resumed or refused in one place; `config.yaml` and `environment.json` beside the results."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from t2i_align.config import Settings, load_config
from t2i_align.errors import T2IError

LIBRARIES = (
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors"),
    *("huggingface_hub", "numpy", "scipy", "pillow", "pyarrow", "pydantic", "xformers", "bitsandbytes"),
)
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"


class FolderError(T2IError):
    """An output folder that is in the way."""


def open_folder(folder: str | Path, config: Settings, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make a run's folder and write `config.yaml` and `environment.json` into it.

    Args:
        folder: where results go.
        config: the resolved settings of the job.
        resume: go on in an existing folder, if its settings are the same.
        overwrite: delete an existing folder first; only one that an earlier run of ours made.

    Raises:
        FolderError: the folder holds something, and neither `resume` nor `overwrite` applies.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"Expected {folder} to be a folder but it is a file.")
    if folder.exists() and any(folder.iterdir()):
        ours = _is_ours(folder)
        if overwrite and ours:
            shutil.rmtree(folder)
        elif resume and ours:
            before = load_config(type(config), folder / CONFIG)
            if before != config:
                changed = [n for n in type(config).model_fields if getattr(before, n) != getattr(config, n)]
                raise FolderError(
                    f"{folder} was made with other settings ({', '.join(changed)}): repeat them to resume, or choose "
                    "another folder."
                )
            return folder
        elif overwrite or resume:
            raise FolderError(
                f"{folder} is not a folder that t2i-align wrote (no {ENVIRONMENT} of ours); choose another."
            )
        else:
            raise FolderError(f"{folder} already holds files; pass --resume to go on or --overwrite to replace them.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, config.to_yaml())
    write_text(folder / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether a run of ours made the folder: its `environment.json` says so."""
    try:
        written = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / CONFIG).is_file() and isinstance(written, dict) and "t2i_align" in written


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
