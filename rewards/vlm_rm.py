"""VLM-RM: CLIP regularised along the direction from a baseline to a goal (Rocamonde et al., arXiv 2310.12921).

With unit image embedding s, goal g, baseline b, d = g - b and P = alpha d d^T / |d|^2 + (1 - alpha) I,

    r = 1 - |P (s - g)|^2 / 2 = 1 - ((1 - alpha)^2 |s - g|^2 + (2 alpha - alpha^2) c^2) / 2,   c = (s - g) d / |d|

alpha = 0 is the cosine; alpha = 1 looks along d alone: 1 - c^2 / 2. Several descriptions of a goal are averaged and not
normalised again, as published. Departures: the goal is each image's prompt unless one is named; gradients pass. The
paper has it that the size of CLIP decides: RN50 fails, ViT-bigG/14 serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.rewards import clip
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile
from t2i_align.rewards.tower import TowerSpec

SMALL = 1e-6  # lengths of d below which goal and baseline are one text to the tokenizer


class VLMRM(clip.TowerScorer):
    """Goal-baseline regularised CLIP.

    Args:
        baseline: what pictures are like without the goal; one text or several.
        goal: what is wanted; "" for each image's prompt.
        alpha: 0 (cosine) to 1 (the direction alone).
        name: folder or hub id of a transformers `CLIPModel`, or a name that open_clip takes.
        weights: for an open_clip model name: a tag or a checkpoint file.

    Raises:
        RewardError: an alpha outside [0, 1], equal goal and baseline, or weights that cannot be opened.
    """

    name = "vlm_rm"
    needs_prompt = True
    range = (-1.0, 1.0)
    without_std = True
    unit: ClassVar[str] = "cosine"
    license: ClassVar[str] = "MIT"
    source: ClassVar[str] = clip.PUBLISHED
    files: ClassVar[tuple[WeightFile, ...]] = clip.CLIP.files
    summary: ClassVar[str] = "cosine of picture and prompt along the direction from a baseline text"

    def __init__(
        self,
        baseline: str | Sequence[str] = "an image",
        goal: str | Sequence[str] = "",
        alpha: float = 0.5,
        name: str = clip.PUBLISHED,
        weights: str = "",
    ) -> None:
        self.baseline, self.goal = _texts(baseline), _texts(goal)
        if not 0 <= alpha <= 1 or not self.baseline:
            raise RewardError(f"Expected vlm_rm to have a baseline and alpha in [0, 1] but got {baseline!r}, {alpha}.")
        if alpha and self.goal == self.baseline:
            raise RewardError(f"Expected vlm_rm to have a goal that is not the baseline but got {goal!r} for both.")
        super().__init__(TowerSpec(name, weights))
        self.alpha, self.needs_prompt = alpha, not self.goal

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        return clip.CLIP.missing(**options)

    def refuse(self, prompt: str) -> str | None:
        same = self.alpha and not self.goal and (prompt,) == self.baseline
        return "it is the baseline, so there is no direction from one to the other." if same else None

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        image = self.tower.image_features(images)
        goal = self._mean(self.goal)[None] if self.goal else self.tower.text_features(prompts.text)
        return regularised(image, goal, self._mean(self.baseline), self.alpha)

    def _mean(self, texts: Sequence[str]) -> Tensor:
        return self.tower.text_features(texts).mean(0)


def regularised(image: Tensor, goal: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """The formula above for rows of (B, D), or one row for all -> (B,)."""
    direction = goal - baseline
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=SMALL)
    gap = image - goal
    along = (gap * direction).sum(-1)
    return 1 - ((1 - alpha) ** 2 * gap.square().sum(-1) + (2 * alpha - alpha**2) * along.square()) / 2


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return ((given,) if given else ()) if isinstance(given, str) else tuple(given)
