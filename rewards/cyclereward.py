"""CycleReward (Bahng et al., arXiv 2506.02095): agreement of picture and prompt, learnt from cycle consistency.

    r = head(BLIP(picture, prompt))

ImageReward's network with a GELU between the head's layers, 128 tokens of prompt, and no mean or sd taken off.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.blip import VOCABULARY, load_blip
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile

RELEASE = "https://github.com/hjbahng/cyclereward/releases/download/v1.0.0"
CONTEXT = 128
Variant = Literal["Combo", "I2T", "T2I"]


def published(variant: str) -> WeightFile:
    """The release file of a variant."""
    file = f"CycleReward-{variant}.pth"
    return WeightFile(file, url=f"{RELEASE}/{file}")


class Head(nn.Sequential):
    """Width -> 1024 -> 128 -> 64 -> 16 -> 1 with GELU."""

    def __init__(self, width: int) -> None:
        widths = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(one, other) for one, other in zip(widths, widths[1:], strict=False)]
        between = [layer for one in linear[:-1] for layer in (one, nn.GELU())]
        super().__init__(*between, linear[-1])


class CycleReward(Scorer):
    """CycleReward: agreement of picture and prompt, on BLIP.

    Args:
        weights: the published .pth file, or a folder that holds it (and vocab.txt); "" is the hub's cache.
        vocabulary: bert-base-uncased's vocab.txt, or a folder that holds it.
        variant: what it was trained on: `Combo`, `I2T` or `T2I`.

    Raises:
        RewardError: an unknown variant, or files that are missing or are not CycleReward's.
    """

    name = "cyclereward"
    differentiable = True
    needs_prompt = True
    without_std = True
    unit: ClassVar[str] = "log-odds"
    license: ClassVar[str] = "MIT"
    source: ClassVar[str] = "github.com/hjbahng/cyclereward"
    files: ClassVar[tuple[WeightFile, ...]] = (published("Combo"), VOCABULARY)
    summary: ClassVar[str] = "agreement of picture and prompt by cycle consistency (BLIP)"

    def __init__(self, weights: str = "", vocabulary: str = "", variant: Variant = "Combo") -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise RewardError(
                f"Unknown variant {variant!r} of cyclereward.{nearest(variant, get_args(Variant))} Expected Combo, I2T "
                "or T2I."
            )
        self.network = load_blip(weights, vocabulary, published(variant), Head, CONTEXT, self.name)
        self.preprocessing = self.network.preprocessing

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        return self.network(images, prompts.text)
