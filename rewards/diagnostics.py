"""Do two rewards agree, is one stable, and has a proxy been optimised too far? Measures over tables of scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from t2i_align.prompts import Prompts
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.mixing import group_index


def within_prompt_correlation(values: Tensor, prompts: Prompts) -> Tensor:
    """(K, K) Pearson correlations of K rewards (N, K) after each prompt's mean is taken away."""
    off = _centred(values, prompts)
    unit = off / off.norm(dim=0)
    return (unit.T @ unit).clamp(-1, 1)


def starc(values: Tensor, prompts: Prompts) -> Tensor:
    """(K, K) STARC distances (arXiv 2309.15257) in one step: `sqrt(2 (1 - rho))`, twice the EPIC distance.

    0 for rewards equal up to a scale and a constant per prompt, 2 for opposite ones, sqrt(2) for unrelated ones. A
    distance between proxy and gold that grows under optimisation is Goodhart's signature.
    """
    return (2 * (1 - within_prompt_correlation(values, prompts))).sqrt()


class Stability(NamedTuple):
    """How a reward reacts to a change of the images that should not matter.

    `ratio`: mean absolute change over the within-prompt sd. `flips`: share of pairs of one prompt whose order turns;
    5 % is a sensible limit.
    """

    ratio: float
    flips: float


def stability(before: Tensor, after: Tensor, prompts: Prompts) -> Stability:
    """Stability of scores (N,) under a change of the images.

    Raises:
        RewardError: no prompt has two different scores.
    """
    group = group_index(prompts).to(before.device)
    spread = _centred(before[:, None], prompts).square().mean().sqrt()
    gaps, changed = (scores[:, None] - scores for scores in (before, after))
    pairs = (group[:, None] == group) & (gaps > 0)
    if not pairs.any():
        raise RewardError("Expected a prompt with two different scores to measure stability but got none.")
    return Stability(float((after - before).abs().mean() / spread), float((changed[pairs] < 0).double().mean()))


class Contrast(NamedTuple):
    """Accuracies on pairs of matched prompts and images (arXiv 2309.16155, Winoground); ties count half.

    `image`: the matched image scores higher, for a given prompt; `text`: the matched prompt does, for a given image, .5
    for a scorer that reads no prompt; `group`: both hold for all of a pair.
    """

    image: float
    text: float
    group: float


def contrast(scores: Tensor) -> Contrast:
    """Accuracies of scores (N, 2, 2): entry [n, i, j] is image i of pair n under prompt j."""
    image = scores.diagonal(dim1=1, dim2=2) - torch.stack([scores[:, 1, 0], scores[:, 0, 1]], 1)
    text = scores.diagonal(dim1=1, dim2=2) - torch.stack([scores[:, 0, 1], scores[:, 1, 0]], 1)
    image_wins, text_wins = ((gap.sign() + 1) / 2 for gap in (image.double(), text.double()))
    group = (torch.cat([image_wins, text_wins], 1) == 1).all(1)
    return Contrast(float(image_wins.mean()), float(text_wins.mean()), float(group.double().mean()))


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || base) in nats for a reward without ties: `log n - (n - 1) / n`."""
    return math.log(n) - (n - 1) / n


def best_of_n_chi2(n: int) -> float:
    """chi^2(best-of-n || base): `n^2 / (2 n - 1) - 1`."""
    return n**2 / (2 * n - 1) - 1


def chi2_of_weights(log_weights: Tensor) -> Tensor:
    """chi^2 of a weighted sample against its equally weighted one: `N / ESS - 1` over the last dimension."""
    shares = log_weights.double().softmax(-1)
    return log_weights.shape[-1] * shares.square().sum(-1) - 1


def gold_bound(gain: float, correlation: float, chi2: float) -> float:
    """The least gold gain that a proxy gain guarantees, both in sds of the base model's samples.

    Regress gold on proxy: `rho d - sqrt(1 - rho^2) sqrt(chi^2 - d^2)`, at least the bound of arXiv 2403.03185.

    Args:
        gain: d, of the proxy.
        correlation: rho > 0 of proxy and gold on base samples.
        chi2: of the optimised model against the base.
    """
    return correlation * gain - math.sqrt(1 - correlation**2) * math.sqrt(max(chi2 - gain**2, 0.0))


class Curve(NamedTuple):
    """Gold over d = sqrt(KL), Gao et al., arXiv 2210.10760: `d (alpha - beta d)` for best-of-n, else beta log d."""

    alpha: float
    beta: float
    best_of_n: bool

    @property
    def peak(self) -> tuple[float, float]:
        """Where gold is highest, and its value there."""
        if self.best_of_n:
            return self.alpha / (2 * self.beta), self.alpha**2 / (4 * self.beta)
        d = math.exp(self.alpha / self.beta - 1)
        return d, self.beta * d

    def at(self, d: Tensor) -> Tensor:
        """Gold gains at d > 0, of any shape."""
        return d * (self.alpha - self.beta * (d if self.best_of_n else d.log()))

    def r2(self, d: Tensor, gold: Tensor) -> float:
        """Share of the variance of gold gains (N,) at d (N,) that the curve explains."""
        gold = gold.double()
        return float(1 - (gold - self.at(d.double())).square().sum() / (gold - gold.mean()).square().sum())


def fit_overoptimisation(d: Tensor, gold: Tensor, best_of_n: bool) -> Curve:
    """Least squares, without intercept, of gold gains (N,) over d = sqrt(KL) > 0 (N,)."""
    d, gold = d.double(), gold.double()
    columns = torch.stack([d, -d * d if best_of_n else -d * d.log()], 1)
    alpha, beta = torch.linalg.lstsq(columns, gold[:, None]).solution[:, 0].tolist()
    return Curve(alpha, beta, best_of_n)


def still_safe(direction: Tensor, proxy: Tensor, correlation: float) -> bool:
    """Whether a step surely does not lower the gold reward: arXiv 2310.09144, `cos(step, proxy) >= sin(theta)`.

    Args:
        direction: of the feasible step, any shape.
        proxy: gradient of the proxy, of that shape.
        correlation: cos(theta) of proxy and gold, e.g. from `within_prompt_correlation` on base samples.
    """
    cosine = torch.nn.functional.cosine_similarity(direction.flatten(), proxy.flatten(), dim=0)
    return float(cosine) >= math.sqrt(1 - correlation**2)


def _centred(values: Tensor, prompts: Prompts) -> Tensor:
    """Values (N, K) less their prompt's mean; float64."""
    group = group_index(prompts).to(values.device)
    sums = torch.zeros(int(group.max()) + 1, values.shape[1], dtype=torch.float64, device=values.device)
    sums = sums.index_add(0, group, values.double())
    return values.double() - (sums / torch.bincount(group)[:, None])[group]
