"""`t2i-align rewards`: what can score an image here, calibrating it on a base model, and judging it by preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option, Typer

from t2i_align.cli.tables import print_json, print_table

rewards = Typer(help="List, describe, calibrate and judge the scorers.", rich_markup_mode=None)


@rewards.callback(invoke_without_command=True)
def top(context: Context, as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """List the scorers.

    What they need, whether gradients pass, their licence, and whether their weights are here.
    """
    if context.invoked_subcommand is not None:
        return
    from t2i_align.rewards import SCORERS, scorer_class

    rows = [_row(scorer_class(name)) for name in SCORERS]
    if as_json:
        print_json(rows, indent=2)
        return
    from t2i_align.rewards.build import FUNCTIONS

    shown = ("name", "needs", "differentiable", "unit", "license", "weights", "summary")
    print_table([{name: row[name] for name in shown} | {"weights": row["weights"].partition(":")[0]} for row in rows])
    print(f"Functions of scorers: {', '.join(FUNCTIONS)}.")
    print("`t2i-align rewards show NAME` describes any of these, and says how to get weights that are missing.")


@rewards.command()
def show(
    name: Annotated[str, Argument(help="A scorer, a function of scorers, or an expression such as 'lcb(a, b)'.")],
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a scorer or a function of scorers, with the files of its weights and their SHA-256."""
    import inspect

    from t2i_align.rewards import check_reward, load_reward, scorer_class
    from t2i_align.rewards.build import FUNCTIONS, function_class
    from t2i_align.rewards.expression import Part, read_reward

    if name in FUNCTIONS:
        found: Any = function_class(name)
        facts: dict[str, Any] = {"name": name, "options": _options(found), "summary": inspect.getdoc(found) or ""}
    elif not isinstance(node := read_reward(name), (str, Part)):
        check_reward(name)
        scorer = load_reward(name)
        members = {"parts": ", ".join(scorer.part_names()), "groupwise": "yes" if scorer.groupwise else "no"}
        facts = {**_row(scorer), **members, "weights": "present"}
    else:
        found = scorer_class(str(node))
        low, high = found.range
        about = inspect.getdoc(found) or ""
        facts = {**_row(found), "range": f"{low:g} to {high:g}", "options": _options(found), "source": found.source}
        facts |= {"files": [file.facts() for file in found.files], "summary": about}
    if as_json:
        print_json(facts, indent=2)
        return
    width = max(map(len, facts))
    for label, value in facts.items():
        first, *rest = _lines(value) or [""]
        print(f"{label.ljust(width)}  {first}".rstrip())
        for line in rest:
            print(f"{' ' * width}  {line}".rstrip())


@rewards.command()
def calibrate(
    pipeline: Annotated[str, Argument(help="Alias or folder of the base model.")],
    specs: Annotated[str, Option("--rewards", help="Scorers or expressions, separated by commas.")],
    prompts: Annotated[str, Option(help="A prompt, or a .txt, .jsonl, .json, .csv, .tsv or .parquet file.")],
    particles: Annotated[int, Option(min=2, help="Samples per prompt; 8 or more for a usable scale.")] = 16,
    seed: Annotated[int, Option(help="Names the samples.")] = 0,
    steps: Annotated[int | None, Option(min=1, help="Denoising steps. [default: the pipeline's own]")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale. [default: the pipeline's own]")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images computed together.")] = 16,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a calibration with other settings.")] = False,
) -> None:
    """Score samples of a base model, for calibrated(...), log_sigmoid(...), par(...) and limits at `base`.

    Kept under ~/.cache/t2i_align (or $T2I_ALIGN_CACHE), by content of pipeline and scorer, and by prompt; prompts that
    are there already are not sampled again.
    """
    from t2i_align.errors import T2IError
    from t2i_align.pipelines.loading import find_pipeline
    from t2i_align.prompts import read_prompts
    from t2i_align.rewards import check_reward, load_reward, split_rewards

    names = split_rewards(specs)
    if not names:
        raise T2IError(f"Expected scorers separated by commas but got {specs!r}.")
    for name in names:
        check_reward(name)
    find_pipeline(pipeline)
    table = read_prompts(prompts)

    from t2i_align.calibration import calibrate as run
    from t2i_align.devices import resolve_device

    place = resolve_device(device)
    scorers = [load_reward(name, place, base=pipeline) for name in names]
    sampling: dict[str, Any] = {"particles": particles, "seed": seed, "steps": steps, "guidance": guidance}
    references = run(pipeline, scorers, table, batch_size=batch_size, device=place, overwrite=overwrite, **sampling)
    print_table(
        [
            {
                "scorer": scorer.name,
                "prompts": len(reference.row),
                "mean": float(reference.means.mean()),
                "sd within a prompt": reference.global_sd,
                "sd between prompts": float(reference.means.std(correction=0)),
            }
            for scorer, reference in zip(scorers, references, strict=True)
        ]
    )


@rewards.command()
def evaluate(
    specs: Annotated[str, Option("--rewards", help="Scorers or expressions, separated by commas.")],
    out: Annotated[Path, Option(help="Folder for index.html and results.json.")],
    data: Annotated[
        list[str] | None,
        Option(
            "--data", help="Preferences: a .json, .jsonl, .csv, .tsv or .parquet file or a folder; may be repeated."
        ),
    ] = None,
    root: Annotated[Path | None, Option(help="Folder of the images. [default: that of the file]")] = None,
    base: Annotated[
        str, Option(help="Samples of the base model, several a prompt: a folder of `generate`, or what `score` reads.")
    ] = "",
    optimised: Annotated[
        list[str] | None, Option(help="Samples optimised for some reward, of the same prompts; may be repeated.")
    ] = None,
    best_of: Annotated[
        int, Option(min=0, help="Also the best of so many of the base's samples, by each scorer. [default: none]")
    ] = 0,
    gold: Annotated[str, Option(help="Scorer whose order of samples is taken for the truth.")] = "",
    paraphrases: Annotated[
        str, Option(help="Table of prompts in other words, beside those made by rule: columns prompt, paraphrase.")
    ] = "",
    playground: Annotated[bool, Option(help="Also scenes that are drawn, and captions with one false fact.")] = True,
    scenes: Annotated[int, Option(min=4, help="Drawn scenes.")] = 200,
    limit: Annotated[int | None, Option(min=1, help="Rankings of each set. [default: all]")] = None,
    seed: Annotated[int, Option(help="Of the drawn scenes and of the intervals.")] = 0,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the results of an earlier run.")] = False,
) -> None:
    """Judge scorers by people's preferences: pairwise accuracy, calibration, stability, distances, false captions.

    Pick-a-Pic, HPDv2, ImageRewardDB and ImageReward's test.json are known by their columns, folders of pairs by their
    names w/ and l/. Samples of a base model and optimised ones show how far scorers part under optimisation.
    """
    from t2i_align.errors import T2IError
    from t2i_align.judging.job import Judging, run
    from t2i_align.rewards import check_reward, split_rewards

    names = split_rewards(specs)
    if not names or not (data or playground or base or optimised):
        raise T2IError(
            f"Expected scorers, and --data, --base or the playground, but got {specs!r} and nothing to judge them on."
        )
    if best_of == 1 or (best_of and not base):
        raise T2IError(f"Expected --best-of 2 or more, of the samples of --base, but got {best_of} of {base!r}.")
    for name in (*names, *([gold] if gold else [])):
        check_reward(name)
    settings = Judging(
        rewards=tuple(names), data=tuple(data or ()), root=str(root or ""), base=base, optimised=tuple(optimised or ()),
        best_of=best_of, gold=gold, paraphrases=paraphrases, playground=playground, scenes=scenes, limit=limit,
        seed=seed,
    )  # fmt: skip

    from t2i_align.devices import resolve_device

    print_table(run(settings, out, resolve_device(device), overwrite=overwrite))
    print(f"open {out / 'index.html'}")


@rewards.command()
def average(
    folders: Annotated[list[Path], Argument(help="Trained scorers, or the runs that made them.")],
    out: Annotated[Path, Option(help="Folder of the result; new.")],
) -> None:
    """Make one scorer whose weights are the mean of those of scorers that were trained from one start (WARM)."""
    from t2i_align.errors import T2IError
    from t2i_align.rewards.trained import average_scorers, find_folder

    found = [find_folder(folder) for folder in folders]
    for folder, place in zip(folders, found, strict=True):
        if place is None:
            raise T2IError(f"Expected {folder} to be the folder of a trained scorer or of its run but it is none.")
    if out.exists():
        raise T2IError(f"Expected {out} to be new but it exists: choose another folder.")
    average_scorers([place for place in found if place is not None], out)
    print(f"load_reward({str(out)!r}) opens the mean of {len(found)} scorers")


def _lines(value: Any) -> list[str]:
    """What a person reads of a fact: of files, one block a file."""
    if not isinstance(value, list):
        return str(value).splitlines()
    return [f"{'' if key == 'file' else f'  {key} '}{said}" for facts in value for key, said in facts.items()]


def _options(found: type) -> str:
    import inspect

    parameters = inspect.signature(found).parameters.values()
    own = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "args"]  # of nn.Module: (*args, **kwargs)
    return ", ".join(str(p.replace(annotation=p.empty)) for p in own) or "none"


def _row(scorer: Any) -> dict[str, Any]:
    missing = scorer.missing()
    needs = [*(["prompt"] if scorer.needs_prompt else []), *scorer.columns]
    return {
        "name": scorer.name,
        "needs": ", ".join(["image", *needs]),
        "differentiable": "yes" if scorer.differentiable else "no",
        "unit": scorer.unit,
        "license": scorer.license,
        "weights": f"missing: {missing}" if missing else "none" if scorer.source == "none" else "present",
        "summary": scorer.summary,
    }
