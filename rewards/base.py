"""The scorer contract: what a reward is, for training, steering and batch scoring alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from t2i_align.data.images import to_tensors
from t2i_align.prompts import Prompts
from t2i_align.rewards.expression import RewardError


class Scores(NamedTuple):
    """Scores of a batch; larger is better, always.

    `total`: (B,) float32. `parts`: each scorer's own values by name, (B,) in its own unit. `std`: (B,) the scorer's
    own uncertainty in the unit of `total`, or None.
    """

    total: Tensor
    parts: dict[str, Tensor]
    std: Tensor | None = None


class Scorer(nn.Module):
    """Base of all scorers: a subclass declares facts and implements `forward`.

    `forward(images, prompts)` receives images (B, 3, H, W) in [0, 1] and a `Prompts` table of B rows and returns (B,)
    or (mean, std), both (B,).
    """

    name: str = ""
    differentiable: bool = False  # gradients reach the pixels
    needs_prompt: bool = False
    columns: tuple[str, ...] = ()  # prompt columns read besides the text
    range: tuple[float, float] = (-float("inf"), float("inf"))  # of possible values
    unit: ClassVar[str] = ""
    license: ClassVar[str] = "Apache-2.0"  # of code and weights
    source: ClassVar[str] = "none"  # where they come from
    tolerance: ClassVar[float] = 1e-4  # relative difference between a PIL image and its float tensor
    summary: ClassVar[str] = ""

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    @classmethod
    def missing(cls) -> str | None:
        """What keeps the scorer from working here (absent weights, say), or None."""
        return None

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
            images: what `t2i_align.data.images.to_tensors` takes.
            prompts: one string for all images, one per image, or a `Prompts` table.
            batch_size: images of one size that go through the scorer together.

        Raises:
            RewardError: prompts or columns are missing or cannot be scored, or a gradient was asked of a scorer
                that has none.
        """
        tensors = to_tensors(images)
        if not len(tensors):
            return Scores(torch.empty(0), {self.name: torch.empty(0)})
        table = Prompts.of(prompts, len(tensors))
        self.check(tensors, table, given=prompts is not None)
        if isinstance(tensors, Tensor):
            parts = [
                self._score(tensors[first : first + batch_size], table[first : first + batch_size])
                for first in range(0, len(tensors), batch_size)
            ]
            return _concatenate(parts)
        by_size: dict[torch.Size, list[int]] = {}
        for row, tensor in enumerate(tensors):
            by_size.setdefault(tensor.shape, []).append(row)
        order = [row for rows in by_size.values() for row in rows]
        parts = [
            self._score(
                torch.stack([tensors[row] for row in rows[first : first + batch_size]]),
                table[rows[first : first + batch_size]],
            )
            for rows in by_size.values()
            for first in range(0, len(rows), batch_size)
        ]
        back = torch.tensor(order).argsort()
        return _map(lambda values: values[back.to(values.device)], _concatenate(parts))

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

    def _score(self, images: Tensor, prompts: Prompts) -> Scores:
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            value = self(images, prompts)
        mean, std = value if isinstance(value, tuple) else (value, None)
        return Scores(mean.float(), {self.name: mean.float()}, None if std is None else std.float())


def _map(function: Any, scores: Scores) -> Scores:
    parts = {name: function(values) for name, values in scores.parts.items()}
    return Scores(function(scores.total), parts, None if scores.std is None else function(scores.std))


def _concatenate(parts: list[Scores]) -> Scores:
    names = parts[0].parts
    std = None if parts[0].std is None else torch.cat([p.std for p in parts if p.std is not None])
    return Scores(
        torch.cat([p.total for p in parts]), {name: torch.cat([p.parts[name] for p in parts]) for name in names}, std
    )
