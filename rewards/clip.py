"""CLIPScore: cosine of a picture's and its prompt's embeddings by any CLIP of open_clip or transformers.

Radford et al., arXiv 2103.00020; Hessel et al., arXiv 2104.08718. Variants, always named:

    cosine      cos, as ImageReward's repository and FK steering use it
    x100        100 cos: the checkpoint's logit, as in ReNO
    clipscore   2.5 max(cos, 0), as Hessel et al. define it; they use ViT-B/32 and the prefix "A photo depicts"

The text is the prompt as it is unless a prefix is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.checkpoints import load_tower, missing_weights
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile
from t2i_align.rewards.tower import Tower, TowerSpec

Variant = Literal["cosine", "x100", "clipscore"]
RANGES: dict[str, tuple[float, float]] = {"cosine": (-1.0, 1.0), "x100": (-100.0, 100.0), "clipscore": (0.0, 2.5)}
PUBLISHED = "openai/clip-vit-large-patch14"


class TowerScorer(Scorer):
    """Base of scorers on a CLIP tower, which they share with every other scorer on the same weights."""

    differentiable = True
    tower: Tower

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self._hold(load_tower(spec))

    def _hold(self, tower: Tower) -> None:
        # Not registered as a submodule: moving or saving one scorer must not move or save what others use, too.
        object.__setattr__(self, "tower", tower)

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), self.tower.network]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Where `.to`, `.half`, `.cuda` arrive: change to the tower that is shared on that device, in that type."""
        probe = fn(torch.empty(0, device=self.tower.device, dtype=self.tower.dtype))
        if (probe.device, probe.dtype) != (self.tower.device, self.tower.dtype):
            self._hold(self.tower.on(probe.device, probe.dtype))
        return super()._apply(fn, recurse)


class CLIP(TowerScorer):
    """Cosine of picture and prompt by a CLIP.

    Args:
        name: folder or hub id of a transformers `CLIPModel`; or for open_clip a model name, `local-dir:FOLDER` or
            `hf-hub:REPO`.
        weights: for an open_clip model name: a tag such as `openai`, or a checkpoint file.
        variant: `cosine`, `x100` or `clipscore`.
        prefix: put before the prompt.
        label: the scorer's name in sums and tables; needed where one sum has two.

    Raises:
        RewardError: an unknown variant, or weights that cannot be opened.
    """

    name = "clip"
    needs_prompt = True
    without_std = True
    unit: ClassVar[str] = "cosine"
    license: ClassVar[str] = "MIT"  # the model card puts deployment out of scope
    source: ClassVar[str] = PUBLISHED
    files: ClassVar[tuple[WeightFile, ...]] = (WeightFile("model.safetensors", PUBLISHED),)
    summary: ClassVar[str] = "cosine of picture and prompt by CLIP ViT-L/14"

    def __init__(
        self,
        name: str = PUBLISHED,
        weights: str = "",
        variant: Variant = "cosine",
        prefix: str = "",
        label: str = "",
    ) -> None:
        if variant not in get_args(Variant):
            raise RewardError(
                f"Unknown variant {variant!r} of clip.{nearest(variant, get_args(Variant))} Expected "
                f"{', '.join(get_args(Variant))}."
            )
        super().__init__(TowerSpec(name, weights))
        self.variant, self.prefix, self.range = variant, prefix, RANGES[variant]
        self.name = label or self.name

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        if options.get("weights"):  # open_clip's
            return None
        return missing_weights(options.get("name") or PUBLISHED)

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        text = self.tower.text_features([self.prefix + prompt for prompt in prompts.text])
        cosine = (self.tower.image_features(images) * text).sum(1)
        if self.variant == "clipscore":
            return 2.5 * cosine.clamp(min=0)
        return 100 * cosine if self.variant == "x100" else cosine
