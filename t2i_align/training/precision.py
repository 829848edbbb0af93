"""The number types of a run's networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from t2i_align.config import TrainConfig
from t2i_align.wide_attention import WideAttention

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def autocast(device: torch.device, config: TrainConfig) -> Iterator[None]:
    """The number type of the networks; log-probs, losses and weights stay fp32."""
    number = AUTOCAST[config.precision]
    # Without a cache: weights that were cast without gradients first would have none later in the same block.
    halved = torch.autocast(device.type, number, enabled=number is not None, cache_enabled=False)
    with halved, WideAttention() if number and device.type == "cpu" else nullcontext():
        yield
