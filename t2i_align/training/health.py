"""Signs that a training is broken, each with advice; checked in every run because none of them heals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from t2i_align.training.method import Ctx, TrainingError
from t2i_align.training.metrics import read

RATIO = 1e-3  # largest difference from 1 of a ratio of per-dimension probabilities before the first update
ROUNDING = 1e-6  # what fp32 makes of equal log-probs in batches of other samples, a few 1e-7
RIGHT = {"ratio": 1.0, "log_ratio": 0.0}  # what such statistics are then
CONSTANT = 5  # rounds without any difference between rewards
INVALID = 0.5  # share of a round's rewards that may be no numbers


class Health:
    """Watches the statistics of a run.

    Args:
        clip: of the method's ratios, half of which they may be off: further, and noise alone would decide what is
            clipped. None for a method without.
    """

    def __init__(self, clip: float | None = None) -> None:
        self.constant = 0  # rounds in a row
        self.allowed = RATIO if clip is None else min(RATIO, max(clip / 2, ROUNDING))
        self.off: list[tuple[str, Tensor]] = []  # how far ratios of an update's terms are from what they should be

    def term(self, ctx: Ctx, stats: Mapping[str, Tensor | float]) -> None:
        """Look at a loss term; `check_terms` says what was seen."""
        if ctx.update:
            return
        for name in (name for name in RIGHT if name in stats):
            values = torch.as_tensor(stats[name]).detach().float()
            if values.numel():
                self.off.append((name, (values - RIGHT[name]).abs().max()))

    def check_terms(self) -> None:
        """Look at all loss terms of an update, before it is made.

        Raises:
            TrainingError: before the first update on a batch, the policy is not the one that drew the batch.
        """
        names, found = [name for name, _ in self.off], read([off for _, off in self.off])
        self.off = []
        for name, off in zip(names, found, strict=True):
            if not math.isfinite(off):
                raise TrainingError(
                    f"The {name} of the policy to the one that drew the images is no number before the first update on "
                    "them, so latents are not finite: use precision=bf16 or fp32 where it was fp16, or a lower "
                    "learning rate; the last checkpoint is kept."
                )
            if off > self.allowed:
                raise TrainingError(
                    f"Expected the {name} of the policy to the one that drew the images to be {RIGHT[name]:g} before "
                    f"the first update on them, to {self.allowed:.3g}, but it is off by {off:.3g}: drawing and "
                    "training are not the same function; look for dropout, a network in another mode, or layers whose "
                    "result depends on the batch."
                )

    def round(self, step: int, report: Mapping[str, float]) -> None:
        """Look at a collected batch.

        Raises:
            TrainingError: too many rewards are no numbers, or rewards have not differed for several rounds.
        """
        images, invalid = report.get("images", 0), report.get("invalid", 0)
        if invalid > INVALID * images:
            raise TrainingError(
                f"{invalid:g} of {images:g} rewards of the round at step {step} are no numbers: score such images with "
                "`t2i-align score --explain` to see why; the last checkpoint is kept."
            )
        self.constant = self.constant + 1 if report.get("reward_spread") == 0 else 0
        if self.constant >= CONSTANT:
            raise TrainingError(
                f"All images of a prompt got the same reward in {CONSTANT} rounds up to step {step}, so there is "
                "nothing to learn from: use a larger group, harder or easier prompts, or a finer reward; the last "
                "checkpoint is kept."
            )

    def update(self, step: int, loss: float, norm: float, scale: float | None) -> None:
        """Look at an update before it is made.

        Args:
            step: of the update.
            loss: of all terms.
            norm: of the gradient.
            scale: that the loss was multiplied by against fp16's range, under which infinite gradients are expected
                now and then; None without.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        if not math.isfinite(loss) or (scale is None and not math.isfinite(norm)):
            raise TrainingError(
                f"The loss of update {step} is {loss} (gradient norm {norm}): lower the learning rate or look at the "
                "data; the last checkpoint is kept."
            )
        if scale is not None and scale < 1:
            raise TrainingError(
                f"The gradients of update {step} overflow fp16 whatever the loss is scaled by: use precision=bf16; the "
                "last checkpoint is kept."
            )
