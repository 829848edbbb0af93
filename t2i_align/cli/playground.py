"""`t2i-align playground`: the embedded world, its trainings and its measurements."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option, Typer

from t2i_align.cli.tables import print_json, print_table

playground = Typer(help="The embedded world: scenes, trainings, measurements.", rich_markup_mode=None)


@playground.callback(invoke_without_command=True)
def top(context: Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


class Split(str, Enum):
    train = "train"
    heldout = "heldout"


class Part(str, Enum):
    vae = "vae"
    sd = "sd"
    clip = "clip"
    pick = "pick"
    turbo = "turbo"


MEASURED = {Part.vae: 400, Part.sd: 500, Part.clip: 120, Part.pick: 120, Part.turbo: 500}  # scenes, prompts


@playground.command()
def sample(
    out: Annotated[Path, Option(help="Folder for PNGs and prompts.jsonl.")],
    n: Annotated[int, Option("--n", min=1, help="Scenes.")] = 100,
    split: Annotated[
        Split, Option(help="train, or heldout: captions with combinations never trained on.")
    ] = Split.train,
    seed: Annotated[int, Option(help="Names the data set.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing folder of ours.")] = False,
) -> None:
    """Draw scenes with their captions."""
    from t2i_align.playground.sampling import SampleJob, run_sample

    run_sample(SampleJob(n=n, split=split.value, seed=seed), out, overwrite=overwrite)
    print(f"{n} {split.value} scenes in {out}")


@playground.command()
def train(
    part: Annotated[
        Part,
        Argument(
            help="vae: the autoencoder; sd: text encoder and UNet; clip: tiny_clip; pick: tiny_pick, on tiny-sd's "
            "pictures; turbo: tiny-turbo, from tiny-sd."
        ),
    ],
    out: Annotated[Path, Option(help="Run folder.")],
    overrides: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Recipe overrides, e.g. train.steps=500.")
    ] = None,
    config: Annotated[Path | None, Option(help="YAML file with changes to the recipe.")] = None,
    vae: Annotated[
        Path | None, Option(help="For sd and clip: folder of a trained autoencoder. [default: the shipped one]")
    ] = None,
    clip: Annotated[
        Path | None, Option(help="For pick: folder of a trained tiny_clip. [default: the shipped one]")
    ] = None,
    minutes: Annotated[
        float | None, Option(min=0, help="Stop after this much training time; --resume goes on.")
    ] = None,
    measure: Annotated[
        int | None,
        Option(
            min=0,
            help="Prompts to measure on (sd, turbo: per split; clip, pick: held-out ones), for vae scenes; 0 for none. "
            "[default: 500; clip, pick: 120; vae: 400]",
        ),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing run.")] = False,
) -> None:
    """Train a part of the playground from scratch, by its fixed-seed recipe."""
    from t2i_align.pipelines.loading import find_pipeline
    from t2i_align.playground import training
    from t2i_align.rewards.tiny import CLIP_FOLDER

    job = training.Job(out, config, overrides or [], minutes, resume, overwrite)
    prompts = MEASURED[part] if measure is None else measure
    if part is Part.vae:
        training.run_vae(job, prompts)
    elif part is Part.sd:
        training.run_sd(job, vae or find_pipeline("tiny-sd") / "vae", prompts)
    elif part is Part.clip:
        training.run_clip(job, vae or find_pipeline("tiny-sd") / "vae", prompts)
    elif part is Part.pick:
        training.run_pick(job, clip or CLIP_FOLDER, prompts)
    else:
        training.run_turbo(job, prompts)
    made = out / ("vae" if part is Part.vae else f"tiny-{part.value}")
    print(f"the trained weights are in {made}" if made.is_dir() else "stopped before the end; --resume goes on")


@playground.command()
def measure(
    pipeline: Annotated[str, Option(help="Alias or folder of a diffusers pipeline.")] = "tiny-sd",
    prompts: Annotated[int, Option(min=1, help="Prompts per split, one image each.")] = 500,
    steps: Annotated[int | None, Option(min=1, help="Denoising steps. [default: the pipeline's own]")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale. [default: the pipeline's own]")] = None,
    grids: Annotated[Path | None, Option(help="Folder for a picture grid per split.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a pipeline by the verifier: mean gold reward by split and kind of prompt."""
    from t2i_align.pipelines.loading import find_pipeline

    find_pipeline(pipeline)
    from t2i_align.pipelines import call_keywords, load_pipeline
    from t2i_align.playground.measure import measure_pipeline

    if grids is not None:
        grids.mkdir(parents=True, exist_ok=True)
    call = call_keywords(pipeline, steps, guidance)
    rows = measure_pipeline(load_pipeline(pipeline), prompts, grid=grids, **call)
    if as_json:
        print_json(rows, indent=2)
    else:
        print_table(rows)


@playground.command()
def verify(
    scenes: Annotated[int, Option(min=2, help="Rendered scenes, half of each split.")] = 5000,
    noise: Annotated[float, Option(min=0, help="Standard deviation of added noise, in 1/255.")] = 0.0,
    vae: Annotated[
        str | None, Option(help="Round trip through the autoencoder of this pipeline (alias or folder).")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the verifier itself on scenes whose facts are known."""
    from t2i_align.pipelines.loading import find_pipeline, load_pipeline
    from t2i_align.playground import measure as measuring

    change = measuring.noise(noise) if noise else None
    if vae is not None:
        find_pipeline(vae)
        change = measuring.round_trip(load_pipeline(vae).vae, change)
    table = measuring.measure_verifier(scenes, change=change)
    if as_json:
        print_json(table, indent=2)
    else:
        print_table(
            [
                {"fact": sort, **{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}}
                for sort, row in table.items()
            ]
        )
