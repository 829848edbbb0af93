"""Subject fidelity: does the picture show the subject of the reference pictures? (DreamBooth, arXiv 2208.12242.)

    s = mean over references of cos(f(image), f(reference))

`dino`: the class token of DINO ViT-S/16; `clip`: CLIP-I, image embeddings of CLIP ViT-B/32. DreamBooth published no
code for its metrics: DINO's preprocessing here is DINO's own for evaluation (256, then the middle 224, bicubic,
ImageNet's mean and sd). CLIP-I rewards the right kind of thing, DINO the very one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.config import nearest
from t2i_align.data.images import to_tensors
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.checkpoints import missing_weights
from t2i_align.rewards.clip import TowerScorer
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.features import Extract, Vision
from t2i_align.rewards.files import WeightFile
from t2i_align.rewards.tower import Preprocessing, TowerSpec

MODELS = {"dino": "facebook/dino-vits16", "clip": "openai/clip-vit-base-patch32"}
DINO = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "shortest", before_crop=256)
COLUMN = "reference"
REMEMBERED = 1024  # reference files whose features are kept


class Subject(Scorer):
    """Likeness of the picture to its reference pictures, which stand in the prompt column `reference`.

    A row's value is an image (path, PIL, array or tensor) or a list of them.

    Args:
        features: `dino` or `clip`.
        name: another hub id or folder of such a model.

    Raises:
        RewardError: unknown features, or weights that are missing or cannot be opened; in use, a row without reference.
    """

    name = "subject"
    differentiable = True
    columns = (COLUMN,)
    range = (-1.0, 1.0)
    without_std = True
    unit: ClassVar[str] = "cosine"
    license: ClassVar[str] = "Apache-2.0 (DINO); MIT (CLIP)"
    source: ClassVar[str] = MODELS["dino"]
    files: ClassVar[tuple[WeightFile, ...]] = (WeightFile("model.safetensors", MODELS["dino"]),)
    summary: ClassVar[str] = "likeness to the reference pictures of the prompt (DINO or CLIP-I)"

    def __init__(self, features: str = "dino", name: str = "") -> None:
        super().__init__()
        model = name or _model(features)
        if missing := missing_weights(model):
            raise RewardError(f"The scorer {self.name!r} cannot be used: {missing}")
        self.extract: Extract = _Clip(model) if features == "clip" else _dino(model)
        self.remembered: dict[tuple[str, float], Tensor] = {}

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        return missing_weights(options.get("name") or _model(options.get("features") or "dino"))

    def networks(self) -> list[nn.Module]:
        tower = self.extract.networks() if isinstance(self.extract, TowerScorer) else []
        return [*super().networks(), *tower]

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        features = F.normalize(self.extract(images), dim=-1)
        known: dict[int, Tensor] = {}  # references of one call, by identity
        scores = []
        for feature, given in zip(features, prompts.columns[COLUMN], strict=True):
            references = list(given) if isinstance(given, (list, tuple)) else [given]
            if not references or any(reference is None for reference in references):
                raise RewardError(f"Expected the column {COLUMN!r} to have an image or a list of images in every row.")
            for reference in references:
                if id(reference) not in known:
                    known[id(reference)] = self._features(reference, images.device)
            scores.append(torch.stack([feature @ known[id(reference)] for reference in references]).mean())
        return torch.stack(scores)

    @torch.no_grad()
    def _features(self, reference: Any, device: torch.device) -> Tensor:
        """The unit vector (D,) of a reference; those of files are kept until the file changes."""
        path = Path(reference) if isinstance(reference, (str, Path)) else None
        key = (str(path), path.stat().st_mtime if path.is_file() else 0.0) if path else None
        if key is None or key not in self.remembered:
            (image,) = to_tensors(reference)
            found = F.normalize(self.extract(image[None].to(device)), dim=-1)[0]
            if key is None:
                return found
            self.remembered[key] = found
            for old in list(self.remembered)[:-REMEMBERED]:
                del self.remembered[old]
        return self.remembered[key].to(device)


class _Clip(TowerScorer):
    """Image embeddings of a CLIP tower, which moves as towers do."""

    def __init__(self, name: str) -> None:
        super().__init__(TowerSpec(name))

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.tower.image_features(images)


def _model(features: str) -> str:
    if features not in MODELS:
        raise RewardError(
            f"Unknown features {features!r} of subject.{nearest(features, MODELS)} Expected {', '.join(MODELS)}."
        )
    return MODELS[features]


def _dino(name: str) -> Vision:
    try:
        return Vision(name, DINO if name == MODELS["dino"] else None)
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(f"Cannot open the features {name!r}: {' '.join(str(error).split())}") from error
