"""How value functions and trained scorers say a number: what it is predicted as, its loss and its mean.

    regression  one output, squared error
    hl_gauss    bins, cross-entropy to a Gaussian around the target (Stop Regressing, arXiv 2403.03950)
    quantile    quantiles at (i + 1/2) / Q, pinball loss; their mean is the expectation

Targets are in standard deviations of the reward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2i_align.rewards.uncertainty import QuantileHead, quantiles_to_mean_std

REACH, BINS = 10.0, 51  # of hl_gauss: bins between -REACH and REACH standard deviations
SMEAR = 0.75  # its Gaussian's standard deviation in widths of a bin, as published
QUANTILES = 16


class Head(nn.Module):
    """Features (B, D) -> outputs (B, K)."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss (B,) of outputs (B, K) for targets (B,)."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation (B,) that outputs say."""
        raise NotImplementedError

    def std(self, outputs: Tensor) -> Tensor | None:
        """The standard deviation (B,) that outputs say; None where they say none."""
        return None


class Regression(Head):
    """The number itself; 0 at the start."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]


class HLGauss(Head):
    """A histogram; uniform at the start."""

    edges: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, BINS)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("edges", torch.linspace(-REACH, REACH, BINS + 1), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def shares(self, targets: Tensor) -> Tensor:
        """The mass (B, bins) of a Gaussian around each target, all of it within the bins."""
        width = self.edges[1] - self.edges[0]
        off = (self.edges - targets.clamp(-REACH, REACH)[:, None]) / (SMEAR * width)
        below = torch.special.ndtr(off)
        return below.diff(dim=1) / (below[:, -1:] - below[:, :1])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -(self.shares(targets) * outputs.log_softmax(1)).sum(1)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1) @ self.centres

    def std(self, outputs: Tensor) -> Tensor:
        """The standard deviation (B,) of the histogram."""
        shares = outputs.softmax(1)
        return (shares * (self.centres - (shares @ self.centres)[:, None]).square()).sum(1).sqrt()

    @property
    def centres(self) -> Tensor:
        """The middle (bins,) of each bin."""
        return (self.edges[1:] + self.edges[:-1]) / 2


class Quantile(Head):
    """Quantiles that never cross; those of a standard normal at the start."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.quantiles = QuantileHead(features, tuple((i + 0.5) / QUANTILES for i in range(QUANTILES)))
        normal = torch.special.ndtri(self.quantiles.levels)
        nn.init.zeros_(self.quantiles.linear.weight)
        with torch.no_grad():  # the head adds a softplus from each to the next
            self.quantiles.linear.bias.copy_(torch.cat([normal[:1], normal.diff().expm1().log()]))

    def forward(self, features: Tensor) -> Tensor:
        return self.quantiles(features)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error, levels = targets[:, None] - outputs, self.quantiles.levels
        return torch.maximum(levels * error, (levels - 1) * error).mean(1)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.mean(1)

    def std(self, outputs: Tensor) -> Tensor:
        """That of the Gaussian that fits the quantiles best; its mean is theirs, since their levels are symmetric."""
        return quantiles_to_mean_std(outputs, self.quantiles.levels)[1]


HEADS: dict[str, type[Head]] = {"regression": Regression, "hl_gauss": HLGauss, "quantile": Quantile}
