"""PickScore: CLIP ViT-H/14 fine-tuned on 500,000 choices of Pick-a-Pic (Kirstain et al., arXiv 2305.01569).

    s = exp(logit_scale) cos(image, text)

Differences of scores are log-odds of a choice: softmax over the candidates of a prompt gives their probabilities. The
scale is the checkpoint's own, about 100. No departure from the published recipe.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.rewards.checkpoints import CLIP_WORDS
from t2i_align.rewards.clip import TowerScorer
from t2i_align.rewards.files import WeightFile, find_weights
from t2i_align.rewards.tower import TowerSpec

PUBLISHED, COMMIT = "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"


class PickScore(TowerScorer):
    """Log-odds that people choose the picture for the prompt; 18 to 24 for today's pictures.

    Args:
        weights: a local folder with `config.json` and `model.safetensors`, and with tokenizer and image processor where
            they are not those of CLIP ViT-H/14; "" for the published ones.

    Raises:
        RewardError: weights that are missing or cannot be opened.
    """

    name = "pickscore"
    needs_prompt = True
    without_std = True
    unit: ClassVar[str] = "log-odds"
    license: ClassVar[str] = "MIT code; the weights state none"
    source: ClassVar[str] = PUBLISHED
    files: ClassVar[tuple[WeightFile, ...]] = (
        WeightFile("model.safetensors", PUBLISHED, revision=COMMIT),
        WeightFile("config.json", PUBLISHED, revision=COMMIT),
    )
    summary: ClassVar[str] = "which picture people choose for a prompt (Pick-a-Pic)"

    def __init__(self, weights: str = "") -> None:
        folder = find_weights(weights, self.files[0], self.name, self.files[1:]).parent
        own = (folder / "tokenizer_config.json").is_file()
        super().__init__(TowerSpec(str(folder), processor="" if own else CLIP_WORDS))
        self.range = (-self.tower.scale, self.tower.scale)

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        text = self.tower.text_features(prompts.text)
        return self.tower.scale * (self.tower.image_features(images) * text).sum(1)
