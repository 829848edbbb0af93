"""Rewards as data (`expression.py`) -> scorers: checked whole before any weight is loaded, each scorer made once."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from t2i_align.config import nearest
from t2i_align.rewards.expression import Call, Limited, Node, Part, RewardError, Sum

if TYPE_CHECKING:
    from t2i_align.rewards.base import Scorer
    from t2i_align.rewards.reference import Reference

FUNCTIONS = {
    "rank": "mixing:Rank",
    "zscore": "mixing:ZScore",
    "calibrated": "mixing:Calibrated",
    "log_sigmoid": "mixing:LogSigmoid",
    "par": "mixing:Par",
    "clamp": "mixing:Clamp",
    "soft_min": "ensemble:SoftMin",
    "mean": "ensemble:Mean",
    "worst": "ensemble:Worst",
    "robust": "ensemble:Robust",
    "lcb": "ensemble:LowerBound",
    "uwo": "ensemble:VariancePenalty",
    "consistent": "uncertainty:Consistent",
    "pareto": "pareto:Pareto",
    "vendi": "set_rewards:Vendi",
    "fid": "set_rewards:FID",
    "cmmd": "set_rewards:CMMD",
}
OF_FEATURES = ("vendi", "fid", "cmmd")  # their argument is a feature extractor, not a scorer

KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false"}  # of options, by annotation


def function_class(name: str) -> type[Scorer]:
    """The class behind a function of expressions.

    Raises:
        RewardError: no such function; the message has the nearest name and the list.
    """
    if name not in FUNCTIONS:
        raise RewardError(f"Unknown function {name!r}.{nearest(name, FUNCTIONS)} Available: {', '.join(FUNCTIONS)}.")
    module, _, attribute = FUNCTIONS[name].partition(":")
    return getattr(importlib.import_module(f"t2i_align.rewards.{module}"), attribute)


def check_node(node: Node, scorer_class: Callable[[str], type[Scorer]]) -> None:
    """Make sure that every scorer, function and option of a reward exists, without loading weights.

    Raises:
        RewardError: what does not, and the nearest that does.
    """
    if isinstance(node, str):
        if node in FUNCTIONS:
            raise RewardError(f"{node!r} is a function of scorers: write {node}(SCORER).")
        _check_scorer(scorer_class(node), node, {})
    elif isinstance(node, Call):
        found = function_class(node.function)
        _bind(found, f"The function {node.function}", node.members, node.options)
        for member in () if node.function in OF_FEATURES else node.members:
            check_node(member, scorer_class)
    elif isinstance(node, Part):
        if node.options and isinstance(node.use, str):
            found = scorer_class(node.use)
            _bind(found, f"The scorer {node.use!r}", (), node.options)
            _check_scorer(found, node.use, node.options)
        else:
            check_node(node.use, scorer_class)
    elif isinstance(node, Sum):
        for _, member in node.terms:
            check_node(member, scorer_class)
    else:
        for member in (node.objective, *(limit.node for limit in node.limits)):
            check_node(member, scorer_class)


def _check_scorer(found: type[Scorer], name: str, options: Mapping[str, Any]) -> None:
    """Raise RewardError where a scorer, made with these options, would lack something."""
    missing = found.missing(**options)
    if missing:
        raise RewardError(f"The scorer {name!r} cannot be used: {missing}")


def _bind(found: type, what: str, members: tuple[Node, ...], options: Mapping[str, Any]) -> None:
    """Raise RewardError where a class would not take these arguments."""
    signature = inspect.signature(found)
    named = [n for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for option in options:
        if option not in named:
            known = ", ".join(named) or "none"
            raise RewardError(f"{what} has no option {option!r}.{nearest(option, named)} It has {known}.")
        annotation = signature.parameters[option].annotation
        kind = getattr(annotation, "__name__", annotation)  # a text where its module defers annotations
        if kind in KINDS and not _is(kind, options[option]):
            raise RewardError(f"{what} expects {KINDS[kind]} for {option} but got {options[option]!r:.60}.")
    try:
        signature.bind(*members, **options)
    except TypeError as error:
        raise RewardError(f"{what} cannot be made: {error}.") from error


def _is(kind: str, value: Any) -> bool:
    """Whether a value is of a kind of `KINDS`."""
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    return isinstance(value, Real) and (kind == "float" or float(value).is_integer())


class Builder:
    """Makes the scorers of one reward.

    Args:
        scorer_class: name -> class.
        base: for functions that compare with the base model: a `Reference`, or the pipeline that was calibrated.
    """

    def __init__(self, scorer_class: Callable[[str], type[Scorer]], base: Reference | str | None = None) -> None:
        self.scorer_class, self.base = scorer_class, base
        self.made: dict[str, Scorer] = {}

    def build(self, node: Node) -> Scorer:
        """The scorer of a node that `check_node` passed."""
        from t2i_align.rewards import compose

        if isinstance(node, str):
            return self._make(node, {})
        if isinstance(node, Part):
            scorer = self._make(node.use, node.options) if isinstance(node.use, str) else self.build(node.use)
            return scorer if scorer.name == node.name else compose.Named(scorer, node.name)
        if isinstance(node, Sum):
            return compose.weighted_sum(*((weight, self.build(member)) for weight, member in node.terms))
        if isinstance(node, Limited):
            return self._limited(node)
        if node.function in OF_FEATURES:
            return function_class(node.function)(*node.members, **node.options)
        made, options = function_class(node.function), dict(node.options)
        if "base" in inspect.signature(made).parameters:
            options.setdefault("base", self.base)
        return made(*(self.build(member) for member in node.members), **options)

    def _make(self, name: str, options: dict[str, Any]) -> Scorer:
        """A scorer of the table; equal ones are one object, so that each runs once."""
        made = self.scorer_class(name)
        usual = inspect.signature(made).parameters
        changed = {option: value for option, value in options.items() if value != usual[option].default}
        said = json.dumps(changed, sort_keys=True, default=str) if changed else ""
        key = f"{made.__module__}:{made.__qualname__} {said}"
        if key not in self.made:
            self.made[key] = made(**options)
            self.made[key].made_with = said
        return self.made[key]

    def _limited(self, node: Limited) -> Scorer:
        from t2i_align.rewards import constraints

        objective = self.build(node.objective)
        limits = [
            constraints.Constraint(self.build(limit.node), limit.kind, limit.bound, self.base) for limit in node.limits
        ]
        return constraints.Limited(objective, limits)
