"""`t2i-align train`: a config -> a trained LoRA, with everything that was measured on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


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
) -> None:
    """Train a pipeline on a reward.

    Several processes share the work under `accelerate launch -m t2i_align train ...` or `torchrun -m t2i_align ...`.
    """
    from t2i_align.training.blocks import load_run

    run = load_run(config, overrides or [])

    from t2i_align.training.distributed import ALONE, World
    from t2i_align.training.run import LORA, MODEL, make_parts
    from t2i_align.training.run import train as start

    if dry_run:
        from t2i_align.cli.tables import print_table
        from t2i_align.training.plan import make_plan

        plan = make_plan(make_parts(run, ALONE))
        if as_json:
            print(json.dumps(plan._asdict() | {"memory": plan.memory._asdict(), "hours": plan.hours}))
        else:
            print_table(plan.rows())
        return
    done = start(run, resume=resume, overwrite=overwrite, minutes=minutes)
    if not World.join().first:
        return
    kept = {name: value for name, value in done.kept.items() if name != "scores"}
    if as_json:
        print(json.dumps({"folder": str(done.folder), "step": done.step, "kept": kept}))
        return
    result = done.folder / (LORA if run.policy.use == "lora" else MODEL)
    print(f"{done.step} updates; the weights of step {kept['step']} are in {result}")
    print(f"open {done.folder / 'README.md'} for the scores before and after")
