"""Rewards as data: texts such as `2 * a + zscore(b) - 0.1 * c` and YAML mappings, read without loading anything."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from t2i_align.config import nearest
from t2i_align.errors import T2IError

BLOCK = ("use", "weight", "options", "transform", "at_least", "at_most", "equals")
LIMITS = ("at_least", "at_most", "equals")


class RewardError(T2IError):
    """A scorer that cannot serve: unknown, badly combined, or asked for what it does not do."""


@dataclass(frozen=True)
class Call:
    """A scorer made of scorers: `lcb(a, b, k=1)`."""

    function: str
    members: tuple[Node, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A scorer under a name of the user's, made with options: `{sharp: {use: clip, options: {...}}}`."""

    name: str
    use: Node
    options: dict[str, Any] = field(default_factory=dict)


class Sum(NamedTuple):
    """`sum_i weight_i * node_i`."""

    terms: tuple[tuple[float, Node], ...]


class Limit(NamedTuple):
    """A constraint: the node at least, at most or equal to a number, or to `base`, its mean under the base model."""

    node: Node
    kind: str
    bound: float | str


class Limited(NamedTuple):
    """An objective under constraints."""

    objective: Node
    limits: tuple[Limit, ...]


Node = str | Call | Part | Sum | Limited  # a str names a scorer of the table


def read_reward(spec: str | Mapping[str, Any]) -> Node:
    """Read a text or a mapping.

    A mapping has weights or blocks: `{a: 2, safe: {use: "lcb(b)", weight: 1, transform: zscore}, c: {at_least: base}}`.
    A block's `use` is a text (its own name by default), `options` go to the scorer's constructor, `transform` is a
    function's name, `{name: {options}}`, or a list of these, applied in turn; `at_least`, `at_most` and `equals` make
    it a constraint instead of a summand.

    Raises:
        RewardError: neither.
    """
    if isinstance(spec, str):
        return _alone(parse_expression(spec))
    terms: list[tuple[float, Node]] = []
    limits: list[Limit] = []
    for name, value in spec.items():
        if isinstance(value, Mapping):
            node, weight, limit = _read_block(str(name), value)
            terms += [(weight, node)] if limit is None else []
            limits += [] if limit is None else [limit]
        else:
            terms.append((_as_number(value, f"the weight of {name!r}"), _alone(parse_expression(str(name)))))
    if not terms:
        raise RewardError(f"Expected a reward with at least one scorer that is no constraint but got {dict(spec)!r}.")
    objective = _alone(terms)
    return Limited(objective, tuple(limits)) if limits else objective


def _alone(terms: list[tuple[float, Node]]) -> Node:
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(tuple(terms))


def _read_block(name: str, block: Mapping[str, Any]) -> tuple[Node, float, Limit | None]:
    for key in block:
        if key not in BLOCK:
            raise RewardError(
                f"The reward {name!r} has an unknown key {key!r}.{nearest(str(key), BLOCK)} Known: {', '.join(BLOCK)}."
            )
    options = block.get("options") or {}
    use = read_reward(block.get("use") or name)
    if options and not isinstance(use, str):
        raise RewardError(f"The reward {name!r} has options, so its 'use' must be the name of one scorer.")
    node: Node = Part(name, use, dict(options))
    transforms = block.get("transform") or []
    for transform in transforms if isinstance(transforms, list) else [transforms]:
        said = {transform: {}} if isinstance(transform, str) else transform
        if not isinstance(said, Mapping):
            raise RewardError(f"Expected the transform of {name!r} to be a name or {{name: options}} but got {said!r}.")
        for function, given in said.items():
            node = Call(str(function), (node,), dict(given or {}))
    kinds = [kind for kind in LIMITS if kind in block]
    if len(kinds) > 1 or (kinds and "weight" in block):
        raise RewardError(f"Expected the reward {name!r} to have one of weight, {', '.join(LIMITS)}.")
    if not kinds:
        return node, _as_number(block.get("weight", 1.0), f"the weight of {name!r}"), None
    bound = block[kinds[0]]
    bound = bound if bound == "base" else _as_number(bound, f"{kinds[0]} of {name!r}, unless it is 'base',")
    return node, 0.0, Limit(node, kinds[0], bound)


def _as_number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RewardError(f"Expected {what} to be a number but got {value!r:.60}.")
    return float(value)


def parse_expression(text: str) -> list[tuple[float, Node]]:
    """Read `2 * a + b - 0.1 * c` (spaces around the signs) as [(2.0, "a"), (1.0, "b"), (-0.1, "c")].

    A summand may be a function of sums: `lcb(a, b, k=1)` is a `Call`.

    Raises:
        RewardError: not such a sum.
    """
    words = re.findall(r"[(),]|[^\s(),]+", text)
    try:
        terms, rest = _read_sum(words)
    except IndexError:
        terms, rest = [], words
    if rest or not terms:
        raise RewardError(
            "Expected a reward such as 'verifier', '2 * verifier - 0.1 * jpeg_incompressibility' or "
            f"'lcb(a, b, k=1)' (spaces around + - *) but got {text!r}."
        )
    return terms


def split_rewards(text: str) -> list[str]:
    """Split a list of rewards at its commas, but for those inside parentheses."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]


def _read_sum(words: list[str]) -> tuple[list[tuple[float, Node]], list[str]]:
    """The sum at the front of `words`, and what follows it. Raises IndexError where words are missing or odd."""
    terms: list[tuple[float, Node]] = []
    while not terms or words[:1] in (["+"], ["-"]):
        sign = -1.0 if words[0] == "-" else 1.0
        words = words[1:] if words[0] in ("+", "-") else words
        weight = number(words[0])
        if weight is not None:
            if words[1] != "*":
                raise IndexError
            words = words[2:]
        node, words = _read_scorer(words)
        terms.append((sign * (1.0 if weight is None else weight), node))
    return terms, words


def _read_scorer(words: list[str]) -> tuple[Node, list[str]]:
    name, words = words[0], words[1:]
    if re.search(r"[+*(),=]", name) or name == "-" or number(name) is not None:
        raise IndexError
    if words[:1] != ["("]:
        return name, words
    members: list[Node] = []
    options: dict[str, Any] = {}
    while words[0] != ")":
        words = words[1:]  # the opening parenthesis or a comma
        if "=" in words[0]:
            key, _, value = words[0].partition("=")
            said = number(value, infinite=True)
            options[key] = value if said is None else said
            words = words[1:]
        else:
            terms, words = _read_sum(words)
            members.append(_alone(terms))
        if words[0] not in (",", ")"):
            raise IndexError
    return Call(name, tuple(members), options), words[1:]


def number(word: str, infinite: bool = False) -> float | None:
    """The number a word says, or None; inf and -inf count only where `infinite`."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) or (infinite and math.isinf(value)) else None
