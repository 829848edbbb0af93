"""ImageReward v1.0 (Xu et al., arXiv 2304.05977): human preference of a picture for its prompt.

    r = (head(BLIP(picture, prompt)) - 0.16717362830052426) / 1.0333394966054072

The head is five linear layers without anything between them: one affine map. Prompts are cut at 35 tokens, so a long
prompt's tail is not judged; a warning says so.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.data.images import tensor_to_pil
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.blip import VOCABULARY, load_blip
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile, find_weights

COMMIT = "5736be03b2652728fb87788c9797b0570450ab72"
PUBLISHED = WeightFile("ImageReward.pt", "THUDM/ImageReward", revision=COMMIT)
MED_CONFIG = WeightFile("med_config.json", "THUDM/ImageReward", revision=COMMIT)
MEAN, SD = 0.16717362830052426, 1.0333394966054072  # of raw scores on the authors' validation set
CONTEXT = 35
Backend = Literal["own", "package"]


class Head(nn.Sequential):
    """Width -> 1024 -> 128 -> 64 -> 16 -> 1; the published indices count dropout layers."""

    def __init__(self, width: int) -> None:
        widths = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(one, other) for one, other in zip(widths, widths[1:], strict=False)]
        drop = nn.Identity
        super().__init__(linear[0], drop(), linear[1], drop(), linear[2], drop(), linear[3], linear[4])


class ImageReward(Scorer):
    """ImageReward: a preference model on BLIP.

    Args:
        weights: ImageReward.pt, or a folder that holds it (and vocab.txt); "" is the hub's cache.
        vocabulary: bert-base-uncased's vocab.txt, or a folder that holds it.
        backend: `own`, or `package` for an installed image-reward, which has no gradient here and reads the vocabulary
            itself.

    Raises:
        RewardError: files that are missing or are not ImageReward's, an unknown backend, or a package that is not here.
    """

    name = "image_reward"
    differentiable = True
    needs_prompt = True
    without_std = True
    unit: ClassVar[str] = "sd of raw scores"
    source: ClassVar[str] = PUBLISHED.repo
    files: ClassVar[tuple[WeightFile, ...]] = (PUBLISHED, VOCABULARY)
    summary: ClassVar[str] = "human preference by ImageReward (BLIP)"

    def __init__(self, weights: str = "", vocabulary: str = "", backend: Backend = "own") -> None:
        super().__init__()
        if backend not in get_args(Backend):
            raise RewardError(
                f"Unknown backend {backend!r} of image_reward.{nearest(backend, get_args(Backend))} Expected own or "
                "package."
            )
        self.backend = backend
        self.differentiable = backend == "own"
        self.network: Any = (
            load_blip(weights, vocabulary, PUBLISHED, Head, CONTEXT, self.name)
            if backend == "own"
            else _load_package(weights)
        )
        self.preprocessing = self.network.preprocessing if backend == "own" else None

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        if self.backend == "package":
            self.network.device = images.device  # it moves its inputs there itself
            pairs = zip(images, prompts.text, strict=True)
            values = [self.network.score(text, tensor_to_pil(image)) for image, text in pairs]
            return torch.tensor(values, device=images.device)
        return (self.network(images, prompts.text) - MEAN) / SD


def _load_package(weights: str) -> Any:
    file = find_weights(weights, PUBLISHED, ImageReward.name)
    config = find_weights(weights and str(file.parent), MED_CONFIG, ImageReward.name)
    try:
        package: Any = importlib.import_module("ImageReward")
    except ImportError as error:
        raise RewardError(
            f"backend=package needs an image-reward that can be imported, but here: {error}; leave the option out for "
            "the module of t2i-align."
        ) from error
    return package.load(str(file), device="cpu", med_config=str(config))
