"""`t2i-align generate`: prompts -> images, a results table and a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def generate(
    prompts: Annotated[
        str, Argument(metavar="PROMPT|FILE", help="A prompt, or a .txt, .jsonl, .csv or .parquet file of prompts.")
    ],
    out: Annotated[Path, Option(help="Folder for the images, results.jsonl and contact_sheet.png.")],
    pipeline: Annotated[str, Option(help="Alias or folder of a diffusers pipeline.")] = "tiny-sd",
    particles: Annotated[int, Option(min=1, help="Images per prompt.")] = 8,
    seed: Annotated[int, Option(help="An image depends on prompt, seed and its number alone.")] = 0,
    steps: Annotated[int | None, Option(min=1, help="Denoising steps. [default: the pipeline's own]")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale. [default: the pipeline's own]")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images computed together.")] = 16,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    resume: Annotated[bool, Option("--resume", help="Go on in an existing folder.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing folder of ours.")] = False,
) -> None:
    """Generate images from prompts."""
    from t2i_align.pipelines.loading import find_pipeline
    from t2i_align.prompts import read_prompts

    find_pipeline(pipeline)
    table = read_prompts(prompts)

    from t2i_align.jobs import GenerateJob, run_generate

    job = GenerateJob(
        prompts=table.text, pipeline=pipeline, particles=particles, seed=seed, steps=steps, guidance=guidance
    )
    rows = run_generate(job, out, batch_size=batch_size, device=device, resume=resume, overwrite=overwrite)
    print(f"{len(rows)} images of {len(table)} prompts in {out}; open {out / 'contact_sheet.png'}")
