"""What to score: folders, tables, tar shards and the layouts of benchmarks -> a stream of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from t2i_align.config import nearest
from t2i_align.data.files import braces, file_state, relative_path, walk
from t2i_align.data.images import walk_images
from t2i_align.data.tables import BEYOND, TABLES, json_line, parquet_columns, printable, stream_table
from t2i_align.errors import T2IError
from t2i_align.prompts import PROMPT_COLUMNS, find_column, read_text

IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "file")
# What `generate`, steered `generate` and `playground sample` write into their folders.
LISTINGS = ("results.jsonl", "results.parquet", "prompts.jsonl")


@dataclass(frozen=True)
class Row:
    """One image to score; `prompt` is None where the input has none, `rest` holds its other columns.

    `image` is a file or `SHARD.tar/MEMBER`. `problem` says why the row cannot be scored, if that is known before its
    image is opened.
    """

    image: Path
    prompt: str | None
    rest: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of an input, read anew each time one goes through them, so that no table is held in memory.

    `table` is the file that they are read from, if it is one.
    """

    layout: str
    read: Callable[[], Iterator[Row]]
    table: Path | None = None

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def open_rows(
    source: str | Path, prompt: str | None = None, *, layout: str = "auto", prompts: str | Path | None = None
) -> Rows:
    """Find out what `source` is, and make sure that there is something to score.

    Args:
        source: a folder that `generate` or `playground sample` wrote; a folder in the layout of GenEval, HPSv2 or
            T2I-CompBench; tar shards of webdataset (one, a folder of them, or `x-{000..010}.tar`); any other folder of
            images, with prompts in equally named `.txt` files if there are any; a table, whose image paths are
            relative to it, or which holds the images if it is a parquet file; or several such parquet files.
        prompt: for rows without one.
        layout: one of `LAYOUTS`, or `auto` to find out.
        prompts: for `hpsv2`: a JSON file `{style: [prompt, ...]}` or a folder of `STYLE.json` files; by default the
            folder itself.

    Raises:
        T2IError: nothing to score there, or not in that layout.
    """
    from t2i_align.scoring.layouts import LAYOUTS, detect

    if layout not in ("auto", *LAYOUTS):
        raise T2IError(f"Unknown layout {layout!r}.{nearest(layout, LAYOUTS)} Available: auto, {', '.join(LAYOUTS)}.")
    path = Path(source)
    many = "{" in str(source) and not path.exists()
    if path.suffix.lower() in TABLES and not many and not path.is_dir() and layout == "auto":
        _check_prompts(prompts, "table", source)
        return _table(path, prompt)
    if many:
        found = [Path(name) for name in braces(str(source))]
    elif path.exists():
        found = [path]
    else:
        raise T2IError(f"No such file or folder: {source}.")
    kind = detect(found, prompts) if layout == "auto" else layout
    _check_prompts(prompts, kind, source)
    if kind == "listing":
        name = next((name for name in LISTINGS if (path / name).is_file()), None)
        if name is None:
            raise T2IError(f"Expected {source} to hold {' or '.join(LISTINGS)} but it has none.")
        return _table(path / name, prompt)
    rows = Rows(kind, partial(LAYOUTS[kind], found, prompt, prompts))
    if next(iter(rows), None) is None:
        raise T2IError(f"The folder {source} has no images{'' if kind == 'folder' else f' in the layout {kind!r}'}.")
    return rows


def _check_prompts(prompts: str | Path | None, kind: str, source: str | Path) -> None:
    """Refuse a file of prompts that would not be used."""
    if prompts is not None and kind != "hpsv2":
        raise T2IError(
            f"Expected a file of prompts (--prompts) for the layout hpsv2 alone but {source} is read as {kind!r}: "
            "leave it out."
        )


def read_rows(source: str | Path, prompt: str | None = None, **options: Any) -> list[Row]:
    """All rows of `open_rows`, in memory."""
    return list(open_rows(source, prompt, **options))


def folder_rows(found: list[Path], prompt: str | None, prompts: str | Path | None = None) -> Iterator[Row]:
    """All images below a folder."""
    for folder in found:
        for image in walk_images(folder):
            yield file_row(image, prompt)


def file_row(image: Path, prompt: str | None, **rest: Any) -> Row:
    """An image of a folder, with the prompt of an equally named text file."""
    text = image.with_suffix(".txt")
    if not text.is_file():
        return Row(image, prompt, rest)
    try:
        return Row(image, read_text(text).strip() or prompt, rest)
    except T2IError as error:
        return Row(image, None, rest, str(error))


def parquet_rows(found: list[Path], prompt: str | None, prompts: str | Path | None = None) -> Iterator[Row]:
    """The rows of several parquet files, or of all below a folder."""
    folder = found[0]
    files = [path for path in walk(folder) if path.suffix.lower() == ".parquet"] if folder.is_dir() else found
    for path in files:
        if parquet_columns(path).rows:
            yield from _table(path, prompt)


def _table(path: Path, prompt: str | None) -> Rows:
    """A table; of one that is no parquet file two passes see that all cells which must be paths are texts."""
    torn, held = path.name in LISTINGS, list[str]()
    if path.suffix.lower() == ".parquet":
        about = parquet_columns(path)
        names, held = (about.names if about.rows else []), about.images
    else:
        names = list(dict.fromkeys(name for row in stream_table(path, torn=torn) for name in row))
    if not names:
        raise T2IError(f"The table {path} has no rows.")
    image, text = _image_column(names, held), find_column(names, PROMPT_COLUMNS)
    if image is None:
        raise T2IError(f"Expected {path} to have a column {' or '.join(IMAGE_COLUMNS)} but it has {', '.join(names)}.")
    if image not in held:
        if path.suffix.lower() == ".parquet":
            odd = None if image in about.texts else "of another type"
        else:
            cells = (row.get(image) for row in stream_table(path, torn=torn))
            odd = next((f"a {type(cell).__name__}" for cell in cells if not isinstance(cell, (str, type(None)))), None)
        if odd is not None:
            raise T2IError(f"Expected the column {image!r} of {path} to hold paths but got {odd}.")
    left_out = {image, text, "error", BEYOND, *held}
    return Rows("table", partial(_table_rows, path, torn, image, text, left_out, prompt), path)


def _image_column(names: list[str], held: list[str]) -> str | None:
    """The column of images: one that holds them, if it has the name for it or is alone; else one of paths."""
    within = find_column(held, IMAGE_COLUMNS) or (held[0] if len(held) == 1 else None)
    named = find_column(names, IMAGE_COLUMNS)
    return named if within is None or (named is not None and named.lower() == "image") else within


def _table_rows(
    path: Path, torn: bool, image: str, text: str | None, left_out: set[str | None], prompt: str | None
) -> Iterator[Row]:
    for row in stream_table(path, torn=torn, cells=path.name):
        said = row.get(text or "")
        rest = {name: value for name, value in row.items() if name not in left_out}
        problem = None if row.get(image) else f"The row has nothing in the column {image!r}"
        if BEYOND in row:
            problem = "The row has more cells than the header: put texts with commas in quotes"
        yield Row(path.parent / (row.get(image) or ""), prompt if said in (None, "") else str(said), rest, problem)


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows tells: how many, how many with a prompt, and digests.

    `digest` is of the rows, `files` of the size and time of change of their image files.
    """

    rows: int
    prompted: int
    digest: str
    files: str


def survey(rows: Iterable[Row], out: str | Path) -> Survey:
    """Go through the rows once without opening an image."""
    number, prompted, digest, files = 0, 0, sha256(), sha256()
    for row in rows:
        number += 1
        prompted += row.prompt is not None
        said = {"image": path_from(out, row.image), "prompt": row.prompt, "rest": row.rest, "problem": row.problem}
        digest.update(json_line(printable(said)).encode())
        files.update(f"{file_state(row.image)}\n".encode())
    return Survey(number, prompted, digest.hexdigest(), files.hexdigest())


def path_from(out: str | Path, image: Path) -> str:
    """The image's path as the table names it: relative to the table, so that the table can be scored again."""
    return str(image) if image.is_absolute() else relative_path(image, Path(out).parent)
