"""What steering methods share: the context they run in, what they return, what it cost."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from t2i_align.config import Settings
from t2i_align.data.images import tensor_to_pil
from t2i_align.errors import T2IError
from t2i_align.keys import generator, key
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import Driver, noise_of
from t2i_align.pipelines.kernels import Gaussian, Kernel, Step, ddim, flow_sde, join_steps
from t2i_align.prompts import Prompts, occurrences
from t2i_align.rewards.base import Scorer, Scores

STEPS = 20  # of pipelines that say nothing of their own
Value = Callable[[Tensor, int, Cond], Tensor]  # latents (B, ...), their row of the grid, condition -> (B,)


class SteeringError(T2IError):
    """A steering run that cannot be done, or cannot go on."""


@dataclass
class Cost:
    """What a run spent, per sample: guided network calls and their backwards, decoded images and theirs, scored images.

    `seconds`: of the whole run.
    """

    forwards: int = 0
    backwards: int = 0
    decodes: int = 0
    decode_backwards: int = 0
    scored: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Steered:
    """P prompts with K particles each.

    `images` (P, K, 3, H, W) in [0, 1]; `latents` (P, K, ...); `scores` of the P K images, group-major; `log_weight`
    (P, K) nats, normalised in each group: the particles with these weights are the method's sample, -inf where a
    reward is not a number; `log_normaliser` (P,) nats, where the method estimates one; `history`: one row per step.

    `start` (P, K, ...) and `streams` (P, K, rows), where the method knows them: the latents that each particle's line
    began with and the names of the random streams that its rows drew from, which together make it again.
    """

    prompts: Prompts
    images: Tensor
    latents: Tensor
    scores: Scores
    log_weight: Tensor
    cost: Cost
    history: list[dict[str, Any]]
    log_normaliser: Tensor | None = None
    start: Tensor | None = None
    streams: Tensor | None = None

    @property
    def totals(self) -> Tensor:
        """Rewards (P, K)."""
        return self.scores.total.reshape(self.log_weight.shape)

    @property
    def best(self) -> Tensor:
        """The particle with the highest reward, (P,): a maximum, not a draw from the target."""
        return self.totals.nan_to_num(nan=-math.inf).argmax(1)

    def draw(self, seed: int = 0) -> Tensor:
        """One particle of each group by its weight, (P,)."""
        uniforms = [torch.rand((), generator=generator(seed, "draw", prompt)) for prompt in self.prompts.text]
        cumulated = self.log_weight.exp().cumsum(1)
        return torch.searchsorted(cumulated, torch.stack(uniforms).double()[:, None], right=True)[:, 0].clamp(
            max=cumulated.shape[1] - 1
        )

    def pil(self, index: Tensor | None = None) -> list[Any]:
        """One PIL image per prompt: the best, or those of `index` (P,)."""
        index = self.best if index is None else index
        return [tensor_to_pil(images[int(i)]) for images, i in zip(self.images, index, strict=True)]


class Line(NamedTuple):
    """How a sample came about: its starting latents (...) and the stream that each row's noise was drawn from."""

    start: Tensor
    streams: tuple[int, ...]


@dataclass
class Ctx:
    """A run: driver, reward, settings that all methods share, and the meter that counts what is spent.

    `kernel`: of the reverse steps; `decoder`: drives the pipeline with a small autoencoder, for previews; `particles`
    of a prompt are its samples number 0, 1, ...; `on_step` receives a row of the history as soon as it is known;
    `lines`: samples, by the name of their random stream, that begin like a particle of an earlier run instead of by a
    draw of their own; `repeats`: how many equal prompts come before each one, where the run's prompts are part of a
    larger table.
    """

    driver: Driver
    reward: Scorer
    steps: int = STEPS
    kernel: Kernel | None = None
    seed: int = 0
    max_batch: int = 16
    decode_batch: int = 8
    decoder: Driver | None = None
    on_step: Callable[[dict[str, Any]], None] | None = None
    lines: dict[int, Line] = field(default_factory=dict)
    repeats: Sequence[int] | None = None
    cost: Cost = field(default_factory=Cost)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def noisy(self) -> Kernel:
        """The kernel, or the usual stochastic one: `ddim(1)`, on flow-matching schedulers `flow_sde(0.7)`."""
        if self.kernel is None:
            return flow_sde(0.7) if self.driver.grid(self.steps).linear else ddim(1.0)
        return self.kernel

    def stochastic(self, method: str) -> Kernel:
        """The kernel for a method that lives on noise. Raises SteeringError for a deterministic one."""
        if not self.noisy.stochastic:
            raise SteeringError(
                f"Expected a stochastic kernel for {method} but got {self.noisy.name}, under which copies of a "
                "particle would stay equal: use ddim(1.0), or flow_sde(0.7) on flow-matching models."
            )
        return self.noisy

    def ids(self, prompts: Prompts, particles: int) -> list[int]:
        """Names of all particles' random streams: by prompt, its repeat in the table, and number."""
        repeats = occurrences(prompts) if self.repeats is None else self.repeats
        named = zip(prompts.text, repeats, strict=True)
        return [key(prompt, repeat, k) for prompt, repeat in named for k in range(particles)]

    def uniforms(self, prompts: Prompts, particles: int, row: int) -> Tensor:
        """(P, particles) draws in [0, 1) for the resampling at a row, one stream per prompt."""
        firsts = self.ids(prompts, 1)
        draws = [torch.rand(particles, generator=generator(self.seed, "resample", i, row)) for i in firsts]
        return torch.stack(draws)

    def encode(self, prompts: Prompts) -> Cond:
        """The prompts' condition, one row each."""
        return self.driver.encode(prompts)

    def start(self, cond: Cond, ids: Sequence[int]) -> Tensor:
        """Starting latents (B, ...): draws, or those of `lines`."""
        x = self.driver.start(cond, self.steps, self.seed, ids)
        for i, name in enumerate(ids):
            if name in self.lines:
                x[i] = self.lines[name].start.to(x)
        return x

    def streams(self, ids: Sequence[int], row: int) -> list[int]:
        """Names of the random streams that samples draw a row's noise from: their own, or those of `lines`."""
        return [self.lines[name].streams[row] if name in self.lines else name for name in ids]

    def all_streams(self, ids: Sequence[int]) -> Tensor:
        """The streams of all rows, (B, rows)."""
        return torch.tensor([self.streams(ids, row) for row in range(self.rows)]).T

    def draw(self, q: Gaussian, row: int, ids: Sequence[int]) -> Tensor:
        """The next latents (B, ...) of a row: a draw from `q` by the samples' streams."""
        return self.driver.draw(q, row, self.steps, self.seed, self.streams(ids, row))

    def noise(self, like: Tensor, ids: Sequence[int]) -> Tensor:
        """The noise (B, rows, ...) of whole runs, as `driver.unroll` takes it, for latents like `like` (B, ...)."""
        rows = range(self.rows)
        return torch.stack([noise_of(like, self.seed, self.streams(ids, row), row) for row in rows], 1)

    @torch.no_grad()
    def sample(self, cond: Cond, ids: Sequence[int]) -> Tensor:
        """Final latents (B, ...) of plain sampling, by the kernel or, without one, the scheduler's own solver."""
        if self.kernel is None and not self.lines:
            self.cost.forwards += len(cond) * self.rows
            return self.driver.solve(cond, self.steps, self.seed, self.max_batch, ids)
        return self.denoise(self.start(cond, ids), cond, ids, self.noisy)

    @torch.no_grad()
    def denoise(self, x: Tensor, cond: Cond, ids: Sequence[int], kernel: Kernel) -> Tensor:
        """Final latents (B, ...) of starting ones, by a kernel and the samples' streams."""
        for row in range(self.rows):
            x = self.draw(self.step(x, row, cond, kernel).q, row, ids)
        return x

    def unroll(
        self, x: Tensor, cond: Cond, kernel: Kernel, noise: Tensor | None = None, checkpointing: bool = False
    ) -> Tensor:
        """Final latents (B, ...) of a whole run with their graph, for one backward pass; both counted.

        `noise`: (B, rows, ...) standard normal, for a stochastic kernel.
        """
        self.cost.forwards += len(x) * self.rows * (2 if checkpointing else 1)
        self.cost.backwards += len(x) * self.rows
        return self.driver.unroll(x, cond, self.steps, kernel, noise=noise, checkpointing=checkpointing)

    @property
    def rows(self) -> int:
        """Number of steps on the grid."""
        return self.driver.grid(self.steps).steps

    def open_value(self, value: Value | str | None) -> Value | None:
        """A value function from its folder, its network calls and images counted; a callable as it is."""
        if not isinstance(value, str):
            return value
        from t2i_align.values import Served

        served = Served.open(value, self.driver, self.steps, self.max_batch)

        def counted(x: Tensor, row: int, cond: Cond) -> Tensor:
            self.cost.forwards += served.calls * len(x)
            self.cost.decodes += served.decodes * len(x)
            return served(x, row, cond)

        return counted

    def step(self, x: Tensor, row: int, cond: Cond, kernel: Kernel, **call: Any) -> Step:
        """One reverse step of all samples, `max_batch` at a time; counted."""
        self.cost.forwards += len(x)
        made = [
            self.driver.step(x[rows], row, cond[rows], self.steps, kernel, **call)
            for rows in chunks(len(x), self.max_batch)
        ]
        return join_steps(made)

    def decode(self, latents: Tensor, scale: float = 1.0, preview: bool = False) -> Tensor:
        """Images (B, 3, H, W); `preview` by the small decoder, if there is one; `scale` shrinks latents before."""
        self.cost.decodes += len(latents)
        if scale != 1.0:
            if latents.ndim != 4:
                raise SteeringError(
                    f"Expected latents (B, C, h, w) for previews at another scale but {self.driver.family} has latents "
                    f"of {latents.ndim} dimensions: use preview_scale=1."
                )
            latents = interpolate(latents.float(), scale_factor=scale, mode="bilinear", antialias=True)
        driver = self.decoder if preview and self.decoder is not None else self.driver
        free = latents.requires_grad and bool(driver.clamps)
        return driver.decode(latents, self.decode_batch, straight_through=free)

    def score(self, images: Tensor, prompts: Prompts) -> Scores:
        """Scores of images; counted. Infinite rewards, and images with pixels that are no numbers, become nan."""
        self.cost.scored += len(images)
        finite = images.isfinite().flatten(1).all(1)
        shown = images if finite.all() else torch.where(finite[:, None, None, None], images, 0.0)
        scores = self.reward.scores(shown, prompts)
        known = finite.to(scores.total.device) & scores.total.isfinite()
        return scores if known.all() else scores._replace(total=torch.where(known, scores.total, math.nan))

    @torch.no_grad()
    def rewards(self, latents: Tensor, prompts: Prompts, scale: float = 1.0, preview: bool = True) -> Tensor:
        """Rewards (B,) of latents, on the CPU."""
        return self.score(self.decode(latents, scale, preview), prompts).total.cpu()

    @torch.no_grad()
    def judge(self, latents: Tensor, prompts: Prompts) -> tuple[Tensor, Scores]:
        """Final images (B, 3, H, W) and their scores, on the CPU."""
        images = self.decode(latents)
        scores = self.score(images, prompts)
        parts = {name: values.cpu() for name, values in scores.parts.items()}
        std = None if scores.std is None else scores.std.cpu()
        return images.float().cpu(), scores._replace(total=scores.total.cpu(), parts=parts, std=std)

    def log(self, **row: Any) -> None:
        """Append a row to the history."""
        self.history.append(row)
        if self.on_step is not None:
            self.on_step(row)

    def finish(
        self,
        prompts: Prompts,
        particles: int,
        latents: Tensor,
        images: Tensor,
        scores: Scores,
        log_weight: Tensor | None = None,
        log_normaliser: Tensor | None = None,
        start: Tensor | None = None,
        streams: Tensor | None = None,
    ) -> Steered:
        """What a method returns; uniform weights over particles whose reward is a number unless given.

        Raises:
            SteeringError: some prompt has no particle whose reward is a number.
        """
        groups = len(prompts)
        totals = scores.total.reshape(groups, particles)
        self.refuse_nan(totals, prompts)
        if log_weight is None:
            log_weight = torch.where(totals.isnan(), -math.inf, 0.0).double()
        log_weight = log_weight - log_weight.logsumexp(1, keepdim=True)
        shape = (groups, particles)
        return Steered(
            prompts=prompts,
            images=images.reshape(*shape, *images.shape[1:]),
            latents=latents.reshape(*shape, *latents.shape[1:]).detach(),
            scores=scores,
            log_weight=log_weight,
            cost=self.cost,
            history=self.history,
            log_normaliser=log_normaliser,
            start=None if start is None else start.reshape(*shape, *start.shape[1:]).detach(),
            streams=None if streams is None else streams.reshape(*shape, -1),
        )

    def refuse_nan(self, totals: Tensor, prompts: Prompts) -> None:
        """Say which final rewards are no numbers. Raises SteeringError where a prompt has no other."""
        bad = ~totals.isfinite()
        for row in bad.all(1).nonzero()[:, 0].tolist():
            raise SteeringError(
                f"All {totals.shape[1]} particles of {prompts[row]!r} have rewards that are no numbers: score an image "
                "of the prompt by itself to see why."
            )
        if bad.any():
            warnings.warn(f"{int(bad.sum())} of {bad.numel()} rewards are no numbers and weigh nothing.", stacklevel=3)


class Steering(Settings):
    """Base of steering methods: their settings as fields, their algorithm as `__call__`."""

    summary: ClassVar[str] = ""

    particles: int = Field(4, gt=0, description="samples drawn per prompt")

    @property
    def needs_gradient(self) -> bool:
        """Whether, with these settings, it needs the reward's gradient with respect to the image."""
        return False

    @property
    def keeps_lines(self) -> bool:
        """Whether, with these settings, results say how their particles came about: `start` and `streams`."""
        return False

    def __call__(self, ctx: Ctx, prompts: Prompts) -> Steered:
        """Steer `particles` samples of every prompt."""
        raise NotImplementedError


def check_value(value: Value | str | None) -> Value | str | None:
    """Raise SteeringError where a folder holds no value function."""
    if isinstance(value, str):
        from t2i_align.values.value import is_value

        if not is_value(value):
            raise SteeringError(
                f"Expected a folder with a value function, such as the value/ of a vard run, but got {value!r}."
            )
    return value


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` rows."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


@contextmanager
def timed(cost: Cost) -> Iterator[None]:
    """Add the seconds of a block to a cost."""
    started = time.perf_counter()
    try:
        yield
    finally:
        cost.seconds += time.perf_counter() - started
