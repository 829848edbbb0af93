"""The job behind `t2i-align generate --steer`: prompts in windows, a table and pictures on disk, resumable."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from t2i_align.config import load_config
from t2i_align.data.images import tensor_to_pil
from t2i_align.data.preferences import PAIRS_FILE
from t2i_align.data.tables import write_table
from t2i_align.devices import resolve_device
from t2i_align.errors import T2IError
from t2i_align.jobs import SHEET_ROWS, GenerateJob, failing_cleanly, image_name, open_job, write_sheet
from t2i_align.pipelines import Driver, load_kernel, preview_pipeline
from t2i_align.prompts import NEGATIVE, occurrences
from t2i_align.rewards import check_reward, load_reward
from t2i_align.runs import read_jsonl, write_jsonl, write_text
from t2i_align.scoring.views import write_pairs
from t2i_align.steering import load_method, method_class, method_name
from t2i_align.steering.base import STEPS, Cost, Ctx, Steered, Steering
from t2i_align.steering.checks import check_columns, check_gradient
from t2i_align.steering.live import LiveLines, slice_row
from t2i_align.steering.plots import plot_history

COSTS = ("forwards", "backwards", "decodes", "decode_backwards", "scored", "seconds")


class SteerJob(GenerateJob):
    """What decides the images of `t2i-align generate --steer`."""

    steer: str = Field("fk", description="a steering method")
    settings: dict[str, Any] = Field(default_factory=dict, description="its settings, all of them")
    rewards: str = Field(description="what it maximises")
    decoder: str | None = Field(None, description="a small autoencoder for rewards along the way; null: the own one")
    fallback: ClassVar[str] = f"diffusers, and {STEPS} steps of steering's own"

    def call(self) -> dict[str, Any]:
        """Keywords of the pipeline's `__call__`, with steps."""
        return {"num_inference_steps": STEPS} | super().call()

    def method(self) -> Steering:
        """The method with its settings."""
        return load_method(self.steer, **self.settings)


def read_method(name: str, words: Sequence[str], particles: int | None = None) -> tuple[str, dict[str, Any]]:
    """A method's name and all its settings from words `key=value`.

    Raises:
        T2IError: no such method or setting, or two numbers of particles.
    """
    kind = method_class(name)
    given = [word.partition("=")[0] for word in words]
    if particles is not None and "particles" in given:
        raise T2IError("Expected --particles or particles= but got both.")
    words = list(words) if particles is None else [f"particles={particles}", *words]
    method = load_config(kind, None, words)
    return method_name(method), method.model_dump(mode="json")


def run_steer(
    job: SteerJob,
    out: Path,
    *,
    max_batch: int = 16,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    save_pairs: Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Write images, a history per prompt, `results.parquet` and contact sheets into `out`; return the result rows.

    A prompt is finished when `prompts/ROW.json` is there; a resumed job makes the others.

    Args:
        job: what decides the images.
        out: the folder.
        max_batch: samples that go through the network together, of one prompt or of several.
        device: where networks go.
        resume: go on in an existing folder.
        overwrite: replace an existing folder of ours.
        save_pairs: folder for the best and the worst image of each prompt as preference pairs.
        options: those of `load_pipeline` that do not decide the images.

    Raises:
        T2IError: a method, setting, reward, prompt or folder that cannot serve; before weights are loaded where that
            can be known.
    """
    method = job.method()
    check_reward(job.rewards)
    check_gradient(method, job.rewards)
    check_columns(job.rewards, job.table())
    kernel = None if job.kernel is None else load_kernel(job.kernel)
    if save_pairs is not None and (save_pairs / PAIRS_FILE).exists() and not (resume or overwrite):
        raise T2IError(
            f"{save_pairs / PAIRS_FILE} already exists; pass --overwrite to replace it or choose another folder."
        )
    place = resolve_device(device)
    reward = load_reward(job.rewards, place, base=job.pipeline)
    check_gradient(method, reward)
    reward.check([], job.table())
    wanted = {*reward.columns, NEGATIVE}  # others do not decide the images
    read = {name: values for name, values in job.columns.items() if name in wanted}
    job = job.model_copy(update={"particles": method.particles, "columns": read})
    job, pipe, call, folder = open_job(job, out, place, resume=resume, overwrite=overwrite, **options)
    rows = call.pop("num_inference_steps")
    ctx = Ctx(Driver(pipe, **call), reward, rows, kernel, job.seed, max_batch)
    with failing_cleanly(job, folder, resume):
        if job.decoder is not None:
            ctx.decoder = Driver(preview_pipeline(pipe, job.decoder), **call)
        _steer_windows(job, method, ctx, folder)
    return _finish(job, folder, save_pairs)


def _steer_windows(job: SteerJob, method: Steering, ctx: Ctx, folder: Path) -> None:
    """Steer the prompts that are not finished, as many together as fill a batch."""
    for name in ("history", "prompts"):
        (folder / name).mkdir(exist_ok=True)
    table = job.table()
    repeats = occurrences(table)
    todo = [row for row in range(len(table)) if not _record(folder, row).is_file()]
    size = max(1, ctx.max_batch // method.particles)
    for first in range(0, len(todo), size):
        window = todo[first : first + size]
        with LiveLines(table[window].text, window[0], len(table), method.particles) as lines:
            fresh: dict[str, Any] = {"repeats": [repeats[row] for row in window], "cost": Cost(), "history": []}
            result = method(replace(ctx, on_step=lines, **fresh), table[window])
        for at, row in enumerate(window):
            _save_prompt(job, folder, row, at, result)
        _draw_histories(job, folder, window)


def _record(folder: Path, row: int) -> Path:
    return folder / "prompts" / f"{row:05d}.json"


def _save_prompt(job: SteerJob, folder: Path, row: int, at: int, result: Steered) -> None:
    """Write all of one prompt; its record comes last and says that it is complete."""
    prompts, particles = result.log_weight.shape
    totals, best = result.totals[at], int(result.best[at])
    cost = {name: value / prompts for name, value in asdict(result.cost).items()}
    parts = {name: values.reshape(prompts, particles)[at] for name, values in result.scores.parts.items()}
    rows = []
    for k in range(particles):
        name = image_name(row, k)
        tensor_to_pil(result.images[at, k]).save(folder / name)
        made: dict[str, Any] = {"prompt": job.prompts[row], "row": row, "particle": k, "image": name}
        made |= {"reward": _number(totals[k])} | {part: _number(values[k]) for part, values in parts.items()}
        made |= {"log_weight": float(result.log_weight[at, k]), "is_best": k == best, "seed": job.seed}
        rows.append(made | {name: cost[name] for name in COSTS})
    history = [slice_row(made, at, prompts) for made in result.history]
    write_text(_record(folder, row), json.dumps({"rows": rows, "history": history}))


def _draw_histories(job: SteerJob, folder: Path, rows: Sequence[int]) -> None:
    """Draw the histories of finished prompts, those that are not drawn yet; from their records, which come first."""
    for row in rows:
        picture = folder / "history" / f"{row:05d}.png"
        if not picture.is_file():
            history = json.loads(_record(folder, row).read_text(encoding="utf-8"))["history"]
            unfinished = picture.with_suffix(".part.png")
            plot_history(history, unfinished, job.prompts[row], job.rewards)
            unfinished.replace(picture)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finish(job: SteerJob, folder: Path, save_pairs: Path | None) -> list[dict[str, Any]]:
    """Everything about all prompts: the table, the sheets, the pairs."""
    records = (json.loads(_record(folder, row).read_text(encoding="utf-8")) for row in range(len(job.prompts)))
    groups = [record["rows"] for record in records]
    rows = [row for group in groups for row in group]
    write_table(rows, folder / "results.parquet")
    most = max(len(group) for group in groups)
    shown = [folder / row["image"] for group in groups[:SHEET_ROWS] for row in _padded(group, most)]
    write_sheet(folder / "contact_sheet.png", shown, most, job.prompts)
    best = [folder / row["image"] for row in rows if row["is_best"]][:SHEET_ROWS]
    write_sheet(folder / "best.png", best, min(8, len(best)))
    _draw_histories(job, folder, range(len(job.prompts)))  # those that a killed job left
    if save_pairs is not None:
        write_pair_folder(rows, job.rewards, folder, save_pairs)
    return rows


def _padded(group: list[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """A row of a sheet: a prompt's particles, the last one again where others have more."""
    yield from group
    yield from [group[-1]] * (most - len(group))


def write_pair_folder(rows: list[dict[str, Any]], reward: str, folder: Path, target: Path) -> int:
    """Copy the best and the worst image of each prompt of a results table to `target`, with a `pairs.jsonl`.

    The table is that of `t2i-align score --pairs`: `prompt`, `image_0`, `image_1`, `label_0`, `label_1`, the scores and
    their `gap`. Prompts whose images all score the same give no pair. Returns the number of pairs.
    """
    (target / "images").mkdir(parents=True, exist_ok=True)
    scored = [{"prompt": row["prompt"], "image": row["image"], reward: row["reward"]} for row in rows]
    count = write_pairs(scored, target / PAIRS_FILE, reward, folder / "results.parquet")
    pairs = read_jsonl(target / PAIRS_FILE)
    for pair in pairs:
        for side in ("image_0", "image_1"):
            source = (target / pair[side]).resolve()
            copy = target / "images" / source.name
            if copy.resolve() != source:  # pairs may go to the job's own folder
                shutil.copyfile(source, copy)
            pair[side] = f"images/{source.name}"
    write_jsonl(target / PAIRS_FILE, pairs)
    return count
