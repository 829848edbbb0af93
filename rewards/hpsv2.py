"""Human Preference Score v2: CLIP ViT-H/14 fine-tuned on 800,000 choices of HPDv2 (Wu et al., arXiv 2306.09341).

    s = cos(image, text), without the scale; the benchmark's tables show 100 s

The whole picture is seen: the *longest* side becomes 224, the rest is black before normalisation. It is resized as a
float picture, and what bicubic interpolation overshoots is kept, as published. torchvision antialiases float pictures
only since 0.17: the numbers of the paper come without (`antialias=False`), those of anyone who runs the published code
today with it. Departures: a picture whose longest side is 224 already is padded (the published code stops); fp32
instead of automatic fp16.

2.0 and 2.1 are not on one scale, and 2.0's `score` and `evaluate` differ in which they use: name the version.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.rewards.clip import TowerScorer
from t2i_align.rewards.files import WeightFile, find_weights
from t2i_align.rewards.tower import CLIP_MEAN, CLIP_STD, Preprocessing, TowerSpec

PUBLISHED, COMMIT = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"


class HPSv2(TowerScorer):
    """Cosine of picture and prompt by HPS v2.0; 0.23 to 0.29 for today's pictures.

    Args:
        weights: the published checkpoint as a local file, or a folder that has it; "" for the hub's.
        antialias: False for the numbers of the paper.
        model: open_clip's name of the architecture.
        size: side of the network's input in pixels.

    Raises:
        RewardError: weights that are missing or cannot be opened.
    """

    name = "hpsv2"
    needs_prompt = True
    range = (-1.0, 1.0)
    without_std = True
    unit: ClassVar[str] = "cosine"
    license: ClassVar[str] = "Apache-2.0"
    source: ClassVar[str] = PUBLISHED
    files: ClassVar[tuple[WeightFile, ...]] = (WeightFile("HPS_v2_compressed.pt", PUBLISHED, revision=COMMIT),)
    summary: ClassVar[str] = "which picture people prefer for a prompt (HPDv2), version 2.0"

    def __init__(self, weights: str = "", antialias: bool = True, model: str = "ViT-H-14", size: int = 224) -> None:
        path = find_weights(weights, self.files[0], self.name)
        letterbox = Preprocessing(
            (size, size), CLIP_MEAN, CLIP_STD, "longest", fill=0.0, antialias=antialias, eight_bit=False
        )
        super().__init__(TowerSpec(model, str(path), preprocessing=letterbox))

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        text = self.tower.text_features(prompts.text)
        return (self.tower.image_features(images) * text).sum(1)


class HPSv21(HPSv2):
    """Cosine of picture and prompt by HPS v2.1; 0.15 to 0.31 for today's pictures. Arguments are those of `HPSv2`."""

    name = "hpsv2.1"
    files: ClassVar[tuple[WeightFile, ...]] = (WeightFile("HPS_v2.1_compressed.pt", PUBLISHED, revision=COMMIT),)
    summary: ClassVar[str] = "which picture people prefer for a prompt (HPDv2), version 2.1"
