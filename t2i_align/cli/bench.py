"""`t2i-align bench`: what methods do at equal cost, in resumable cells."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option, Typer

from t2i_align.cli.tables import print_json, print_table

bench = Typer(help="Benches on the playground: resumable cells, tables, pages.", rich_markup_mode=None)


@bench.callback(invoke_without_command=True)
def top(context: Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command()
def steering(
    out: Annotated[Path, Option(help="Folder of the cells.")] = Path("benchmarks/results/steering"),
    only: Annotated[str, Option(help="Regular expression: cells whose names it is found in.")] = "",
    proxy: Annotated[str, Option(help="The learned reward.")] = "tiny_pick",
    prompts: Annotated[int, Option(min=2, help="Held-out prompts.")] = 32,
    seeds: Annotated[int, Option(min=1, help="Runs of each prompt.")] = 3,
    docs: Annotated[Path | None, Option(help="Markdown file whose generated part is written.")] = None,
    listing: Annotated[bool, Option("--list", help="List the cells and which are done, and exit.")] = False,
) -> None:
    """Steering methods at 8 and 16 times the cost of a plain sample, judged by gold and proxy."""
    from t2i_align.bench.steering import Bench, cells
    from t2i_align.errors import T2IError
    from t2i_align.pipelines.catalog import check_pipeline
    from t2i_align.pipelines.models import PipelineError
    from t2i_align.rewards import check_reward

    check_reward(proxy)
    wanted = chosen(cells(proxy), only)
    if listing:
        for cell in wanted:
            print(f"{'done' if (out / cell.name / 'result.json').is_file() else 'to do'}  {cell.name}")
        return
    work, results = Bench(out, proxy, prompts, seeds), []
    for number, cell in enumerate(wanted, start=1):
        try:
            check_pipeline(cell.pipeline)
        except PipelineError as error:
            print(f"[{number}/{len(wanted)}] {cell.name} is skipped: {error}", file=sys.stderr, flush=True)
            continue
        print(f"[{number}/{len(wanted)}] {cell.name}", file=sys.stderr, flush=True)
        results.append(work.run(cell))
    if not results:
        raise T2IError("None of the cells could be run.")
    from t2i_align.bench.steering_report import write_pages

    for line in write_pages(out, results, docs):
        print(line)
    print_json({"cells": len(results), "page": str(out / "steering.html")})


def chosen(every: Sequence[Any], only: str, words: Sequence[str] | None = None, label: str = "") -> list[Any]:
    """The cells whose names a regular expression is found in.

    Raises:
        T2IError: there are none, or other settings have no label.
    """
    from t2i_align.errors import T2IError

    if words and not label:
        raise T2IError("Expected a --label for other settings: its results are kept apart from the bench's own.")
    found = [cell for cell in every if re.search(only, cell.name)]
    if not found:
        raise T2IError(f"Expected --only to fit one of {', '.join(cell.name for cell in every)}.")
    return found


@bench.command()
def training(
    words: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Other settings to try, under a --label.")
    ] = None,
    out: Annotated[Path, Option(help="Folder of the results.")] = Path("benchmarks/results/training"),
    work: Annotated[Path, Option(help="Folder of the runs.")] = Path("runs/bench-training"),
    only: Annotated[str, Option(help="Regular expression: cells whose names it is found in.")] = "",
    minutes: Annotated[float, Option(min=0, help="Of this call; a run that is not done goes on in the next.")] = 20.0,
    images: Annotated[
        int | None, Option(min=1, help="Drawn by each run on gold and on the proxy.", show_default="the bench's own")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Runs of each method.")] = 3,
    prompts: Annotated[int, Option(min=2, help="Of each split, to judge the results on.")] = 200,
    label: Annotated[str, Option(help="Name of a try with other settings or images, kept apart in OUT/tuning.")] = "",
    docs: Annotated[Path | None, Option(help="Markdown file whose generated part is written.")] = None,
    listing: Annotated[bool, Option("--list", help="List the cells and how far they are, and exit.")] = False,
) -> None:
    """Training methods at an equal number of images, judged by gold and proxy against the base."""
    from dataclasses import replace

    from t2i_align.bench.recipes import IMAGES
    from t2i_align.bench.training import Bench, cells

    images = images or IMAGES
    every = cells(images, seeds)
    if label:  # the same number of images for all tries, also where the reward has its own
        every = [replace(cell, images=images, label=label, words=tuple(words or ())) for cell in every]
    wanted, run = chosen(every, only, words, label), Bench(out, work, prompts, minutes)
    if listing:
        print("\n".join(f"{run.progress(cell)}  {cell.name}" for cell in wanted))
        return
    results = run.all_of(wanted)

    from t2i_align.bench.training_report import tuning_rows, write_pages

    if label:
        for row in tuning_rows(results, run.base()) if results else ():
            print_json(row)
        return
    done = run.done(every)
    if done:
        for line in write_pages(out, done, run.base(), docs):
            print(line)
    print_json({"cells": len(done), "page": str(out / "training.html") if done else None})


@bench.command()
def hacking(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Folders of finished training runs.")],
    gold: Annotated[str, Option(help="A scorer that the runs watched and did not train on.")] = "verifier",
    out: Annotated[Path | None, Option(help="Picture of gold and proxy over sqrt(KL).")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """How training runs over-optimise their reward: gold over sqrt(KL), fitted after Gao et al."""
    from t2i_align.bench.hacking import number, plot_runs, read_run

    found = [read_run(run, gold) for run in runs]
    if out is not None:
        plot_runs(found, out)
    rows = [run.row() for run in found]
    if as_json:
        print_json(rows)
        return
    print_table([{k: v if isinstance(v, str) else number(v) for k, v in row.items()} for row in rows])


@bench.command()
def hacking_study(
    words: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Other settings to try, under a --label.")
    ] = None,
    out: Annotated[Path, Option(help="Folder of the results.")] = Path("benchmarks/results/hacking"),
    work: Annotated[Path, Option(help="Folder of the runs.")] = Path("runs/bench-hacking"),
    only: Annotated[str, Option(help="Regular expression: cells whose names it is found in.")] = "",
    minutes: Annotated[float, Option(min=0, help="Of this call; a run that is not done goes on in the next.")] = 20.0,
    images: Annotated[int | None, Option(min=1, help="Drawn by each run.", show_default="the study's own")] = None,
    seeds: Annotated[int, Option(min=1, help="Runs of each guard.")] = 3,
    prompts: Annotated[int, Option(min=2, help="Held-out ones, to judge the kept weights on.")] = 200,
    method: Annotated[str, Option(help="What is trained with: draft or grpo.")] = "draft",
    label: Annotated[str, Option(help="Name of a try with other settings, kept apart in OUT/tuning.")] = "",
    docs: Annotated[Path | None, Option(help="Markdown file whose generated part is written.")] = None,
    listing: Annotated[bool, Option("--list", help="List the cells and how far they are, and exit.")] = False,
) -> None:
    """Training far past the optimum of a learned reward, with and without guards: gold, proxy and KL on the way."""
    from dataclasses import replace

    from t2i_align.bench.hacking_report import path_rows, write_pages
    from t2i_align.bench.hacking_study import BASES, IMAGES, Study, cells
    from t2i_align.errors import T2IError

    if method not in BASES:
        raise T2IError(f"Expected --method to be one of {', '.join(BASES)} but got {method!r}.")
    every = [replace(cell, label=label, words=tuple(words or ())) for cell in cells(images or IMAGES, seeds, method)]
    wanted, run = chosen(every, only, words, label), Study(out, work, prompts, minutes)
    if listing:
        print("\n".join(f"{run.progress(cell)}  {cell.name}" for cell in wanted))
        return
    results = run.all_of(wanted)
    if label:
        for row in (row for result in results for row in path_rows(result)):
            print_json(row)
        return
    done = run.done(every)
    if done:
        for line in write_pages(out, done, run.base(), docs):
            print(line)
    print_json({"cells": len(done), "curves": str(out / "curves.png") if done else None})


@bench.command()
def values(
    run: Annotated[Path, Argument(help="Folder of a finished vard run.")],
    prompts: Annotated[
        int, Option(min=2, help="Held-out prompts, as many images of each as the run's group has.")
    ] = 64,
    docs: Annotated[Path | None, Option(help="Markdown file whose generated part is written.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Whether a value function is right: its predictions of half-made images against their final rewards."""
    from t2i_align.bench.values import predict, write_pages

    rows = write_pages(run, predict(run, prompts), docs)
    if as_json:
        print_json(rows)
        return
    print_table(rows)
