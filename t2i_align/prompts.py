"""`Prompts`: prompt texts plus named columns, one value a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_align.data.tables import BEYOND, TABLES, stream_table
from t2i_align.errors import T2IError

NEGATIVE = "negative_prompt"  # column of prompts, and keyword of pipelines
MORE_TEXTS = ("prompt_", "negative_prompt_")  # how keywords for second and third text encoders begin
PROMPT_COLUMNS = ("prompt", "caption", "text", "prompts")  # the last is DrawBench's


@dataclass(frozen=True)
class Prompts(Sequence[str]):
    """A table of prompts.

    `text` has one string a row; each of `columns` (reference images, seeds, metadata) has one value a row.
    """

    text: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {name: len(values) for name, values in self.columns.items() if len(values) != len(self.text)}
        if wrong:
            raise T2IError(f"Expected {len(self.text)} values in every prompt column but got {wrong}.")

    @classmethod
    def of(cls, prompts: str | Sequence[str] | Prompts | None, rows: int | None = None) -> Prompts:
        """Make a table of what a user passed: one string serves all `rows`, a list must have as many.

        Raises:
            TypeError: not a string, a sequence of strings or a `Prompts`.
            T2IError: the number of prompts is not `rows`, or one cannot be written as UTF-8.
        """
        if isinstance(prompts, Prompts):
            table = prompts
        elif prompts is None or isinstance(prompts, str):
            table = cls((prompts or "",) * (1 if rows is None else rows))
        else:
            table = cls(tuple(prompts))
        wrong = [text for text in table.text if not isinstance(text, str)]
        if wrong:
            raise TypeError(f"Expected prompts to be strings but got {wrong[0]!r:.80}.")
        for text in dict.fromkeys(table.text):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair, as a cut JSON escape leaves it
                raise T2IError(f"Expected prompts to be UTF-8 text but got {text!r:.80}.") from error
        if rows is not None and len(table) != rows:
            raise T2IError(f"Expected one prompt for each of {rows} images but got {len(table)} prompts.")
        return table

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: Any) -> Any:  #  int -> str; slice or list of ints -> Prompts
        if isinstance(index, int):
            return self.text[index]
        rows = range(len(self))[index] if isinstance(index, slice) else [int(i) for i in index]
        return Prompts(
            tuple(self.text[i] for i in rows),
            {name: tuple(values[i] for i in rows) for name, values in self.columns.items()},
        )

    def __add__(self, other: Prompts) -> Prompts:
        """The rows of both, one after the other, with the columns that both have, and `negative_prompt` of either."""
        shared = [name for name in self.columns if name in other.columns]
        columns = {name: tuple(self.columns[name]) + tuple(other.columns[name]) for name in shared}
        if NEGATIVE in self.columns or NEGATIVE in other.columns:
            parts = (table.columns.get(NEGATIVE, (None,) * len(table)) for table in (self, other))
            columns[NEGATIVE] = tuple(text for part in parts for text in part)
        return Prompts(self.text + other.text, columns)

    def repeat(self, times: int) -> Prompts:
        """Each row `times` times, group-major: a a b b."""
        return self[[i for i in range(len(self)) for _ in range(times)]]


def read_prompts(source: str | Path) -> Prompts:
    """Prompts of a file, or `source` itself as the one prompt.

    Args:
        source: a `.txt` (one prompt a line), `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file with a `prompt`
            column (or `caption`, `text` or `prompts`, in any case; other columns are kept, but for images in a parquet
            file), or a prompt.

    Raises:
        T2IError: a file that is missing, empty or has no prompts.
    """
    path = Path(source)
    if path.suffix.lower() not in (".txt", *TABLES):
        if path.suffix.lower() in (".yaml", ".yml", ".parq", ".xlsx", ".xls"):
            raise T2IError(f"Expected a prompt or a file ending in .txt, {', '.join(TABLES)} but got {source}.")
        if not str(source).strip():
            raise T2IError("Expected a prompt but got an empty text.")
        if _is_path(path):
            raise T2IError(f"Expected a prompt or a file ending in .txt, {', '.join(TABLES)} but got {source}.")
        try:
            str(source).encode()
        except UnicodeEncodeError as error:
            raise T2IError(f"Expected the prompt to be UTF-8 text but got {source!r}.") from error
        return Prompts((str(source),))
    if path.suffix.lower() == ".txt":
        lines = read_text(path).splitlines()
        table = Prompts(tuple(line.strip() for line in lines if line.strip()))
    else:
        rows = list(stream_table(path))
        names = dict.fromkeys(name for row in rows for name in row)
        if BEYOND in names:
            number = next(number for number, row in enumerate(rows, start=1) if BEYOND in row)
            raise T2IError(f"Row {number} of {path} has more cells than the header: put texts with commas in quotes.")
        column = find_column(names, PROMPT_COLUMNS)
        if column is None and rows:
            known = " or ".join(PROMPT_COLUMNS)
            raise T2IError(f"Expected {path} to have a column {known} but it has {', '.join(names)}.")
        columns = {name: tuple(row.get(name) for row in rows) for name in names if name != column}
        table = Prompts(tuple(str(row.get(column or "") or "") for row in rows), columns)
    if not len(table):
        raise T2IError(f"The file {path} has no prompts.")
    return table


def _is_path(path: Path) -> bool:
    """Whether it names a file or a path to a folder that is there; a word that a folder is called by is a prompt."""
    try:
        return path.is_file() or (path.is_dir() and (len(path.parts) != 1 or str(path) == ".."))
    except (OSError, ValueError):
        return False


def read_prompt_file(path: str | Path) -> Prompts:
    """As `read_prompts`, where a file is meant.

    Raises:
        T2IError: no such file, not one of prompts, or empty.
    """
    if not Path(path).is_file():
        raise T2IError(f"No such file of prompts: {path}, seen from {Path.cwd()}.")
    if Path(path).suffix.lower() not in (".txt", *TABLES):
        raise T2IError(f"Expected a file of prompts ending in .txt, {', '.join(TABLES)} but got {path}.")
    return read_prompts(path)


def negatives(prompts: Prompts, general: str | None, accepted: Collection[str]) -> list[str | None] | None:
    """What each image should not show: the column `negative_prompt`, and where that is empty the general one.

    None where the table has no such column, or nothing in it. Of the rows, None is the pipeline's default; a pipeline
    that `accepted` `true_cfg_scale` guides no batch in which it is missing, so that an empty text takes its place.
    """
    own = prompts.columns.get(NEGATIVE)
    if own is None or not any(own):
        return None
    blank = "" if general is None and "true_cfg_scale" in accepted else general
    return [str(text) if text else blank for text in own]


def occurrences(prompts: Prompts) -> list[int]:
    """For each row, how many earlier rows have the same text."""
    seen: dict[str, int] = {}
    counts = []
    for text in prompts.text:
        counts.append(seen.get(text, 0))
        seen[text] = counts[-1] + 1
    return counts


def find_column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The column whose name is the first of `wanted` that there is, in capitals or not."""
    every = list(names)
    known = {name.lower(): name for name in reversed(every)} | {name: name for name in every}
    return next((known[name] for name in wanted if name in known), None)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Raises T2IError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise T2IError(f"No such file: {path}.") from error
    except UnicodeDecodeError as error:
        raise T2IError(f"The file {path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise T2IError(f"Cannot read {path}: {error.strerror}.") from error
