"""`Cond`: what the network is told, as rows that can be picked, repeated and batched without encoding again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_align.prompts import Prompts

Tree = Any  # tensors, None and numbers in nested tuples and lists


@dataclass(frozen=True)
class Cond:
    """What the network is told, one row per sample.

    `encoded`: per different prompt, the outputs of every `encode_prompt` call in call order; `rows`: per sample, which
    of them. Rows index prompts encoded once: picking and repeating copy no embedding. `given`: per sample, keywords of
    the pipeline's `__call__` (ready embeddings, a control image) instead of or besides that.
    """

    encoded: tuple[tuple[Tree, ...], ...]
    rows: tuple[int, ...]
    prompts: Prompts
    given: tuple[dict[str, Tree], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Sequence[int] | slice | int) -> Cond:
        """The samples of a slice, of a list of indices, or one."""
        index = [index] if isinstance(index, int) else index
        picked = range(len(self))[index] if isinstance(index, slice) else [int(i) for i in index]
        given = tuple(self.given[i] for i in picked) if self.given else ()
        return Cond(self.encoded, tuple(self.rows[i] for i in picked), self.prompts[list(picked)], given)

    def repeat(self, times: int) -> Cond:
        """Each sample `times` times, group-major: a a b b."""
        return self[[i for i in range(len(self)) for _ in range(times)]]

    def call(self, number: int) -> Tree:
        """What the pipeline's `number`-th call of `encode_prompt` returns for these samples."""
        return _stack([self.encoded[row][number] for row in self.rows])

    def keywords(self) -> dict[str, Tree]:
        """The given keywords of `__call__`, batched."""
        names = self.given[0] if self.given else ()
        return {name: _stack([row[name] for row in self.given]) for name in names}


def take_row(tree: Tree, index: int, rows: int) -> Tree:
    """One row of a tree of tensors and lists whose first length is `rows`; anything else belongs to every row."""
    if isinstance(tree, Tensor) and tree.ndim and len(tree) == rows:
        return tree[index]
    if isinstance(tree, tuple):
        return tuple(take_row(part, index, rows) for part in tree)
    if isinstance(tree, list) and len(tree) == rows:
        return _Listed(tree[index])
    return tree


class _Listed(NamedTuple):
    """A row of a list, as some pipelines keep their embeddings."""

    item: Any


def _stack(rows: list[Tree]) -> Tree:
    """The inverse of `take_row`; sequences of different lengths are padded with zeros at their end."""
    first = rows[0]
    if isinstance(first, _Listed):
        return [row.item for row in rows]
    if isinstance(first, tuple):
        return tuple(_stack([row[i] for row in rows]) for i in range(len(first)))
    if isinstance(first, Tensor):
        if any(row.shape != first.shape for row in rows):
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return torch.stack(rows)
    return first
