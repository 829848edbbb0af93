"""Heads of trained scorers: unit vectors of picture and prompt from a CLIP -> a score, or a score with its std.

    cosine     exp(log_scale) sum_d i_d t_d, as PickScore has it (arXiv 2305.01569)
    weighted   exp(log_scale) sum_d w_d i_d t_d: small enough for bootstrapped ensembles on one tower
    linear     w x + b of x, which is i t (elementwise), i alone, or both with t; `mlp` has hidden layers before

Linear and mlp heads end in a number, a histogram (HL-Gauss) or quantiles (`outputs.py`); the last two know a std.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.rewards.outputs import HEADS

READS = {"product": 1, "image": 1, "both": 3}  # what a head looks at, and how often it has the width of the features


class Head(nn.Module):
    """Features -> score.

    `facts`: what `make_head` makes it from again. `reads_prompt`: whether the prompt matters.
    """

    facts: dict[str, Any]
    reads_prompt = True

    def forward(self, image: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """Score (B,), or (mean, std), of unit vectors (B, D) each; `text` may be None where it is not read."""
        raise NotImplementedError


class Cosine(Head):
    """`exp(log_scale) sum_d w_d i_d t_d`: all w_d are 1, or are learnt and the scale is not.

    Args:
        features: D.
        scale: exp(log_scale) at the start.
        weighted: learn w.
    """

    def __init__(self, features: int, scale: float = 1.0, weighted: bool = False) -> None:
        super().__init__()
        self.facts = {"kind": "weighted" if weighted else "cosine", "features": features}
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=not weighted)
        self.weight = nn.Parameter(torch.ones(features)) if weighted else None

    def forward(self, image: Tensor, text: Tensor | None) -> Tensor:
        assert text is not None
        product = image * text
        return self.log_scale.exp() * (product.sum(-1) if self.weight is None else product @ self.weight)


class Readout(Head):
    """A linear or multi-layer head; `offset + factor * output`, so that outputs are in standard deviations of targets.

    Args:
        features: D.
        reads: a key of `READS`.
        hidden: widths of hidden layers; none for a linear head.
        output: a key of `outputs.HEADS`.
    """

    offset: Tensor
    factor: Tensor

    def __init__(
        self, features: int, reads: str = "product", hidden: tuple[int, ...] = (), output: str = "regression"
    ) -> None:
        super().__init__()
        self.facts = {
            "kind": "mlp" if hidden else "linear",
            "features": features,
            "reads": reads,
            "hidden": list(hidden),
            "output": output,
        }
        self.reads, self.reads_prompt = reads, reads != "image"
        widths = (READS[reads] * features, *hidden)
        layers: list[nn.Module] = []
        for inner, outer in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.output = HEADS[output](widths[-1])
        self.register_buffer("offset", torch.tensor(0.0))
        self.register_buffer("factor", torch.tensor(1.0))

    def outputs(self, image: Tensor, text: Tensor | None) -> Tensor:
        """What the loss of `output` takes: (B, K)."""
        root = math.sqrt(image.shape[-1])  # entries of a unit vector are about 1/sqrt(D)
        parts = {"image": [root * image]}
        if text is not None:
            product = root * root * image * text
            parts |= {"product": [product], "both": [root * image, root * text, product]}
        return self.output(self.body(torch.cat(parts[self.reads], -1)))

    def forward(self, image: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        outputs = self.outputs(image, text)
        std = self.output.std(outputs)
        mean = self.offset + self.factor * self.output.mean(outputs)
        return mean if std is None else (mean, self.factor * std)


def make_head(facts: Mapping[str, Any]) -> Head:
    """The head that `facts` of a head describe, with starting weights."""
    if facts["kind"] in ("cosine", "weighted"):
        return Cosine(facts["features"], weighted=facts["kind"] == "weighted")
    return Readout(facts["features"], facts["reads"], tuple(facts["hidden"]), facts["output"])
