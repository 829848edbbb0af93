"""Batch scoring: tables or folders of images -> a table of scores; one bad row never stops the rest."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from t2i_align.data.images import ImageError, find_images, open_image
from t2i_align.errors import T2IError
from t2i_align.progress import Progress
from t2i_align.prompts import PROMPT_COLUMNS, TABLES, find_column, read_table, read_text
from t2i_align.rewards import Scorer
from t2i_align.runs import append_jsonl, environment, read_jsonl, write_jsonl, write_text

IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "file")
LISTINGS = ("results.jsonl", "prompts.jsonl")  # what `generate` and `playground sample` write into their folders
OUTPUTS = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """One image to score; `prompt` is None where the input has none."""

    image: Path
    prompt: str | None


def read_rows(source: str | Path, prompt: str | None = None) -> list[Row]:
    """Images and prompts of a folder or table.

    Args:
        source: a folder that `generate` or `playground sample` wrote; any other folder of images, with prompts in
            equally named `.txt` files if there are any; or a `.jsonl`, `.csv` or `.parquet` table whose image paths
            are relative to it.
        prompt: for rows without one.

    Raises:
        T2IError: nothing to score there.
    """
    source = Path(source)
    if source.is_dir():
        listing = next((source / name for name in LISTINGS if (source / name).is_file()), None)
        rows = _table_rows(listing, prompt) if listing else [Row(p, _sidecar(p) or prompt) for p in find_images(source)]
        if not rows:
            raise T2IError(f"The folder {source} has no images.")
        return rows
    if source.suffix.lower() in TABLES:
        return _table_rows(source, prompt)
    if not source.exists():
        raise T2IError(f"No such file or folder: {source}.")
    raise T2IError(f"Expected a folder of images or a table ending in {', '.join(TABLES)} but got {source}.")


def _table_rows(path: Path, prompt: str | None) -> list[Row]:
    rows = read_table(path)
    image, text = find_column(rows, IMAGE_COLUMNS), find_column(rows, PROMPT_COLUMNS)
    if image is None:
        raise T2IError(f"Expected {path} to have a column {' or '.join(IMAGE_COLUMNS)} but it has none.")
    said = [row.get(text or "") for row in rows]
    said = [prompt if value is None or value == "" else str(value) for value in said]
    return [Row(path.parent / str(row.get(image) or ""), value) for row, value in zip(rows, said, strict=True)]


def _sidecar(image: Path) -> str | None:
    text = image.with_suffix(".txt")
    return read_text(text).strip() if text.is_file() else None


def score_file(
    rows: Sequence[Row],
    scorers: Sequence[Scorer],
    out: str | Path,
    *,
    settings: dict[str, Any],
    batch_size: int = 64,
    resume: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Score `rows` into the file `out` and return the table.

    Finished batches go to `OUT.partial.jsonl` at once; the file itself appears when all is done. A row that cannot be
    read or scored has null scores and the reason in its `error` column.

    Raises:
        T2IError: `out` has an unknown ending, exists, or (`resume`) belongs to another job.
    """
    out = Path(out)
    if out.suffix.lower() not in OUTPUTS:
        raise T2IError(f"Expected an output file ending in {', '.join(OUTPUTS)} but got {out}.")
    partial = out.with_name(out.name + ".partial.jsonl")
    job = sha256(
        json.dumps([settings["rewards"], [[_printable(r.image), r.prompt] for r in rows]]).encode()
    ).hexdigest()
    done = _resume(out, partial, job, resume, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(partial, [{"job": job}, *done])  # without a last line that was cut short
    with Progress(len(rows), "scoring", start=len(done)) as progress:
        for first in range(len(done), len(rows), batch_size):
            batch = score_rows(rows[first : first + batch_size], scorers)
            append_jsonl(partial, batch)
            done += batch
            progress.update(len(done))
    write_table(done, out)
    write_text(out.with_name(out.stem + ".config.yaml"), yaml.safe_dump(settings, sort_keys=False))
    write_text(out.with_name(out.stem + ".environment.json"), json.dumps(environment(), indent=2) + "\n")
    partial.unlink()
    return done


def _resume(out: Path, partial: Path, job: str, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
    """Rows an interrupted job left, or []; refuses to lose or mix anything."""
    if overwrite:
        out.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    if out.exists():
        raise T2IError(f"{out} already exists; pass --overwrite to replace it or choose another name.")
    if not partial.exists():
        return []
    if not resume:
        raise T2IError(f"{partial} holds an unfinished job; pass --resume to go on or --overwrite to start again.")
    rows = read_jsonl(partial)
    if rows and rows[0].get("job") != job:
        raise T2IError(
            f"{partial} belongs to a job with other images, prompts or rewards; pass --overwrite to replace it."
        )
    return rows[1:]


def score_rows(rows: Sequence[Row], scorers: Sequence[Scorer]) -> list[dict[str, Any]]:
    """Score one batch: a table row for each of `rows`, with the columns of `score_columns`."""
    images: list[Image.Image | None] = []
    table: list[dict[str, Any]] = []
    for row in rows:
        error = None
        try:
            images.append(open_image(row.image))
        except ImageError as problem:
            images.append(None)
            error = str(problem)
        table.append(
            {"image": _printable(row.image), "prompt": row.prompt}
            | dict.fromkeys(score_columns(scorers))
            | {"error": error}
        )
    for scorer in scorers:
        able = []
        for index, (row, image) in enumerate(zip(rows, images, strict=True)):
            reason = None if image is None else _refusal(scorer, row.prompt)
            if reason:
                _add_error(table[index], f"{scorer.name}: {reason}")
            elif image is not None:
                able.append(index)
        for index, values in _score_robustly(scorer, able, images, rows).items():
            if isinstance(values, str):
                _add_error(table[index], values)
            else:
                table[index] |= values
                if values[scorer.name] is None:
                    _add_error(table[index], f"{scorer.name}: the score is not a finite number")
    return table


def score_columns(scorers: Sequence[Scorer]) -> list[str]:
    """Names of the score columns: each scorer's total, and the parts of sums."""
    names: dict[str, None] = {}
    for scorer in scorers:
        names[scorer.name] = None
        names |= dict.fromkeys(part.name for part in scorer.children() if isinstance(part, Scorer))
        for group in scorer.children():
            names |= dict.fromkeys(part.name for part in group.children() if isinstance(part, Scorer))
    return list(names)


def _refusal(scorer: Scorer, prompt: str | None) -> str | None:
    if scorer.needs_prompt and prompt is None:
        return "the row has no prompt"
    return scorer.refuse(prompt or "")


def _score_robustly(
    scorer: Scorer, able: list[int], images: Sequence[Image.Image | None], rows: Sequence[Row]
) -> dict[int, dict[str, float | None] | str]:
    """Scores of the rows `able`; where the batch fails, row by row, so that only the bad ones carry the error."""
    if not able:
        return {}
    try:
        with torch.no_grad():
            scores = scorer.scores([images[i] for i in able], [rows[i].prompt or "" for i in able])
    except Exception as error:
        if len(able) == 1:
            return {able[0]: f"{scorer.name}: {type(error).__name__}: {error}"}
        return {i: v for index in able for i, v in _score_robustly(scorer, [index], images, rows).items()}
    columns = {**scores.parts, scorer.name: scores.total}
    if scores.std is not None:
        columns[f"{scorer.name}_std"] = scores.std
    lists = {name: values.tolist() for name, values in columns.items()}
    return {index: {name: _number(lists[name][at]) for name in lists} for at, index in enumerate(able)}


def _printable(path: Path) -> str:
    """The path as text; bytes that are not UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _add_error(row: dict[str, Any], message: str) -> None:
    row["error"] = message if row["error"] is None else f"{row['error']} | {message}"


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as `.parquet`, `.csv` or `.jsonl`, atomically."""
    if path.suffix.lower() == ".jsonl":
        write_jsonl(path, rows)
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix.lower() == ".csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, names)
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, buffer.getvalue())
        return
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row.get(name) for row in rows] for name in names}
    text = {"image", "prompt", "error"}
    schema = pyarrow.schema([(name, pyarrow.string() if name in text else pyarrow.float64()) for name in names])
    temporary = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), temporary)
    temporary.replace(path)
