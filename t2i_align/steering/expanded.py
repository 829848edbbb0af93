"""Guidance by a prompt and its expansion at once, centred on the prompt the user wrote (Parrot, arXiv 2401.05675).

    output = null + w1 (original - null) + w2 (expanded - null)

`null` is the network's output for the negative prompt, `original` for the prompt and `expanded` for a longer text of
it. The prompt keeps its say however much an expansion adds; w2 = 0 is classifier-free guidance with scale w1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from t2i_align.pipelines.catalog import guidance_keyword
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import At, Driver
from t2i_align.pipelines.grid import Point
from t2i_align.prompts import NEGATIVE, Prompts, negatives


def joint_guidance(
    driver: Driver,
    x: Tensor,
    at: At,
    original: Cond,
    expanded: Cond,
    null: Cond,
    w1: float = 5.0,
    w2: float = 5.0,
    steps: int = 20,
    **call: Any,
) -> Tensor:
    """The jointly guided output (B, ...): one network call of 3 B rows without the pipeline's own guidance.

    Args:
        driver: of a pipeline with classifier-free guidance.
        x: (B, ...) latents.
        at: as in `Driver.predict`.
        original: B rows, the prompts as the user wrote them.
        expanded: B rows, their expansions.
        null: B rows, the negative prompt.
        w1: weight of the prompt.
        w2: weight of its expansion.
        steps: of the run whose grid `at` counts in.
        call: keywords of `__call__`.
    """
    off = {guidance_keyword(driver.pipe): 1.0}
    told = null + original + expanded
    outputs = Driver.predict(driver, torch.cat([x] * 3), _thrice(at), told, steps, **call | off)
    blind, by_prompt, by_expansion = outputs.chunk(3)
    return blind + w1 * (by_prompt - blind) + w2 * (by_expansion - blind)


def _thrice(at: At) -> At:
    if isinstance(at, Point):
        return Point(*(torch.cat([part] * 3) if part.ndim else part for part in at))
    return torch.cat([at] * 3) if isinstance(at, Tensor) and at.ndim else at


class JointDriver(Driver):
    """A driver whose every prediction is jointly guided, for steering and sampling with expanded prompts.

    Args:
        pipe: as in `Driver`.
        expansions: prompt -> expanded prompt; a prompt without one is guided by itself, with w1 + w2.
        w1: weight of the prompt.
        w2: weight of its expansion.
        call: as in `Driver`; a guidance scale among them is not used, a `negative_prompt`, or that of
            the prompts, is the null.
    """

    def __init__(
        self, pipe: DiffusionPipeline, expansions: Mapping[str, str], w1: float = 5.0, w2: float = 5.0, **call: Any
    ) -> None:
        super().__init__(pipe, **call)
        self.expansions, self.w1, self.w2 = dict(expansions), w1, w2
        self.others: dict[str, Cond] = {}  # conditions of one row: the expansions, and the null under its own text

    def predict(self, x: Tensor, at: At, cond: Cond, steps: int = 20, **call: Any) -> Tensor:
        """As `Driver.predict`, jointly guided; `cond` tells the original prompts."""
        longer = self._rows([self.expansions.get(text, text) for text in cond.prompts.text], cond)
        general = self.defaults.get(NEGATIVE)
        own = negatives(cond.prompts, general, self.accepts) or [general] * len(cond)
        null = self._rows([text or "" for text in own], cond)
        return joint_guidance(self, x, at, cond, longer, null, self.w1, self.w2, steps, **call)

    def _rows(self, texts: list[str], cond: Cond) -> Cond:
        """The condition of texts, each encoded once, with what else the rows of `cond` are told."""
        for text in dict.fromkeys(texts):
            if text not in self.others:
                self.others[text] = self.encode(Prompts.of(text))
        rows = self.others[texts[0]]
        for text in texts[1:]:
            rows = rows + self.others[text]
        return Cond(rows.encoded, rows.rows, rows.prompts, cond.given)
