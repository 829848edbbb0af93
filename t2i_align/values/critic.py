"""Learns a value function from the rounds of a run: L = mean over images and rows of loss(V(x_t, t, c), r(x_0, c)).

Its minimiser is E[r | x_t, c] under the model that drew the images, so that it has to be taught again as that moves:
from the last few rounds, since one round has too few images to learn from without learning them by heart. It has its
own optimiser: `fit` trains the policy alone. Rewards are brought to mean 0 and standard deviation 1 by the statistics
of the first round, once and for all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t2i_align.pipelines.cond import Cond
from t2i_align.rewards.base import Scorer
from t2i_align.training import Ctx, TrainingError
from t2i_align.values.calibration import calibrate, plot_calibration
from t2i_align.values.readers import Source
from t2i_align.values.value import READ, Served, Value, ValueBlock, dims_of

if TYPE_CHECKING:
    from t2i_align.methods.base import Rollout

KEPT = 8  # rounds whose predictions are remembered


class Critic:
    """What a method has of a value function: predictions with their graph, lessons, state, files.

    Args:
        block: settings.
        source: the run's driver, steps and keywords, and the path of the base network.
        reward: of the run.
        batch_size: latents that go through the network together.
    """

    ends = False  # whether it has a value at the last latents, below all rows of the grid

    def __init__(self, block: ValueBlock, source: Source, reward: Scorer, batch_size: int) -> None:
        self.block, self.source, self.reward, self.batch_size = block, source, reward, batch_size
        self.mean, self.std = 0.0, 0.0  # of the rewards; std 0 before the first round
        self.seen: list[dict[str, Tensor]] = []  # predictions (B, rows) and rewards (B,) of the last rounds, scaled

    def scaled(self, x: Tensor, row: int, cond: Cond) -> Tensor:
        """V (B,) in standard deviations of the reward, around its mean, differentiable by x."""
        raise NotImplementedError

    def observe(self, ctx: Ctx, data: Rollout, learn: bool = True) -> dict[str, float]:
        """Predict a round's rewards, then learn from them; what to log, the same in all processes."""
        rewards = data.scores.total.float().cpu()
        known = rewards[rewards.isfinite()]
        if not self.std:
            spread = float(known.std(correction=0))
            self.mean, self.std = float(known.mean()), spread if spread > 0 else 1.0
        rewards = (rewards - self.mean) / self.std
        predicted, loss = self._look(ctx, data, rewards, learn)
        self.seen = [*self.seen, {"predicted": ctx.world.gather(predicted).cpu(), "rewards": rewards}][-KEPT:]
        found = calibrate(self.seen[-1]["predicted"], rewards)
        middle = found[len(found) // 2]
        return {"value_r2": middle.r2, "value_correlation": middle.correlation} | loss

    def _look(self, ctx: Ctx, data: Rollout, rewards: Tensor, learn: bool) -> tuple[Tensor, dict[str, float]]:
        """Predictions (B, rows) for this process's images, and what to log of the lesson."""
        x, cond = data.traj.x, data.traj.cond
        chunks = [slice(first, first + self.batch_size) for first in range(0, len(x), self.batch_size)]
        rows = [torch.cat([self.scaled(x[c, r], r, cond[c]) for c in chunks]) for r in range(data.traj.steps)]
        return torch.stack(rows, 1), {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "std": self.std, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.mean, self.std, self.seen = state["mean"], state["std"], list(state["seen"])

    def save(self, folder: Path) -> None:
        """Write `calibration.json` and `calibration.png` of the last rounds."""
        if not self.seen:
            return
        folder.mkdir(parents=True, exist_ok=True)
        predicted, rewards = (torch.cat([round_[name] for round_ in self.seen]) for name in ("predicted", "rewards"))
        rows = (row._asdict() for row in calibrate(predicted, rewards))
        numbers = [{name: None if math.isnan(value) else value for name, value in row.items()} for row in rows]
        (folder / "calibration.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
        plot_calibration(predicted, rewards, folder / "calibration.png")


class Learned(Critic):
    """A network that learns; it remembers what the reader saw of all processes' last rounds."""

    optimizer: torch.optim.Optimizer

    def __init__(self, block: ValueBlock, source: Source, reward: Scorer, batch_size: int) -> None:
        super().__init__(block, source, reward, batch_size)
        self.served: Served | None = None
        self.memory: list[dict[str, Tensor]] = []  # rewards and trust (B,), what was seen (B, rows, ...)

    def scaled(self, x: Tensor, row: int, cond: Cond) -> Tensor:
        assert self.served is not None
        return self.served.scaled(x, row, cond)

    def state(self) -> dict[str, Any]:
        if self.served is None:
            return super().state()
        value = self.served.value
        mine = {"dims": value.dims, "value": value.state_dict(), "optimizer": self.optimizer.state_dict()}
        return super().state() | mine | {"memory": self.memory}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.served, self.memory = None, list(state.get("memory", ()))
        if "dims" in state:
            self._begin(state["dims"], 0)
            assert self.served is not None
            self.served.value.load_state_dict(state["value"])
            self.optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.served is None:
            return
        driver = self.source.driver
        self.served.value.save(folder, reward=self.reward.name, pipeline=driver.family, steps=self.source.steps)

    def _begin(self, dims: tuple[int, ...], seed: int) -> None:
        value = Value(self.block, dims, seed).to(next(self.source.driver.network.parameters()).device)
        value.mean.fill_(self.mean)
        value.std.fill_(self.std)
        value.requires_grad_(False)
        self.served = Served(value, self.source, self.batch_size)
        # With the usual eps of 1e-8, weights without a gradient would follow its rounding, which differs by processes.
        self.optimizer = torch.optim.AdamW(
            value.parameters(), self.block.learning_rate, eps=1e-5, weight_decay=self.block.weight_decay
        )

    def _look(self, ctx: Ctx, data: Rollout, rewards: Tensor, learn: bool) -> tuple[Tensor, dict[str, float]]:
        angles, seen = self._read(data)
        if self.served is None:
            self._begin(dims_of(tuple(part[:1, 0] for part in seen)), ctx.seed)
        assert self.served is not None
        value, rows = self.served.value, range(data.traj.steps)
        lesson = {"rewards": rewards, "trust": data.trust.cpu()}
        lesson |= {f"seen{i}": ctx.world.gather(part).cpu() for i, part in enumerate(seen)}
        self.memory = [*self.memory, lesson][-self.block.memory :]
        with torch.autocast(ctx.device.type, enabled=False):
            predicted = [value.expected(angles[[row] * len(data)], *(part[:, row] for part in seen)) for row in rows]
            loss = self._learn(ctx, angles) if learn else {}
        return torch.stack(predicted, 1), loss

    def _read(self, data: Rollout) -> tuple[Tensor, list[Tensor]]:
        """Noise levels (rows,) and what the reader sees of every latent: tensors (B, rows, ...)."""
        x, cond, source = data.traj.x, data.traj.cond, self.source
        chunks = [slice(first, first + self.batch_size) for first in range(0, len(x), self.batch_size)]
        read = READ[self.block.net]
        every = []
        for row in range(data.traj.steps):
            parts = [read(source, x[part, row], row, cond[part]) for part in chunks]
            every.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
        angles = torch.stack([source.angle(row, x[:1, row])[0] for row in range(data.traj.steps)])
        return angles, [torch.stack(tensors, 1) for tensors in zip(*every, strict=True)]

    @torch.enable_grad()
    def _learn(self, ctx: Ctx, angles: Tensor) -> dict[str, float]:
        """Some passes over the latents of the remembered rounds; all processes make the same ones."""
        assert self.served is not None
        value, block, rows = self.served.value, self.block, len(angles)
        taught = {name: torch.cat([lesson[name] for lesson in self.memory]) for name in self.memory[0]}
        rewards, trust = taught.pop("rewards"), taught.pop("trust")
        known = rewards.isfinite()
        for part in taught.values():  # a half-made image may overflow its decoder though the finished one is fine
            known &= part.isfinite().flatten(1).all(1)
        known = known.nonzero()[:, 0]
        losses = []
        value.requires_grad_(True)
        for epoch in range(block.epochs):
            order = torch.randperm(len(known) * rows, generator=ctx.generator("value", epoch))
            for batch in order.split(block.batch_size):
                image, row = known[batch // rows], batch % rows
                outputs = value(
                    angles[row.to(angles.device)], *(part[image, row].to(angles) for part in taught.values())
                )
                loss = (value.head.loss(outputs, rewards[image].to(outputs)) * trust[image].to(outputs)).mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(value.parameters(), 1.0)
                self.optimizer.step()
                losses.append(loss.item())
        value.requires_grad_(False)
        # Gradients on a GPU are the same in all processes but for rounding, which would add up over the lessons.
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values() if tensor.ndim]
        ctx.world.same([*value.parameters(), *moments])
        mean = sum(losses) / max(1, len(losses))
        if not math.isfinite(mean):
            raise TrainingError(
                "The value function's loss is no number: lower method.value.learning_rate; the last checkpoint is kept."
            )
        return {"value_loss": mean}


class PlugIn(Critic):
    """Nothing learned: the reward of the decoded x0 prediction of the base network; the baseline to beat."""

    ends = True

    def scaled(self, x: Tensor, row: int, cond: Cond) -> Tensor:
        images = self.source.promised(x, row, cond)
        with torch.autocast(x.device.type, enabled=False):
            return (self.reward.scores(images, cond.prompts).total - self.mean) / (self.std or 1.0)


def make_critic(block: ValueBlock, source: Source, reward: Scorer, batch_size: int) -> Critic:
    """The critic of a block. Raises RewardError for a CLIP that cannot be opened."""
    source = block.connect(source, next(source.driver.network.parameters()).device)
    made: type[Critic] = PlugIn if block.net == "plugin" else Learned
    return made(block, source, reward, batch_size)
