"""`t2i-align demo`: six prompts, base images against best-of-8, as a page with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option


def demo(
    out: Annotated[Path, Option(help="Folder for report.html and the images.")] = Path("demo"),
    seed: Annotated[int, Option(help="Names the images.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """See it work: generate, score, pick the best, report.

    Offline, under three minutes on two cores.
    """
    from t2i_align.pipelines.loading import find_pipeline

    find_pipeline("tiny-sd")
    from t2i_align.cli.tables import print_table
    from t2i_align.demo import run_demo

    rows, cost = run_demo(out, seed, overwrite=overwrite)
    print_table([{name: row[name] for name in ("prompt", "base", "mean", "best")} for row in rows])
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("base", "mean", "best")}
    print(
        f"mean gold reward: {means['base']:.2f} for the first image, {means['best']:.2f} for the best of "
        f"{len(rows[0]['images'])}; cost: {cost['images']} images, {cost['seconds']:.1f} s"
    )
    print(f"open {out / 'report.html'}")
