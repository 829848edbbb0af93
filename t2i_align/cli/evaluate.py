"""`t2i-align evaluate`: a pipeline with and without a LoRA, by any scorers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from t2i_align.cli.tables import print_json, print_table

if TYPE_CHECKING:
    from t2i_align.evaluation import Comparison


def evaluate(
    prompts: Annotated[
        str, Argument(metavar="PROMPT|FILE", help="A prompt, or a .txt, .jsonl, .json, .csv, .tsv or .parquet file.")
    ],
    rewards: Annotated[str, Option(help="Scorers or sums of scorers, separated by commas.")],
    pipeline: Annotated[str, Option(help="Alias, hub id or folder of a diffusers pipeline.")] = "tiny-sd",
    lora: Annotated[
        Path | None, Option(help="Folder of trained weights (runs/x/lora), or any LoRA that the pipeline opens.")
    ] = None,
    images: Annotated[int, Option(min=1, help="Images per prompt.")] = 4,
    html: Annotated[Path | None, Option(help="Write a page with pictures side by side.")] = None,
    seed: Annotated[int, Option(help="Of the noise, the same with and without the LoRA.")] = 0,
    steps: Annotated[int | None, Option(min=1, help="Denoising steps. [default: the pipeline's own]")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale. [default: the pipeline's own]")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images computed together.")] = 16,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a pipeline, and what a LoRA changes: paired 95 % intervals and win rates."""
    from t2i_align.pipelines.catalog import check_pipeline
    from t2i_align.prompts import read_prompts
    from t2i_align.rewards import check_reward, split_rewards

    for spec in split_rewards(rewards):
        check_reward(spec)
    check_pipeline(pipeline)
    table = read_prompts(prompts)

    from t2i_align.evaluation import check_page, write_page
    from t2i_align.evaluation import evaluate as measure

    if html is not None:
        check_page(html)
    found = measure(
        pipeline,
        table,
        rewards,
        lora,
        images=images,
        seed=seed,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
        device=device,
    )
    if as_json:
        print_json({name: _flat(row) for name, row in found.comparisons.items()})
    else:
        _print(found.comparisons, lora is not None)
    if html is not None:  # last: the numbers are there whatever becomes of the page
        write_page(html, found)
        if not as_json:
            print(f"open {html}")


def _print(comparisons: Mapping[str, Comparison], tuned: bool) -> None:
    rows = []
    for name, row in comparisons.items():
        line = {"scorer": name, "base": str(row.base)}
        if tuned:
            line |= {"tuned": str(row.tuned), "gain": str(row.gain), "wins, ties half": f"{100 * row.win_rate:.0f} %"}
        rows.append(line | {"prompts": str(row.prompts), "invalid": str(row.invalid)})
    print_table(rows, "means over prompts [95 % interval]")


def _flat(row: Comparison) -> dict[str, object]:
    """A comparison as nested mappings."""
    from t2i_align.evaluation import Interval

    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in row._asdict().items()}
