"""The batch job: rows in, one table out, the same whether or not it was interrupted, by any number of processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from t2i_align.data.tables import blocks, replace_safely, write_beside
from t2i_align.errors import T2IError
from t2i_align.progress import Progress
from t2i_align.rewards import Scorer
from t2i_align.runs import environment
from t2i_align.scoring.batch import Dtype, Scoring, batches
from t2i_align.scoring.decode import Decoder
from t2i_align.scoring.inputs import Row, Survey, path_from, survey
from t2i_align.scoring.parts import Parts, Writer, create, discard, is_unfinished
from t2i_align.scoring.processes import Processes

OUTPUTS = (".parquet", ".csv", ".jsonl")
CHUNK_BATCHES = 4  # batches saved together, and within which rows of one prompt are brought together
MAX_PIXELS = 89_478_485  # Pillow's own limit
ROWS, FILES = "images, prompts or columns", "sizes or times of image files"

Job = dict[str, Any]  # all that decides the table


@dataclass(frozen=True)
class Outcome:
    """What a job did: rows in the table, images scored now by all processes, seconds, and those this process waited."""

    rows: int
    scored: int = 0
    seconds: float = 0.0
    waited: float = 0.0


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
    unfinished = is_unfinished(_partial(out))
    if out.exists() and not (overwrite or resume):
        raise T2IError(f"{out} already exists; pass --overwrite to replace it or choose another name.")
    if unfinished and not (resume or overwrite):
        raise T2IError(
            f"{_partial(out)} holds an unfinished job; pass --resume to go on or --overwrite to start again."
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _record(out: Path) -> Path:
    return out.with_name(out.stem + ".config.yaml")


def score_file(
    rows: Iterable[Row],
    scorers: Sequence[Scorer],
    out: str | Path,
    *,
    settings: dict[str, Any],
    seen: Survey | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    device: torch.device | str = "cpu",
    dtype: Dtype = "fp32",
    explain: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> Outcome:
    """Score `rows` into the file `out`.

    Finished chunks of `CHUNK_BATCHES` batches go to the folder `OUT.partial` at once; the file itself appears when all
    is done. A row that cannot be read or scored has null for what is missing and the reason in its `error` column.
    Chunks are scored independently of each other, so the table does not depend on interruptions or on processes.

    Args:
        rows: gone through twice, so no iterator.
        scorers: on `device`.
        out: a `.parquet`, `.csv` or `.jsonl` file.
        settings: written to `STEM.config.yaml` with the table's name; the keys `rewards` and, if given, `base` decide
            the scores.
        seen: the survey of the rows, if it was made.
        batch_size: images scored together at most.
        workers: decoding threads; by default one per core, at most 8.
        max_pixels: larger images are refused before they are decoded.
        device: where the scorers are.
        dtype: "bf16" for matrix products in bfloat16.
        explain: add columns of reasons.
        resume: go on with an interrupted job; nothing is done where it is finished.
        overwrite: replace an existing table or job.
        processes: this one among those of the job.

    Raises:
        T2IError: `out` has an unknown ending, exists, or (`resume`) belongs to another job; the rows changed.
    """
    out, team, rows_seen = Path(out), processes or Processes(), seen or survey(rows, out)
    scoring = Scoring(scorers, torch.device(device), dtype, explain)
    decisive = {
        "rewards": settings["rewards"],
        "base": settings.get("base"),
        "explain": explain,
        "dtype": dtype,
        "max_pixels": max_pixels,
        ROWS: rows_seen.digest,
        FILES: rows_seen.files,
    }
    job: Job = json.loads(json.dumps(decisive))  # as it is read back

    def prepare() -> None:
        check_output(out, settings.get("input", ""), resume=resume, overwrite=overwrite)
        if _finished(out, job, resume):
            discard(_partial(out))  # what a kill may have left of it
        else:
            _begin(out, job, CHUNK_BATCHES * batch_size, resume)

    team.once(prepare)
    if not is_unfinished(_partial(out)):
        return Outcome(rows_seen.rows)
    parts = Parts(_partial(out))
    decoder = Decoder(workers, 2 * batch_size, max_pixels)
    started, before = time.perf_counter(), len(parts)
    with Writer(parts, team.rank) as writer, scoring.precision(), _pillow_without_limit():
        _score_chunks(rows, out, parts, writer, scoring, decoder, batch_size, rows_seen.rows, team)
    scored = team.sum(len(parts) - before)
    done = Outcome(rows_seen.rows, scored, time.perf_counter() - started, decoder.waited)
    team.once(lambda: _finish(out, job, settings, rows_seen.rows))
    return done


def _finished(out: Path, job: Job, resume: bool) -> bool:
    """Whether there is nothing left to do. Raises T2IError where the table is another job's."""
    if not resume or is_unfinished(_partial(out)) or not out.exists():
        return False
    record = _record(out)
    written = yaml.safe_load(record.read_text(encoding="utf-8")) if record.is_file() else None
    written = written if isinstance(written, dict) else {}
    table = written.get("table")
    if table == out.name and written["job"] == job:
        return True
    if table is None:
        why = f"{record.name} does not say so"
    elif table != out.name:
        why = f"{record.name} is the record of {table}"
    else:
        why = f"that one has other {_differences(written['job'], job)}"
    raise T2IError(
        f"{out} already exists and is not known to be the table of this job: {why}; pass --overwrite to replace it or "
        "choose another name."
    )


def _begin(out: Path, job: Job, chunk: int, resume: bool) -> None:
    partial = _partial(out)
    if resume and is_unfinished(partial):
        before = Parts(partial).job
        if before != job:
            raise T2IError(
                f"{partial} belongs to a job with other {_differences(before, job)}; resume it with its own, or pass "
                "--overwrite to replace it."
            )
        return
    create(partial, job, chunk)


def _differences(before: Any, job: Job) -> str:
    """What decides the table otherwise than before, with the settings of then."""
    known = before if isinstance(before, dict) else {}  # an older version kept a digest alone
    names = [name for name, value in job.items() if name not in known or known[name] != value]
    return ", ".join(
        name if name in (ROWS, FILES) or name not in known else f"{name} ({json.dumps(known[name])})" for name in names
    )


def _score_chunks(
    rows: Iterable[Row],
    out: Path,
    parts: Parts,
    writer: Writer,
    scoring: Scoring,
    decoder: Decoder,
    batch_size: int,
    total: int,
    processes: Processes,
) -> None:
    """Score the chunks that are this process's and not done yet."""
    sizes = {at: min(parts.chunk, total - first) for at, first in enumerate(range(0, total, parts.chunk))}
    mine = {at: size for at, size in sizes.items() if at % processes.count == processes.rank}
    started, scored = time.perf_counter(), 0
    label = "scoring images" + (f" ({processes.rank + 1} of {processes.count})" if processes.count > 1 else "")
    progress = Progress(sum(mine.values()), label, start=sum(mine[at] for at in parts.done if at in mine))
    # Closed at once when something is raised, and not when the exception is forgotten: its threads would wait so long.
    with progress, closing(decoder(_todo(rows, parts, processes))) as decoded:
        for number, items in groupby(decoded, key=lambda item: item[0][0]):
            scoring.forget()  # a chunk's scores are to the last bit what they are without the chunks before it
            table: dict[int, dict[str, Any]] = {}
            for batch in batches(items, batch_size):
                places = [tag[1] for tag, _ in batch]
                table |= zip(places, scoring([item for _, item in batch]), strict=True)
                scored += len(batch)
                rate = {"images/s": scored / (time.perf_counter() - started)} if progress.bar else {}  # lines have it
                progress.advance(len(batch), **rate)
            made = [table[place] for place in sorted(table)]
            for row in made:
                row["image"] = path_from(out, Path(row["image"]))
            writer.add(number, made)


def _todo(rows: Iterable[Row], parts: Parts, processes: Processes) -> Iterator[tuple[tuple[int, int], Row]]:
    """`((chunk, place), row)`; within a chunk, rows of one prompt stand together, so that its text is encoded once."""
    for number, chunk in enumerate(blocks(rows, parts.chunk)):
        if number % processes.count == processes.rank and number not in parts.done:
            first: dict[str | None, int] = {}
            for row in chunk:
                first.setdefault(row.prompt, len(first))
            order = sorted(enumerate(chunk), key=lambda pair: first[pair[1].prompt])
            yield from (((number, place), row) for place, row in order)


def _finish(out: Path, job: Job, settings: dict[str, Any], total: int) -> None:
    """Merge the parts into the table; a kill between any two steps leaves what `--resume` can finish."""
    parts = Parts(_partial(out))
    if len(parts) != total:
        raise T2IError(f"Expected {total} rows but scored {len(parts)}: the input changed meanwhile; start again.")
    written = write_beside(parts, out)
    out.unlink(missing_ok=True)  # an older table must never stand beside this job's record
    _write_durably(_record(out), yaml.safe_dump({**settings, "table": out.name, "job": job}, sort_keys=False))
    _write_durably(out.with_name(out.stem + ".environment.json"), json.dumps(environment(), indent=2) + "\n")
    replace_safely(written, out)
    discard(_partial(out))


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    replace_safely(temporary, path)


@contextmanager
def _pillow_without_limit() -> Iterator[None]:
    """Our own limit stands in for Pillow's, which warns and is one for the whole process."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
