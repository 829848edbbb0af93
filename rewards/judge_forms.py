"""What a vision-language judge is asked, and how its reply becomes a number or the reason why it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

YES_NO = 'Does this image show "{prompt}"? Answer Yes or No.'

# Wang et al., arXiv 2503.05236, github.com/CodeGoat24/UnifiedReward (MIT): the words that the model was trained on
UNIFIED_REWARD = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated image using the "
    "format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a "
    "score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
RUBRIC = (
    "Rate how well this image shows what its prompt asks for, and how well it is made.\n"
    "5: everything asked for, without a fault. 4: everything, with small faults. 3: most of it. 2: little of it, or "
    "badly made. 1: none of it.\n"
    "Prompt: {prompt}\n"
    "End your reply with a line 'Final Score: N', with a number N from 1 to 5."
)
FINAL = re.compile(r"Final Score:[\s*\[(]*([1-5](?:\.\d+)?)(?![\d.]*\d)")


class Form(NamedTuple):
    """A kind of question.

    `template` has {prompt}; `parameters` are sent along; `read` takes the first choice of a reply and returns a number
    in `range`, or says why there is none.
    """

    template: str
    parameters: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], float | str]
    range: tuple[float, float]


def read_yes_no(choice: Mapping[str, Any]) -> float | str:
    """P(Yes) / (P(Yes) + P(No)) over all spellings, at the last token of the reply where either was likely.

    That is the only token unless the model was given room to think first.
    """
    tokens = (choice.get("logprobs") or {}).get("content") or []
    for token in reversed(tokens):
        mass = {"yes": 0.0, "no": 0.0}
        for candidate in token.get("top_logprobs") or [token]:
            word = re.sub(r"\W", "", str(candidate["token"])).lower()
            if word in mass:
                mass[word] += math.exp(candidate["logprob"])
        if sum(mass.values()):
            return mass["yes"] / sum(mass.values())
    return "no log-probabilities came back" if not tokens else "neither Yes nor No is among the likely tokens"


def read_score(choice: Mapping[str, Any]) -> float | str:
    """The number after the last `Final Score:`."""
    text = str((choice.get("message") or {}).get("content") or "")
    found: Sequence[str] = FINAL.findall(text)
    return float(found[-1]) if found and float(found[-1]) <= 5 else f"no final score from 1 to 5 in {text[-60:]!r}"


FORMS = {
    "yes_no": Form(YES_NO, {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}, read_yes_no, (0.0, 1.0)),
    "rubric": Form(RUBRIC, {"max_tokens": 512}, read_score, (1.0, 5.0)),
    "unified_reward": Form(UNIFIED_REWARD, {"max_tokens": 4096}, read_score, (1.0, 5.0)),
}
