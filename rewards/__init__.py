"""Image scorers: one contract (`base.py`), one table, one file a scorer; torch and the scorers load on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from t2i_align.config import nearest
from t2i_align.rewards.expression import RewardError, parse_expression

if TYPE_CHECKING:
    from t2i_align.rewards.base import Scorer, Scores
    from t2i_align.rewards.compose import FunctionScorer, WeightedSum

__all__ = [
    "SCORERS",
    "FunctionScorer",
    "RewardError",
    "Scorer",
    "Scores",
    "WeightedSum",
    "check_reward",
    "load_reward",
    "scorer_class",
]

_LAZY = {
    "FunctionScorer": "t2i_align.rewards.compose",
    "Scorer": "t2i_align.rewards.base",
    "Scores": "t2i_align.rewards.base",
    "WeightedSum": "t2i_align.rewards.compose",
}

SCORERS = {
    "verifier": "t2i_align.rewards.verifier:Verifier",
    "jpeg_compressibility": "t2i_align.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "t2i_align.rewards.jpeg:JpegIncompressibility",
}


def scorer_class(name: str) -> type[Scorer]:
    """The class behind a name of the table, or behind `package.module:Class`.

    Raises:
        RewardError: no such scorer; the message has the nearest name and the list.
    """
    known = name.lower().replace("-", "_")
    target = name if ":" in name else SCORERS.get(known)
    if target is None:
        raise RewardError(f"Unknown scorer {name!r}.{nearest(known, SCORERS)} Available: {', '.join(SCORERS)}.")
    from t2i_align.rewards.base import Scorer

    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"Cannot import the scorer {target!r}: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise RewardError(f"Expected {target!r} to be a subclass of t2i_align.rewards.Scorer but got {found!r}.")
    return found


def check_reward(spec: str | Mapping[str, float]) -> list[tuple[float, str]]:
    """Read a reward's text or mapping form and make sure that every scorer in it exists, without loading weights.

    Raises:
        RewardError: not an expression, an unknown scorer, or one that cannot work here.
    """
    terms = (
        parse_expression(spec) if isinstance(spec, str) else [(float(weight), name) for name, weight in spec.items()]
    )
    for _, name in terms:
        missing = scorer_class(name).missing()
        if missing:
            raise RewardError(f"The scorer {name!r} cannot be used: {missing}")
    return terms


def load_reward(
    spec: str | Mapping[str, float] | Scorer | Callable[..., Any],
    device: Any = None,
) -> Scorer:
    """Make a scorer.

    Args:
        spec: a name, a sum such as `"2 * verifier - 0.1 * jpeg_incompressibility"`, a mapping of names to weights, a
            callable `f(images, prompts) -> (B,)`, or a `Scorer`, which is returned as it is.
        device: where its networks go.

    Raises:
        RewardError: unknown or unusable scorers, before any weight is loaded.
    """
    from t2i_align.rewards.base import Scorer
    from t2i_align.rewards.compose import FunctionScorer, WeightedSum

    if isinstance(spec, Scorer):
        scorer = spec
    elif isinstance(spec, (str, Mapping)):
        terms = check_reward(spec)
        classes = [(weight, scorer_class(name)) for weight, name in terms]
        scorers = [(weight, made()) for weight, made in classes]
        alone = len(scorers) == 1 and scorers[0][0] == 1
        scorer = scorers[0][1] if alone else WeightedSum(scorers)
    elif callable(spec):
        scorer = FunctionScorer(spec)
    else:
        raise RewardError(
            f"Expected a reward to be a name, a sum, a mapping, a Scorer or a callable but got {spec!r:.80}."
        )
    scorer.eval().requires_grad_(False)
    return scorer if device is None else scorer.to(device)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
