"""`t2i-align rewards evaluate`: preference sets and the playground -> `index.html` and `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2i_align.config import Settings
from t2i_align.data.preferences import read_preferences
from t2i_align.errors import T2IError
from t2i_align.judging.drawn import draw_preferences
from t2i_align.judging.judge import judge, table, write_results
from t2i_align.judging.paraphrases import read_paraphrases
from t2i_align.judging.samples import read_samples
from t2i_align.playground.proxies import measure_captions, measure_swaps
from t2i_align.rewards import load_reward
from t2i_align.runs import open_folder

DRAWN = "playground"


class Judging(Settings):
    """What is judged on what.

    `base`, `optimised`: folders or tables of samples, ranked by the scorer `gold` if there is one; `best_of`: n of the
    best-of-n by each scorer among the base's. `paraphrases`: table of prompts in other words.
    """

    rewards: tuple[str, ...]
    data: tuple[str, ...] = ()
    root: str = ""
    base: str = ""
    optimised: tuple[str, ...] = ()
    best_of: int = 0
    gold: str = ""
    paraphrases: str = ""
    playground: bool = True
    scenes: int = 200
    limit: int | None = None
    seed: int = 0


def run(settings: Judging, out: Path, device: Any = None, overwrite: bool = False) -> list[dict[str, Any]]:
    """Judge and write; returns the table for people.

    Raises:
        T2IError: preferences, samples or paraphrases that cannot be read, too few samples for a best-of-n, or scorers
            that compare images or read columns.
    """
    given = read_paraphrases(settings.paraphrases) if settings.paraphrases else None
    sets = {source: read_preferences(source, root=settings.root or None) for source in settings.data}
    scorers = [load_reward(spec, device) for spec in settings.rewards]
    gold = next((s for s in scorers if s.name == settings.gold), None)
    if settings.gold and gold is None:
        gold = load_reward(settings.gold, device)
        scorers.append(gold)
    for scorer in scorers:
        if scorer.groupwise or scorer.columns:
            raise T2IError(
                f"The scorer {scorer.name!r} compares images or reads prompt columns: it cannot be judged here."
            )
    for source in (settings.base, *settings.optimised):
        if source:
            sets[source] = read_samples(source, gold)
    if settings.best_of and all(len(r.images) < 2 * settings.best_of for r in sets[settings.base].rankings):
        raise T2IError(
            f"Expected {settings.base} to have {2 * settings.best_of} images of a prompt, for two best of "
            f"{settings.best_of}, but no prompt has as many: draw more, or lower --best-of."
        )
    open_folder(out, settings, resume=None, overwrite=overwrite)
    notes = [f"{source}: {found.summary()}" for source, found in sets.items()]
    contrasts = {}
    if settings.playground:
        sets[DRAWN] = draw_preferences(out / DRAWN, settings.scenes, settings.seed)
        notes.append(f"{DRAWN}: drawn scenes, ranked by the verifier: {sets[DRAWN].summary()}")
        contrasts = {
            s.name: measure_captions(s, settings.scenes) | {"colours swapped": measure_swaps(s, settings.scenes)}
            for s in scorers
            if s.needs_prompt
        }
    verdicts = judge(
        scorers, sets, limit=settings.limit, seed=settings.seed, given=given, base=settings.base,
        optimised=settings.optimised, best=settings.best_of,
    )  # fmt: skip
    write_results(out, verdicts, contrasts, notes)
    return table(verdicts.rows)
