"""Prompts of a run: sources, mixtures by weight, and the keyed draw of each round."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_align.choices import read_choices
from t2i_align.data.preferences import CHOICES, PAIRS_FILE, read_preferences
from t2i_align.errors import T2IError
from t2i_align.keys import generator
from t2i_align.playground.grammar import KINDS
from t2i_align.playground.world import sample_scene
from t2i_align.prompts import Prompts, read_prompt_file

if TYPE_CHECKING:
    from t2i_align.training.blocks import PromptsBlock, RunConfig, Source

TRIES = 60  # scenes drawn for each different caption that is wanted


@dataclass(frozen=True)
class Pool:
    """All prompts of a run, source after source: `sizes` rows of each, `weights` the shares of a round."""

    prompts: Prompts
    sizes: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)

    def draw(self, seed: int, number: int, size: int) -> Prompts:
        """The prompts of round `number`, a pure function of the arguments.

        A source has its share of the round, within one prompt and exactly on average. Its rows are different ones; of
        a source that is smaller than its share all rows come equally often, within one.
        """
        import torch

        if size > len(self.prompts):
            raise T2IError(f"Expected at least {size} prompts, one for each of a round, but got {len(self.prompts)}.")
        draws, mixing = generator(seed, "prompts", number), generator(seed, "mixture", number)
        ends = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        # One offset for the edges of all shares: any source's count is rounded up as often as its fraction says.
        edges = (size * (ends / ends[-1]) + torch.rand((), dtype=torch.float64, generator=mixing)).floor().long()
        rows: list[int] = []
        first = 0
        for length, share in zip(self.sizes, edges.diff(prepend=edges.new_zeros(1)).tolist(), strict=True):
            even = torch.full((length,), 1 / length, dtype=torch.float64)
            while share > 0:
                some = min(share, length)
                rows += (first + torch.multinomial(even, some, replacement=False, generator=draws)).tolist()
                share -= some
            first += length
        if len(self.sizes) > 1:  # processes and minibatches have parts of a round
            rows = [rows[i] for i in torch.randperm(len(rows), generator=mixing)]
        return self.prompts[rows]


def training_pool(config: RunConfig) -> Pool:
    """The prompts that a run is trained on: those of its block, or those that a person has chosen images of.

    Raises:
        T2IError: as `make_pool` and `read_choices`.
    """
    if config.choices is None:
        return make_pool(config.prompts)
    prompts = read_choices(config.choices).prompts()
    return _large_enough(Pool(prompts, (len(prompts),)), config.prompts.per_round)


def make_pool(block: Source | PromptsBlock) -> Pool:
    """Read the prompts of a block; of a mixture, the columns that all its parts have.

    Raises:
        T2IError: a file that cannot be read, or too few prompts.
    """
    parts = getattr(block, "mix", ()) or (block,)
    tables = [read_source(part) for part in parts]
    joined = tables[0]
    for table in tables[1:]:
        joined = joined + table
    pool = Pool(joined, tuple(len(table) for table in tables), tuple(part.weight for part in parts))
    return _large_enough(pool, getattr(block, "per_round", 1))


def _large_enough(pool: Pool, per_round: int) -> Pool:
    if per_round > len(pool.prompts):
        raise T2IError(
            f"Expected at least the {per_round} prompts or pairs of a round but got {len(pool.prompts)}: add some, or "
            "lower prompts.per_round."
        )
    return pool


def read_source(source: Source) -> Prompts:
    """The prompts of one source; of preferences with the columns `better` and `worse`, or `image` and `liked`."""
    if source.use == "pairs":
        return read_pairs(source)
    if source.path is not None:
        return read_prompt_file(source.path)
    found: dict[str, str] = {}
    for index in count():
        if len(found) == source.size:
            break
        if index == TRIES * source.size:
            raise T2IError(
                f"The playground has about {len(found)} captions of the kinds {', '.join(source.kinds)} in its "
                f"{source.split} split: ask for fewer than {source.size}."
            )
        kind = None if set(source.kinds) == set(KINDS) else source.kinds[index % len(source.kinds)]
        caption = sample_scene(source.seed, index, source.split, kind).caption
        found[str(caption)] = caption.kind
    kinds, split = tuple(found.values()), (source.split,) * len(found)
    return Prompts(tuple(found), {"kind": kinds, "split": split})


def read_pairs(source: Source) -> Prompts:
    """The pairs of a source that are no ties, a row each; or its single images, where it has no pairs."""
    assert source.path is not None
    columns = None if source.columns is None else tuple(source.columns.items())
    files = [Path(source.path), *(Path(source.path) / name for name in (PAIRS_FILE, CHOICES))]
    changed = tuple(file.stat().st_mtime_ns for file in files if file.exists())
    return _read_pairs(source.path, columns, source.root, changed)


@lru_cache(maxsize=4)  # a run's checks read what it then trains on
def _read_pairs(
    path: str, columns: tuple[tuple[str, str], ...] | None, root: str | None, changed: tuple[int, ...]
) -> Prompts:
    found = read_preferences(path, None if columns is None else dict(columns), root)
    if found.problems:
        print(f"note: {path}: {found.summary()}", file=sys.stderr)
    table = found.decided()
    table = table if len(table) else found.judged()
    if not len(table):
        raise T2IError(f"Expected pairs of which one image is better in {path} but all are ties.")
    return table
