"""Scorers made of scorers: weighted sums, in text, mapping and Python form."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.expression import RewardError


class WeightedSum(Scorer):
    """`sum_i weight_i * scorer_i`; the parts keep their names and raw units.

    The std, where any part has one, is the root of the weighted sum of squares: parts are taken as independent, a part
    without a std as exact.
    """

    summary = "weighted sum of scorers"

    def __init__(self, terms: Sequence[tuple[float, Scorer]]) -> None:
        super().__init__()
        names = [scorer.name for _, scorer in terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not terms or twice:
            what = f"{', '.join(twice)} twice" if twice else "none"
            raise RewardError(f"Expected a sum of different scorers but got {what}; give each one weight.")
        if not all(math.isfinite(weight) and weight for weight, _ in terms):
            raise RewardError(f"Expected weights that are finite and not 0 but got {[weight for weight, _ in terms]}.")
        self.factors = tuple(float(weight) for weight, _ in terms)
        self.scorers = nn.ModuleList(scorer for _, scorer in terms)
        self.name = expression(terms)
        self.differentiable = all(scorer.differentiable for scorer in self._parts())
        self.needs_prompt = any(scorer.needs_prompt for scorer in self._parts())
        self.columns = tuple(dict.fromkeys(column for scorer in self._parts() for column in scorer.columns))
        edges = [sorted(w * edge for edge in s.range) for w, s in zip(self.factors, self._parts(), strict=True)]
        self.range = (sum(low for low, _ in edges), sum(high for _, high in edges))

    def _parts(self) -> list[Scorer]:
        return list(self.scorers)  # type: ignore[arg-type]

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor | tuple[Tensor, Tensor]:
        scores = self._score(images, prompts)
        return scores.total if scores.std is None else (scores.total, scores.std)

    def refuse(self, prompt: str) -> str | None:
        return next((reason for scorer in self._parts() if (reason := scorer.refuse(prompt))), None)

    def _score(self, images: Tensor, prompts: Prompts) -> Scores:
        scored = [scorer._score(images, prompts) for scorer in self._parts()]
        total = sum(weight * part.total for weight, part in zip(self.factors, scored, strict=True))
        variances = [
            (weight * part.std).square()
            for weight, part in zip(self.factors, scored, strict=True)
            if part.std is not None
        ]
        parts = {name: values for part in scored for name, values in part.parts.items()}
        return Scores(torch.as_tensor(total), parts, torch.stack(variances).sum(0).sqrt() if variances else None)


class FunctionScorer(Scorer):
    """Any callable as a scorer: `f(images, prompts) -> (B,)`, or `f(images)`, images (B, 3, H, W) in [0, 1].

    It may return a tensor, an array or a list of floats. `differentiable=True` says that gradients pass through it.
    """

    summary = "a Python callable"
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
