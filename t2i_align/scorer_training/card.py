"""The README.md of a scorer's training: what was trained on what, what it is worth on held-out data, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from t2i_align.rewards.trained import RUN
from t2i_align.runs import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from t2i_align.scorer_training.heldout import HeldOut
    from t2i_align.scorer_training.run import Parts

CARD = """\
---
tags:
- t2i-align
- reward-model
- {objective}
---
# {name}: a scorer trained from {base}

{what} of {base}, trained by {objective} on {data}.{noise}
{steps} updates of {batch} rankings.{members}{kept}

## On held-out data

{whence}: {held_out}. 95 % intervals are over {unit}.{across} The numbers are of the
saved scorer, opened by `load_reward`.

{table}
{gain}{left_out}
## Use

```python
from t2i_align import load_reward

scorer = load_reward("{folder}")  # the folder {folder}/ beside this file; this folder will do, too
scores = scorer.scores(images, prompts)  # total{std}
```
{cautious}
Larger is better. {scale}
`config.yaml` has all settings, `evaluations.jsonl` the held-out numbers on the way, `environment.json` the versions.
"""
LEARNT = {
    "full": "All weights of the CLIP, with a {head} head,",
    "lora": "A LoRA on the CLIP, with a {head} head,",
    "head": "A {head} head on the CLIP",
}
COLUMNS = ("log_loss", "rmse", "mae", "pearson", "spearman", "within_std")


def write_card(
    parts: Parts, folder: Path, watchers: list[HeldOut], measured: dict[str, tuple[dict[str, float], Tensor]]
) -> None:
    """Write the card of a run.

    Args:
        parts: of the run.
        folder: of the run.
        watchers: one for each member.
        measured: the rows of the base, members and the result.
    """
    from t2i_align.scorer_training.run import improvement

    c = parts.config
    ensemble, members = c.ensemble, c.ensemble.members
    how = "an ensemble" if ensemble.combine == "mean" else "the mean of their weights (WARM)"
    sampled = ", each on its own bootstrap sample of the prompts" if ensemble.bootstrap else ""
    several = f" {members} members{sampled}; the result is {how}." if members > 1 else ""
    best = ", ".join(str(watcher.kept["step"]) for watcher in watchers)
    kept = f" The weights kept are those of the best evaluation (step {best})." if c.evaluate.keep == "best" else ""
    noise = f" {100 * c.data.label_noise:.0f} % of its pairs were turned round." if c.data.label_noise else ""
    mean, low, high = improvement(measured, parts)
    has_std = c.objective.use in ("quantile", "hl_gauss") or (members > 1 and ensemble.combine == "mean")
    given = c.evaluate.data
    log_odds = "A difference of scores is the log-odds of a preference." if c.comparing else ""
    cautious = "\n`lcb(FOLDER, k=1)` scores one std below the mean.\n" if has_std else ""
    text = CARD.format(
        name=c.scorer.name,
        base=f"`{c.scorer.use}`",
        objective=c.objective.use,
        what=LEARNT[c.scorer.train].format(head=c.scorer.head),
        data=parts.train.summary(),
        noise=noise,
        steps=c.train.steps,
        batch=min(c.data.batch, len(parts.train)),
        members=several,
        kept=kept,
        held_out=parts.held_out.summary(),
        whence="Prompts that no update saw" if given is None else f"From {given.path or given.use}",
        unit="rankings" if c.comparing else "prompts",
        across="" if c.comparing else " All images of a prompt are paired, since scores are on one scale.",
        table=table({name: row for name, (row, _) in measured.items()}),
        gain=f"\nThe gain in pairs in order is {100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}].\n"
        if mean == mean
        else "",
        left_out=left_out(parts),
        folder=RUN,
        std=" and std" if has_std else "",
        cautious=cautious,
        scale=log_odds or "Scores are in the unit of the data.",
    )
    write_text(folder / "README.md", text)
    write_text(folder / RUN / "README.md", text)


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of what was measured, a line a scorer."""
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    paired = any("accuracy" in row for row in rows.values())
    heads = ["scorer", *(["pairs in order", "of"] if paired else []), *(name.replace("_", " ") for name in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, row in rows.items():
        cells = [name]
        if paired:
            cells += [f"{100 * row['accuracy']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"]
            cells += [f"{row['pairs']:.0f}"]
        cells += [f"{row[column]:.3f}" if column in row else "-" for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def left_out(parts: Parts) -> str:
    """A sentence on rows and images that could not serve."""
    said = [*parts.train.problems, *(p for pictures in parts.pictures for p in pictures.unreadable.values())]
    if not said:
        return ""
    more = f"; and {len(said) - 5} more" if len(said) > 5 else ""
    return f"\nLeft out: {'; '.join(text.rstrip('.') for text in said[:5])}{more}.\n"
