"""Calibration: what a pipeline's own samples score, prompt by prompt, kept for `calibrated(...)` and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from t2i_align.errors import T2IError
from t2i_align.generation import generate_samples
from t2i_align.keys import key
from t2i_align.pipelines import call_keywords, check_call, load_pipeline
from t2i_align.progress import Progress
from t2i_align.prompts import NEGATIVE, Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.reference import (
    Reference,
    calibration_folder,
    prompt_file,
    read_calibration,
    read_calibration_file,
    write_calibration,
)


def calibrate(
    pipeline: str | Path,
    scorers: Sequence[Scorer],
    prompts: str | Sequence[str] | Prompts,
    *,
    particles: int = 16,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> list[Reference]:
    """Sample `particles` images of each prompt, score them, and keep the scores on disk (`reference.py`).

    Prompts that are there already are left alone, so a call can be interrupted and repeated, or extended.

    Args:
        pipeline: alias or folder of the base model.
        scorers: each is calibrated on its own.
        prompts: one or many; equal ones count once. Columns do not matter here, `negative_prompt` neither: a scale is
            known by the text of its prompt.
        particles: samples per prompt, 8 or more for a usable scale.
        seed: names the samples; they are not those of `generate`.
        steps: denoising steps; the pipeline's own if None.
        guidance: guidance scale; the pipeline's own if None.
        batch_size: images computed together.
        device: of the pipeline.
        overwrite: delete a calibration that was sampled with other settings.

    Returns:
        One reference per scorer, over all prompts that were ever calibrated.

    Raises:
        T2IError: too few particles, a scorer that compares images of one call or cannot read a prompt, or a
            calibration with other settings.
    """
    if particles < 2:
        raise T2IError(f"Expected 2 or more particles to calibrate with but got {particles}.")
    table = Prompts.of(prompts)
    table = table[[table.text.index(text) for text in dict.fromkeys(table.text)]]
    table = Prompts(table.text, {name: values for name, values in table.columns.items() if name != NEGATIVE})
    for scorer in scorers:
        if scorer.groupwise:
            raise T2IError(f"The scorer {scorer.name!r} compares images of one call: calibrate its members instead.")
        scorer.check([], table)
    call = call_keywords(pipeline, steps, guidance)
    settings = {"particles": particles, "seed": seed, "call": call}
    folders = [calibration_folder(pipeline, scorer) for scorer in scorers]
    missing = [_missing(folder, table, settings, overwrite) for folder in folders]
    rows = sorted(set().union(*missing))
    if rows:
        pipe = load_pipeline(pipeline, device=device)
        check_call(pipe, call)
        wanted = list(zip(scorers, folders, missing, strict=True))
        jobs = [(row, particle) for row in rows for particle in range(particles)]
        images: list[Image.Image] = []
        samples = generate_samples(pipe, table, jobs, seed=key(seed, "calibrate"), batch_size=batch_size, **call)
        with Progress(len(jobs), "sampling and scoring", batch=batch_size) as progress:
            for sample in samples:
                images.append(sample.image)
                if len(images) == particles:
                    _keep(wanted, images, table[[sample.row]], sample.row, settings)
                    images = []
                progress.advance()
    return [read_calibration(pipeline, scorer) for scorer in scorers]


def _keep(
    wanted: list[tuple[Scorer, Path, set[int]]],
    images: list[Image.Image],
    prompt: Prompts,
    row: int,
    settings: dict[str, Any],
) -> None:
    """Score all samples of one prompt for the scorers that lack it."""
    for scorer, folder, rows in wanted:
        if row in rows:
            scores = scorer.scores(images, prompt.repeat(len(images))).total.tolist()
            write_calibration(folder, prompt[0], scores, settings)


def _missing(folder: Path, table: Prompts, settings: dict[str, Any], overwrite: bool) -> set[int]:
    """Rows of the table that a folder has no file of. Raises T2IError where it was made with other settings."""
    files = sorted(folder.glob("*.json"))
    if files and read_calibration_file(files[0])["settings"] != settings:
        before = read_calibration_file(files[0])["settings"]
        if not overwrite:
            raise T2IError(
                f"{folder} was calibrated with {before}, not {settings}: repeat these, or pass --overwrite to replace "
                f"its {len(files)} prompts."
            )
        for file in files:
            file.unlink()
    return {row for row, text in enumerate(table.text) if not prompt_file(folder, text).is_file()}
