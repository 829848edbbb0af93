"""What a method needs of a reward, known before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i_align.prompts import Prompts
from t2i_align.rewards import check_reward, scorer_class
from t2i_align.rewards.gradients import differentiable, scorer_names, without_gradient
from t2i_align.steering.base import Steering, SteeringError


def gradient_free() -> list[str]:
    """The methods of the table that need no gradient of the reward, whatever their settings."""
    from t2i_align.steering import METHODS, method_class

    return [name for name in METHODS if method_class(name).needs_gradient is Steering.needs_gradient]


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
    blind = without_gradient(reward)
    if blind:
        raise SteeringError(
            f"Expected a differentiable reward for {type(method).__name__} but {', '.join(blind)} is none: use a "
            f"method without gradients ({', '.join(gradient_free())}) or one of {', '.join(differentiable())}."
        )


def check_columns(reward: Any, prompts: Prompts) -> None:
    """Refuse prompts without a column that the reward reads.

    Args:
        reward: what `load_reward` takes; of a text or mapping nothing is loaded.
        prompts: that it will score.

    Raises:
        SteeringError: a column is missing.
        RewardError: it is no reward.
    """
    names = scorer_names(check_reward(reward)) if isinstance(reward, (str, Mapping)) else ()
    for name in names:
        absent = [column for column in scorer_class(name).columns if column not in prompts.columns]
        if absent:
            raise SteeringError(
                f"The scorer {name!r} reads the prompt columns {', '.join(absent)}, which are missing: pass a table of "
                "prompts that has them (.jsonl, .csv, .parquet)."
            )
