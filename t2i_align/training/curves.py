"""`curves.png`: the trained reward beside everything that it could have been raised at the cost of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

GRAY, BLUE = "#b0b7bf", "#3b6ea5"
MEASURES = ("kl", "diversity", "vendi", "sharpness", "saturation")  # of an evaluation besides scores
COLUMNS, WIDTH, HEIGHT = 3, 3.4, 2.3  # panels in a row, inches of one
TITLES = {
    "reward": "trained reward",
    "kl": "KL to the base, nats per image",
    "diversity": "distance of a prompt's images",
    "vendi": "effective number of images",
}


def plot_curves(
    rows: Sequence[dict[str, Any]], scorers: Sequence[str], path: Path, trained: Collection[str] = ()
) -> None:
    """Draw a panel for each score and measure of evaluations; a gray line is the base.

    Args:
        rows: evaluations.
        scorers: their names, `reward` for the trained one.
        path: of the picture.
        trained: the watched ones that are in the reward, too.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    names = [*scorers, *(name for name in MEASURES if name in rows[0])]
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH, lines * HEIGHT), layout="constrained", dpi=110)
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    steps = [row["step"] for row in rows]
    for axes, name in zip(panels, names, strict=False):
        values = [row[name] for row in rows]
        axes.axhline(values[0], color=GRAY, linewidth=1)
        axes.plot(steps, values, ".-", color=BLUE)
        axes.set_title(title_of(name, name not in MEASURES, name in trained), fontsize=8, parse_math=False)
        axes.set_xlabel("updates", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.savefig(path)


def title_of(name: str, scorer: bool, trained: bool) -> str:
    """Of a panel; `trained`: a watched scorer that is in the reward, too."""
    watched = f"in the reward: {name}" if trained else f"watched: {name}"
    return TITLES.get(name, watched if scorer else name)
