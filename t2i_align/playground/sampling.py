"""Rendered scenes on disk: PNGs and `prompts.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from t2i_align.config import Settings
from t2i_align.playground.world import sample_scenes
from t2i_align.progress import Progress
from t2i_align.runs import append_jsonl, open_folder


class SampleJob(Settings):
    """What decides the scenes of `t2i-align playground sample`."""

    n: int = Field(100, gt=0)
    split: Literal["train", "heldout"] = "train"
    seed: int = 0


def run_sample(job: SampleJob, out: Path, *, overwrite: bool = False) -> None:
    """Write `images/N.png` and `prompts.jsonl` (image, prompt, kind, split) into the folder `out`."""
    folder = open_folder(out, job, resume=None, overwrite=overwrite)
    (folder / "images").mkdir()
    rows = []
    with Progress(job.n, "drawing scenes") as progress:
        for index, scene in enumerate(sample_scenes(job.n, job.seed, job.split)):
            name = f"images/{index:05d}.png"
            scene.render().save(folder / name)
            rows.append({"image": name, "prompt": str(scene.caption), "kind": scene.caption.kind, "split": job.split})
            progress.advance()
    append_jsonl(folder / "prompts.jsonl", rows)
