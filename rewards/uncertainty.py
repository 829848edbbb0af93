"""Sources of a std: consistency under reward-preserving augmentations, and quantile heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.keys import generator
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.compose import Composite, call_name
from t2i_align.rewards.ensemble import disagreement
from t2i_align.rewards.expression import RewardError

Augment = Callable[[Tensor, torch.Generator], Tensor]

SHIFT, ZOOM, TONE = 0.02, 0.04, 0.03  # largest shift (share of a side), crop and change of brightness and contrast


def nudge(images: Tensor, draws: torch.Generator) -> Tensor:
    """A view of images (B, 3, H, W) that shows the same: shifted, cropped, and its tone changed, by a few per cent.

    Differentiable; no flips, which would change what "left of" means.
    """
    u = (2 * torch.rand(5, generator=draws) - 1).tolist()
    scale = 1 - ZOOM * (u[0] + 1) / 2
    frame = torch.tensor([[scale, 0, 2 * SHIFT * u[1]], [0, scale, 2 * SHIFT * u[2]]]).to(images)
    grid = F.affine_grid(frame.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return ((moved - 0.5) * (1 + TONE * u[3]) + 0.5 + TONE * u[4]).clamp(0, 1)


class Consistent(Composite):
    """A scorer whose std is how much its score changes when the image is augmented: Ctrl-U's idea (arXiv 2410.11236).

    The total is the plain score; the std is over it and the scores of `views` augmented copies. View v is the same
    change for every image, keyed by (seed, v), so that a score depends on its image alone. It costs `views` more
    forwards. A std of the scorer's own is left out of it.

    Args:
        scorer: a scorer of single images.
        views: augmented copies.
        seed: names the augmentations.
        ddof: 0 divides the squares by views + 1, 1 by views.
        augment: `f(images, generator) -> images`; `nudge` by default.
    """

    def __init__(self, scorer: Scorer, views: int = 4, seed: int = 0, ddof: int = 0, augment: Augment = nudge) -> None:
        if scorer.groupwise:
            raise RewardError(f"Expected consistent(...) of a scorer of single images but got {scorer.name!r}.")
        if views < 1:
            raise RewardError(f"Expected 1 or more views but got {views}.")
        said = {"views": (int(views), 4), "seed": (int(seed), 0), "ddof": (int(ddof), 0)}
        options = {name: value for name, (value, default) in said.items() if value != default}
        super().__init__([scorer], call_name("consistent", [scorer], **options))
        self.views, self.seed, self.ddof, self.augment = int(views), int(seed), int(ddof), augment
        self.range, self.without_std = scorer.range, False

    def leaves(self) -> list[Scorer]:
        return [*super().leaves(), self]

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, ...]:
        (scorer,) = self.members
        changed = (self.augment(images, generator(self.seed, "augment", view)) for view in range(self.views))
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            scores = [scorer(view, prompts) for view in changed]
        means = [score[0] if isinstance(score, tuple) else score for score in scores]
        return (torch.stack(means, 1).float(),)  # (B, views)

    def forward(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        scores = self.combine({leaf: leaf.measure(images, prompts) for leaf in self.leaves()}, prompts)
        assert scores.std is not None
        return scores.total, scores.std

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        (scores,) = self.combined(measured, prompts)
        values = torch.cat([scores.total[:, None], measured[self][0]], 1)
        return Scores(scores.total, scores.parts, disagreement(values.T, self.ddof))


def discount(loss: Tensor, uncertainty: Tensor, weight: float = 1.0) -> Tensor:
    """Ctrl-U's rectified loss `loss * exp(-U) + weight * U`, elementwise, with gradients through U as in its code.

    For losses of 0 or more, 0 at best: it falls as U grows where `loss` > `weight` exp(U).
    """
    return loss * torch.exp(-uncertainty) + weight * uncertainty


class QuantileHead(nn.Module):
    """Features (B, D) -> quantiles (B, Q) that never cross: the first is linear, each next one adds a softplus.

    Args:
        features: D.
        levels: of the quantiles, increasing, in (0, 1).
    """

    levels: Tensor

    def __init__(self, features: int, levels: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)) -> None:
        super().__init__()
        if not all(0 < a < b < 1 for a, b in zip((1e-9, *levels), (*levels, 1 - 1e-9), strict=True)):
            raise RewardError(f"Expected increasing quantile levels in (0, 1) but got {levels}.")
        self.linear = nn.Linear(features, len(levels))
        self.register_buffer("levels", torch.tensor(levels))

    def forward(self, features: Tensor) -> Tensor:
        first, *steps = self.linear(features).split(1, dim=-1)
        return torch.cat([first, *(F.softplus(step) for step in steps)], -1).cumsum(-1)


def pinball(quantiles: Tensor, targets: Tensor, levels: Tensor) -> Tensor:
    """Mean of `max(tau e, (tau - 1) e)`, e = r - q_tau, over targets (B,) and quantiles (B, Q): QRM, arXiv 2409.10164.

    Over samples of one distribution its minimiser is the empirical quantile.
    """
    error = targets[:, None] - quantiles
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def quantiles_to_mean_std(quantiles: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std), both (B,), of the Gaussian whose quantiles (B, Q) fit best in least squares; exact for Gaussians."""
    normal = math.sqrt(2) * torch.erfinv(2 * levels.to(quantiles) - 1)
    slope = normal - normal.mean()
    std = (quantiles * slope).sum(-1) / slope.square().sum()
    return quantiles.mean(-1) - std * normal.mean(), std


class HeadScorer(Scorer):
    """A head on a feature extractor, as a scorer.

    Args:
        name: of the scorer.
        extract: images (B, 3, H, W) in [0, 1] -> (B, D).
        head: (B, D) -> (B,) or (B, 1), a pair (mean, std) of these, or, if a `QuantileHead`, (B, Q).
        differentiable: gradients pass through `extract`.
    """

    def __init__(
        self, name: str, extract: Callable[[Tensor], Tensor], head: nn.Module, differentiable: bool = True
    ) -> None:
        super().__init__()
        self.name, self.extract, self.head, self.differentiable = name, extract, head, differentiable

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor | tuple[Tensor, Tensor]:
        value = self.head(self.extract(images))
        if isinstance(self.head, QuantileHead):
            return quantiles_to_mean_std(value, self.head.levels)
        if isinstance(value, tuple):
            mean, std = value
            return mean.flatten(), std.flatten()
        return value.flatten()
