"""`Cond`: what the network is told, as rows that can be picked, repeated, joined and batched without encoding again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_align.errors import T2IError
from t2i_align.prompts import Prompts

Tree = Any  # tensors, None and numbers in nested tuples and lists


class CondError(T2IError):
    """Rows that do not fit together."""


class _Listed(NamedTuple):
    """A row of a list, as some pipelines keep their embeddings."""

    item: Any


class _Slice(NamedTuple):
    """A row of a tensor whose samples lie along its second axis."""

    item: Tensor


class _Common(NamedTuple):
    """A tensor that belongs to every row, such as position ids."""

    item: Tensor


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
    given: tuple[dict[str, Tree], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Sequence[int] | slice | int) -> Cond:
        """The samples of a slice, of a list of indices, or one."""
        index = [index] if isinstance(index, int) else index
        picked = range(len(self))[index] if isinstance(index, slice) else [int(i) for i in index]
        given = tuple(self.given[i] for i in picked)
        return Cond(self.encoded, tuple(self.rows[i] for i in picked), self.prompts[list(picked)], given)

    def __add__(self, other: Cond) -> Cond:
        """The samples of both, one after the other.

        Raises:
            CondError: one is told by prompts and the other by ready embeddings, or by other keywords.
        """
        mine, theirs = (bool(cond.encoded) for cond in (self, other))
        if mine != theirs or {frozenset(row) for row in self.given} != {frozenset(row) for row in other.given}:
            raise CondError("Expected both conditions to be told the same keywords, prompts or ready embeddings.")
        rows = self.rows + tuple(len(self.encoded) + row for row in other.rows)
        return Cond(self.encoded + other.encoded, rows, self.prompts + other.prompts, self.given + other.given)

    def repeat(self, times: int) -> Cond:
        """Each sample `times` times, group-major: a a b b."""
        return self[[i for i in range(len(self)) for _ in range(times)]]

    def having(self, **given: Any) -> Cond:
        """The same samples with further keywords of `__call__` that have one row each: `image=(B, 3, H, W)`.

        Raises:
            CondError: a keyword with another number of rows.
        """
        added = rows_of(given, len(self))
        return replace(self, given=tuple({**mine, **more} for mine, more in zip(self.given, added, strict=True)))

    def to(self, device: torch.device | str) -> Cond:
        """The same samples with every tensor on a device."""
        return replace(self, encoded=_moved(self.encoded, device), given=_moved(self.given, device))

    def call(self, number: int) -> Tree:
        """What the pipeline's `number`-th call of `encode_prompt` returns for these samples.

        Raises:
            CondError: there was no such call when the prompts were encoded.
        """
        if any(number >= len(self.encoded[row]) for row in self.rows):
            raise CondError(
                f"The pipeline asks for a prompt encoding that these {len(self)} samples lack: encode them with "
                "negative= to use true classifier-free guidance."
            )
        return collate([self.encoded[row][number] for row in self.rows])

    def keywords(self) -> dict[str, Tree]:
        """The given keywords of `__call__`, batched."""
        names = self.given[0] if self.given else ()
        return {name: collate([row[name] for row in self.given]) for name in names}


def rows_of(given: dict[str, Any], rows: int, second_axis: int = 0) -> list[dict[str, Tree]]:
    """Split keywords that have one entry per sample (`second_axis`: as in `split_rows`).

    Raises:
        CondError: one has not.
    """
    parts = {}
    for name, value in given.items():
        listed = list(value) if isinstance(value, (list, tuple)) else value
        sizes = [len(v) for v in (listed,) if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim)]
        if second_axis and isinstance(value, Tensor) and value.ndim == second_axis:
            sizes = [value.shape[1]]
        if sizes != [rows]:
            found = sizes[0] if sizes else "no"
            raise CondError(f"Expected {name} to have {rows} rows, one per sample, but it has {found}.")
        parts[name] = split_rows(listed, rows, second_axis)
    return [{name: part[i] for name, part in parts.items()} for i in range(rows)]


def split_rows(tree: Tree, rows: int, second_axis: int = 0) -> list[Tree]:
    """An encoder's output for `rows` prompts -> one tree each; what has no row per prompt belongs to all.

    Args:
        tree: nested tuples of tensors and lists.
        rows: number of prompts.
        second_axis: tensors of so many dimensions have their rows along the second one.
    """
    if isinstance(tree, Tensor) and second_axis and tree.ndim == second_axis:
        return [_Slice(item) for item in tree.unbind(1)]
    if isinstance(tree, Tensor) and tree.ndim and len(tree) == rows:
        return list(tree)
    if isinstance(tree, tuple):
        parts = [split_rows(part, rows, second_axis) for part in tree]
        return [tuple(part[i] for part in parts) for i in range(rows)]
    if isinstance(tree, list) and len(tree) == rows:
        return [_Listed(item) for item in tree]
    return [_Common(tree) if isinstance(tree, Tensor) else tree] * rows


def ambiguous(tree: Tree, rows: int) -> bool:
    """Whether some sequence is as long as there are prompts, so that lengths cannot tell rows from positions."""
    if isinstance(tree, Tensor):
        return tree.ndim > 1 and tree.shape[0] == tree.shape[1] == rows > 1
    return isinstance(tree, (tuple, list)) and any(ambiguous(part, rows) for part in tree)


def collate(rows: list[Tree]) -> Tree:
    """The inverse of `split_rows`: one batch of rows that may come from different encodings.

    Sequences of different lengths are padded with zeros at their end, which their masks say; a mask that an encoder
    left out because it would be all ones is filled in.
    """
    first = rows[0]
    if isinstance(first, _Listed):
        return [row.item for row in rows]
    if isinstance(first, _Common):
        return max((row.item for row in rows), key=len)  # positions of the longest prompt
    if isinstance(first, _Slice):
        return torch.stack([row.item for row in rows], 1)
    if isinstance(first, tuple):
        parts = list(zip(*rows, strict=True))
        lengths = [[len(row) for row in part] for part in parts if isinstance(part[0], Tensor) and part[0].ndim == 2]
        uneven = next((n for n in lengths if len(set(n)) > 1), None)
        if uneven and not any(_is_mask(row) for part in parts for row in part if row is not None):
            raise CondError(
                "Expected prompts of equal length in tokens, as this pipeline has no attention masks: encode all "
                "prompts in one call."
            )
        return tuple(collate(_with_masks(list(part), uneven or (lengths[0] if lengths else []))) for part in parts)
    if isinstance(first, Tensor):
        if any(row.shape != first.shape for row in rows):
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return torch.stack(rows)
    return first


def _is_mask(row: Tree) -> bool:
    return isinstance(row, Tensor) and row.ndim == 1 and bool(((row == 0) | (row == 1)).all())


def _with_masks(part: list[Tree], lengths: list[int]) -> list[Tree]:
    """Fill in masks (length,) where other rows have them."""
    like = next((row for row in part if row is not None), None)
    if like is None or not any(row is None for row in part) or not _is_mask(like):
        return part
    return [like.new_ones(n) if row is None else row for row, n in zip(part, lengths, strict=True)]


def _moved(tree: Tree, device: torch.device | str) -> Tree:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, (_Listed, _Slice, _Common)):
        return type(tree)(_moved(tree.item, device))
    if isinstance(tree, dict):
        return {name: _moved(value, device) for name, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_moved(part, device) for part in tree)
    return tree
