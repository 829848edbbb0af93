"""Rewards as text: `2 * a + b - 0.1 * c`."""

from __future__ import annotations

import math

from t2i_align.errors import T2IError


class RewardError(T2IError):
    """A scorer that cannot serve: unknown, badly combined, or asked for what it does not do."""


def parse_expression(text: str) -> list[tuple[float, str]]:
    """Read `2 * a + b - 0.1 * c` (spaces around the signs) as [(2.0, "a"), (1.0, "b"), (-0.1, "c")].

    Raises:
        RewardError: not such a sum.
    """
    words = text.split()
    terms: list[tuple[float, str]] = []
    sign, at = 1.0, 0
    if words and words[0] in ("+", "-"):
        sign, at = (-1.0 if words[0] == "-" else 1.0), 1
    while at < len(words):
        weight = _number(words[at])
        if weight is not None:
            if words[at + 1 : at + 2] != ["*"] or at + 2 >= len(words):
                break
            at += 2
        if any(sign in words[at] for sign in "+*") or words[at] == "-" or _number(words[at]) is not None:
            break
        terms.append((sign * (1.0 if weight is None else weight), words[at]))
        at += 1
        if at == len(words):
            return terms
        if words[at] not in ("+", "-") or at + 1 == len(words):
            break
        sign, at = (-1.0 if words[at] == "-" else 1.0), at + 1
    raise RewardError(
        f"Expected a reward such as 'verifier' or '2 * verifier - 0.1 * jpeg_incompressibility' (spaces around + - *) "
        f"but got {text!r}."
    )


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
