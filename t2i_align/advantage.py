"""From rewards to advantages: per group, per prompt over a run, per reward, and by Pareto dominance.

Rewards are group-major (B,), groups of equal size; a reward that is no number gets advantage 0 and moves no statistic.
All is computed in float64 on the CPU, since not every device has that, and handed back where the rewards are.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor

Spread = Literal["group", "global", "none"]


def group_advantage(
    rewards: Tensor, group: int, spread: Spread = "group", ddof: int = 0, eps: float = 1e-4, clip: float | None = 5.0
) -> Tensor:
    """(r - group mean) / (std + eps), as GRPO uses it.

    Args:
        rewards: (B,).
        group: images per prompt.
        spread: std of each group (DanceGRPO), of the whole batch around its mean (Flow-GRPO), or none (Dr. GRPO).
        ddof: 0 for the population's standard deviation, 1 for the sample's.
        eps: added to the standard deviation.
        clip: largest absolute advantage; None for no bound.
    """
    values = rewards.cpu().double().reshape(-1, group)
    centred = values - values.nanmean(1, keepdim=True)
    if spread == "none":
        scaled = centred
    else:
        around = values - values.nanmean() if spread == "global" else centred
        dims = (0, 1) if spread == "global" else 1
        counted = (~values.isnan()).sum(dims, keepdim=True)
        std = (around.square().nansum(dims, keepdim=True) / (counted - ddof).clamp(min=1)).sqrt()
        scaled = centred / (std + eps)
    scaled = scaled.nan_to_num(nan=0.0)
    return (scaled if clip is None else scaled.clamp(-clip, clip)).flatten().float().to(rewards.device)


def gdpo_advantage(parts: dict[str, Tensor], weights: dict[str, float], group: int, clip: float | None = 5.0) -> Tensor:
    """GDPO: each reward normalised in its group, their weighted sum normalised over the batch.

    Args:
        parts: every reward's own values (B,).
        weights: theirs in the sum.
        group: images per prompt.
        clip: as in `group_advantage`.
    """
    total = torch.stack(
        [weights[name] * group_advantage(values, group, clip=None) for name, values in parts.items()]
    ).sum(0)
    scaled = (total - total.mean()) / (total.std(correction=0) + 1e-4)
    return scaled if clip is None else scaled.clamp(-clip, clip)


def gains_by_step(advantage: Tensor, previews: Tensor, group: int, decay: float) -> Tensor:
    """Advantages (B, N) of the first N steps of a chain, from that of its image (B,) and previews on the way.

    Stepwise-Flow-GRPO (arXiv 2603.28718): a step counts what it adds to the reward that the x0 estimate promises. With
    V_k for what is expected before step k, and V_N = advantage,

        A_k = sum over j >= k of decay^(j - k) (V_(j+1) - V_j)          (GAE, arXiv 1506.02438, without discount)

    so that 0 counts a step's own gain and 1 all that comes after it, which has the expectation of the image's advantage
    and less variance. Steps after the last preview count as one. Departure: V_k = b_k (preview - its group mean) with
    b_k by least squares over the round, since the first previews, of blurred images, say little, the last nearly all.

    Args:
        advantage: of finished images, 0 on average in a group.
        previews: (B, N) rewards of the x0 estimates that steps began with; one that is no number promises nothing.
        group: images per prompt; 1 compares all.
        decay: lambda, from 0 to 1.
    """
    count = len(advantage)
    rows = previews.cpu().double().reshape(-1, group if group > 1 else count, previews.shape[1])
    seen = (rows - rows.nanmean(1, keepdim=True)).nan_to_num(nan=0.0).reshape(count, -1)
    final = advantage.cpu().double()
    slope = (seen * final[:, None]).sum(0) / seen.square().sum(0).clamp(min=1e-12)
    values = torch.cat([slope.clamp(min=0) * seen, final[:, None]], 1)
    gains, total, out = values.diff(dim=1), torch.zeros_like(final), []
    for step in reversed(range(gains.shape[1])):
        total = gains[:, step] + decay * total
        out.append(total)
    return torch.stack(out[::-1], 1).float().to(advantage.device)


class PromptTracker:
    """Reward statistics per prompt over a run (DDPO): the last `size` rewards of each; part of a run's checkpoints."""

    def __init__(self, size: int = 16, min_count: int = 16) -> None:
        self.size, self.min_count = size, min_count
        self.seen: dict[str, deque[float]] = {}

    def advantage(self, prompts: list[str], rewards: Tensor, eps: float = 1e-6, clip: float | None = 5.0) -> Tensor:
        """Take in rewards (B,) and standardise them: by their prompt's statistics, the batch's until it has enough."""
        values = rewards.cpu().double()
        out = torch.zeros_like(values)
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            if value == value:  # not nan
                self.seen.setdefault(prompt, deque(maxlen=self.size)).append(value)
        known = values[~values.isnan()]
        for i, prompt in enumerate(prompts):
            past = self.seen.get(prompt, ())
            own = torch.tensor(list(past), dtype=torch.float64) if len(past) >= self.min_count else known
            out[i] = (values[i] - own.mean()) / (own.std(correction=0) + eps)
        out = out.nan_to_num(nan=0.0)
        return (out if clip is None else out.clamp(-clip, clip)).float().to(rewards.device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {prompt: list(values) for prompt, values in self.seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.seen = {prompt: deque(values, maxlen=self.size) for prompt, values in state.items()}


def unequal_pairs(rewards: Tensor, group: int, extremes: bool = False) -> Tensor:
    """Pairs (winner, loser) (M, 2) of samples of one prompt whose rewards differ; all of them, or best and worst."""
    values = rewards.cpu().double().reshape(-1, group)
    if extremes:
        high = values.nan_to_num(nan=-float("inf")).argmax(1)
        low = values.nan_to_num(nan=float("inf")).argmin(1)
        first = group * torch.arange(len(values))
        rows = torch.arange(len(values))
        differ = values[rows, high] > values[rows, low]
        return torch.stack([first + high, first + low], 1)[differ]
    better = values[:, :, None] > values[:, None, :]  # false wherever one is nan
    which, win, lose = better.nonzero(as_tuple=True)
    return torch.stack([which * group + win, which * group + lose], 1)
