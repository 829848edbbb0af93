"""`t2i-align score`: a folder or table of images -> a table of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option


def score(
    source: Annotated[
        str,
        Argument(
            metavar="INPUT", help="Folder of images, output folder of `generate`, or a .jsonl, .csv or .parquet table."
        ),
    ],
    rewards: Annotated[str, Option(help="Scorers or sums of scorers, separated by commas.")],
    out: Annotated[Path, Option(help="Table to write: .parquet, .csv or .jsonl.")],
    prompt: Annotated[str | None, Option(help="Prompt for rows without one.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images scored together.")] = 64,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    explain: Annotated[bool, Option("--explain", help="Add a column of reasons, from scorers that have any.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the summary as JSON.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with an interrupted job.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing table.")] = False,
) -> None:
    """Score images with rewards.

    Rows that fail are reported; the exit code is then 3.
    """
    from t2i_align.cli.main import ROWS_FAILED
    from t2i_align.rewards import check_reward, load_reward

    specs = [spec.strip() for spec in rewards.split(",") if spec.strip()]
    for spec in specs:
        check_reward(spec)

    from t2i_align.devices import resolve_device
    from t2i_align.errors import T2IError
    from t2i_align.scoring import check_output, read_rows, score_columns, score_file

    if not specs or len(set(specs)) < len(specs):
        raise T2IError(f"Expected different scorers separated by commas but got {rewards!r}.")
    check_output(out, source, resume=resume, overwrite=overwrite)
    rows = read_rows(source, prompt)
    place = resolve_device(device)
    scorers = [load_reward(spec, place) for spec in specs]
    blind = [scorer.name for scorer in scorers if scorer.needs_prompt and all(row.prompt is None for row in rows)]
    if blind:
        raise T2IError(
            f"{', '.join(blind)} reads the prompt but {source} has none: add a prompt column or pass --prompt."
        )
    settings = {"input": str(source), "rewards": specs, "prompt": prompt, "batch_size": batch_size, "device": device}
    options: dict[str, Any] = {"batch_size": batch_size, "explain": explain, "resume": resume, "overwrite": overwrite}
    table = score_file(rows, scorers, out, settings=settings, **options)
    failed = [row for row in table if row["error"]]
    summary = {name: _summary([row[name] for row in table if row[name] is not None]) for name in score_columns(scorers)}
    if as_json:
        print(json.dumps({"rows": len(table), "failed": len(failed), "out": str(out), "scores": summary}))
    else:
        for name, numbers in summary.items():
            print(f"{name}: " + (", ".join(f"{k} {v:.4g}" for k, v in numbers.items()) or "no scores"))
        print(f"{len(table) - len(failed)} of {len(table)} rows scored, table in {out}")
        for row in failed[:10]:
            print(f"failed: {row['image']}: {row['error']}")
        if len(failed) > 10:
            print(f"... and {len(failed) - 10} more; see the column 'error'.")
    if failed:
        raise Exit(ROWS_FAILED)


def _summary(values: list[float]) -> dict[str, Any]:
    if not values:
        return {}
    from statistics import fmean, pstdev

    return {"mean": fmean(values), "sd": pstdev(values), "min": min(values), "max": max(values), "n": len(values)}
