"""`t2i-align score`: a folder or table of images -> a table of scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from t2i_align.cli.tables import print_json

if TYPE_CHECKING:
    from t2i_align.scoring.views import Summary

SOURCE = (
    "Folder of images, output folder of `generate`, .jsonl, .json, .csv, .tsv or .parquet table, tar shards or parquet "
    "files with images inside (one, a folder of them, or 'x-{000..010}.tar'), or a folder in the layout of GenEval, "
    "HPSv2 or T2I-CompBench."
)


def score(
    source: Annotated[str, Argument(metavar="INPUT", help=SOURCE)],
    rewards: Annotated[str, Option(help="Scorers or sums of scorers, separated by commas.")],
    out: Annotated[Path, Option(help="Table to write: .parquet, .csv or .jsonl.")],
    prompt: Annotated[str | None, Option(help="Prompt for rows without one.")] = None,
    layout: Annotated[str, Option(help="auto, folder, geneval, hpsv2, compbench, webdataset or parquet.")] = "auto",
    prompts: Annotated[str | None, Option(help="For hpsv2: folder of STYLE.json, or a JSON file of styles.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images scored together.")] = 64,
    workers: Annotated[int, Option(min=0, help="Decoding threads; 0: one per core, at most 8.")] = 0,
    max_pixels: Annotated[int, Option(min=1, help="Larger images are refused unread.")] = 89_478_485,
    base: Annotated[str | None, Option(help="Pipeline whose calibration `calibrated(...)` and the like use.")] = None,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    dtype: Annotated[str, Option(help="fp32; bf16 computes matrix products in bfloat16.")] = "fp32",
    explain: Annotated[bool, Option("--explain", help="Add a column of reasons, from scorers that have any.")] = False,
    by: Annotated[str, Option(help="Score column for the three options below; the first by default.")] = "",
    gallery: Annotated[Path | None, Option(help="Write an .html page: histograms, best and worst images.")] = None,
    top_k: Annotated[int, Option(min=0, help="Write the K best rows of each prompt to STEM.top.SUFFIX.")] = 0,
    pairs: Annotated[Path | None, Option(help="Write best and worst of each prompt as .jsonl pairs.")] = None,
    min_gap: Annotated[float, Option(min=0.0, help="Least score difference of a pair.")] = 0.0,
    limit: Annotated[int, Option(min=2, help="Images in each part of the gallery.")] = 100,
    as_json: Annotated[bool, Option("--json", help="Print the summary as JSON.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with an interrupted job.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing table.")] = False,
) -> None:
    """Score images with rewards.

    Rows that fail are reported; the exit code is then 3. Several processes share the work under `accelerate launch -m
    t2i_align score ...`.
    """
    from t2i_align.cli.main import ROWS_FAILED
    from t2i_align.rewards import check_reward, load_reward, split_rewards

    specs = split_rewards(rewards)
    for spec in specs:
        check_reward(spec)

    from t2i_align.devices import resolve_device
    from t2i_align.errors import T2IError
    from t2i_align.scoring import Processes, check_dtype, check_output, open_rows, score_columns, score_file, survey

    if not specs or len(set(specs)) < len(specs):
        raise T2IError(f"Expected different scorers separated by commas but got {rewards!r}.")
    check_dtype(dtype)
    processes = Processes.from_environment()
    top = out.with_name(f"{out.stem}.top{out.suffix}") if top_k else None
    if processes.first:
        check_output(out, source, resume=resume, overwrite=overwrite)
        _check_views([(gallery, ".html"), (pairs, ".jsonl"), (top, out.suffix)], replace=resume or overwrite)
    rows = open_rows(source, prompt, layout=layout, prompts=prompts)
    if processes.first:
        files = {"the input": rows.table or Path(source), "--out": out, "the table of --top-k": top}
        _check_apart(files | {"--pairs": pairs, "--gallery": gallery})
    seen = survey(rows, out)
    if rows.layout not in ("folder", "table") and processes.first:
        print(f"note: {source} is read in the layout {rows.layout!r}", file=sys.stderr)
    place = resolve_device(device)
    if place.type == "cuda" and place.index is None and processes.count > 1:
        place = resolve_device(f"cuda:{processes.local}")
    scorers = [load_reward(spec, place, base) for spec in specs]
    blind = [scorer.name for scorer in scorers if scorer.needs_prompt and not seen.prompted]
    if blind:
        raise T2IError(
            f"{', '.join(blind)} reads the prompt but {source} has none: add a prompt column or pass --prompt."
        )
    columns = score_columns(scorers)
    by = by or scorers[0].name
    if by not in columns:
        raise T2IError(f"Expected --by to be one of {', '.join(columns)} but got {by!r}.")
    settings: dict[str, Any] = {"input": source, "rewards": specs, "prompt": prompt, "layout": rows.layout}
    settings |= {
        "prompts": prompts,
        "base": base,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "explain": explain,
    }
    outcome = score_file(
        rows,
        scorers,
        out,
        settings=settings | {"max_pixels": max_pixels},
        seen=seen,
        batch_size=batch_size,
        workers=workers or None,
        max_pixels=max_pixels,
        device=place,
        dtype=dtype,  # type: ignore[arg-type]
        explain=explain,
        resume=resume,
        overwrite=overwrite,
        processes=processes,
    )
    if not processes.first:
        return
    written = _write_views(out, columns, by, gallery, limit, top, top_k, pairs, min_gap)
    summary = _summary(out, columns)
    if as_json:
        numbers = {name: numbers.as_dict() for name, numbers in summary.scores.items()}
        said = {"rows": summary.rows, "failed": summary.failed, "out": str(out), "scores": numbers}
        said["failures"] = [{name: row[name] for name in ("image", "error")} for row in summary.failures]
        print_json(said | {"scored": outcome.scored, "seconds": outcome.seconds, "waited": outcome.waited})
    else:
        _print(summary, out, outcome, written)
    if summary.failed:
        raise Exit(ROWS_FAILED)


def _check_views(files: list[tuple[Path | None, str]], replace: bool) -> None:
    from t2i_align.errors import T2IError

    for path, suffix in files:
        if path is not None and path.suffix.lower() != suffix.lower():
            raise T2IError(f"Expected a file ending in {suffix} but got {path}.")
        if path is not None and path.exists() and not replace:
            raise T2IError(f"{path} already exists; pass --overwrite to replace it or choose another name.")


def _check_apart(files: dict[str, Path | None]) -> None:
    """Refuse two of these that are one file: the later one would replace the earlier."""
    from t2i_align.errors import T2IError

    names: dict[Path, str] = {}
    for name, path in files.items():
        if path is not None and (other := names.setdefault(path.resolve(), name)) != name:
            raise T2IError(f"Expected {other} and {name} to be two files but both are {path}.")


def _write_views(
    out: Path,
    columns: list[str],
    by: str,
    gallery: Path | None,
    limit: int,
    top: Path | None,
    top_k: int,
    pairs: Path | None,
    min_gap: float,
) -> list[str]:
    """Write what was asked for beside the table; a line to print about each."""
    from functools import partial

    from t2i_align.scoring.gallery import write_gallery
    from t2i_align.scoring.views import read_scored, write_pairs, write_top

    read = partial(read_scored, out, columns)
    said = []
    for path in (gallery, pairs):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if top is not None:
        said.append(f"{write_top(read(), top, by, top_k)} best rows in {top}")
    if pairs is not None:
        said.append(f"{write_pairs(read(), pairs, by, out, min_gap)} pairs in {pairs}")
    if gallery is not None:
        write_gallery(read, out, gallery, columns, by, limit)
        said.append(f"gallery in {gallery}")
    return said


def _summary(out: Path, columns: list[str]) -> Summary:
    from t2i_align.scoring.views import read_scored, summarise

    return summarise(read_scored(out, columns), columns)


def _print(summary: Summary, out: Path, outcome: Any, written: list[str]) -> None:
    for name, numbers in summary.scores.items():
        print(f"{name}: " + (", ".join(f"{k} {v:.4g}" for k, v in numbers.as_dict().items()) or "no scores"))
    print(f"{summary.rows - summary.failed} of {summary.rows} rows scored, table in {out}")
    if outcome.scored:
        share = outcome.waited / max(outcome.seconds, 1e-9)
        print(f"{outcome.scored / outcome.seconds:.4g} images/s; the model waited {share:.0%} of the time for images")
    else:
        print("nothing to do: the table was finished before")
    for line in written:
        print(line)
    for row in summary.failures:
        print(f"failed: {row['image']}: {row['error']}")
    if summary.failed > len(summary.failures):
        print(f"... and {summary.failed - len(summary.failures)} more; see the column 'error'.")
