"""`t2i-align rewards evaluate`: preference sets and the playground -> `index.html` and `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2i_align.config import Settings
from t2i_align.data.preferences import read_preferences
from t2i_align.errors import T2IError
from t2i_align.judging.drawn import draw_preferences
from t2i_align.judging.judge import judge, table, write_results
from t2i_align.playground.proxies import measure_captions
from t2i_align.rewards import load_reward
from t2i_align.runs import open_folder

DRAWN = "playground"


class Judging(Settings):
    """What is judged on what."""

    rewards: tuple[str, ...]
    data: tuple[str, ...] = ()
    root: str = ""
    playground: bool = True
    scenes: int = 200
    limit: int | None = None
    seed: int = 0


def run(settings: Judging, out: Path, device: Any = None, overwrite: bool = False) -> list[dict[str, Any]]:
    """Judge and write; returns the table for people.

    Raises:
        T2IError: preferences that cannot be read, or scorers that compare images or read columns.
    """
    sets = {source: read_preferences(source, root=settings.root or None) for source in settings.data}
    scorers = [load_reward(spec, device) for spec in settings.rewards]
    for scorer in scorers:
        if scorer.groupwise or scorer.columns:
            raise T2IError(
                f"The scorer {scorer.name!r} compares images or reads prompt columns: it cannot be judged here."
            )
    open_folder(out, settings, resume=None, overwrite=overwrite)
    notes = [f"{source}: {found.summary()}" for source, found in sets.items()]
    contrasts = {}
    if settings.playground:
        sets[DRAWN] = draw_preferences(out / DRAWN, settings.scenes, settings.seed)
        notes.append(f"{DRAWN}: drawn scenes, ranked by the verifier: {sets[DRAWN].summary()}")
        contrasts = {s.name: measure_captions(s, settings.scenes) for s in scorers if s.needs_prompt}
    rows, distances = judge(scorers, sets, limit=settings.limit, seed=settings.seed)
    write_results(out, rows, distances, contrasts, notes)
    return table(rows)
