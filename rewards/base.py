"""The scorer contract: what a reward is, for training, steering and batch scoring alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from t2i_align.data.images import to_tensors
from t2i_align.prompts import Prompts
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile, missing_files


class Scores(NamedTuple):
    """Scores of a batch; larger is better, always.

    `total`: (B,) float32. `parts`: each scorer's own values by name, (B,) in its own unit. `std`: (B,) the scorer's
    own uncertainty in the unit of `total`, or None.
    """

    total: Tensor
    parts: dict[str, Tensor]
    std: Tensor | None = None


class Fitting(Protocol):
    """How pictures of any size become those that a network takes, all of one size."""

    def fit(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, *size); pictures that it made before stay as they are."""
        ...


class Scorer(nn.Module):
    """Base of all scorers: a subclass declares facts and implements `forward`.

    `forward(images, prompts)` receives images (B, 3, H, W) in [0, 1] and a `Prompts` table of B rows and returns (B,)
    or (mean, std), both (B,).
    """

    name: str = ""
    made_with: str = ""  # options of its block that are not the defaults, as JSON; other options, another calibration
    differentiable: bool = False  # gradients reach the pixels
    needs_prompt: bool = False
    groupwise: bool = False  # compares images of one prompt: a score depends on the other rows of the call
    without_std: bool = False  # certainly returns no std; False also where it may or may not
    preprocessing: Fitting | None = None  # where pictures of all sizes may be fitted first, to be one batch
    columns: tuple[str, ...] = ()  # prompt columns read besides the text
    range: tuple[float, float] = (-float("inf"), float("inf"))  # of possible values
    unit: ClassVar[str] = ""
    license: ClassVar[str] = "Apache-2.0"  # of code and weights
    source: ClassVar[str] = "none"  # where they come from
    files: ClassVar[tuple[WeightFile, ...]] = ()  # published weights that it reads unless local ones are named
    tolerance: ClassVar[float] = 1e-4  # relative difference between a PIL image and its float tensor
    summary: ClassVar[str] = ""

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        """What keeps the scorer, made with these options, from working here (absent weights, say), or None."""
        return None if options.get("weights") else missing_files(cls.files)  # local ones are looked for when it is made

    def refuse(self, prompt: str) -> str | None:
        """Why this prompt cannot be scored, or None; lets a batch job report a row instead of stopping."""
        return None

    def explain(self, image: Any, prompt: str) -> str | None:
        """Why an image scores what it does, in words; None where the scorer cannot say."""
        return None

    def scores(
        self,
        images: Any,
        prompts: str | Sequence[str] | Prompts | None = None,
        batch_size: int = 64,
    ) -> Scores:
        """Score images of any kind and size.

        Args:
            images: what `t2i_align.data.images.to_tensors` takes; they move to where the scorer's networks are.
            prompts: one string for all images, one per image, or a `Prompts` table.
            batch_size: images of one size that go through the scorer together.

        Raises:
            RewardError: prompts or columns are missing or cannot be scored, or a gradient was asked of a scorer
                that has none.
        """
        tensors = to_tensors(images)
        if not len(tensors):
            return Scores(torch.empty(0), {name: torch.empty(0) for name in self.part_names()})
        table = Prompts.of(prompts, len(tensors))
        self.check(tensors, table, given=prompts is not None)
        place = next((weight.device for network in self.networks() for weight in network.parameters()), None)
        leaves = self.leaves()
        seen: dict[Scorer, list[tuple[Tensor, ...]]] = {leaf: [] for leaf in leaves}
        batches = _batches(tensors, batch_size)
        for rows in batches:
            if isinstance(tensors, Tensor):
                batch = tensors[rows[0] : rows[-1] + 1]
            else:
                batch = torch.stack([tensors[row] for row in rows])
            batch = batch if place is None else batch.to(place)
            for leaf in leaves:  # one object for all of them: scorers on one tower find its features ready
                seen[leaf].append(leaf.measure(batch, table[rows]))
        back = torch.tensor([row for rows in batches for row in rows]).argsort()
        measured = {
            leaf: tuple(torch.cat(values)[back.to(values[0].device)] for values in zip(*parts, strict=True))
            for leaf, parts in seen.items()
        }
        return self.combine(measured, table)

    def leaves(self) -> list[Scorer]:
        """The scorers that look at pixels, each once; of a scorer made of others, theirs."""
        return [self]

    def networks(self) -> list[nn.Module]:
        """The modules whose weights decide the score; overridden by scorers that share one without owning it."""
        return [self]

    def part_names(self) -> tuple[str, ...]:
        """The names of `Scores.parts`."""
        return (self.name,)

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, ...]:
        """What `combine` needs of a batch: tensors with one row per image, here (mean,) or (mean, std)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            value = self(images, prompts)
        parts = value if isinstance(value, tuple) else (value,)
        if any(part.shape != (len(images),) for part in parts):  # (B, 1) would broadcast to (B, B) in a sum
            raise RewardError(
                f"Expected {self.name!r} to return one number for each of {len(images)} images but got shape "
                f"{', '.join(str(tuple(part.shape)) for part in parts)}."
            )
        return tuple(part.float() for part in parts)

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        """Scores of all rows of a call, from what its leaves measured batch by batch."""
        mean, *std = measured[self]
        return Scores(mean, {self.name: mean}, std[0] if std else None)

    def check(self, images: Tensor | list[Tensor], prompts: Prompts, given: bool = True) -> None:
        """Raise RewardError where `forward` could not do what is asked of it."""
        if self.needs_prompt and not given:
            raise RewardError(f"The scorer {self.name!r} reads the prompt: pass one prompt per image.")
        absent = [column for column in self.columns if column not in prompts.columns]
        if absent:
            raise RewardError(
                f"The scorer {self.name!r} reads the prompt columns {', '.join(absent)}, which are missing."
            )
        if not self.differentiable and any(image.requires_grad for image in images):
            raise RewardError(
                f"The scorer {self.name!r} is not differentiable: detach the images, or use a scorer that "
                "`t2i-align rewards` lists as differentiable."
            )
        for prompt in dict.fromkeys(prompts.text):
            reason = self.refuse(prompt)
            if reason:
                raise RewardError(f"The scorer {self.name!r} cannot score {prompt!r}: {reason}")

    def __mul__(self, weight: float) -> Scorer:
        if not isinstance(weight, (int, float)):
            return NotImplemented
        from t2i_align.rewards.compose import weighted_sum

        return weighted_sum((float(weight), self))

    def __add__(self, other: Scorer) -> Scorer:
        if not isinstance(other, Scorer):
            return NotImplemented
        from t2i_align.rewards.compose import weighted_sum

        return weighted_sum((1.0, self), (1.0, other))

    def __radd__(self, other: int) -> Scorer:  # `sum()` starts from 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Scorer) -> Scorer:
        return self + -other if isinstance(other, Scorer) else NotImplemented

    def __neg__(self) -> Scorer:
        return -1.0 * self

    def __truediv__(self, number: float) -> Scorer:
        return self * (1 / number) if isinstance(number, (int, float)) else NotImplemented

    __rmul__ = __mul__


def _batches(tensors: Tensor | list[Tensor], batch_size: int) -> list[list[int]]:
    """Rows that go through a scorer together: images of one size, at most `batch_size`."""
    by_size: dict[torch.Size, list[int]] = {}
    for row, tensor in enumerate(tensors):
        by_size.setdefault(tensor.shape, []).append(row)
    return [rows[first : first + batch_size] for rows in by_size.values() for first in range(0, len(rows), batch_size)]
