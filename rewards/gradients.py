"""Which rewards pass gradients on, known before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from t2i_align.rewards import SCORERS, check_reward, scorer_class
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.expression import Call, Node, Part, Sum


def without_gradient(reward: Any) -> list[str]:
    """The scorers of a reward that pass no gradients on; empty where it is differentiable.

    Args:
        reward: what `load_reward` takes; of a text or mapping nothing is loaded. A callable is known only when it has
            become a `Scorer`, and counts as differentiable.

    Raises:
        RewardError: it is no reward.
    """
    if isinstance(reward, Scorer):
        return [] if reward.differentiable else [reward.name]
    if not isinstance(reward, (str, Mapping)):
        return []
    return [name for name in dict.fromkeys(scorer_names(check_reward(reward))) if not scorer_class(name).differentiable]


def differentiable() -> list[str]:
    """The scorers of the table that pass gradients on."""
    return [name for name in SCORERS if scorer_class(name).differentiable]


def scorer_names(node: Node) -> Iterator[str]:
    """The scorers of the table whose values a reward needs, one after the other."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Part):
        yield from scorer_names(node.use)
    else:
        members: tuple[Node, ...]
        if isinstance(node, Sum):
            members = tuple(member for _, member in node.terms)
        elif isinstance(node, Call):
            from t2i_align.rewards.build import OF_FEATURES

            members = () if node.function in OF_FEATURES else node.members
        else:
            members = (node.objective, *(limit.node for limit in node.limits))
        for member in members:
            yield from scorer_names(member)
