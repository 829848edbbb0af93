"""One batch of decoded images -> rows of the table; what one row or one scorer does wrong costs that row alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2i_align.data.tables import printable
from t2i_align.errors import T2IError
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer
from t2i_align.rewards.base import Fitting
from t2i_align.rewards.clip import TowerScorer
from t2i_align.rewards.tower import Preprocessing
from t2i_align.scoring.decode import Decoded, decode_row
from t2i_align.scoring.inputs import Row

BATCH_PIXELS = 16_000_000  # scored at once; as floats they take about 0.2 GB, twice that in a scorer
DTYPES = ("fp32", "bf16")

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Scoring:
    """How batches are scored.

    `dtype`: "bf16" computes in bfloat16: towers with weights of that type inside `precision()`, all other scorers by
    autocast; scores stay fp32. `explain`: scorers that can say why add a column `NAME_report`.
    """

    scorers: Sequence[Scorer]
    device: torch.device = torch.device("cpu")
    dtype: Dtype = "fp32"
    explain: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        mixed = next((scorer.name for scorer in self.scorers if scorer.groupwise), None)
        if mixed is not None:
            raise T2IError(
                f"{mixed!r} compares the images of one prompt with each other, which a table scored batch by batch "
                "cannot: score its parts, and combine the columns."
            )

    @property
    def on_towers(self) -> list[TowerScorer]:
        """The scorers among `scorers` and their parts that look through a tower."""
        modules = (module for scorer in self.scorers for module in scorer.modules())
        return [module for module in modules if isinstance(module, TowerScorer)]

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Towers in the number type asked for. Autocast would round their weights anew for every batch."""
        before = [scorer.tower for scorer in self.on_towers]
        try:
            for scorer, tower in zip(self.on_towers, before, strict=True):
                scorer._hold(tower.on(self.device, torch.bfloat16) if self.dtype == "bf16" else tower)
            yield
        finally:
            for scorer, tower in zip(self.on_towers, before, strict=True):
                scorer._hold(tower)

    def forget(self) -> None:
        """Drop texts that towers remember: how they round depends on the batch they were encoded in."""
        for scorer in self.on_towers:
            scorer.tower.texts.clear()

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, Any]]:
        """A table row for each of `batch`, with the columns of `score_columns`."""
        table = [self._blank(item) for item in batch]
        pictures = Pictures([item.pixels for item in batch], self.device)
        for scorer in self.scorers:
            reasons = {at: _refusal(scorer, batch[at].row) for at in pictures.readable}
            for at, reason in reasons.items():
                if reason:
                    _add_error(table[at], f"{scorer.name}: {reason}")
            able = tuple(at for at, reason in reasons.items() if not reason)
            for at, values in self._score(scorer, pictures, batch, able).items():
                self._fill(table[at], scorer, values, batch[at])
        return table

    def _blank(self, item: Decoded) -> dict[str, Any]:
        row, scores = item.row, dict.fromkeys(score_columns(self.scorers))
        rest = {name: value for name, value in row.rest.items() if name not in ("image", "prompt", "error", *scores)}
        made = {"image": str(row.image), "prompt": row.prompt, **rest, **scores, "error": item.error}
        return printable(made | ({"image_note": item.note} if item.note else {}))

    def _fill(self, row: dict[str, Any], scorer: Scorer, values: dict[str, float | None] | str, item: Decoded) -> None:
        if isinstance(values, str):
            _add_error(row, values)
            return
        row |= values
        if self.explain and (said := _report(scorer, item)):
            row[f"{scorer.name}_report"] = said
        if values[scorer.name] is None:
            _add_error(row, f"{scorer.name}: the score is not a finite number")

    def _score(
        self, scorer: Scorer, pictures: Pictures, batch: Sequence[Decoded], able: tuple[int, ...]
    ) -> dict[int, dict[str, float | None] | str]:
        """Values of the rows `able`; where they fail together, each half by itself, down to the guilty rows."""
        if not able:
            return {}
        rows = [batch[at].row for at in able]
        columns = {name: tuple(row.rest[name] for row in rows) for name in scorer.columns}
        prompts = Prompts(tuple(row.prompt or "" for row in rows), columns)
        try:
            with torch.no_grad():
                scorer.check([], prompts)
                measured = {leaf: self._measure(leaf, pictures, prompts, able) for leaf in scorer.leaves()}
                scores = scorer.combine(measured, prompts)
        except Exception as error:
            if len(able) == 1:
                return {able[0]: f"{scorer.name}: {_said(error)}"}
            halves = able[: len(able) // 2], able[len(able) // 2 :]
            return {at: v for half in halves for at, v in self._score(scorer, pictures, batch, half).items()}
        named = {**scores.parts, scorer.name: scores.total}
        if scores.std is not None:
            named[f"{scorer.name}_std"] = scores.std
        lists = {name: values.tolist() for name, values in named.items()}
        return {at: {name: _finite(lists[name][n]) for name in lists} for n, at in enumerate(able)}

    def _measure(self, leaf: Scorer, pictures: Pictures, prompts: Prompts, able: tuple[int, ...]) -> tuple[Tensor, ...]:
        """What a leaf measures of the rows `able`, in their order."""
        tower = leaf.tower if isinstance(leaf, TowerScorer) else None
        how = tower.preprocessing if tower else leaf.preprocessing
        groups = pictures.by_size(able) if how is None else pictures.fitted(able, how)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16" and tower is None):
            parts = [leaf.measure(images, prompts[places]) for places, images in groups]
        back = torch.tensor([n for places, _ in groups for n in places]).argsort()
        return tuple(torch.cat(values)[back.to(values[0].device)] for values in zip(*parts, strict=True))


class Pictures:
    """The pictures of a batch, in the tensors that scorers take; each is made once, since scorers on one tower run it
    once for the same tensor.

    `readable`: positions in the batch that have a picture.
    """

    def __init__(self, pixels: Sequence[NDArray[np.uint8] | None], device: torch.device) -> None:
        self.pixels, self.device = pixels, device
        self.readable = tuple(at for at, array in enumerate(pixels) if array is not None)
        self.made: dict[Any, list[tuple[list[int], Tensor]]] = {}

    def by_size(self, able: tuple[int, ...]) -> list[tuple[list[int], Tensor]]:
        """`(positions in able, (B, 3, H, W) in [0, 1])` for each size of the pictures `able`."""
        if able not in self.made:
            sizes: dict[Any, list[int]] = {}
            for n, at in enumerate(able):
                sizes.setdefault(self.pixels[at].shape, []).append(n)  # type: ignore[union-attr]
            self.made[able] = [
                (places, _tensor([self.pixels[able[n]] for n in places], self.device)) for places in sizes.values()
            ]
        return self.made[able]

    def fitted(self, able: tuple[int, ...], preprocessing: Fitting) -> list[tuple[list[int], Tensor]]:
        """The same as one tensor of the size that a network takes, so that pictures of many sizes make one batch.

        For a tower that takes pictures as they are it is `by_size`.
        """
        if isinstance(preprocessing, Preprocessing) and preprocessing.resize == "none":
            return self.by_size(able)
        key = (able, preprocessing)
        if key not in self.made:
            parts = self.by_size(able)
            places = [n for part, _ in parts for n in part]
            self.made[key] = [(places, torch.cat([preprocessing.fit(images) for _, images in parts]))]
        return self.made[key]


def check_dtype(dtype: str) -> None:
    """Raise T2IError unless it is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise T2IError(f"Expected the dtype {' or '.join(DTYPES)} but got {dtype!r}.")


def score_rows(
    rows: Iterable[Row], scorers: Sequence[Scorer], explain: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Score a few rows as one batch in this thread: a table row for each, with the columns of `score_columns`."""
    scoring = Scoring(scorers, explain=explain, **options)
    with scoring.precision():
        return scoring([decode_row(row) for row in rows])


def batches(items: Iterable[tuple[Any, Decoded]], size: int) -> Iterator[list[tuple[Any, Decoded]]]:
    """At most `size` rows each, with at most `BATCH_PIXELS` pixels unless one image alone has more."""
    batch: list[tuple[Any, Decoded]] = []
    pixels = 0
    for item in items:
        array = item[1].pixels
        more = 0 if array is None else array.shape[0] * array.shape[1]
        if batch and (len(batch) == size or pixels + more > BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(item)
        pixels += more
    if batch:
        yield batch


def score_columns(scorers: Sequence[Scorer]) -> list[str]:
    """Names of the score columns: each scorer's total, and the parts of sums."""
    return list(dict.fromkeys(name for scorer in scorers for name in (scorer.name, *scorer.part_names())))


def _tensor(pixels: Sequence[Any], device: torch.device) -> Tensor:
    """Arrays (H, W, 3) uint8 of one size -> (B, 3, H, W) in [0, 1], converted on the device."""
    levels = torch.from_numpy(np.stack(pixels)).to(device)
    return levels.permute(0, 3, 1, 2).contiguous().float() / 255


def _refusal(scorer: Scorer, row: Row) -> str | None:
    if scorer.needs_prompt and row.prompt is None:
        return "the row has no prompt"
    absent = [name for name in scorer.columns if row.rest.get(name) is None]
    if absent:
        return f"the row has no {', '.join(absent)}"
    return scorer.refuse(row.prompt or "")


def _report(scorer: Scorer, item: Decoded) -> str | None:
    """Why the image scores what it does; what keeps the scorer from saying so does not cost the score."""
    try:
        said = scorer.explain(item.pixels, item.row.prompt or "")
    except Exception as error:
        said = f"no report: {_said(error)}"
    return None if said is None else printable(said)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _add_error(row: dict[str, Any], message: str) -> None:
    message = printable(message)
    row["error"] = message if row["error"] is None else f"{row['error']} | {message}"
