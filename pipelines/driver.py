"""The universal driver: any diffusers text-to-image pipeline as a policy, through its own `__call__`.

Every call runs on a shallow copy of the pipeline (modules shared, call state its own) whose scheduler is a dynamic
subclass of the pipeline's scheduler class with our `set_timesteps` and `step`. A pipeline already knows how to encode
its prompt, call its network, guide it and decode: the driver picks the timesteps its loop sees and takes the guided
output away. Latents live in variance-preserving space for DDIM-, Euler- and DPM-type schedulers, in linear space for
flow matching (`grid.py`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from t2i_align.keys import generator
from t2i_align.pipelines.calling import STEP_ALONE, DriverError
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driven import keep_last, no_rows, show
from t2i_align.pipelines.encoding import Encoder
from t2i_align.pipelines.grid import Grid, Point
from t2i_align.pipelines.indexed import needs_index
from t2i_align.pipelines.kernels import Gaussian, Kernel, Step, ddim, join_steps, output_to_x0_eps
from t2i_align.trajectory import Trajectory
from t2i_align.wide_attention import recomputed

__all__ = ["Driver", "DriverError"]

At = int | Tensor | Point  # a row of the grid, one row per sample (B,), or points off it
NO_MEMORY = ("out of memory", "allocate memory")  # CUDA alone has a class of error for it
OnStep = Callable[[int, Step, Tensor], Tensor | None]


class Driver(Encoder):
    """Drive a pipeline.

    Args:
        pipe: a diffusers text-to-image pipeline; it is never written to.
        call: keywords of its `__call__` (`guidance_scale`, `height`, ...) for every call, overridable in each.

    Raises:
        DriverError: the pipeline has no latents, encoder or scheduler that the driver can reach.
        SchedulerError: its scheduler cannot be read.
    """

    # One network call

    def grid(self, steps: int, **call: Any) -> Grid:
        """The noise levels of a run, read after the pipeline itself has set its timesteps."""
        return self._schedule(steps, call).grid

    def predict(self, x: Tensor, at: At, cond: Cond, steps: int = 20, **call: Any) -> Tensor:
        """One guided network call.

        Args:
            x: (B, ...) latents as the pipeline's loop sees them.
            at: row of the grid, one row per sample (B,), or `grid.at(t)` for any timesteps.
            cond: B rows.
            steps: of the run whose grid `at` counts in.
            call: keywords of `__call__` that override the driver's (`guidance_scale=1.0` in a loss, say).

        Returns:
            (B, ...) the guided output in the scheduler's prediction type, with its graph where gradients are on.
        """
        self._check_differentiable(x)
        self._remember(cond)
        if len(x) != len(cond):
            raise DriverError(f"Expected a cond of {len(x)} rows, one per latent, but got {len(cond)}.")
        groups = _groups(self._checked(at, steps, call))
        if len(groups) == 1:
            return self._predict(x, groups[0][1], cond, steps, call)
        if not self.one_timestep and not needs_index(type(self.pipe), {**self.defaults, **call}):
            try:
                return self._predict(x, at, cond, steps, call)
            except (RuntimeError, TypeError, ValueError) as error:  # a loop that turns t into a number, not known so
                if any(said in str(error) for said in NO_MEMORY):  # smaller calls would hide it
                    raise
                together = self._predict_in_groups(x, groups, cond, steps, call)
                self.one_timestep = True
                warnings.warn(
                    f"{self.family} takes one timestep in a call, so samples at different ones go through the network "
                    f"one after the other from now on: {' '.join(str(error).split())}",
                    stacklevel=2,
                )
                return together
        return self._predict_in_groups(x, groups, cond, steps, call)

    def _predict(self, x: Tensor, at: At, cond: Cond, steps: int, call: dict[str, Any]) -> Tensor:
        captured: list[Tensor] = []
        pipe = self._copy(show(at), on_output=captured.append)
        # Contiguous, so that a slice of a stored trajectory takes the matmul path that the rollout took.
        x = x.to(self._schedule(steps, call).dtype).contiguous()
        told = self._tell(pipe, cond) | self._give(pipe, x)
        alone = STEP_ALONE.get(self.family, {})
        self._run(pipe, steps, {**told, **call, **alone, "output_type": "latent"})
        if len(captured) != 1:
            raise DriverError(f"Expected one denoising step of {self.family} but saw {len(captured)}.")
        return captured[0].as_subclass(Tensor)

    def _predict_in_groups(
        self, x: Tensor, groups: list[tuple[list[int], At]], cond: Cond, steps: int, call: dict[str, Any]
    ) -> Tensor:
        """One call per different row or timestep."""
        outputs = [self._predict(x[mine], at, cond[mine], steps, call) for mine, at in groups]
        order = torch.tensor([i for mine, _ in groups for i in mine])
        return torch.cat(outputs)[order.argsort().to(x.device)]

    def _checked(self, at: At, steps: int, call: dict[str, Any]) -> At:
        if isinstance(at, Point):
            return at
        last = self.grid(steps, **call).steps - 1
        if not 0 <= int(torch.as_tensor(at).min()) <= int(torch.as_tensor(at).max()) <= last:
            raise DriverError(f"Expected rows of the grid from 0 to {last} but got {at}.")
        return at

    def step(
        self,
        x: Tensor,
        at: At,
        cond: Cond,
        steps: int = 20,
        kernel: Kernel | None = None,
        to: At | None = None,
        **call: Any,
    ) -> Step:
        """One reverse step as a value: x0 and eps (B, ...), and the Gaussian of the next latent; fp32.

        Args:
            x: (B, ...) latents.
            at: as in `predict`.
            cond: B rows.
            steps: as in `predict`.
            kernel: `ddim(1.0)` by default.
            to: where the step leads; the next row of the grid by default, for a point the next one below it.
            call: keywords of `__call__`.

        Raises:
            DriverError: the kernel is for flow-matching schedulers and this is none.
        """
        kernel = self._kernel(kernel, steps, call)
        grid = self.grid(steps, **call)
        output = self.predict(x, at, cond, steps, **call).float()
        below = torch.as_tensor(at.row if isinstance(at, Point) else at) + 1
        here, there = grid.level(at, x), grid.level(below if to is None else to, x)
        x0, eps = output_to_x0_eps(output, x.float(), here, self.prediction)
        return Step(x0, eps, kernel(x0, eps, here, there))

    def _kernels(self, kernel: Kernel | Sequence[Kernel] | None, steps: int, call: dict[str, Any]) -> list[Kernel]:
        """The kernel of every row."""
        rows = self.grid(steps, **call).steps
        given = [kernel] * rows if kernel is None or isinstance(kernel, (Kernel, str)) else list(kernel)
        if len(given) != rows:
            raise DriverError(f"Expected one kernel for each of {rows} rows but got {len(given)}.")
        return [self._kernel(each, steps, call) for each in given]

    def _kernel(self, kernel: Kernel | None, steps: int, call: dict[str, Any]) -> Kernel:
        kernel = ddim(1.0) if kernel is None else kernel
        if not isinstance(kernel, Kernel):
            raise DriverError(
                f"Expected a kernel such as ddim(1.0) but got {kernel!r}; 'native', the scheduler's own solver, has no "
                "Gaussian and serves generate() alone."
            )
        self.check_kernel(kernel, steps, **call)
        return kernel

    def check_kernel(self, kernel: Kernel, steps: int, **call: Any) -> None:
        """Raise DriverError for a kernel of flow matching where the scheduler is of another kind."""
        if kernel.linear_only and not self.grid(steps, **call).linear:
            raise DriverError(
                f"The kernel {kernel.name} is for flow-matching schedulers but {type(self.pipe.scheduler).__name__} is "
                "none: use ddim(eta) or cps(level)."
            )

    # Whole runs

    @torch.no_grad()
    def start(
        self,
        cond: Cond,
        steps: int = 20,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        batch_size: int = 64,
        **call: Any,
    ) -> Tensor:
        """Starting latents (B, ...) keyed by (seed, id); ids are 0 ... B - 1 unless given."""
        self._remember(cond)
        ids = range(len(cond)) if ids is None else ids
        chunks = [slice(first, first + batch_size) for first in range(0, len(cond), batch_size)]
        x = torch.cat([self._start(cond[rows], steps, seed, ids[rows], call) for rows in chunks])
        schedule = self._schedule(steps, call)
        return (x.float() * schedule.start_factor).to(schedule.dtype)

    def _start(self, cond: Cond, steps: int, seed: int, ids: Sequence[int], call: dict[str, Any]) -> Tensor:
        draws = [generator(seed, "start", i) for i in ids]
        return self._first_latents(self._copy(no_rows), cond, steps, {**call, "generator": draws})

    @torch.no_grad()
    def rollout(
        self,
        cond: Cond,
        steps: int = 20,
        kernel: Kernel | Sequence[Kernel] | None = None,
        seed: int = 0,
        on_step: OnStep | None = None,
        batch_size: int = 64,
        ids: Sequence[int] | None = None,
        start: Tensor | None = None,
        **call: Any,
    ) -> Trajectory:
        """Sample B chains and keep every latent and log-probability.

        The loop is the driver's own, over guided single-step calls of `batch_size` rows, so that all samples meet at
        every step. A latent is rounded to its storage type before its log-probability is taken: replaying the
        trajectory with the same weights gives ratio 1.

        Args:
            cond: B rows.
            steps: denoising steps.
            kernel: `ddim(1.0)` by default; or one for each row of the grid.
            seed: with the sample's id and the row, decides all noise.
            on_step: called after each step with (row, Step of all samples, latents (B, ...)); what it returns, unless
                None, replaces the latents (`log_prob` stays that of the sampled ones).
            batch_size: rows that go through the network together.
            ids: name the samples' random streams; 0 ... B - 1 by default.
            start: (B, ...) starting latents; drawn by `start` if None.
            call: keywords of `__call__`.
        """
        kernels = self._kernels(kernel, steps, call)
        ids = list(range(len(cond)) if ids is None else ids)
        self._remember(cond)
        dtype = self._schedule(steps, call).dtype
        x = self.start(cond, steps, seed, ids, batch_size, **call) if start is None else start.to(dtype)
        latents, log_probs, stochastic = [x], [], []
        for row, each in enumerate(kernels):
            chunks = [slice(first, first + batch_size) for first in range(0, len(x), batch_size)]
            made = join_steps([self.step(x[rows], row, cond[rows], steps, each, **call) for rows in chunks])
            x = self.draw(made.q, row, steps, seed, ids, **call)
            log_probs.append(made.q.log_prob(x))
            if on_step is not None:
                replaced = on_step(row, made, x)
                x = x if replaced is None else replaced.to(dtype)
            latents.append(x)
            stochastic += [row] if made.q.std.any() else []
        self._release()
        return Trajectory(torch.stack(latents, 1), torch.stack(log_probs, 1), tuple(stochastic), cond)

    def draw(self, q: Gaussian, row: int, steps: int, seed: int, ids: Sequence[int], **call: Any) -> Tensor:
        """The next latents (B, ...) of a row: a draw from `q`, keyed as in `rollout`, in the latents' number type."""
        noise = noise_of(q.mean, seed, ids, row) if q.std.any() else torch.zeros_like(q.mean)
        return q.sample(noise).to(self._schedule(steps, call).dtype)

    def unroll(
        self,
        x: Tensor,
        cond: Cond,
        steps: int = 20,
        kernel: Kernel | None = None,
        rows: range | None = None,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        noise: Tensor | None = None,
        checkpointing: bool = True,
        **call: Any,
    ) -> Tensor:
        """Latents (B, ...) after several steps, with their graph: the latents of `rollout`, differentiable.

        Gradients reach `x`, `noise` and the network. With `checkpointing` only the latents between steps are kept, and
        each step is computed again in the backward pass.

        Args:
            x: (B, ...) latents at the first of `rows`.
            cond: B rows.
            steps: denoising steps of the whole run.
            kernel: `ddim(1.0)` by default.
            rows: rows of the grid to go through, in order; all by default.
            seed: decides the noise as in `rollout`.
            ids: as in `rollout`.
            noise: (B, len(rows), ...) standard normal noise, instead of that of `seed`.
            checkpointing: trade one more forward pass for memory.
            call: keywords of `__call__`.
        """
        self._remember(cond)
        kernel = self._kernel(kernel, steps, call)
        dtype = self._schedule(steps, call).dtype
        ids = list(range(len(cond)) if ids is None else ids)
        rows = range(self.grid(steps, **call).steps) if rows is None else rows

        def advance(x: Tensor, row: int, draw: Tensor) -> Tensor:
            return self.step(x, row, cond, steps, kernel, **call).q.sample(draw).to(dtype)

        x = x.to(dtype)
        for i, row in enumerate(rows):
            draw = noise[:, i] if noise is not None else noise_of(x, seed, ids, row)
            if checkpointing and torch.is_grad_enabled():
                x = recomputed(advance, x, row, draw)
            else:
                x = advance(x, row, draw)
        return x

    def decode(
        self,
        latents: Tensor,
        batch_size: int = 16,
        straight_through: bool = False,
        checkpointing: bool = False,
        **call: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, ...), by the pipeline's own unpacking, scaling and decoder.

        Differentiable where gradients are on.

        Args:
            latents: as the pipeline's loop sees them.
            batch_size: latents that are decoded together.
            straight_through: let gradients through pixels that are clamped at 0 or 1, which otherwise have none.
            checkpointing: compute the decoder again in the backward pass instead of keeping its features.
            call: keywords of `__call__`.
        """
        self._check_differentiable(latents)

        def one(chunk: Tensor) -> Tensor:
            return self._decode(chunk, straight_through, call)

        images = []
        for chunk in latents.split(batch_size):
            again = checkpointing and torch.is_grad_enabled()
            images.append(recomputed(one, chunk) if again else one(chunk))
        self._release()
        return torch.cat(images)

    def _decode(self, latents: Tensor, straight_through: bool, call: dict[str, Any]) -> Tensor:
        pipe = self._copy(no_rows)
        latents = latents.to(self._schedule(1, call).dtype).contiguous()
        if self._upcasts():  # the pipeline casts its decoder to fp32 and back, which a pending graph would not survive
            self.exact_vae = self.exact_vae or copy.deepcopy(self.pipe.vae).float()
            pipe.__dict__["vae"], latents = self.exact_vae, latents.float()
        if straight_through:
            self._do_not_clamp(pipe)
        told = self._tell(pipe, self._blank()[[0] * len(latents)]) | self._give(pipe, latents)
        return self._run(pipe, 1, {**told, **call, "output_type": "pt"})

    @property
    def clamps(self) -> list[str]:
        """What of the pipeline clamps pixels, and can be told by `straight_through`; in some pipelines nothing does."""
        return [name for name in ("image_processor", "video_processor") if name in vars(self.pipe)]

    def _do_not_clamp(self, pipe: DiffusionPipeline) -> None:
        """Let gradients through the copy's last clamp. Raises DriverError where it has no processor to tell."""
        if not self.clamps:
            raise DriverError(f"{self.family} has no image processor, so straight_through cannot act: leave it out.")
        for name in self.clamps:
            processor = copy.copy(getattr(self.pipe, name))
            processor.denormalize = _denormalize_straight_through
            pipe.__dict__[name] = processor

    @contextmanager
    def _vae_as_it_was(self) -> Iterator[None]:
        """Put the user's decoder back to fp16 where a run that failed left it in fp32."""
        upcasts = self._upcasts()
        try:
            yield
        finally:
            if upcasts and self.pipe.vae.dtype != torch.float16:
                self.pipe.vae.half()

    def _upcasts(self) -> bool:
        """Whether the pipeline decodes in fp32 although its decoder's weights are fp16 (SDXL)."""
        vae = getattr(self.pipe, "vae", None)
        return vae is not None and self.stays and vae.dtype == torch.float16 and vae.config.get("force_upcast", False)

    @torch.no_grad()
    def generate(
        self,
        cond: Cond,
        steps: int = 20,
        kernel: Kernel | str = "native",
        seed: int = 0,
        batch_size: int = 16,
        ids: Sequence[int] | None = None,
        **call: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], by a kernel or by the scheduler's own solver.

        `native` is bit for bit what the pipeline itself makes of the same starting noise.
        """
        if kernel == "native":
            return self._native(cond, steps, seed, batch_size, ids, {**call, "output_type": "pt"})[0]
        if not isinstance(kernel, Kernel):
            raise DriverError(f"Expected a kernel or 'native' but got {kernel!r}.")
        made = self.rollout(cond, steps, kernel, seed, batch_size=batch_size, ids=ids, **call)
        return self.decode(made.x[:, -1], batch_size, **call)

    @torch.no_grad()
    def solve(
        self,
        cond: Cond,
        steps: int = 20,
        seed: int = 0,
        batch_size: int = 16,
        ids: Sequence[int] | None = None,
        **call: Any,
    ) -> Tensor:
        """Latents (B, ...) at the end of a run of the scheduler's own solver, as `decode` takes them."""
        return self._native(cond, steps, seed, batch_size, ids, {**call, "output_type": "latent"})[1]

    def _native(
        self,
        cond: Cond,
        steps: int,
        seed: int,
        batch_size: int,
        ids: Sequence[int] | None,
        call: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The pipeline's own outputs and its loop's last latents."""
        ids = list(range(len(cond)) if ids is None else ids)
        images, latents = [], []
        for first in range(0, len(cond), batch_size):
            rows = slice(first, first + batch_size)
            pipe = self._copy(None)
            told = self._tell(pipe, cond[rows])
            draws = [generator(seed, "start", i) for i in ids[rows]]
            last = keep_last(pipe.scheduler)
            with self._vae_as_it_was():
                images.append(self._run(pipe, steps, {**told, **call, "generator": draws}))
            latents.append(last[0])
        self._release()
        return torch.cat(images), torch.cat(latents)


def noise_of(like: Tensor, seed: int, ids: Sequence[int], row: int) -> Tensor:
    """The noise of a row of a rollout: standard normal (B, ...), fp32, one stream per sample."""
    draws = [torch.randn(like.shape[1:], generator=generator(seed, "noise", i, row)) for i in ids]
    return torch.stack(draws).to(like.device)


def _groups(at: At) -> list[tuple[list[int], At]]:
    """Samples that share a row or timestep: pairs (their indices, it as a scalar); one pair where all do."""
    values = at.t if isinstance(at, Point) else torch.as_tensor(at)
    if not values.ndim:
        return [([], at)]
    return list(_split(at, values))


def _split(at: At, values: Tensor) -> Iterator[tuple[list[int], At]]:
    for value in values.unique():
        mine = (values == value).nonzero()[:, 0].tolist()
        yield mine, Point(*(part[mine[0]] for part in at)) if isinstance(at, Point) else int(value)


def _denormalize_straight_through(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped in value but not in gradient."""
    free = images * 0.5 + 0.5
    return free + (free.clamp(0, 1) - free).detach()
