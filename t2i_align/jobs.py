"""The jobs behind the verbs that make folders: settings in, results on disk, resumable."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from t2i_align.config import Settings
from t2i_align.data.images import contact_sheet, open_image
from t2i_align.devices import resolve_device
from t2i_align.generation import generate_samples
from t2i_align.pipelines import call_keywords, card_of, check_call, load_pipeline
from t2i_align.playground.grammar import CaptionError, parse
from t2i_align.progress import Progress
from t2i_align.prompts import Prompts
from t2i_align.runs import append_jsonl, open_folder, read_jsonl, write_jsonl

SHEET_ROWS = 50  # prompts on a contact sheet


class GenerateJob(Settings):
    """What decides the images of `t2i-align generate`; None leaves a value to the pipeline's card."""

    prompts: tuple[str, ...]
    pipeline: str = "tiny-sd"
    particles: int = Field(8, gt=0)
    seed: int = 0
    steps: int | None = Field(None, gt=0)
    guidance: float | None = None

    def resolved(self) -> GenerateJob:
        """The same with the pipeline's defaults filled in."""
        call = call_keywords(self.pipeline, self.steps, self.guidance)
        update = {"steps": call.get("num_inference_steps"), "guidance": call.get("guidance_scale")}
        return self.model_copy(update=update)


def prompt_notes(pipeline: str | Path, prompts: Sequence[str]) -> Iterator[str]:
    """What to say about prompts that a pipeline of the playground was not trained to read."""
    if card_of(pipeline).get("prompts") != "playground":
        return
    for prompt in dict.fromkeys(prompts):
        try:
            parse(prompt)
        except CaptionError as error:
            yield f"{pipeline} was trained on playground captions alone. {error}"


def run_generate(
    job: GenerateJob,
    out: Path,
    *,
    batch_size: int = 16,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Write `images/ROW-PARTICLE.png`, `results.jsonl` and `contact_sheet.png`; return the result rows."""
    job, place = job.resolved(), resolve_device(device)
    for line in prompt_notes(job.pipeline, job.prompts):
        print(f"note: {line}", file=sys.stderr)
    call = call_keywords(job.pipeline, job.steps, job.guidance)
    pipe = load_pipeline(job.pipeline, device=place)
    check_call(pipe, call)
    folder = open_folder(out, job, resume=resume, overwrite=overwrite)
    (folder / "images").mkdir(exist_ok=True)
    results = folder / "results.jsonl"
    rows = [row for row in read_jsonl(results) if (folder / row["image"]).is_file()]
    write_jsonl(results, rows)  # without rows whose images are gone
    done = {(row["row"], row["particle"]) for row in rows}
    table = Prompts(job.prompts)
    jobs = [(row, p) for row in range(len(table)) for p in range(job.particles) if (row, p) not in done]
    with Progress(len(table) * job.particles, "generating", start=len(done)) as progress:
        for sample in generate_samples(pipe, table, jobs, seed=job.seed, batch_size=batch_size, **call):
            name = f"images/{sample.row:05d}-{sample.particle:03d}.png"
            sample.image.save(folder / name)
            row = {
                "image": name,
                "prompt": sample.prompt,
                "row": sample.row,
                "particle": sample.particle,
                "seed": job.seed,
            }
            append_jsonl(results, [row])
            rows.append(row)
            progress.advance()
    rows.sort(key=lambda row: (row["row"], row["particle"]))
    shown = [open_image(folder / row["image"]) for row in rows[: SHEET_ROWS * job.particles]]
    sheet = contact_sheet(shown, job.particles, labels=job.prompts, zoom=max(1, 128 // shown[0].width))
    sheet.save(folder / "contact_sheet.png")
    return rows
