"""A learned value function V(x_t, t, prompt): its network, and its folder on disk.

A trunk reads (`readers.py`), a head predicts (`heads.py`). The noise level enters as the angle atan2(sigma, alpha), so
that a value learned on one grid serves another, and through it every scheduler of the same latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.config import Settings
from t2i_align.keys import key
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import Driver
from t2i_align.rewards.features import load_clip
from t2i_align.rewards.outputs import HEADS
from t2i_align.values.readers import Source, ValueFunctionError, read_clip, read_features, read_latents

WEIGHTS, NOTE = "value.safetensors", "value.json"
READ = {"features": read_features, "conv": read_latents, "clip": read_clip}
WAVES = 8  # of the noise level's embedding


class ValueBlock(Settings):
    """A value function and how it is learned."""

    net: Literal["features", "conv", "clip", "plugin"] = Field(
        "features",
        description="reads the network's middle layer, the latent, or a CLIP's view of the decoded x0 prediction; "
        "`plugin`, nothing learned: its reward",
    )
    clip: str | None = Field(None, description="scorer on a CLIP, such as `clip`, whose CLIP net=clip looks through")
    head: Literal["regression", "hl_gauss", "quantile"] = Field("regression", description="what it predicts")
    width: int = Field(128, gt=0, description="channels of its own layers")
    learning_rate: float = Field(1e-3, gt=0, description="of its AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="of its AdamW")
    memory: int = Field(8, gt=0, description="last rounds that it learns from; checkpoints hold what it saw of them")
    epochs: int = Field(2, gt=0, description="passes over their latents per round")
    batch_size: int = Field(128, gt=0, description="latents of an update of it")

    @model_validator(mode="after")
    def _eyes(self) -> ValueBlock:
        if (self.net == "clip") != (self.clip is not None):
            raise ValueFunctionError(
                "Expected value.clip to name a scorer on a CLIP, such as tiny_clip, where value.net is clip, and to be "
                f"null elsewhere, but got net={self.net} and clip={self.clip}."
            )
        return self

    def connect(self, source: Source, device: torch.device) -> Source:
        """A source with what the net reads by. Raises RewardError for a CLIP that cannot be opened."""
        return source if self.clip is None else source._replace(tower=load_clip(self.clip, device))


class Level(nn.Module):
    """Features scaled and shifted by what is known of the noise level and prompt."""

    def __init__(self, width: int, known: int) -> None:
        super().__init__()
        self.linear = nn.Linear(known, 2 * width)

    def forward(self, h: Tensor, known: Tensor) -> Tensor:
        scale, shift = self.linear(known).reshape(len(h), -1, *[1] * (h.ndim - 2)).chunk(2, 1)
        return h * (1 + scale) + shift


class FeatureTrunk(nn.Module):
    """Two layers on features (B, F)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(features), nn.Linear(features, width), nn.Linear(width, width)
        self.level = Level(width, 2 * WAVES)

    def forward(self, waves: Tensor, features: Tensor) -> Tensor:
        h = F.silu(self.level(self.first(self.norm(features)), waves))
        return h + F.silu(self.second(h))


class ConvTrunk(nn.Module):
    """Two residual convolutions at full and at half size on latents (B, C, ...); no norms, which would hide their size.

    The means over positions of both sizes and of the latent itself go on, so that a linear value is within reach.
    """

    def __init__(self, channels: int, axes: int, prompt: int, width: int) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.enter = conv(channels, width, 3, padding=1)
        self.inner = nn.ModuleList(conv(width, width, 3, stride=stride, padding=1) for stride in (1, 2))
        self.prompt = nn.Linear(prompt, width)
        self.levels = nn.ModuleList(Level(width, 2 * WAVES + width) for _ in range(2))
        self.leave = nn.Linear(2 * width + channels, width)

    def forward(self, waves: Tensor, x: Tensor, prompt: Tensor) -> Tensor:
        known = torch.cat([waves, F.silu(self.prompt(prompt))], 1)
        h = self.enter(x)
        full = h + self.inner[0](F.silu(self.levels[0](h, known)))
        half = F.silu(self.inner[1](F.silu(self.levels[1](full, known))))
        pooled = [part.flatten(2).mean(2) for part in (full, half, x)]
        return self.leave(torch.cat(pooled, 1))


class Value(nn.Module):
    """V in standard deviations of the reward, around its mean: `mean` and `std` are the reward's.

    Args:
        block: its settings.
        dims: sizes of what it reads, see `dims_of`.
        seed: of its starting weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, block: ValueBlock, dims: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.block, self.dims = block, tuple(dims)
        trunk: Any = ConvTrunk if block.net == "conv" else FeatureTrunk
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "value"))
            self.trunk = trunk(*self.dims, block.width)
            self.head = HEADS[block.head](block.width)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, angle: Tensor, *seen: Tensor) -> Tensor:
        """The head's outputs (B, K) at noise levels `angle` (B,) for what the reader saw, B rows each."""
        steps = torch.arange(WAVES, device=angle.device) + 1
        waves = angle.float()[:, None] * steps
        hidden = self.trunk(torch.cat([waves.sin(), waves.cos()], 1), *seen)
        return self.head(hidden)

    def expected(self, angle: Tensor, *seen: Tensor) -> Tensor:
        """V (B,) in standard deviations of the reward."""
        return self.head.mean(self(angle, *seen))

    def save(self, folder: str | Path, **note: Any) -> None:
        """Write `value.safetensors` and `value.json`, with further facts in `note`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: part.contiguous() for name, part in self.state_dict().items()}, folder / WEIGHTS)
        said = {"format": 1, "block": self.block.model_dump(mode="json"), "dims": list(self.dims), **note}
        (folder / NOTE).write_text(json.dumps(said, indent=1), encoding="utf-8")


def dims_of(seen: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Sizes of what a reader saw: (features,), or (channels, axes, prompt)."""
    if len(seen) == 1:
        return (seen[0].shape[1],)
    return seen[0].shape[1], seen[0].ndim - 2, seen[1].shape[1]


def is_value(folder: str | Path) -> bool:
    """Whether a folder holds a value function."""
    return (Path(folder) / NOTE).is_file() and (Path(folder) / WEIGHTS).is_file()


def load_value(folder: str | Path) -> Value:
    """Open what `Value.save` wrote. Raises ValueFunctionError for anything else."""
    folder = Path(folder)
    if not is_value(folder):
        raise ValueFunctionError(
            f"Expected {folder} to be a value function ({NOTE} and {WEIGHTS}), such as the value/ of a vard run."
        )
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        value = Value(ValueBlock(**note["block"]), note["dims"])
        value.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueFunctionError(
            f"The value function {folder} cannot be read ({' '.join(str(error).split()):.200}): copy it again."
        ) from error
    return value.eval().requires_grad_(False)


@dataclass(frozen=True)
class Served:
    """A value function at work on a pipeline: latents (B, ...), their row, condition -> V (B,), in the reward's unit.

    Differentiable by the latents. Per latent it makes `calls` network calls and `decodes` images.
    """

    value: Value
    source: Source
    batch_size: int = 16

    @classmethod
    def open(cls, folder: str | Path, driver: Driver, steps: int, batch_size: int = 16) -> Served:
        """The value function of a folder, on a driver's runs of so many steps."""
        device = driver.pipe._execution_device  # where an offloaded pipeline computes
        value = load_value(folder).to(device)
        return cls(value, value.block.connect(Source(driver, steps, {}), device), batch_size)

    @property
    def calls(self) -> int:
        """Network calls per latent."""
        return int(self.value.block.net in ("features", "clip"))

    @property
    def decodes(self) -> int:
        """Decoded images per latent."""
        return int(self.value.block.net == "clip")

    def see(self, x: Tensor, row: int, cond: Cond) -> tuple[Tensor, ...]:
        """What the value function reads of latents.

        Raises:
            ValueFunctionError: it was learned on another kind of latents, network or prompt encoding.
        """
        seen = READ[self.value.block.net](self.source, x, row, cond)
        if dims_of(seen) != self.value.dims:
            raise ValueFunctionError(
                f"Expected a pipeline like that of the value function, which reads sizes {self.value.dims}, but "
                f"{self.source.driver.family} has {dims_of(seen)}."
            )
        return seen

    def scaled(self, x: Tensor, row: int, cond: Cond) -> Tensor:
        """V (B,) in standard deviations of the reward, around its mean."""
        seen = self.see(x, row, cond)
        with torch.autocast(x.device.type, enabled=False):
            return self.value.expected(self.source.angle(row, x), *seen)

    def __call__(self, x: Tensor, row: int, cond: Cond) -> Tensor:
        parts = [slice(first, first + self.batch_size) for first in range(0, len(x), self.batch_size)]
        scaled = torch.cat([self.scaled(x[part], row, cond[part]) for part in parts])
        return self.value.mean + self.value.std * scaled
