"""What on-policy methods share: images of the current model with their rewards, and how they are cut into updates."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from t2i_align.config import Settings
from t2i_align.keys import key
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import Driver, OnStep
from t2i_align.pipelines.kernels import Gaussian, Kernel, Step, ddim, flow_sde, load_kernel
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.compose import WeightedSum
from t2i_align.rewards.constraints import Limited
from t2i_align.training import Ctx, Method, TrainingError
from t2i_align.trajectory import Trajectory

DIVERGED = (
    "The images of a round are no numbers, so the weights have diverged: use a lower train.learning_rate, a smaller "
    "train.max_norm, or bf16 in the place of fp16; earlier checkpoints are kept."
)


class SamplingSettings(Settings):
    """How an on-policy method draws its images and goes through them."""

    group: int = Field(16, gt=1, description="images per prompt")
    steps: int = Field(10, gt=0, description="denoising steps of training images")
    kernel: str | None = Field(None, description="reverse steps; null: ddim(1.0), on flow models flow_sde(0.7)")
    shared_start: bool = Field(False, description="all images of a prompt start from one noise")
    batch_size: int = Field(16, gt=0, description="samples that go through the network together")
    epochs: int = Field(1, gt=0, description="passes over the images of a round")
    minibatches: int = Field(1, gt=0, description="updates per pass, each on its share of the images")
    trained_rows: float = Field(
        0.99, gt=0, le=1, description="share of the steps that is trained, noisiest first; the last adds variance"
    )
    discount: float = Field(
        0.0,
        ge=0,
        description="images count exp(-discount std / spread), for rewards with a std (Ctrl-U); 0: all alike",
    )


@dataclass
class Tools:
    """What a method works with besides its weights; not a module, so that `fit` trains the policy alone."""

    driver: Driver  # with the keywords of `call`, which encoding and decoding read, too
    scorer: Scorer | None  # None where nothing is scored
    call: dict[str, Any] = field(default_factory=dict)  # keywords of the pipeline in training, such as guidance_scale

    @property
    def reward(self) -> Scorer:
        """What is maximised. Raises TrainingError in a run without a reward."""
        if self.scorer is None:
            raise TrainingError("Expected a reward, by which the method scores its images, but the run has none.")
        return self.scorer


@dataclass(frozen=True)
class Rollout:
    """Images of one round, group-major: trajectories of those that this process drew, scores of all processes'."""

    traj: Trajectory
    scores: Scores
    group: int
    first: int = 0  # place of this process's images among all
    discount: float = 0.0  # of uncertain rewards, see `trust`
    serves: Tensor | None = None  # (B,) of all images, which of several rewards is the total; None: their sum
    previews: Tensor | None = None  # (B, M) of all images, rewards of the x0 estimates of the first M rows
    means: Tensor | None = None  # (B, M, ...) fp32 of the first M rows' steps, before latents are rounded

    def __len__(self) -> int:
        return len(self.traj.x)

    @property
    def trust(self) -> Tensor:
        """Factors (B,) in (0, 1] of all images' losses, exp(-discount std / spread within prompts): Ctrl-U's weights.

        Ctrl-U adds the uncertainty itself, which no policy gradient sees: `uncertainty.discount` has it for losses
        through which a reward's gradient flows.
        """
        std = self.scores.std
        if std is None or not self.discount:
            return torch.ones_like(self.scores.total)
        groups = self.scores.total.reshape(-1, self.group) if self.group > 1 else self.scores.total[None]
        spread = (groups - groups.nanmean(1, keepdim=True)).square().nanmean().sqrt()
        return (-self.discount * std / spread.clamp(min=1e-12)).exp().nan_to_num(nan=0.0)

    def mine(self, values: Tensor) -> Tensor:
        """Of values (B, ...) of all images those of this process's."""
        return values[self.first : self.first + len(self)]

    def alike(self) -> list[Tensor]:
        """Indices of all processes' images, split by the reward that they serve: what statistics may be taken over."""
        every = torch.arange(len(self.scores.total))
        return [every] if self.serves is None else [every[self.serves == k] for k in self.serves.unique()]


class OnPolicy(Method):
    """Base of methods that learn from images of the current model, or from given ones.

    `needs_gradient`: gradients of the reward reach the weights, so that it must be differentiable; `shardable`: its
    updates make the same passes through the network in all processes, which weights in shards need; `averages`: it
    keeps an average of the weights; `whole_groups`: it compares the images of a prompt in an update, so that they
    belong to one minibatch.
    """

    settings: SamplingSettings
    needs_gradient: ClassVar[bool] = False
    shardable: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False

    def __init__(self, settings: SamplingSettings, policy: Policy, tools: Tools) -> None:
        super().__init__()
        self.settings, self.policy, self.tools = settings, policy, tools

    @classmethod
    def refuse(cls, settings: Any, columns: Collection[str]) -> str | None:
        """Why a table of prompts with these columns cannot serve, or None; told before weights are loaded."""
        return None

    @classmethod
    def dealt(cls, settings: SamplingSettings) -> int:
        """Images that go to one minibatch together: a batch, or as many batches as whole groups of images fill."""
        return math.lcm(settings.batch_size, settings.group) if cls.whole_groups else settings.batch_size

    @property
    def learns_reward(self) -> bool:
        """Whether the reward is what it learns from, not preferences that are given."""
        return self.tools.scorer is not None

    @property
    def updates(self) -> int:
        """Optimiser updates per round of images."""
        return self.settings.epochs * self.settings.minibatches

    def networks(self) -> list[nn.Module]:
        """What it holds besides the pipeline and the scorers, for the estimate of memory."""
        return []

    def state(self) -> dict[str, Any]:
        """The multipliers of a reward under constraints."""
        reward = self.tools.scorer
        return {"multipliers": reward.multipliers.state_dict()} if isinstance(reward, Limited) else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from them."""
        if isinstance(self.tools.scorer, Limited):
            self.tools.scorer.multipliers.load_state_dict(state["multipliers"])

    def report(self, batch: Any) -> dict[str, float]:
        """Rewards of a round: their mean and those of their parts, their spread within prompts (DDPO: in all)."""
        data: Rollout = batch[0]
        total, parts = data.scores.total.cpu().double(), data.scores.parts
        groups = total.reshape(-1, data.group) if data.group > 1 else total[None]
        off = groups - groups.nanmean(1, keepdim=True)
        seen = {"reward": total.nanmean()}
        if groups.shape[1] > 1:  # one image alone has none
            seen["reward_spread"] = off.square().nanmean().sqrt()
        if len(parts) > 1:
            seen |= {f"reward/{name}": values.cpu().double().nanmean() for name, values in parts.items()}
        if data.scores.std is not None:
            seen |= {"reward_std": data.scores.std.cpu().double().nanmean(), "trust": data.trust.mean()}
        if isinstance(self.tools.scorer, Limited):
            held = zip(self.tools.scorer.constraints, self.tools.scorer.multipliers(), strict=True)
            seen |= {f"multiplier/{limit.scorer.name}": value for limit, value in held}
        counts = {"images": len(total), "invalid": int(total.isnan().sum())}
        return {name: float(value) for name, value in seen.items()} | counts

    def as_used(self, prompts: Prompts) -> Prompts:
        """What a user of the result would write for these prompts."""
        return prompts

    @property
    def usage(self) -> str:
        """What a user of the result should know, for its card."""
        return ""

    def save(self, folder: Path) -> None:
        """Write into the run's folder what is trained besides the policy."""

    def check_term(self) -> None:
        """Raises PolicyError where a loss term was yielded inside a context of the policy."""
        self.policy.refuse_open_context()

    def train(self, mode: bool = True) -> OnPolicy:
        """Networks keep their mode: sampling and training must be the same function, or ratios are not 1."""
        return self

    @property
    def kernel(self) -> Kernel:
        """The kernel of training images. Raises TrainingError for a deterministic one."""
        if self.settings.kernel is None:
            return self.default_kernel
        kernel = load_kernel(self.settings.kernel)
        if not kernel.stochastic:
            raise TrainingError(
                f"Expected a stochastic kernel such as ddim(1.0) but got {kernel.name}, which has no log-prob."
            )
        return kernel

    @property
    def default_kernel(self) -> Kernel:
        """ddim(1.0), on flow models flow_sde(0.7)."""
        return flow_sde(0.7) if self.tools.driver.grid(self.settings.steps, **self.tools.call).linear else ddim(1.0)

    def kernels(self, ctx: Ctx) -> Kernel | list[Kernel]:
        """The kernel of each row of a round."""
        return self.kernel

    @torch.no_grad()
    def rollout(self, ctx: Ctx, prompts: Prompts, told: Prompts | None = None) -> Rollout:
        """Draw and score `group` images per prompt with the current weights; of several processes each its share.

        The multipliers of a reward under constraints move by these scores, for the next round.

        Args:
            ctx: of the round.
            prompts: of the round, which scorers read.
            told: what the network reads in the place of this process's share of them.

        Raises:
            TrainingError: no reward is a number, or none has the std that `discount` needs.
        """
        s, driver = self.settings, self.tools.driver
        mine = ctx.world.share(len(prompts))
        cond = driver.encode(prompts[mine] if told is None else told).repeat(s.group)
        first = mine.start * s.group
        ids = list(range(first, first + len(cond)))
        seed, many = key(ctx.seed, "rollout", ctx.step), prompts[mine].repeat(s.group)
        previews: list[Tensor] = []
        means: list[Tensor] = []

        def look(row: int, made: Step, x: Tensor) -> None:
            if row < self.previewed:
                previews.append(self.score(made.x0, many).total)
            if row < self.kept_means:
                means.append(made.q.mean)

        traj = self.draw(ctx, cond, seed, ids, look)
        scores = gather(ctx, self.score(traj.x[:, -1], many))
        if not scores.total.isfinite().any():
            raise TrainingError("Every reward of a round is no number: score one image by hand to see why.")
        self.check_std(scores)
        if isinstance(self.tools.reward, Limited):
            self.tools.reward.update(scores)
        promised = ctx.world.gather(torch.stack(previews, 1)) if previews else None
        kept = torch.stack(means, 1) if means else None
        return Rollout(traj, scores, s.group, first, s.discount, previews=promised, means=kept)

    def score(self, latents: Tensor, prompts: Prompts) -> Scores:
        """Scores of latents (B, ...); NaN for those whose images are no numbers.

        Scorers compute in their own number type, as in evaluations; decoders in that of the networks unless it is
        fp16, in which many overflow.

        Raises:
            TrainingError: no image has numbers.
        """
        place = latents.device.type
        small = torch.is_autocast_enabled(place) and torch.get_autocast_dtype(place) == torch.float16
        with torch.autocast(place, enabled=False) if small else nullcontext():
            images = self.tools.driver.decode(latents, self.settings.batch_size)
        images, known = images.float(), images.isfinite().flatten(1).all(1)
        if not known.any():
            raise TrainingError(DIVERGED)
        if not known.all():
            images = images.where(known[:, None, None, None], 0.0)
        with torch.autocast(place, enabled=False):
            scores = self.tools.reward.scores(images, prompts)
        return scores._replace(total=scores.total.where(known, torch.nan))

    def check_std(self, scores: Scores) -> None:
        """Raises TrainingError where `discount` asks for a std that the reward does not have."""
        if self.settings.discount and scores.std is None:
            raise TrainingError(
                f"Expected a reward with a std, which discount={self.settings.discount:g} needs, but "
                f"{self.tools.reward.name} has none: use several members, as in mean(a, b), a scorer that returns "
                "(mean, std), or consistent(...)."
            )

    @property
    def previewed(self) -> int:
        """How many of the first rows' x0 estimates are decoded and scored, too."""
        return 0

    @property
    def kept_means(self) -> int:
        """Of how many of the first rows the means of the steps are kept."""
        return 0

    def draw(self, ctx: Ctx, cond: Cond, seed: int, ids: list[int], on_step: OnStep | None = None) -> Trajectory:
        """The chains of a round, their noise keyed by `ids`."""
        s, driver, call = self.settings, self.tools.driver, self.tools.call
        starts = [i - i % s.group for i in ids] if s.shared_start else ids
        x = driver.start(cond, s.steps, seed, starts, **call)
        options: dict[str, Any] = {"batch_size": s.batch_size, "ids": ids, "start": x, "on_step": on_step}
        return driver.rollout(cond, s.steps, self.kernels(ctx), seed, **options, **call)

    def rows(self, traj: Trajectory) -> list[int]:
        """The rows that are trained: those with noise among the noisiest share. Raises TrainingError without any."""
        found = [row for row in traj.stochastic if row < self.trained(traj.steps)]
        if not found:
            raise TrainingError(
                f"None of the {traj.steps} steps of a run has noise and is trained, so there is nothing to learn: use "
                "more steps, or another kernel."
            )
        return found

    def trained(self, steps: int) -> int:
        """How many of a run's steps are trained."""
        return max(1, int(self.settings.trained_rows * steps))

    def chunks(self, ctx: Ctx, count: int) -> list[slice]:
        """The slices of this process's `count` samples that belong to this update.

        Slices are those of the rollout, so that ratios start at exactly 1. All processes' slices are dealt out
        together, so that an update has the same images however many processes there are: of as many neighbours as there
        are minibatches each one goes to another, so that processes have equally much to do. A method of `whole_groups`
        has the slices of a group as one.
        """
        s, world, size = self.settings, ctx.world, self.dealt(self.settings)
        mine = [slices(range(first, min(first + size, count)), s.batch_size) for first in range(0, count, size)]
        every = len(mine) * world.count
        draws, sets = ctx.round_generator("order", ctx.update // s.minibatches), -(-every // s.minibatches)
        order = torch.cat([torch.randperm(s.minibatches, generator=draws) for _ in range(sets)])[:every]
        dealt = (order == ctx.update % s.minibatches).nonzero()[:, 0].tolist()
        if every < s.minibatches:
            raise TrainingError(
                f"Expected at least {s.minibatches} batches of {size} samples in a round, one for each minibatch, but "
                f"got {every}."
            )
        if self.policy.sharded and len(mine) % s.minibatches:
            raise TrainingError(
                f"Expected a number of batches in each process that the {s.minibatches} minibatches divide, since all "
                f"must make the same passes through weights in shards, but got {len(mine)}."
            )
        here = [mine[i - world.rank * len(mine)] for i in dealt if i // len(mine) == world.rank]
        return [part for parts in here for part in parts]

    def samples(self, ctx: Ctx, chunks: list[slice]) -> float:
        """How many samples an update has in all processes."""
        return ctx.world.total(sum(part.stop - part.start for part in chunks))

    def step(self, traj: Trajectory, rows: slice | Tensor, row: int) -> Gaussian:
        """The current model's Gaussian of the next latents of some samples, with its graph."""
        picked = rows if isinstance(rows, slice) else rows.tolist()
        return self._step(traj.x[rows, row], row, traj.cond[picked]).q

    @torch.no_grad()
    def reference_log_prob(self, traj: Trajectory, context: AbstractContextManager[None] | None = None) -> Tensor:
        """Log-probs (B, N) in nats of the stored steps under the base model, or in another context of the policy."""
        out = torch.zeros_like(traj.log_prob)
        with context or self.policy.reference():
            for first in range(0, len(traj.x), self.settings.batch_size):
                part = slice(first, min(first + self.settings.batch_size, len(traj.x)))
                for row in self.rows(traj):
                    out[part, row] = self.step(traj, part, row).log_prob(traj.x[part, row + 1])
        return out

    def _step(self, x: Tensor, row: int, cond: Any) -> Step:
        s = self.settings
        return self.tools.driver.step(x, row, cond, s.steps, self.kernel, **self.tools.call)


def slices(samples: range, size: int) -> list[slice]:
    """Consecutive samples in slices of at most `size`."""
    return [slice(first, min(first + size, samples.stop)) for first in range(samples.start, samples.stop, size)]


def gather(ctx: Ctx, scores: Scores) -> Scores:
    """Scores of all processes' images; rewards that are infinite become NaN, which methods leave out."""
    total = ctx.world.gather(scores.total)
    parts = {name: ctx.world.gather(values) for name, values in scores.parts.items()}
    std = None if scores.std is None else ctx.world.gather(scores.std)
    return Scores(total.where(total.isfinite(), torch.nan), parts, std)


def reward_weights(reward: Scorer) -> dict[str, float]:
    """The weights of a sum of scorers by part. Raises TrainingError for another kind of reward."""
    if not isinstance(reward, WeightedSum):
        raise TrainingError(f"Expected a sum of rewards such as 'a + 2 * b' but got {reward.name}.")
    terms = zip(reward.members, reward.factors, strict=True)
    return {name: factor for scorer, factor in terms for name in scorer.part_names()}


def surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss (B,): max(-A rho, -A clip(rho, 1 - clip, 1 + clip))."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def outside(ratio: Tensor, clip: float) -> Tensor:
    """Share of ratios that are clipped."""
    return ((ratio - 1).abs() > clip).float().mean()
