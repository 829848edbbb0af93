"""Batch scoring: tables or folders of images -> a table of scores; one bad row never stops the rest."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
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
BATCH_PIXELS = 16_000_000  # decoded at once; as floats they take about 0.5 GB with a scorer's copies


@dataclass(frozen=True)
class Row:
    """One image to score; `prompt` is None where the input has none, `rest` holds its other columns.

    `problem` says why the row cannot be scored, if that is known before its image is opened.
    """

    image: Path
    prompt: str | None
    rest: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


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
        rows = _table_rows(listing, prompt) if listing else [_file_row(path, prompt) for path in find_images(source)]
        if not rows:
            raise T2IError(f"The folder {source} has no images.")
        return rows
    if source.suffix.lower() in TABLES:
        return _table_rows(source, prompt)
    if not source.exists():
        raise T2IError(f"No such file or folder: {source}.")
    raise T2IError(f"Expected a folder of images or a table ending in {', '.join(TABLES)} but got {source}.")


def _table_rows(path: Path, prompt: str | None) -> list[Row]:
    rows = read_jsonl(path) if path.name in LISTINGS else read_table(path)
    if not rows:
        raise T2IError(f"The table {path} has no rows.")
    image, text = find_column(rows, IMAGE_COLUMNS), find_column(rows, PROMPT_COLUMNS)
    if image is None:
        raise T2IError(f"Expected {path} to have a column {' or '.join(IMAGE_COLUMNS)} but it has none.")
    odd = next((row[image] for row in rows if row.get(image) is not None and not isinstance(row[image], str)), None)
    if odd is not None:
        raise T2IError(f"Expected the column {image!r} of {path} to hold paths but got a {type(odd).__name__}.")
    made = []
    for row in rows:
        said = row.get(text or "")
        rest = {name: value for name, value in row.items() if name not in (image, text, "error")}
        made.append(Row(path.parent / (row.get(image) or ""), prompt if said in (None, "") else str(said), rest))
    return made


def _file_row(image: Path, prompt: str | None) -> Row:
    """An image of a folder, with the prompt of an equally named text file."""
    text = image.with_suffix(".txt")
    if not text.is_file():
        return Row(image, prompt)
    try:
        return Row(image, read_text(text).strip() or prompt)
    except T2IError as error:
        return Row(image, None, problem=str(error))


def check_output(out: str | Path, source: str | Path = "", *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse an output file before any work is done.

    Raises:
        T2IError: unknown ending, a folder, the input itself, or there already.
    """
    out = Path(out)
    if out.suffix.lower() not in OUTPUTS:
        raise T2IError(f"Expected an output file ending in {', '.join(OUTPUTS)} but got {out}.")
    if resume and overwrite:
        raise T2IError("Expected --resume or --overwrite but got both.")
    if out.is_dir():
        raise T2IError(f"Expected {out} to be a file but it is a folder.")
    if source and out.resolve() == Path(source).resolve():
        raise T2IError(f"Expected an output other than the input {source}.")
    if out.exists() and not overwrite:
        raise T2IError(f"{out} already exists; pass --overwrite to replace it or choose another name.")
    if _partial(out).exists() and not (resume or overwrite):
        raise T2IError(
            f"{_partial(out)} holds an unfinished job; pass --resume to go on or --overwrite to start again."
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial.jsonl")


def score_file(
    rows: Sequence[Row],
    scorers: Sequence[Scorer],
    out: str | Path,
    *,
    settings: dict[str, Any],
    batch_size: int = 64,
    explain: bool = False,
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
    check_output(out, settings.get("input", ""), resume=resume, overwrite=overwrite)
    partial = _partial(out)
    said = json.dumps([settings["rewards"], explain, [[_printable(r.image), r.prompt] for r in rows]])
    job = sha256(said.encode()).hexdigest()
    done = _finished(partial, job) if resume else []
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(partial, [{"job": job}, *done])  # without a last line that was cut short
    with Progress(len(rows), "scoring", start=len(done)) as progress:
        while len(done) < len(rows):
            batch = score_rows(_next_batch(rows, len(done), batch_size), scorers, explain=explain)
            for row in batch:  # relative to the table, so that the table can be scored again
                path = row["image"]
                row["image"] = path if os.path.isabs(path) else os.path.relpath(path, out.parent)
            append_jsonl(partial, batch)
            done += batch
            progress.update(len(done))
    write_table(done, out)
    write_text(out.with_name(out.stem + ".config.yaml"), yaml.safe_dump(settings, sort_keys=False))
    write_text(out.with_name(out.stem + ".environment.json"), json.dumps(environment(), indent=2) + "\n")
    partial.unlink()
    return done


def _finished(partial: Path, job: str) -> list[dict[str, Any]]:
    """Rows an interrupted job left. Raises T2IError if it was another job."""
    rows = read_jsonl(partial)
    if rows and rows[0].get("job") != job:
        raise T2IError(
            f"{partial} belongs to a job with other images, prompts or rewards; pass --overwrite to replace it."
        )
    return rows[1:]


def _next_batch(rows: Sequence[Row], first: int, batch_size: int) -> Sequence[Row]:
    """Rows from `first` on: at most `batch_size`, with at most `BATCH_PIXELS` pixels unless one alone has more."""
    pixels = 0
    for count, row in enumerate(rows[first : first + batch_size]):
        try:
            with Image.open(row.image) as image:  # reads the header alone
                pixels += image.width * image.height
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        if pixels > BATCH_PIXELS and count:
            return rows[first : first + count]
    return rows[first : first + batch_size]


def score_rows(rows: Sequence[Row], scorers: Sequence[Scorer], explain: bool = False) -> list[dict[str, Any]]:
    """Score one batch: a table row for each of `rows`, with the columns of `score_columns`.

    With `explain`, scorers that can say why add a column `NAME_report`.
    """
    images: list[Image.Image | None] = []
    table: list[dict[str, Any]] = []
    for row in rows:
        error = row.problem
        try:
            images.append(None if error else open_image(row.image))
        except ImageError as problem:
            images.append(None)
            error = _utf8(str(problem))
        scores = dict.fromkeys(score_columns(scorers))
        rest = {name: value for name, value in row.rest.items() if name not in ("image", "prompt", *scores)}
        table.append({"image": _printable(row.image), "prompt": row.prompt, **rest, **scores, "error": error})
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
                if explain and (said := scorer.explain(images[index], rows[index].prompt or "")):
                    table[index][f"{scorer.name}_report"] = said
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
    return _utf8(str(path))


def _utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold (bytes of odd file names) escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


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

    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    temporary = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
    temporary.replace(path)


def _column(values: list[Any]) -> Any:
    """An arrow column; one that mixes types becomes text, one without values counts as numbers."""
    import pyarrow

    try:
        column = pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        column = pyarrow.array([None if value is None else str(value) for value in values])
    return column.cast(pyarrow.float64()) if pyarrow.types.is_null(column.type) else column
