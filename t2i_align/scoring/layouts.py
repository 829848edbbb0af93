"""Folder layouts of benchmarks and data sets; each function makes rows of the paths it is given.

geneval      00000/metadata.jsonl, 00000/samples/0000.png           github.com/djghosh13/geneval
hpsv2        STYLE/00000.jpg, prompts in STYLE.json                  github.com/tgxs002/HPSv2
compbench    samples/PROMPT_000000.png                               github.com/Karine-Huang/T2I-CompBench
webdataset   tar files with KEY.jpg, KEY.txt, KEY.json               github.com/webdataset/webdataset
parquet      parquet files with images inside                        huggingface.co/docs/datasets
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from t2i_align.data.files import read_member, tar_index, walk
from t2i_align.data.images import SUFFIXES, walk_images
from t2i_align.data.tables import TABLES
from t2i_align.errors import T2IError
from t2i_align.prompts import PROMPT_COLUMNS, find_column, read_text
from t2i_align.scoring.inputs import LISTINGS, Row, folder_rows, parquet_rows

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
METADATA = "metadata.jsonl"
_COMPBENCH = re.compile(r"(.+)_(\d{6})")
_HPSV2 = re.compile(r"\d{5}")


def detect(found: list[Path], prompts: str | Path | None = None) -> str:
    """The layout of a folder, or of tar or parquet files, by what lies there.

    Raises:
        T2IError: a file of another kind.
    """
    folder = found[0]
    if not folder.is_dir():
        kinds = {".tar": "webdataset", ".parquet": "parquet"}
        kind = folder.suffix.lower()
        wrong = next((path for path in found if path.suffix.lower() != kind or kind not in kinds), None)
        if wrong is not None:
            raise T2IError(
                f"Expected a folder of images, a table ending in {', '.join(TABLES)}, or .tar or .parquet shards but "
                f"got {wrong}."
            )
        return kinds[kind]
    if any((entry / METADATA).is_file() for entry in _folders(folder)):
        return "geneval"
    if any((folder / name).is_file() for name in LISTINGS):
        return "listing"
    if any(path.suffix.lower() == ".tar" for path in _entries(folder)):
        return "webdataset"
    first = next(walk_images(folder / "samples"), None) if (folder / "samples").is_dir() else None
    if first is not None and _COMPBENCH.fullmatch(first.stem):
        return "compbench"
    if prompts is not None or any(_is_style(entry) for entry in _folders(folder)):
        return "hpsv2"
    if next(walk_images(folder), None) is None and any(path.suffix.lower() == ".parquet" for path in walk(folder)):
        return "parquet"
    return "folder"


def _is_style(folder: Path) -> bool:
    """A folder `STYLE/00000.jpg` with `STYLE.json` beside it, or of one of HPSv2's four names."""
    named = folder.name in HPSV2_STYLES or folder.with_name(folder.name + ".json").is_file()
    return named and any(_HPSV2.fullmatch(path.stem) for path in _images(folder))


def geneval_rows(found: list[Path], prompt: str | None, prompts: Any = None) -> Iterator[Row]:
    """`NUMBER/samples/*` with the prompt and the other fields of `NUMBER/metadata.jsonl`; grids are left out."""
    for folder in _folders(found[0]):
        problem, about = None, {}
        try:
            about = json.loads(read_text(folder / METADATA))
        except (T2IError, json.JSONDecodeError) as error:
            problem = f"Cannot read {folder / METADATA}: {error}"
        if not isinstance(about, dict):
            problem, about = f"Expected {folder / METADATA} to be one JSON object", {}
        said = about.pop("prompt", None) or prompt
        for image in _images(folder / "samples"):
            yield Row(image, said, {"folder": folder.name, **about}, problem)


def hpsv2_rows(found: list[Path], prompt: str | None, prompts: str | Path | None = None) -> Iterator[Row]:
    """`STYLE/NUMBER.jpg`, the prompt being entry NUMBER of the style's list."""
    root = found[0]
    where = root if prompts is None else Path(prompts)
    table = _json(where) if where.is_file() else None
    if table is not None and not isinstance(table, dict):
        raise T2IError(f"Expected {where} to be a JSON object of styles, each a list of prompts.")
    for folder in _folders(root):
        own = where / f"{folder.name}.json"
        texts = table.get(folder.name) if table is not None else _json(own) if own.is_file() else None
        if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise T2IError(f"Expected the prompts of the style {folder.name!r} in {where} to be a list of strings.")
        for image in _images(folder):
            if _HPSV2.fullmatch(image.stem):
                index = int(image.stem)
                rest = {"style": folder.name, "index": index}
                if texts is None:
                    yield Row(image, prompt, rest)
                elif index < len(texts):
                    yield Row(image, texts[index], rest)
                else:
                    problem = f"The style {folder.name!r} has {len(texts)} prompts, none for {index}"
                    yield Row(image, None, rest, problem)


def compbench_rows(found: list[Path], prompt: str | None, prompts: Any = None) -> Iterator[Row]:
    """`samples/PROMPT_NUMBER.png`: the prompt is the file's name."""
    folder = found[0] / "samples" if (found[0] / "samples").is_dir() else found[0]
    for image in _images(folder):
        parts = _COMPBENCH.fullmatch(image.stem)
        yield Row(image, parts[1], {"index": int(parts[2])}) if parts else Row(image, prompt)


def shard_rows(found: list[Path], prompt: str | None, prompts: Any = None) -> Iterator[Row]:
    """Samples of tar shards: neighbours with one key; the prompt is `KEY.txt`, or a field of `KEY.json`."""
    shards = [p for p in _entries(found[0]) if p.suffix.lower() == ".tar"] if found[0].is_dir() else found
    for shard in shards:
        index = tar_index(shard)
        for key, group in groupby(index.members, key=_key):
            names = list(group)
            images = [name for name in names if posixpath.splitext(name)[1].lower() in SUFFIXES]
            if images:
                said, rest, problem = _texts(shard, key, names)
                said = None if problem else said or prompt
                yield from (Row(shard / name, said, rest, problem) for name in images)
        if index.cut is not None:
            yield Row(shard, None, problem=f"The shard is cut short: {index.cut}")


def _key(name: str) -> str:
    """`a/b.seg.png` -> `a/b`: what stands before the first dot of the last part."""
    folder, last = posixpath.split(name)
    return posixpath.join(folder, last.split(".")[0])


def _texts(shard: Path, key: str, names: list[str]) -> tuple[str | None, dict[str, Any], str | None]:
    """Prompt, other columns and problem of a sample."""
    rest: dict[str, Any] = {}
    try:
        if f"{key}.json" in names:
            rest = json.loads(read_member(shard, f"{key}.json"))
            if not isinstance(rest, dict):
                return None, {}, f"Expected {shard}/{key}.json to be a JSON object"
        name = find_column(rest, PROMPT_COLUMNS)
        said = str(rest.pop(name) or "") if name else ""
        if f"{key}.txt" in names:
            said = read_member(shard, f"{key}.txt").decode("utf-8-sig").strip() or said
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return None, {}, f"Cannot read the text of {shard}/{key}: {error}"
    return said or None, {name: value for name, value in rest.items() if name not in ("image", "error")}, None


def _entries(folder: Path) -> list[Path]:
    return sorted(folder / name for name in os.listdir(folder))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _images(folder: Path) -> list[Path]:
    return [p for p in _entries(folder) if p.suffix.lower() in SUFFIXES and p.is_file()] if folder.is_dir() else []


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise T2IError(f"The file {path} is not JSON: {error}.") from error


LAYOUTS: dict[str, Callable[[list[Path], str | None, Any], Iterator[Row]]] = {
    "folder": folder_rows,
    "geneval": geneval_rows,
    "hpsv2": hpsv2_rows,
    "compbench": compbench_rows,
    "webdataset": shard_rows,
    "parquet": parquet_rows,
}
