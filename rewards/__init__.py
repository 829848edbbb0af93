"""Image scorers: one contract (`base.py`), one table, one file a scorer; torch and the scorers load on first use."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.config import find_class
from t2i_align.rewards.build import Builder, check_node
from t2i_align.rewards.expression import Node, RewardError, read_reward, split_rewards

if TYPE_CHECKING:
    from t2i_align.rewards.base import Scorer, Scores
    from t2i_align.rewards.compose import FunctionScorer, WeightedSum
    from t2i_align.rewards.constraints import Constraint, Limited
    from t2i_align.rewards.reference import Reference

__all__ = [
    "SCORERS",
    "Constraint",
    "FunctionScorer",
    "Limited",
    "Reference",
    "RewardError",
    "Scorer",
    "Scores",
    "WeightedSum",
    "check_reward",
    "load_reward",
    "scorer_class",
    "split_rewards",
]

_LAZY = {
    "Constraint": "t2i_align.rewards.constraints",
    "FunctionScorer": "t2i_align.rewards.compose",
    "Limited": "t2i_align.rewards.constraints",
    "Reference": "t2i_align.rewards.reference",
    "Scorer": "t2i_align.rewards.base",
    "Scores": "t2i_align.rewards.base",
    "WeightedSum": "t2i_align.rewards.compose",
}

SCORERS = {
    "verifier": "t2i_align.rewards.verifier:Verifier",
    "jpeg_compressibility": "t2i_align.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "t2i_align.rewards.jpeg:JpegIncompressibility",
    "clip": "t2i_align.rewards.clip:CLIP",
    "pickscore": "t2i_align.rewards.pickscore:PickScore",
    "hpsv2": "t2i_align.rewards.hpsv2:HPSv2",
    "hpsv2.1": "t2i_align.rewards.hpsv2:HPSv21",
    "mps": "t2i_align.rewards.mps:MPS",
    "aesthetic": "t2i_align.rewards.aesthetic:Aesthetic",
    "aesthetic_v2.5": "t2i_align.rewards.aesthetic_v25:AestheticV25",
    "clip_iqa": "t2i_align.rewards.clip_iqa:ClipIQA",
    "vlm_rm": "t2i_align.rewards.vlm_rm:VLMRM",
    "subject": "t2i_align.rewards.subject:Subject",
    "ocr": "t2i_align.rewards.ocr:OCR",
    "image_reward": "t2i_align.rewards.image_reward:ImageReward",
    "cyclereward": "t2i_align.rewards.cyclereward:CycleReward",
    "vqascore": "t2i_align.rewards.vqascore:VQAScore",
    "hpsv3": "t2i_align.rewards.hpsv3:HPSv3",
    "vlm_judge": "t2i_align.rewards.vlm_judge:VLMJudge",
    "tiny_clip": "t2i_align.rewards.tiny:TinyCLIP",
    "tiny_pick": "t2i_align.rewards.tiny:TinyPick",
}


def scorer_class(name: str) -> type[Scorer]:
    """The class behind a name of the table, behind `package.module:Class`, or of a folder with a trained scorer.

    Raises:
        RewardError: no such scorer; the message has the nearest name and the list.
    """
    if name.lower().replace("-", "_") not in SCORERS and os.path.isdir(name):
        from t2i_align.rewards.trained import FACTS, find_folder, open_class

        folder = find_folder(name)
        if folder is None:
            raise RewardError(f"Expected {name} to be the folder of a trained scorer but it has no {FACTS}.")
        return open_class(folder)
    return find_class(name, SCORERS, "scorer", "t2i_align.rewards.base:Scorer", RewardError)


def check_reward(spec: str | Path | Mapping[str, Any]) -> Node:
    """Read a reward's text or mapping form, or a folder, and make sure that all of it exists; loads no weights.

    Raises:
        RewardError: not an expression, an unknown scorer, function or option, or a scorer that cannot work here.
    """
    # Not `Path.is_dir`, which raises for a text that is too long to be a path.
    is_folder = isinstance(spec, Path) or (isinstance(spec, str) and spec not in SCORERS and os.path.isdir(spec))
    node = str(spec) if is_folder else read_reward(spec)  # type: ignore[arg-type]
    check_node(node, scorer_class)
    return node


def load_reward(
    spec: str | Path | Mapping[str, Any] | Scorer | Callable[..., Any],
    device: Any = None,
    base: Reference | str | None = None,
) -> Scorer:
    """Make a scorer.

    Args:
        spec: a name; the folder of a trained scorer or of the run that made it; a sum or function such as
            `"2 * verifier - 0.1 * jpeg_incompressibility"` or `"lcb(a, b, k=1)"`; a mapping of names to weights or
            blocks (`expression.read_reward`); a callable `f(images, prompts) -> (B,)`; or a `Scorer`, which is returned
            as it is.
        device: where its networks go.
        base: what functions such as `calibrated` compare with: a `Reference`, or the alias or folder of a pipeline
            for which `t2i-align rewards calibrate` was run.

    Raises:
        RewardError: unknown or unusable scorers, before any weight is loaded; a calibration that is missing.
    """
    from t2i_align.rewards.base import Scorer
    from t2i_align.rewards.compose import FunctionScorer

    if isinstance(spec, Scorer):
        scorer = spec
    elif isinstance(spec, (str, Path, Mapping)):
        scorer = Builder(scorer_class, base).build(check_reward(spec))
    elif callable(spec):
        scorer = FunctionScorer(spec)
    else:
        raise RewardError(
            f"Expected a reward to be a name, a folder, a sum, a mapping, a Scorer or a callable but got {spec!r:.80}."
        )
    scorer.eval().requires_grad_(False)
    return scorer if device is None else scorer.to(device)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
