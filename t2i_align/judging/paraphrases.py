"""Other words for the same prompt, which should not change which picture is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from t2i_align.errors import T2IError
from t2i_align.playground.grammar import OPPOSITE, Caption, CaptionError, parse
from t2i_align.prompts import read_prompts

SPELLINGS = {  # American, British
    **{"gray": "grey", "color": "colour", "colors": "colours", "colored": "coloured", "colorful": "colourful"},
    **{"center": "centre", "theater": "theatre", "armor": "armour", "harbor": "harbour", "jewelry": "jewellery"},
    **{"mustache": "moustache", "donut": "doughnut", "airplane": "aeroplane", "tire": "tyre", "tires": "tyres"},
}
_SPELT = SPELLINGS | {british: american for american, british in SPELLINGS.items()}
_WORD = re.compile(r"[A-Za-z]+")
_PHRASE = r"((?:an?|the) [\w'-]+(?: [\w'-]+){0,2})"  # longer ones may hold what belongs to both: "... in a park"
_PAIR = re.compile(rf"{_PHRASE} and {_PHRASE}", re.IGNORECASE)


def case(prompt: str) -> str:
    """In small letters, or with a capital where all are small already."""
    small = prompt.lower()
    return small if small != prompt else prompt[:1].upper() + prompt[1:]


def stop(prompt: str) -> str:
    """With a full stop, or without the one that is there."""
    return prompt[:-1] if prompt.endswith(".") else prompt if prompt.endswith(("!", "?")) else f"{prompt}."


def spelling(prompt: str) -> str:
    """American words the British way, and the other way round."""

    def other(found: re.Match[str]) -> str:
        word = found[0]
        spelt = _SPELT.get(word.lower(), word)
        return spelt if spelt == word or word.islower() else spelt.upper() if word.isupper() else spelt.capitalize()

    return _WORD.sub(other, prompt)


def article(prompt: str) -> str:
    """The other article, of captions of the playground alone: a slip that its grammar forgives."""
    if _caption(prompt) is None:
        return prompt
    return re.sub(r"\b(an?)\b", lambda found: "a" if found[0] == "an" else "an", prompt, flags=re.IGNORECASE)


def order(prompt: str) -> str:
    """The two things of a prompt in the other order, a relation between them turned round."""
    caption = _caption(prompt)
    if caption is not None:
        if caption.kind != "pair":
            return prompt
        return str(replace(caption, things=caption.things[::-1], relation=OPPOSITE.get(caption.relation, "")))
    end = "." if prompt.endswith(".") else ""
    found = _PAIR.fullmatch(prompt.removesuffix("."))
    if found is None:
        return prompt
    first, second = found.groups()
    if first[0].isupper():
        first, second = first[0].lower() + first[1:], second[0].upper() + second[1:]
    return f"{second} and {first}{end}"


RULES: dict[str, Callable[[str], str]] = {
    "case": case,
    "stop": stop,
    "spelling": spelling,
    "article": article,
    "order": order,
}
GIVEN = "given"  # beside the rules: what a file says

Paraphrases = Mapping[str, tuple[str, ...]]


def paraphrases(prompt: str, given: Paraphrases | None = None) -> list[tuple[str, str]]:
    """(rule, other words) of a prompt, one for each rule that changes it, then those that are given."""
    ruled = [(name, text) for name, rule in RULES.items() if (text := rule(prompt)) != prompt]
    return ruled + [(GIVEN, text) for text in (given or {}).get(prompt, ()) if text != prompt]


def read_paraphrases(file: str | Path) -> dict[str, tuple[str, ...]]:
    """A table with the columns `prompt` and `paraphrase`; a prompt may have several rows.

    Raises:
        T2IError: no such file, or no such columns.
    """
    table = read_prompts(file)
    if "paraphrase" not in table.columns:
        raise T2IError(
            f"Expected {file} to be a .jsonl, .csv or .parquet table with the columns prompt and paraphrase but got "
            f"{', '.join(('prompt', *table.columns))}."
        )
    found: dict[str, tuple[str, ...]] = {}
    for prompt, text in zip(table.text, table.columns["paraphrase"], strict=True):
        if text:
            found[prompt] = (*found.get(prompt, ()), str(text))
    return found


def _caption(prompt: str) -> Caption | None:
    try:
        return parse(prompt)
    except CaptionError:
        return None
