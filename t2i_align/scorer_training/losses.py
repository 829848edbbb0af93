"""Likelihoods of preferences, given scores in nats: Bradley and Terry (1952), with ties, and Plackett and Luce.

    P(i over j) = sigmoid(s_i - s_j)

A tie is, one of

    half         a target of 1/2: KL((1/2, 1/2) || (P, 1 - P)), 0 where scores are equal; PickScore, arXiv 2305.01569
    rao_kupper   an outcome of its own: P(i over j) = sigmoid(s_i - s_j - eta), P(tie) is the rest; Rao and Kupper, 1967
    drop         not counted

All functions take scores (..., P, K) of the K images of P rankings and merits (P, K), NaN where there is no image, and
return the negative log-likelihood of each ranking (..., P), in nats, and of how many decisions it is (P,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from t2i_align.keys import generator


def compare(merits: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (P, K, K), +1 where image i is better than j, -1 where worse, 0 else; and which are there, i < j alone."""
    there = ~merits.isnan()
    known = merits.nan_to_num()
    better = (known[:, :, None] - known[:, None, :]).sign()
    counted = (there[:, :, None] & there[:, None, :]).triu(1)
    return better * (there[:, :, None] & there[:, None, :]), counted


def turn_labels(labels: Tensor, share: float, draws: torch.Generator) -> Tensor:
    """Labels (..., K, K) with a share of the pairs turned round; ties stay."""
    turned = torch.rand(labels.shape, generator=draws) < share
    upper = torch.where(turned, -labels, labels).triu(1)
    return upper - upper.mT


def noisy_labels(merits: Tensor, share: float, seed: int) -> Tensor:
    """`compare`'s labels with a share of the pairs turned round, always the same ones for a seed."""
    return turn_labels(compare(merits)[0], share, generator(seed, "label noise"))


def bradley_terry(
    scores: Tensor, labels: Tensor, counted: Tensor | None = None, ties: str = "half", eta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Over all pairs of each ranking.

    Args:
        scores: (..., P, K).
        labels: (P, K, K) of `compare`.
        counted: (P, K, K) pairs that are there; those that are no ties if None.
        ties: `half`, `rao_kupper` or `drop`.
        eta: log of Rao and Kupper's threshold, > 0: difference of scores at which a win and a tie are as likely.
    """
    margins = scores[..., :, None] - scores[..., None, :]
    decided = labels.triu(1) != 0
    tied = torch.zeros_like(decided) if counted is None or ties == "drop" else counted & ~decided
    if ties == "rao_kupper":
        assert eta is not None
        loss = -F.logsigmoid(labels * margins - eta) * decided
        both = F.logsigmoid(margins - eta) + F.logsigmoid(-margins - eta)
        loss = loss - (both + torch.log(torch.expm1(2 * eta))) * tied
    else:
        loss = -F.logsigmoid(labels * margins) * decided
        loss = loss - ((F.logsigmoid(margins) + F.logsigmoid(-margins)) / 2 + math.log(2)) * tied
    return loss.sum((-2, -1)), (decided | tied).sum((-2, -1))


def plackett_luce(scores: Tensor, merits: Tensor) -> tuple[Tensor, Tensor]:
    """The best image is chosen among all, the next among the rest, and so on.

    Equal merits share one choice set (Breslow's approximation of 1974); the last ones are not chosen from anything.
    """
    there = ~merits.isnan()
    known = merits.nan_to_num()
    not_better = (known[:, None, :] <= known[:, :, None]) & there[:, None, :]  # (P, i, j): j is chosen from beside i
    chosen = there & ((known[:, None, :] < known[:, :, None]) & there[:, None, :]).any(2)
    some = not_better | ~chosen[:, :, None]  # where nothing is chosen, too, so that no gradient is NaN
    rest = scores[..., None, :].where(some, -torch.inf).logsumexp(-1)
    loss = torch.where(chosen, rest - scores, 0.0)
    return loss.sum(-1), chosen.sum(-1)
