"""Aesthetic predictor v2.5 (discus0434, 2024; no paper): a head on SigLIP so400m's pooled image embedding.

    s = head(e / |e|), five linear layers without activation: affine, as LAION's

Pictures are squashed to 384x384, whatever their shape. The code and weights are under AGPL-3.0: check that before you
train on it. No departure but fp32; nothing of the project's code is used.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from t2i_align.prompts import Prompts
from t2i_align.rewards.aesthetic import head_layers, score_features
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.checkpoints import missing_weights
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile, find_weights, join_missing, load_strictly, read_weights
from t2i_align.rewards.tower import Preprocessing

BACKBONE = "google/siglip-so400m-patch14-384"
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and sd


class AestheticV25(Scorer):
    """How much people like the look of the picture, 1 to 10; 5.5 and more is called great. Reads no prompt.

    Args:
        weights: the head as a local file, or a folder that has it; "" for the published one.
        name: folder or hub id of the SigLIP.

    Raises:
        RewardError: weights that are missing or cannot be opened, or a head of another SigLIP.
    """

    name = "aesthetic_v2.5"
    differentiable = True
    without_std = True
    unit: ClassVar[str] = "points"
    license: ClassVar[str] = "AGPL-3.0; SigLIP Apache-2.0"
    source: ClassVar[str] = "github.com/discus0434/aesthetic-predictor-v2-5"
    files: ClassVar[tuple[WeightFile, ...]] = (
        WeightFile(
            "aesthetic_predictor_v2_5.pth",
            url="https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
        ),
        WeightFile("model.safetensors", BACKBONE),
    )
    summary: ClassVar[str] = "aesthetic predictor v2.5 on SigLIP (AGPL)"
    preprocessing: Preprocessing

    def __init__(self, weights: str = "", name: str = BACKBONE) -> None:
        super().__init__()
        path = find_weights(weights, self.files[0], self.name)
        if missing := missing_weights(name):
            raise RewardError(f"The scorer {self.name!r} cannot be used: {missing}")
        from transformers import SiglipVisionModel

        state = read_weights(path)
        self.scoring_head = head_layers(state)
        load_strictly(self, state, path)
        try:
            self.backbone = SiglipVisionModel.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise RewardError(f"Cannot open the SigLIP {name!r}: {' '.join(str(error).split())}") from error
        config = self.backbone.config
        if self.scoring_head[0].in_features != config.hidden_size:
            raise RewardError(
                f"Expected a head for the {config.hidden_size} features of {name} but got that of {path}."
            )
        self.preprocessing = Preprocessing((config.image_size,) * 2, HALF, HALF, "squash")

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        head = None if options.get("weights") else cls.files[0].missing()
        return join_missing(head, missing_weights(options.get("name") or BACKBONE))

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        pixels = self.preprocessing(images.float()).to(next(self.backbone.parameters()).dtype)
        pooled = self.backbone(pixel_values=pixels).pooler_output
        return score_features(self.scoring_head, F.normalize(pooled.float(), dim=-1))
