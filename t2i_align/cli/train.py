"""`t2i-align train`: a config -> a trained LoRA, or a trained scorer, with everything that was measured on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from t2i_align.cli.tables import print_json, print_settings, print_table


def list_settings(method: str | None) -> None:
    if method is None:
        return
    from t2i_align.methods import read_method

    print_settings(type(read_method({"use": method})[1]))
    raise Exit


def train(
    config: Annotated[Path, Argument(help="YAML file of the run; see configs/.")],
    overrides: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.steps=50 or out=runs/x.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print network calls, memory and hours of the run, and train nothing.")
    ] = False,
    minutes: Annotated[
        float | None, Option(min=0, help="Stop after this much training time; --resume goes on.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing run.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
    settings: Annotated[
        str | None,
        Option(
            metavar="METHOD", is_eager=True, callback=list_settings, help="List the settings of a method, and exit."
        ),
    ] = None,
) -> None:
    """Train a pipeline on a reward, or, by a config with the block `scorer`, a scorer on preferences or scores.

    Several processes share the work under `accelerate launch -m t2i_align train ...` or `torchrun -m t2i_align ...`.
    """
    from t2i_align.scorer_training.blocks import is_scorer_run

    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "minutes": minutes}
    if is_scorer_run(config, overrides or []):
        _train_scorer(config, overrides or [], dry_run, as_json, options)
        return
    from t2i_align.training.blocks import load_run

    run = load_run(config, overrides or [])

    from t2i_align.training.distributed import ALONE, World
    from t2i_align.training.run import make_parts
    from t2i_align.training.run import train as start

    if dry_run:
        from t2i_align.training.plan import make_plan

        plan = make_plan(make_parts(run, ALONE))
        if as_json:
            print_json(plan._asdict() | {"memory": plan.memory._asdict(), "hours": plan.hours})
        else:
            print_table(plan.rows())
        return
    done = start(run, **options)
    if not World.join().first:
        return
    kept = {name: value for name, value in done.kept.items() if name != "scores"}
    if as_json:
        said = {"folder": str(done.folder), "step": done.step, "kept_step": done.kept_step, "kept": kept}
        print_json(said | {"note": done.note})
        return
    if done.note:
        print(done.note)
    print(f"updates made: {done.step}; the weights of step {done.kept_step} are in {done.weights}")
    print(f"open {done.folder / 'README.md'} for the scores before and after")


def _train_scorer(config: Path, overrides: list[str], dry_run: bool, as_json: bool, options: dict[str, Any]) -> None:
    from t2i_align.scorer_training.blocks import load_scorer_run

    run = load_scorer_run(config, overrides)

    from t2i_align.rewards.trained import RUN
    from t2i_align.scorer_training.run import make_plan, train_scorer

    if dry_run:
        plan = make_plan(run)
        if as_json:
            print_json(plan)
        else:
            print_table([{"what": name, "value": text} for name, text in plan.items()])
        return
    done = train_scorer(run, **options)
    if as_json:
        print_json(done._asdict() | {"folder": str(done.folder)})
        return
    if not done.finished:
        print(f"stopped at step {done.step} of {run.train.steps} in {done.folder}; --resume goes on")
        return
    print_table([{"scorer": name, **row} for name, row in done.measured.items()])
    print(f"{done.step} updates; load_reward({str(done.folder / RUN)!r}) opens the scorer")
    print(f"open {done.folder / 'README.md'} for the numbers before and after")
