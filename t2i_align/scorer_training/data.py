"""What a scorer learns from, as rankings of pictures: read or drawn, split by prompt, bootstrapped by prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from t2i_align.data.images import ImageError, open_image, pil_to_tensor
from t2i_align.data.preferences import Preferences, read_preferences
from t2i_align.errors import T2IError
from t2i_align.keys import generator, key
from t2i_align.prompts import Prompts

if TYPE_CHECKING:
    from t2i_align.rewards.tower import Preprocessing
    from t2i_align.scorer_training.blocks import DataBlock, ScorerRun

KEPT = 2 << 30  # bytes of prepared pictures that are kept in memory
READERS = 8  # threads that decode


@dataclass(frozen=True)
class Examples:
    """P rankings of pictures.

    `images`: their rows in `pictures`, which are names that `open_image` takes, or uint8 arrays (H, W, 3). `merits`:
    larger is better; with single pictures the score itself. `problems`: what was left out.
    """

    prompts: tuple[str, ...]
    images: tuple[tuple[int, ...], ...]
    merits: tuple[tuple[float, ...], ...]
    pictures: Sequence[Any]
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> Examples:
        """Some of the rankings, in that order."""
        prompts, images = tuple(self.prompts[row] for row in rows), tuple(self.images[row] for row in rows)
        return Examples(prompts, images, tuple(self.merits[row] for row in rows), self.pictures, self.problems)

    def table(self, rows: Sequence[int] | None = None) -> Tensor:
        """Merits (P, K) of rankings, NaN behind the last picture of each."""
        said = self.merits if rows is None else [self.merits[row] for row in rows]
        most = max(map(len, said), default=1)
        return torch.tensor([[*merits, *[float("nan")] * (most - len(merits))] for merits in said])

    def flat(self) -> tuple[list[int], Prompts, Tensor, Tensor]:
        """Of all pictures of all rankings: their rows, prompts, merits (N,) and the number (N,) of their ranking."""
        rows = [row for images in self.images for row in images]
        owner = [number for number, images in enumerate(self.images) for _ in images]
        texts = tuple(self.prompts[number] for number in owner)
        merits = torch.tensor([merit for merits in self.merits for merit in merits])
        return rows, Prompts(texts), merits, torch.tensor(owner, dtype=torch.long)

    def decisions(self) -> tuple[int, int]:
        """How many pairs one picture of which is better, and how many ties."""
        decided = tied = 0
        for merits in self.merits:
            _, counts = np.unique(merits, return_counts=True)
            ties = int((counts * (counts - 1) // 2).sum())
            decided, tied = decided + len(merits) * (len(merits) - 1) // 2 - ties, tied + ties
        return decided, tied

    def summary(self) -> str:
        """For people."""
        decided, tied = self.decisions()
        pictures = len({row for images in self.images for row in images})
        said = f"{pictures} images of {len(set(self.prompts))} prompts: "
        alone = sum(len(images) == 1 for images in self.images)
        parts = [f"{decided + tied} pairs, {tied} of them ties"] if decided + tied else []
        return said + ", ".join([*parts, *([f"{alone} single scores"] if alone else [])])


def read(block: DataBlock) -> Examples:
    """Preferences or scores of a file or folder; what cannot serve is left out, and in `problems`.

    Raises:
        T2IError: as `read_preferences`.
    """
    assert block.path is not None
    columns = None if block.columns is None else tuple(block.columns.items())
    changed = Path(block.path).stat().st_mtime_ns if Path(block.path).exists() else 0
    found = _read(block.path, columns, block.root, changed)
    rows: dict[str, int] = {}
    rankings = found.rankings[: block.limit]
    images = tuple(tuple(rows.setdefault(image, len(rows)) for image in ranking.images) for ranking in rankings)
    prompts, merits = tuple(r.prompt for r in rankings), tuple(r.merits for r in rankings)
    return Examples(prompts, images, merits, tuple(rows), found.problems)


@lru_cache(maxsize=4)  # a run's checks read what it then trains on
def _read(path: str, columns: tuple[tuple[str, str], ...] | None, root: str | None, changed: int) -> Preferences:
    found = read_preferences(path, None if columns is None else dict(columns), root)
    if found.problems:
        print(f"note: {path}: {found.summary()}", file=sys.stderr)
    return found


def load(block: DataBlock, folder: Path, plan: bool = False) -> Examples:
    """Read or draw a block's examples.

    Args:
        block: what.
        folder: keeps the pictures that tiny-sd draws, so that a stopped run goes on where it was.
        plan: take drawn scenes in the place of tiny-sd's pictures, which take minutes.
    """
    if block.use == "file":
        return read(block)
    from t2i_align.playground.judged import preference_samples, to_examples

    if block.use == "playground" and not plan:
        kept = Path(block.samples or folder) / "samples" / f"{block.split}-{block.seed}"
        judged = preference_samples(block.prompts, block.seed, block.split, kept)
        return to_examples(judged).take(range(len(judged.prompts))[: block.limit])
    from t2i_align.judging.drawn import draw_rankings

    drawn = draw_rankings(block.prompts, block.seed, block.split, 6 if block.use == "playground" else 4)
    pictures = [np.asarray(picture) for _, several, _ in drawn for picture in several]
    merits = tuple(tuple(merits) for _, _, merits in drawn)
    rows = iter(range(len(pictures)))
    images = tuple(tuple(next(rows) for _ in several) for _, several, _ in drawn)
    made = Examples(tuple(prompt for prompt, _, _ in drawn), images, merits, pictures)
    return made.take(range(len(made))[: block.limit])


def split(examples: Examples, config: ScorerRun) -> tuple[Examples, Examples]:
    """Training and held-out examples: a share of the prompts, always the same for a seed, all rankings of a prompt.

    Where held-out data are named, all are for training.
    """
    if config.evaluate.data is not None:
        return examples, examples.take([])
    prompts = sorted(set(examples.prompts), key=lambda prompt: key(config.train.seed, "held out", prompt))
    chosen = set(prompts[: max(1, round(config.evaluate.share * len(prompts)))])
    rows = range(len(examples))
    kept = [row for row in rows if examples.prompts[row] not in chosen]
    return examples.take(kept), examples.take([row for row in rows if examples.prompts[row] in chosen])


def without_prompts(examples: Examples, held_out: Examples) -> Examples:
    """The examples whose prompts are not held out, too: a scorer is judged on prompts that it has not seen."""
    seen = set(held_out.prompts)
    rows = [row for row in range(len(examples)) if examples.prompts[row] not in seen]
    if len(rows) < len(examples):
        print(f"note: {len(examples) - len(rows)} rankings of prompts that are held out are left out", file=sys.stderr)
    return examples.take(rows) if len(rows) < len(examples) else examples


def refuse(examples: Examples, config: ScorerRun, where: str) -> Iterator[str]:
    """Why examples cannot serve an objective, if they cannot."""
    objective = config.objective.use
    if not len(examples):
        yield f"{where}: expected examples but there is none"
        return
    decided, tied = examples.decisions()
    held_out = where != "data"
    if config.comparing and not decided and (held_out or not tied or config.objective.ties == "drop"):
        what = f"{tied} ties alone" if tied else "single images alone"
        yield f"{where}: expected pairs of which one image is better for objective.use: {objective} but got {what}"
    elif config.comparing and not decided and not held_out:
        yield f"{where}: expected pairs of which one image is better, since ties alone make all scores equal"
    if not config.comparing and len({merit for merits in examples.merits for merit in merits}) < 2:
        yield f"{where}: expected different scores for objective.use: {objective} but all are equal"


def bootstrap(examples: Examples, seed: int, number: int) -> list[int]:
    """The rankings of as many prompts as there are, drawn with replacement: member `number`'s sample."""
    members: dict[str, list[int]] = {}
    for row, prompt in enumerate(examples.prompts):
        members.setdefault(prompt, []).append(row)
    groups = list(members.values())
    drawn = torch.randint(len(groups), (len(groups),), generator=generator(seed, "bootstrap", number))
    return [row for group in drawn.tolist() for row in groups[group]]


class Pictures:
    """Pictures as a CLIP's preprocessing fits them, kept in memory as far as they go.

    Args:
        sources: names or arrays.
        preprocessing: of the CLIP.
    """

    def __init__(self, sources: Sequence[Any], preprocessing: Preprocessing) -> None:
        self.sources, self.preprocessing = sources, preprocessing
        self.kept: dict[int, Tensor] = {}
        self.unreadable: dict[int, str] = {}
        self.bytes = 0
        self.pool = ThreadPoolExecutor(READERS)

    def get(self, rows: Sequence[int]) -> Tensor:
        """(N, 3, H, W), not yet normalised; NaN for files that cannot be read, of which a note is printed once."""
        new = [row for row in dict.fromkeys(rows) if row not in self.kept]
        made = dict(zip(new, self.pool.map(self._open, new), strict=True))
        for row, pixels in made.items():
            size = pixels.numel() * pixels.element_size()
            if self.bytes + size <= KEPT:
                self.kept[row], self.bytes = pixels, self.bytes + size
        return torch.stack([self.kept[row] if row in self.kept else made[row] for row in rows])

    def _open(self, row: int) -> Tensor:
        source = self.sources[row]
        try:
            if isinstance(source, str):
                pixels = pil_to_tensor(open_image(source))
            else:
                pixels = torch.from_numpy(np.array(source)).permute(2, 0, 1).contiguous().float() / 255
        except ImageError as error:
            if row not in self.unreadable:
                self.unreadable[row] = str(error)
                print(f"note: left out: {error}", file=sys.stderr)
            return torch.full((3, *self.preprocessing.size), float("nan"))
        return self.preprocessing.fit(pixels[None])[0]


def check(examples: Examples, config: ScorerRun, where: str) -> None:
    """Raise T2IError where examples cannot serve."""
    for said in refuse(examples, config, where):
        raise T2IError(f"{said[0].upper()}{said[1:]}.")
