"""What a method needs of a reward, known before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from t2i_align.rewards import SCORERS, check_reward, scorer_class
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.expression import Call, Node, Part, Sum
from t2i_align.steering.base import Steering, SteeringError

GRADIENT_FREE = "best_of_n, fk, svdd, noise_search"


def check_gradient(method: Steering, reward: Any) -> None:
    """Refuse a reward without gradients for a method that needs them.

    Args:
        method: with its settings.
        reward: what `load_reward` takes; of a text or mapping nothing is loaded.

    Raises:
        SteeringError: it has none; the message names scorers that have.
        RewardError: it is no reward.
    """
    if not method.needs_gradient:
        return
    if isinstance(reward, Scorer):
        blind = [] if reward.differentiable else [reward.name]
    elif isinstance(reward, (str, Mapping)):
        names = dict.fromkeys(scorer_names(check_reward(reward)))
        blind = [name for name in names if not scorer_class(name).differentiable]
    else:
        blind = []  # a callable, known when it has become a Scorer
    if blind:
        able = [name for name in SCORERS if scorer_class(name).differentiable]
        raise SteeringError(
            f"Expected a differentiable reward for {type(method).__name__} but {', '.join(blind)} is none: use a "
            f"method without gradients ({GRADIENT_FREE}) or one of {', '.join(able)}."
        )


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
