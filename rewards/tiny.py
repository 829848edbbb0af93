"""The playground's proxy rewards, imperfect on purpose: tiny_clip, and tiny_pick that learnt from noisy preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file
from torch import Tensor

from t2i_align import playground
from t2i_align.prompts import Prompts
from t2i_align.rewards.clip import CLIP, TowerScorer, Variant
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile
from t2i_align.rewards.tower import TowerSpec

WEIGHTS = Path(playground.__file__).parent / "weights"
CLIP_FOLDER, PICK_FOLDER = WEIGHTS / "tiny-clip", WEIGHTS / "tiny-pick"
SIBLINGS = "siblings.safetensors"


class TinyCLIP(CLIP):
    """Cosine of picture and caption by the playground's own CLIP (`playground/clip.py`)."""

    name = "tiny_clip"
    license: ClassVar[str] = "Apache-2.0"
    source: ClassVar[str] = "the package"
    files: ClassVar[tuple[WeightFile, ...]] = ()
    summary: ClassVar[str] = "cosine of picture and caption by the playground's own CLIP"

    def __init__(self, variant: Variant = "cosine", folder: Path = CLIP_FOLDER) -> None:
        super().__init__(f"local-dir:{folder}", variant=variant)

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        return _missing(CLIP_FOLDER, "clip")


class TinyPick(TowerScorer):
    """The playground's preference model (`playground/pick.py`): mean of three siblings, and their disagreement.

    s_n = exp(logit_scale) sum_d h_nd i_d t_d for unit vectors i of the picture, t of the prompt and sibling n's weights
    h_n. The score is the mean over n, in nats: a difference is the log-odds of a preference. The std has ddof 1.
    The mean is also the score by the average of the siblings' weights (WARM, arXiv 2401.12187), in which it is linear.

    Args:
        folder: of the weights.
        sibling: one sibling's score alone, without a std.
    """

    name = "tiny_pick"
    needs_prompt = True
    unit: ClassVar[str] = "log-odds"
    source: ClassVar[str] = "the package"
    summary: ClassVar[str] = "the playground's preference model, wrong in places, with a std"

    heads: Tensor

    def __init__(self, folder: Path = PICK_FOLDER, sibling: int | None = None) -> None:
        super().__init__(TowerSpec(f"local-dir:{folder}"))
        heads = load_file(folder / SIBLINGS)["heads"].float()
        if sibling is not None and not 0 <= sibling < len(heads):
            raise RewardError(f"Expected a sibling of tiny_pick, 0 to {len(heads) - 1}, but got {sibling}.")
        self.register_buffer("heads", heads if sibling is None else heads[sibling : sibling + 1])

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        return _missing(PICK_FOLDER, "pick")

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor | tuple[Tensor, Tensor]:
        text = self.tower.text_features(prompts.text)
        products = self.tower.image_features(images) * text  # (B, D)
        scores = self.tower.scale * self.heads.float() @ products.T  # (siblings, B)
        return (scores.mean(0), scores.std(0)) if len(scores) > 1 else scores[0]


def _missing(folder: Path, part: str) -> str | None:
    if (folder / "open_clip_config.json").is_file():
        return None
    return f"{folder} is missing; reinstall t2i-align, or make it with `t2i-align playground train {part}`."
