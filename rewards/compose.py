"""Scorers made of scorers: the base of all compositions, weighted sums, and callables as scorers."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.expression import RewardError


class Composite(Scorer):
    """A scorer made of scorers: it looks at no pixels itself but combines what its leaves measured.

    Parts keep the leaves' names and raw units, whatever is made of them. A leaf that several members share runs once.
    """

    def __init__(self, scorers: Sequence[Scorer], name: str) -> None:
        super().__init__()
        self.scorers = nn.ModuleList(scorers)
        self.name = name
        self.differentiable = all(scorer.differentiable for scorer in self.members)
        self.needs_prompt = any(scorer.needs_prompt for scorer in self.members)
        self.groupwise = any(scorer.groupwise for scorer in self.members)
        self.without_std = all(scorer.without_std for scorer in self.members)
        self.columns = tuple(dict.fromkeys(column for scorer in self.members for column in scorer.columns))

    @property
    def members(self) -> list[Scorer]:
        """The scorers that this one is made of."""
        return list(self.scorers)  # type: ignore[arg-type]

    def leaves(self) -> list[Scorer]:
        found = dict.fromkeys(leaf for scorer in self.members for leaf in scorer.leaves())
        # Those that look at pictures of their own come last: a tower remembers the features of one batch.
        return sorted(found, key=lambda leaf: isinstance(leaf, Composite))

    def networks(self) -> list[nn.Module]:
        return list(dict.fromkeys(network for scorer in self.members for network in scorer.networks()))

    def part_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for scorer in self.members for name in scorer.part_names()))

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor | tuple[Tensor, Tensor]:
        scores = self.combine({leaf: leaf.measure(images, prompts) for leaf in self.leaves()}, prompts)
        return scores.total if scores.std is None else (scores.total, scores.std)

    def refuse(self, prompt: str) -> str | None:
        return next((reason for scorer in self.members if (reason := scorer.refuse(prompt))), None)

    def combined(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> list[Scores]:
        """Each member's scores."""
        return [scorer.combine(measured, prompts) for scorer in self.members]


class WeightedSum(Composite):
    """`sum_i weight_i * scorer_i`.

    Where a member gives NaN, the row's total is that of the other members times `sum |weight| / sum |their weights|`,
    as if it scored their weighted mean, and a warning says so; where all do, it is NaN.

    The std, where any part has one, is the root of the weighted sum of squares: parts are taken as independent, a part
    without a std as exact.
    """

    summary = "weighted sum of scorers"

    def __init__(self, terms: Sequence[tuple[float, Scorer]]) -> None:
        names = [scorer.name for _, scorer in terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not terms or twice:
            what = f"{', '.join(twice)} twice" if twice else "none"
            raise RewardError(f"Expected a sum of different scorers but got {what}; give each one weight.")
        if not all(math.isfinite(weight) and weight for weight, _ in terms):
            raise RewardError(f"Expected weights that are finite and not 0 but got {[weight for weight, _ in terms]}.")
        super().__init__([scorer for _, scorer in terms], expression(terms))
        self.factors = tuple(float(weight) for weight, _ in terms)
        edges = [sorted(w * edge for edge in s.range) for w, s in zip(self.factors, self.members, strict=True)]
        self.range = (sum(low for low, _ in edges), sum(high for _, high in edges))

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        scored = self.combined(measured, prompts)
        values = torch.stack([scores.total for scores in scored])  # (members, B)
        weights = values.new_tensor(self.factors)[:, None]
        valid = present(values, self.members)
        known = (weights.abs() * valid).sum(0)
        share = torch.where(valid.all(0) | (known == 0), 1.0, weights.abs().sum() / known)
        total = torch.where(valid.any(0), share * (weights * values.where(valid, 0.0)).sum(0), torch.nan)
        std = None
        if any(scores.std is not None for scores in scored):
            stds = weights * torch.stack([std_of(scores) for scores in scored])
            std = share * root(stds.where(valid, 0.0).square().sum(0))
        return Scores(total, merge(scored), std)


def weighted_sum(*terms: tuple[float, Scorer]) -> WeightedSum:
    """The sum of terms, with sums among them opened: `2 * (a + b) - a` has the terms (1, a) and (2, b)."""
    weights: dict[Scorer, float] = {}
    for weight, scorer in terms:
        inner = zip(scorer.factors, scorer.members, strict=True) if isinstance(scorer, WeightedSum) else [(1.0, scorer)]
        for factor, member in inner:
            weights[member] = weights.get(member, 0.0) + weight * factor
    return WeightedSum([(weight, scorer) for scorer, weight in weights.items()])


class Named(Composite):
    """A scorer under another name: its parts of the old name get the new one."""

    def __init__(self, scorer: Scorer, name: str) -> None:
        super().__init__([scorer], name)
        self.range = scorer.range

    def part_names(self) -> tuple[str, ...]:
        (scorer,) = self.members
        return tuple(self.name if part == scorer.name else part for part in scorer.part_names())

    def combine(self, measured: Mapping[Scorer, tuple[Tensor, ...]], prompts: Prompts) -> Scores:
        (scores,) = self.combined(measured, prompts)
        parts = dict(zip(self.part_names(), scores.parts.values(), strict=True))
        return Scores(scores.total, parts, scores.std)


class FunctionScorer(Scorer):
    """Any callable as a scorer: `f(images, prompts) -> (B,)`, or `f(images)`, images (B, 3, H, W) in [0, 1].

    It may return a tensor, an array or a list of floats. `differentiable=True` says that gradients pass through it.
    """

    summary = "a Python callable"
    without_std = True
    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], name: str | None = None, differentiable: bool = False) -> None:
        super().__init__()
        object.__setattr__(self, "function", function)  # not registered: a module's parameters stay its owner's
        self.name = name or getattr(function, "__name__", type(function).__name__).strip("<>").lower()
        self.differentiable = differentiable
        self.needs_prompt = _takes_prompts(function)

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        value = self.function(images, list(prompts.text)) if self.needs_prompt else self.function(images)
        tensor = torch.as_tensor(value, device=images.device)
        if tensor.shape != (len(images),):
            raise RewardError(
                f"Expected {self.name!r} to return one number for each of {len(images)} images but got shape "
                f"{tuple(tensor.shape)}."
            )
        return tensor


def _takes_prompts(function: Callable[..., Any]) -> bool:
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) >= 2 or any(p.name in ("prompt", "prompts") for p in parameters)


def expression(terms: Sequence[tuple[float, Scorer]]) -> str:
    """Write a sum as `parse_expression` reads it: `2 * a + b - 0.1 * c`."""
    words: list[str] = []
    for weight, scorer in terms:
        sign = "-" if weight < 0 else "+"
        words += [sign] if words or sign == "-" else []
        words += [scorer.name] if abs(weight) == 1 else [f"{abs(weight):g} * {scorer.name}"]
    return " ".join(words)


def call_name(function: str, scorers: Sequence[Scorer], **options: object) -> str:
    """Write a function as `parse_expression` reads it: `lcb(a, b, k=1)`."""
    said = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()]
    return f"{function}({', '.join([*(scorer.name for scorer in scorers), *said])})"


def present(values: Tensor, scorers: Sequence[Scorer]) -> Tensor:
    """(members, B) bool: where a member gave a number; a warning names the members that did not everywhere."""
    valid = ~values.isnan()
    for scorer, row in zip(scorers, valid, strict=True):
        if not row.all():
            warnings.warn(
                f"The scorer {scorer.name!r} gave no number (NaN) for some images: the other members score these.",
                RuntimeWarning,
                stacklevel=2,
            )
    return valid


def merge(scored: Sequence[Scores]) -> dict[str, Tensor]:
    """The parts of several scores in one mapping. Raises RewardError where different scorers have one name."""
    parts: dict[str, Tensor] = {}
    for scores in scored:
        for name, values in scores.parts.items():
            if parts.setdefault(name, values) is not values:
                raise RewardError(f"Two different scorers are called {name!r}: give one of them another name.")
    return parts


def root(variance: Tensor) -> Tensor:
    """The square root, with gradient 0 instead of infinity at 0."""
    positive = variance > 0
    return torch.where(positive, variance.where(positive, 1.0).sqrt(), variance)


def exact(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def std_of(scores: Scores) -> Tensor:
    """The std, 0 where a scorer is exact."""
    return torch.zeros_like(scores.total) if scores.std is None else scores.std
