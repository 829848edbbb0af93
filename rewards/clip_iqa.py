"""CLIP-IQA: image quality as a choice between two opposite descriptions (Wang et al., arXiv 2207.12396).

    r = softmax(exp(logit_scale) (cos(image, good), cos(image, bad)))_0 = sigmoid(exp(logit_scale) (cos_good - cos_bad))

averaged over pairs: the paper's pair ("Good photo.", "Bad photo."), or pyiqa's five. CLIP is OpenAI's RN50 without the
position embedding of its attention pool, so that pictures of any size go in as they are: no resize, no crop. No
departure; the learned prompts of CLIP-IQA+ are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.prompts import Prompts
from t2i_align.rewards.clip import TowerScorer
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile, find_weights
from t2i_align.rewards.tower import CLIP_MEAN, CLIP_STD, Preprocessing, TowerSpec

PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "paper": (("Good photo.", "Bad photo."),),
    "pyiqa": (
        ("Good image", "bad image"),
        ("Sharp image", "blurry image"),
        ("sharp edges", "blurry edges"),
        ("High resolution image", "low resolution image"),
        ("Noise-free image", "noisy image"),
    ),
}
SMALLEST = 31  # pixels a side, below which nothing is left after the network's five halvings
POSITIONS = "attnpool.positional_embedding"


class ClipIQA(TowerScorer):
    """Probability that the picture is good rather than bad, by CLIP. Reads no prompt.

    Args:
        pairs: `paper`, `pyiqa`, or pairs of a good and a bad description.
        weights: open_clip's weights of the network as a local file, or a folder that has it; "" for OpenAI's.
        model: open_clip's name of the architecture.

    Raises:
        RewardError: unknown pairs, weights that are missing or cannot be opened, or a CLIP that is not a ResNet.
    """

    name = "clip_iqa"
    range = (0.0, 1.0)
    without_std = True
    unit: ClassVar[str] = "probability"
    license: ClassVar[str] = "MIT (CLIP)"
    source: ClassVar[str] = "timm/resnet50_clip.openai"
    files: ClassVar[tuple[WeightFile, ...]] = (WeightFile("open_clip_model.safetensors", source),)
    summary: ClassVar[str] = "image quality: a good or a bad photo, by CLIP RN50"

    def __init__(
        self, pairs: str | Sequence[tuple[str, str]] = "paper", weights: str = "", model: str = "RN50-quickgelu"
    ) -> None:
        if isinstance(pairs, str) and pairs not in PAIRS:
            raise RewardError(
                f"Unknown pairs {pairs!r} of clip_iqa.{nearest(pairs, PAIRS)} Expected {', '.join(PAIRS)}."
            )
        path = find_weights(weights, self.files[0], self.name)
        as_it_is = Preprocessing((0, 0), CLIP_MEAN, CLIP_STD, "none")
        super().__init__(TowerSpec(model, str(path), preprocessing=as_it_is))
        self.pairs = PAIRS[pairs] if isinstance(pairs, str) else tuple((good, bad) for good, bad in pairs)
        visual = self.tower.network.get_submodule("visual")
        if POSITIONS not in dict(visual.named_parameters()):
            raise RewardError(f"Expected a CLIP with a ResNet, such as RN50, but {model} has {type(visual).__name__}.")
        self.tower.encode_image = _encode  # of all on this tower: its spec is no other scorer's

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        if min(images.shape[-2:]) < SMALLEST:
            raise RewardError(f"{self.name!r} needs images of {SMALLEST} pixels or more but got {tuple(images.shape)}.")
        good, bad = (self.tower.text_features(texts) for texts in zip(*self.pairs, strict=True))  # (pairs, D)
        return torch.sigmoid(self.tower.scale * self.tower.image_features(images) @ (good - bad).T).mean(1)


def _encode(network: nn.Module, pixels: Tensor) -> Tensor:
    """Image embeddings (B, D) with zeros for the position embedding, one row of them for any number of tokens."""
    visual = network.get_submodule("visual")
    positions = visual.get_parameter(POSITIONS)
    return torch.func.functional_call(visual, {POSITIONS: torch.zeros_like(positions[:1])}, (pixels,))
