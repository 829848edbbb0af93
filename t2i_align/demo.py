"""The job behind `t2i-align demo`."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from t2i_align.generation import generate_samples
from t2i_align.jobs import GenerateJob
from t2i_align.pipelines import call_keywords, load_pipeline
from t2i_align.progress import Progress
from t2i_align.prompts import Prompts
from t2i_align.report import write_report
from t2i_align.rewards import load_reward
from t2i_align.rewards.verifier import report
from t2i_align.runs import open_folder

PARTICLES = 8
PROMPTS = {  # prompt -> what makes it harder than the one before
    "a red circle": "One object.",
    "a yellow star on a black background": "One object and its background.",
    "three green squares": "Counting.",
    "a purple circle and a yellow square": "Two objects: which colour goes with which shape?",
    "a blue square left of a yellow circle on a white background": "Two objects and where they stand.",
    "a green triangle above a purple star on a gray background": "The model was never trained on green triangles.",
}


def run_demo(out: Path, seed: int, *, overwrite: bool = False) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write `out/report.html` and the images; return a row per prompt and the cost."""
    job = GenerateJob(prompts=tuple(PROMPTS), particles=PARTICLES, seed=seed).resolved()
    folder = open_folder(out, job, resume=None, overwrite=overwrite)
    (folder / "images").mkdir()
    pipe, reward = load_pipeline(job.pipeline), load_reward("verifier")
    call = call_keywords(job.pipeline, job.steps, job.guidance)
    jobs = [(row, particle) for row in range(len(job.prompts)) for particle in range(PARTICLES)]
    images = []
    started = time.perf_counter()
    with Progress(len(jobs), "generating", batch=PARTICLES) as progress:
        for sample in generate_samples(pipe, Prompts(job.prompts), jobs, seed=seed, batch_size=PARTICLES, **call):
            sample.image.save(folder / "images" / f"{sample.row:05d}-{sample.particle:03d}.png")
            images.append(sample.image)
            progress.advance()
    sampled = time.perf_counter()
    totals = reward.scores(images, Prompts(job.prompts).repeat(PARTICLES)).total.view(-1, PARTICLES)
    scored = time.perf_counter()

    rows: list[dict[str, Any]] = []
    for at, (prompt, note) in enumerate(PROMPTS.items()):
        mine, scores = images[at * PARTICLES : (at + 1) * PARTICLES], totals[at].tolist()
        best = int(totals[at].argmax())
        rows.append(
            {
                "prompt": prompt,
                "note": note,
                "base": scores[0],
                "mean": fmean(scores),
                "best": scores[best],
                "best_index": best,
                "images": mine,
                "base_report": {"image": mine[0], "report": report(np.asarray(mine[0]), prompt)},
                "best_report": {"image": mine[best], "report": report(np.asarray(mine[best]), prompt)},
            }
        )
    cost = {
        "images": len(images),
        "network_calls": len(images) * (job.steps or 0),
        "scorer_calls": len(images),
        "seconds": sampled - started,
        "scoring_seconds": scored - sampled,
    }
    means = {name: fmean(row[name] for row in rows) for name in ("base", "mean", "best")}
    write_report(
        folder / "report.html",
        "demo.html",
        rows=rows,
        means=means,
        cost=cost,
        pipeline=job.pipeline,
        particles=PARTICLES,
        steps=job.steps,
        guidance=job.guidance,
        seed=seed,
    )
    return rows, cost
