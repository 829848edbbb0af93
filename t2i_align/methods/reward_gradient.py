"""What reward gradients share: a differentiable reward backpropagated through decoder and sampler into the policy.

    loss = scale E[shape(r(decode(x0), prompt))],   shape(r) = -r, max(0, goal - r) or |goal - r|

A method says which of the reverse steps keep their graph (`refl.py`, `draft.py`). Only latents between steps, and those
before decoder and scorer, are kept; the rest is computed again in the backward pass (`checkpointing`). The gradient is
taken through the scorer, then the decoder, then the network, so that no weights but the policy's get gradients, and a
sample without a finite one is left out. `kl` adds the KL of the chain of steps to the base's, estimated at one of them
(not in the papers, which stop early instead). A pre-training term, the denoising error on images of a data set, holds
the model to them; ReFL's published weights are 1e-3 for the reward and 1 for that. Departures: guidance acts in
training as the run says (ReFL trains without); clamped pixels pass gradients on, which the published code loses;
decoder and scorer compute in their own number type whatever the network trains in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.errors import T2IError
from t2i_align.keys import key
from t2i_align.methods.base import DIVERGED, OnPolicy, SamplingSettings, Tools
from t2i_align.methods.forward import Forward
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.kernels import Kernel, load_kernel
from t2i_align.pipelines.latents import LatentCache
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts, read_prompts
from t2i_align.rewards.base import Scores
from t2i_align.rewards.constraints import Limited
from t2i_align.rewards.uncertainty import discount
from t2i_align.steering.gradients import SCORER_SCALE, pull
from t2i_align.training import Ctx, Term, TrainingError
from t2i_align.training.health import INVALID
from t2i_align.wide_attention import recomputed

Make = Callable[[], Tensor]
Shape = Literal["linear", "margin", "target"]


class GradientSettings(SamplingSettings):
    """What all of them share."""

    group: int = Field(1, gt=0, description="images per prompt")
    batch_size: int = Field(8, gt=0, description="samples that go through network and scorer together")
    kernel: str | None = Field(None, description="reverse steps; null: ddim(1.0), on flow models flow_sde(0.7)")
    loss: Shape = Field("linear", description="-r, max(0, goal - r) or |goal - r|")
    goal: float = Field(2.0, description="of `margin` and `target`, in the unit of the reward")
    discount: float = Field(
        0.0,
        ge=0,
        description="l exp(-U) + U in place of a loss l, with U = discount std of the reward (Ctrl-U); not of `linear`",
    )
    scale: float = Field(1.0, gt=0, description="weight of the reward beside `pretrain`; Adam does not see it alone")
    kl: float = Field(0.0, ge=0, description="weight of the KL to the base, in units of the reward per nat")
    pretrain: float = Field(0.0, ge=0, description="weight of the denoising error on images of `pretrain_data`")
    pretrain_data: str | None = Field(None, description="table with the columns prompt and image, paths beside it")
    straight_through: bool = Field(True, description="let gradients through pixels that are clamped at 0 or 1")
    checkpointing: bool = Field(True, description="compute steps, decoder and scorer again in the backward pass")
    epochs: ClassVar[int] = 1  # type: ignore[misc]  # images are drawn by the weights of their update
    trained_rows: ClassVar[float] = 1.0  # type: ignore[misc]


class Starts(NamedTuple):
    """Starting latents (B, ...) of this process's images, the first of which is number `first` of the round."""

    x: Tensor
    cond: Cond
    first: int
    seed: int
    images: int  # of all processes

    def ids(self, part: slice) -> list[int]:
        """The numbers of some of them."""
        return list(range(self.first + part.start, self.first + part.stop))


class RewardGradient(OnPolicy):
    """Base: the gradient of the reward at the latents, and its way into the weights."""

    settings: GradientSettings
    needs_gradient: ClassVar[bool] = True

    def __init__(self, settings: GradientSettings, policy: Policy, tools: Tools) -> None:
        super().__init__(settings, policy, tools)
        if tools.reward.groupwise:
            raise TrainingError(
                f"Expected a reward of each image by itself but {tools.reward.name} compares the images of a prompt: "
                "use a method without reward gradients, such as grpo."
            )
        self.total = tools.driver.grid(settings.steps, **tools.call).steps
        self.process = Forward(tools.driver, settings.steps, self.total, "uniform", tools.call)
        self.pictures = None if settings.pretrain_data is None else read_pictures(settings.pretrain_data)
        self.cache = LatentCache(tools.driver, settings.batch_size, **tools.call)

    @classmethod
    def refuse(cls, settings: GradientSettings, columns: Any) -> str | None:
        """A pre-training term needs its images, and Ctrl-U's factor a loss that does not hang on the reward's zero.

        l exp(-U) + U falls as U grows where l > exp(U). Of l = -r that is every reward below -exp(U), so that doubt
        would be learned by rewards that are negative for no other reason than their zero.
        """
        if settings.discount and settings.loss == "linear":
            return "method.loss: expected target or margin with discount, whose losses are 0 at best, but got linear"
        if bool(settings.pretrain) != (settings.pretrain_data is not None):
            return "method.pretrain: expected a weight and pretrain_data, or neither"
        if settings.pretrain_data is not None:
            read_pictures(settings.pretrain_data)
        return None

    @property
    def sampler(self) -> Kernel:
        """The reverse steps of training images, which may be deterministic here."""
        return self.default_kernel if self.settings.kernel is None else load_kernel(self.settings.kernel)

    @property
    def kernel(self) -> Kernel:
        """Steps in which evaluations can measure a KL: the default ones where those of training add no noise."""
        return self.sampler if self.sampler.stochastic else self.default_kernel

    def collect(self, ctx: Ctx, prompts: Prompts) -> Starts:
        """Where the images of the round start; they are drawn in the update that learns from them."""
        s, driver = self.settings, self.tools.driver
        mine = ctx.world.share(len(prompts))
        cond = driver.encode(prompts[mine]).repeat(s.group)
        first, seed = mine.start * s.group, key(ctx.seed, "rollout", ctx.step)
        ids = list(range(first, first + len(cond)))
        starts = [i - i % s.group for i in ids] if s.shared_start else ids
        x = driver.start(cond, s.steps, seed, starts, **self.tools.call)
        return Starts(x, cond, first, seed, len(prompts) * s.group)

    def report(self, batch: Starts) -> dict[str, float]:
        """How many images are drawn."""
        return {"images": batch.images}

    def losses(self, ctx: Ctx, batch: Starts) -> Iterator[Term]:
        """One term per batch of samples and gradient of theirs, then those of the KL and of pre-training."""
        chunks = self.chunks(ctx, len(batch.x))
        images, invalid, seen = self.samples(ctx, chunks), 0.0, []
        mine = sum(part.stop - part.start for part in chunks)
        for part in chunks:
            made = list(self.latents(ctx, batch, part))
            for make in made:
                latents = make()
                loss, slope, scores = self.slope(latents.detach(), batch.cond.prompts[part])
                share, rewards = 1 / (images * len(made)), scores.total
                seen.append(scores)
                straight = (latents.float() * slope).sum()
                known = rewards[rewards.isfinite()]
                invalid += (len(rewards) - len(known)) / len(made)
                stats: dict[str, Tensor | float] = {"reward": known, "invalid": len(rewards) - len(known)}
                yield Term((loss + straight - straight.detach()) * share, stats)
                if invalid > INVALID * mine:
                    raise TrainingError(
                        f"{invalid:g} of {mine} images of an update have a reward that is no number: score some by "
                        "hand to see why; the last checkpoint is kept."
                    )
            if self.settings.kl:
                nats = self.drift(ctx, batch, part)
                yield Term(self.settings.kl * nats.sum() / images, {"kl": nats})
            if self.settings.pretrain:
                yield Term(self.pretraining(ctx, batch, part) / images, {})
        if isinstance(self.tools.reward, Limited):  # a process may have no batch of this update, or fewer
            every = [scores for scores in ctx.world.collect(joined(seen) if seen else None) if scores is not None]
            self.tools.reward.update(joined(every))

    def latents(self, ctx: Ctx, batch: Starts, part: slice) -> Iterator[Make]:
        """Functions that make the latents (B, ...) to be decoded, with their graph; each is called once."""
        raise NotImplementedError

    def slope(self, latents: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor, Scores]:
        """The summed loss of latents (B, ...), its gradient (B, ...) and their scores (B,).

        Images that are no numbers, as decoders in fp16 make some, have the reward nan and the gradient 0.

        Raises:
            TrainingError: latents that are no numbers; a reward without gradients, or without the std for `discount`.
        """
        s, driver = self.settings, self.tools.driver
        if not latents.isfinite().all():
            raise TrainingError(DIVERGED)
        latents = latents.requires_grad_()
        with torch.autocast(latents.device.type, enabled=False):
            free = s.straight_through and bool(driver.clamps)
            images = driver.decode(latents, s.batch_size, straight_through=free, checkpointing=s.checkpointing)
            real = images.detach().isfinite().flatten(1).all(1)
            pixels = images.detach().float().where(real[:, None, None, None], 0.0).requires_grad_()
            scores: Scores = self.again(lambda seen: self.tools.reward.scores(seen, prompts), pixels)
            scores = where_real(scores, real)
            rewards = scores.total
            self.check_std(scores)
            if not rewards.requires_grad:
                raise TrainingError(
                    f"Expected a differentiable reward but the scores of {self.tools.reward.name} have no gradient."
                )
            known = rewards.isfinite()
            losses = shaped(rewards[known], s.loss, s.goal)
            if s.discount and scores.std is not None:
                losses = discount(losses, s.discount * scores.std[known])
            loss = s.scale * losses.sum()
            (slope,) = torch.autograd.grad(SCORER_SCALE * loss, pixels)
            return loss.detach(), pull(images, latents, slope / SCORER_SCALE), joined([scores])

    def sampled(self, batch: Starts, part: slice, x: Tensor, rows: range) -> Tensor:
        """Latents (B, ...) after some rows, with their graph where gradients are on."""
        s = self.settings
        return self.tools.driver.unroll(
            x, batch.cond[part], s.steps, self.sampler, rows, batch.seed, batch.ids(part),
            checkpointing=s.checkpointing, **self.tools.call,
        )  # fmt: skip

    def drift(self, ctx: Ctx, batch: Starts, part: slice) -> Tensor:
        """Nats (B,) by which chains of steps with noise leave the base's: one row, drawn, counts for all of them."""
        s, driver, cond, call = self.settings, self.tools.driver, batch.cond[part], self.tools.call
        row = int(torch.randint(self.total, (), generator=ctx.generator("drift", batch.first + part.start)))
        with torch.no_grad():
            x = driver.unroll(
                batch.x[part], cond, s.steps, self.kernel, range(row), batch.seed, batch.ids(part), **call
            )
            with self.policy.reference():
                base = driver.step(x, row, cond, s.steps, self.kernel, **call).q
        return self.total * driver.step(x, row, cond, s.steps, self.kernel, **call).q.kl(base)

    def again(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A function of a tensor, computed again in the backward pass where the settings say so."""
        return recomputed(function, x) if self.settings.checkpointing else function(x)

    def pretraining(self, ctx: Ctx, batch: Starts, part: slice) -> Tensor:
        """The summed denoising error of as many images of the data set as there are samples."""
        assert self.pictures is not None
        ids = batch.ids(part)
        drawn = [int(torch.randint(len(self.pictures), (), generator=ctx.generator("pretrain", i))) for i in ids]
        table = self.pictures[drawn]
        found = self.cache(table.columns["image"])
        rows = [row for row, name in enumerate(table.columns["image"]) if name in found]
        if not rows:
            why = next(iter(self.cache.problems.values()))
            raise TrainingError(f"None of {len(ids)} images of pretrain_data can be read: {why}")
        x0 = torch.stack([found[table.columns["image"][row]] for row in rows]).to(batch.x.device)
        with torch.no_grad():
            cond = self.tools.driver.encode(table[rows])
        noised = self.process.keyed(ctx, x0, [ids[row] for row in rows], 0)
        return self.settings.pretrain * self.process.error(noised, cond).sum() * len(ids) / len(rows)


def where_real(scores: Scores, real: Tensor) -> Scores:
    """Scores, nan throughout for the images that are not `real` (B,), bool."""

    def kept(values: Tensor) -> Tensor:
        return values.where(real.to(values.device), torch.nan)

    parts = {name: kept(values) for name, values in scores.parts.items()}
    return scores._replace(total=kept(scores.total), parts=parts, std=None if scores.std is None else kept(scores.std))


def joined(scores: Sequence[Scores]) -> Scores:
    """Scores of several batches as those of one, without their graph, on the CPU."""
    stds = [each.std.detach().cpu() for each in scores if each.std is not None]
    parts = {name: torch.cat([each.parts[name].detach().cpu() for each in scores]) for name in scores[0].parts}
    return Scores(torch.cat([each.total.detach().cpu() for each in scores]), parts, torch.cat(stds) if stds else None)


def shaped(rewards: Tensor, loss: str, goal: float) -> Tensor:
    """Losses (B,) of rewards: -r, max(0, goal - r) or |goal - r|."""
    if loss == "linear":
        return -rewards
    return (goal - rewards).relu() if loss == "margin" else (goal - rewards).abs()


def read_pictures(path: str) -> Prompts:
    """A table of images and what they show. Raises T2IError without a column `image`."""
    table = read_prompts(path)
    if "image" not in table.columns:
        raise T2IError(f"Expected {path} to have the columns prompt and image but it has {', '.join(table.columns)}.")
    images = tuple(str(Path(path).parent / str(image)) for image in table.columns["image"])
    return Prompts(table.text, {"image": images})
