"""Preference pairs for the methods of the training bench that learn from given ones, drawn once and kept.

A run's whole budget of images is drawn from the base, as the other methods draw theirs, and labelled by the reward. Of
a prompt's images the best is paired with the worst, the second best with the second worst, and so on; ties are left
out. The pairs with the largest differences are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.data.preferences import PAIRS_FILE
from t2i_align.evaluation import draw
from t2i_align.keys import key
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer
from t2i_align.runs import append_jsonl, read_jsonl, write_jsonl, write_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOTE, DRAWN = "pairs.json", "drawn.jsonl"
FEWEST = 8  # images of a prompt, where the budget is small
TOGETHER = 64  # images between two saves


def read_note(folder: Path) -> dict[str, Any] | None:
    """What finished pairs cost: `images`, `seconds`, and how many `pairs` there are; None where they are not done."""
    path = folder / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def draw_pairs(
    folder: Path,
    pipe: DiffusionPipeline,
    table: Prompts,
    scorer: Scorer,
    images: int,
    most: int,
    seed: int,
    late: Callable[[], bool],
    **call: Any,
) -> dict[str, Any] | None:
    """Draw, label and keep pairs in `folder`, going on where an earlier call stopped.

    Args:
        folder: gets `pairs.jsonl`, which `prompts: {use: pairs}` reads, and its images.
        pipe: draws; the base.
        table: prompts, all of them if the budget has `FEWEST` images for each.
        scorer: of the labels.
        images: the budget.
        most: pairs to keep.
        seed: of the noise.
        late: whether it is time to stop.
        call: keywords of the pipeline.

    Returns:
        As `read_note`; None if it was time to stop before the end.
    """
    known = read_note(folder)
    if known is not None:
        return known
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = table[: max(1, min(len(table), images // FEWEST))]
    each = images // len(table)
    step = max(1, TOGETHER // each)
    done = len(read_jsonl(folder / DRAWN))
    for first in range(done * step, len(table), step):
        if late():
            return None
        started = time.perf_counter()
        rows = table[first : first + step]
        label = f"drawing pairs, {first} of {len(table)} prompts"
        made = draw(pipe, rows, each, key(seed, "pairs"), TOGETHER, label, **call)
        scores = scorer.scores(made, rows.repeat(each)).total.reshape(-1, each).tolist()
        pairs = []
        for row, values in enumerate(scores):
            for better, worse in opposites(values):
                names = [f"images/{first + row:05d}-{number:03d}.png" for number in (better, worse)]
                for name, number in zip(names, (better, worse), strict=True):
                    made[row * each + number].save(folder / name)
                pair = {"prompt": rows.text[row], "image_0": names[0], "image_1": names[1], "label_0": 1, "label_1": 0}
                pairs.append(pair | {"gap": values[better] - values[worse]})
        append_jsonl(folder / DRAWN, [{"seconds": time.perf_counter() - started, "images": len(made), "pairs": pairs}])
    drawn = read_jsonl(folder / DRAWN)
    found = sorted((pair for part in drawn for pair in part["pairs"]), key=lambda pair: -pair["gap"])[:most]
    write_jsonl(folder / PAIRS_FILE, found)
    note = {"images": sum(part["images"] for part in drawn), "seconds": sum(part["seconds"] for part in drawn)}
    write_text(folder / NOTE, json.dumps(note | {"pairs": len(found)}) + "\n")
    return read_note(folder)


def opposites(values: list[float]) -> list[tuple[int, int]]:
    """Indices of best and worst, second best and second worst, and so on, while they differ."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    pairs = zip(order[: len(order) // 2], reversed(order), strict=False)
    return [(better, worse) for better, worse in pairs if values[better] > values[worse]]
