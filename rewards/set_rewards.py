"""Scores of sets as rewards of their images: what each image adds (`sets.py`), from the features of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.prompts import Prompts
from t2i_align.rewards import sets
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.features import Extract, extract_features, load_features, networks_of
from t2i_align.rewards.mixing import group_index


class SetReward(Scorer):
    """What each image adds to the score of its set: the score with it minus the score without it.

    Args:
        features: what `load_features` takes.
        per: `prompt`, where the images of one prompt in a call are a set, or `call`.

    Raises:
        RewardError: features that cannot be opened, or, in use, a set with too few images.
    """

    groupwise = True
    function = ""
    least = 2  # images of a set
    usual = "prompt"  # what `per` is unless it is said

    def __init__(self, features: str | Extract, per: str, reference: str = "") -> None:
        super().__init__()
        if per not in ("prompt", "call"):
            raise RewardError(f"Expected {self.function}(...) per 'prompt' or 'call' but got {per!r}.")
        extract = load_features(features)
        self.features = extract if isinstance(extract, nn.Module) else _Plain(extract)
        self.per = per
        shown = features if isinstance(features, str) else getattr(features, "__name__", type(features).__name__)
        said = [f"reference={reference}"] if reference else []
        said += [f"per={per}"] if per != self.usual else []
        self.name = f"{self.function}({', '.join([shown, *said])})"

    def networks(self) -> list[nn.Module]:
        return list(dict.fromkeys([*super().networks(), *networks_of(self.features)]))

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (self.features(images),)

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        return self.combine({self: self.measure(images, prompts)}, prompts).total

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        (features,) = measured[self]
        group = group_index(prompts) if self.per == "prompt" else torch.zeros(len(prompts), dtype=torch.long)
        total = torch.empty(len(features), device=features.device)
        for number in range(int(group.max()) + 1):
            rows = (group == number).nonzero()[:, 0].to(features.device)
            if len(rows) < self.least:
                raise RewardError(
                    f"{self.name!r} needs {self.least} or more images of each {self.per} but got {len(rows)}."
                )
            total[rows] = self.contributions(features[rows]).to(total)
        return Scores(total, {self.name: total})

    def contributions(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class Vendi(SetReward):
    """How much diversity, in effective images, each image adds to its prompt's set."""

    function = "vendi"

    def __init__(self, features: str | Extract, per: str = "prompt") -> None:
        super().__init__(features, per)

    def contributions(self, features: Tensor) -> Tensor:
        return sets.vendi_contributions(features)


class ReferenceSetReward(SetReward):
    """By how much each image brings its set nearer to a reference set.

    Args:
        features: what `load_features` takes.
        reference: a folder of images, images, or a tensor (m, D) of their features.
        per: `call` or `prompt`.
    """

    reference: Tensor
    usual = "call"

    def __init__(self, features: str | Extract, reference: Any, per: str = "call") -> None:
        super().__init__(features, per, str(reference) if isinstance(reference, (str, Path)) else "")
        if isinstance(reference, (str, Path)) and not Path(reference).is_dir():
            raise RewardError(f"Expected the reference of {self.function}(...) to be a folder but got {reference}.")
        ready = isinstance(reference, Tensor) and reference.ndim == 2
        self.register_buffer("reference", reference if ready else extract_features(reference, self.features))


class FID(ReferenceSetReward):
    """`frechet(set without the image, reference) - frechet(set, reference)`; FID if the features are Inception's."""

    function = "fid"
    least = 3

    def contributions(self, features: Tensor) -> Tensor:
        return sets.frechet_contributions(features, self.reference)


class CMMD(ReferenceSetReward):
    """`cmmd(set without the image, reference) - cmmd(set, reference)`."""

    function = "cmmd"

    def contributions(self, features: Tensor) -> Tensor:
        return sets.cmmd_contributions(features, self.reference)


class _Plain(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)
