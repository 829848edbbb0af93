"""The universal driver: any diffusers text-to-image pipeline as a policy, through its own `__call__`.

Every call runs on a shallow copy of the pipeline (modules shared, call state its own) whose scheduler is a dynamic
subclass of the pipeline's scheduler class with our `set_timesteps` and `step`. A pipeline already knows how to encode
its prompt, call its network, guide it and decode: the driver picks the timesteps its loop sees and takes the guided
output away. Latents live in variance-preserving space for DDIM-, Euler- and DPM-type schedulers, in linear space for
flow matching (`grid.py`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from t2i_align.config import nearest
from t2i_align.errors import T2IError
from t2i_align.keys import generator
from t2i_align.pipelines.cond import Cond, Tree, take_row
from t2i_align.pipelines.driven import Idle, Schedule, drive, on_device_of
from t2i_align.pipelines.grid import Grid, prediction_type, scheduler_kind
from t2i_align.pipelines.kernels import Gaussian, Kernel, Step, ddim, output_to_x0_eps
from t2i_align.prompts import Prompts
from t2i_align.trajectory import Trajectory

# What the driver must know of single families; everything else goes through `__call__` as it is.
ONE_TIMESTEP = {"AuraFlowPipeline", "ZImagePipeline"}  # their loops turn t into a number: batches are grouped by row
PACKS_LATENTS = {"Flux2KleinPipeline", "Flux2Pipeline"}  # take other latents than their loops step
NEEDS_A_STEP = {"LatentConsistencyModelPipeline"}  # cannot finish a loop of no steps

OnStep = Callable[[int, Step, Tensor], Tensor | None]


class DriverError(T2IError):
    """A pipeline that cannot be driven, or a call it cannot serve."""


class Driver:
    """Drive a pipeline.

    Args:
        pipe: a diffusers text-to-image pipeline; it is never written to.
        call: keywords of its `__call__` (`guidance_scale`, `height`, ...) for every call, overridable in each.

    Raises:
        DriverError: the pipeline has no latents, encoder or scheduler that the driver can reach.
        SchedulerError: its scheduler cannot be read.
    """

    any_cond: Cond | None
    schedules: dict[tuple[int, str, str], Schedule]

    def __init__(self, pipe: DiffusionPipeline, **call: Any) -> None:
        needed = [name for name in ("scheduler", "encode_prompt", "prepare_latents") if not hasattr(pipe, name)]
        self.function = inspect.unwrap(type(pipe).__call__)  # without the no_grad around it
        self.accepts = inspect.signature(self.function).parameters
        needed += [f"a {name}= argument" for name in ("prompt", "latents") if name not in self.accepts]
        if needed:
            raise DriverError(f"Expected a pipeline with {', '.join(needed)} but {type(pipe).__name__} has none.")
        scheduler_kind(pipe.scheduler)
        self.family = type(pipe).__name__
        self.pipe, self.any_cond, self.schedules = pipe, None, {}
        self.defaults = self._known(call)
        # An offloaded pipeline computes elsewhere than its weights lie, and keeps finding out where on its own.
        self.stays = pipe._execution_device == next(self.network.parameters()).device

    @property
    def network(self) -> torch.nn.Module:
        """The denoiser: the pipeline's unet or transformer."""
        for name in ("unet", "transformer", "denoiser"):
            if getattr(self.pipe, name, None) is not None:
                return getattr(self.pipe, name)
        raise DriverError(f"Expected {type(self.pipe).__name__} to have a unet or a transformer but it has neither.")

    @property
    def dtype(self) -> torch.dtype:
        """The number type of latents: what the network computes in."""
        return next(self.network.parameters()).dtype

    @property
    def prediction(self) -> str:
        """What the network predicts: `epsilon`, `v_prediction`, `sample` or `flow`."""
        return prediction_type(self.pipe.scheduler)

    # What the network is told

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str] | Prompts, negative: str | None = None, **call: Any) -> Cond:
        """Run the text encoders once per different prompt, for both branches of guidance.

        Args:
            prompts: one row per sample.
            negative: what guidance points away from; the pipeline's own default if None.
            call: keywords of `__call__` that matter for the encoding.
        """
        table = Prompts.of(prompts)
        unique = list(dict.fromkeys(table.text))
        calls: list[Tree] = []
        pipe = self._copy(rows=[])
        original = pipe.encode_prompt
        names = list(inspect.signature(original).parameters)

        def record(*args: Any, **options: Any) -> Tree:
            options = dict(zip(names, args, strict=False)) | options
            if "do_classifier_free_guidance" in options:
                options["do_classifier_free_guidance"] = True  # keep both branches, whatever this call's guidance is
            calls.append(original(**options))
            return calls[-1]

        pipe.__dict__["encode_prompt"] = record
        said = {} if negative is None else {"negative_prompt": [negative] * len(unique)}
        self._run(pipe, 1, {**call, **said, "prompt": unique, "output_type": "latent"})
        encoded = tuple(tuple(take_row(output, i, len(unique)) for output in calls) for i in range(len(unique)))
        cond = Cond(encoded, tuple(unique.index(text) for text in table.text), table)
        self.any_cond = self.any_cond or cond[:1]
        return cond

    def condition(self, prompts: Sequence[str] | None = None, **given: Any) -> Cond:
        """A condition of ready-made keywords of `__call__`: `prompt_embeds=(B, ...)`, a list of B tensors, and so on.

        Args:
            prompts: what the rows say, for scorers that read it; empty texts if None.
            given: keywords with B rows each.
        """
        if not given:
            raise DriverError("Expected keywords such as prompt_embeds=(B, ...) but got none.")
        rows = len(next(iter(self._known(given).values())))
        table = Prompts.of(prompts, rows)
        per_row = tuple({name: take_row(value, i, rows) for name, value in given.items()} for i in range(rows))
        cond = Cond((), (0,) * rows, table, per_row)
        self.any_cond = self.any_cond or cond[:1]
        return cond

    def _blank(self) -> Cond:
        """Some condition, for calls in which the network is not run."""
        return self.any_cond or self.encode("")

    # One network call

    def grid(self, steps: int, **call: Any) -> Grid:
        """The noise levels of a run, read after the pipeline itself has set its timesteps."""
        return self._schedule(steps, call).grid

    def predict(self, x: Tensor, at: int | Tensor, cond: Cond, steps: int = 20, **call: Any) -> Tensor:
        """One guided network call.

        Args:
            x: (B, ...) latents as the pipeline's loop sees them.
            at: row of the grid, or one row per sample (B,).
            cond: B rows.
            steps: of the run whose grid `at` counts in.
            call: keywords of `__call__` that override the driver's (`guidance_scale=1.0` in a loss, say).

        Returns:
            (B, ...) the guided output in the scheduler's prediction type, with its graph where gradients are on.
        """
        if len(x) != len(cond):
            raise DriverError(f"Expected a cond of {len(x)} rows, one per latent, but got {len(cond)}.")
        last = self.grid(steps, **call).steps - 1
        if not 0 <= int(torch.as_tensor(at).min()) <= int(torch.as_tensor(at).max()) <= last:
            raise DriverError(f"Expected rows of the grid from 0 to {last} but got {at}.")
        if isinstance(at, Tensor) and at.ndim:
            different = at.unique().tolist()
            if len(different) > 1 and self.family in ONE_TIMESTEP:
                return self._predict_by_row(x, at, cond, steps, call)
            at = at if len(different) > 1 else different[0]
        captured: list[Tensor] = []
        pipe = self._copy(rows=at, on_output=captured.append)
        told = self._tell(pipe, cond) | self._give(pipe, x)
        self._run(pipe, steps, {**told, **call, "output_type": "latent"})
        if len(captured) != 1:
            raise DriverError(f"Expected one denoising step of {type(self.pipe).__name__} but saw {len(captured)}.")
        return captured[0].as_subclass(Tensor)

    def _predict_by_row(self, x: Tensor, at: Tensor, cond: Cond, steps: int, call: dict[str, Any]) -> Tensor:
        """`predict` in one call per different row."""
        order, outputs = [], []
        for row in at.unique().tolist():
            mine = (at == row).nonzero()[:, 0].tolist()
            outputs.append(self.predict(x[mine], row, cond[mine], steps, **call))
            order += mine
        return torch.cat(outputs)[torch.tensor(order).argsort().to(x.device)]

    def step(
        self,
        x: Tensor,
        at: int | Tensor,
        cond: Cond,
        steps: int = 20,
        kernel: Kernel | None = None,
        **call: Any,
    ) -> Step:
        """One reverse step as a value: x0 and eps (B, ...), and the Gaussian of the next latent; fp32.

        Raises:
            DriverError: the kernel is for flow-matching schedulers and this is none.
        """
        kernel = kernel or ddim(1.0)
        grid = self.grid(steps, **call)
        if kernel.linear_only and not grid.linear:
            raise DriverError(
                f"The kernel {kernel.name} is for flow-matching schedulers but {type(self.pipe.scheduler).__name__} is "
                "none: use ddim(eta) or cps(level)."
            )
        output = self.predict(x, at, cond, steps, **call).float()
        row = torch.as_tensor(at)
        here, there = grid.level(row, x), grid.level(row + 1, x)
        x0, eps = output_to_x0_eps(output, x.float(), here, self.prediction)
        return Step(x0, eps, kernel(x0, eps, here, there))

    # Whole runs

    @torch.no_grad()
    def start(
        self, cond: Cond, steps: int = 20, seed: int = 0, ids: Sequence[int] | None = None, **call: Any
    ) -> Tensor:
        """Starting latents (B, ...) keyed by (seed, id); ids are 0 ... B - 1 unless given."""
        ids = range(len(cond)) if ids is None else ids
        pipe = self._copy(rows=[])
        told = self._tell(pipe, cond)
        draws = [generator(seed, "start", i) for i in ids]
        made: list[Tensor] = []
        prepare = pipe.prepare_latents

        def record(*args: Any, **options: Any) -> Any:
            output = prepare(*args, **options)
            made.append(output[0] if isinstance(output, tuple) else output)
            return output

        pipe.__dict__["prepare_latents"] = record
        self._run(pipe, steps, {**told, **call, "generator": draws, "output_type": "latent"})
        (x,) = made
        return (x.float() * self._schedule(steps, call).start_factor).to(self.dtype)

    @torch.no_grad()
    def rollout(
        self,
        cond: Cond,
        steps: int = 20,
        kernel: Kernel | None = None,
        seed: int = 0,
        on_step: OnStep | None = None,
        batch_size: int = 64,
        ids: Sequence[int] | None = None,
        **call: Any,
    ) -> Trajectory:
        """Sample B chains and keep every latent and log-probability.

        The loop is the driver's own, over guided single-step calls of `batch_size` rows, so that all samples meet at
        every step. A latent is rounded to its storage type before its log-probability is taken: replaying the
        trajectory with the same weights gives ratio 1.

        Args:
            cond: B rows.
            steps: denoising steps.
            kernel: `ddim(1.0)` by default.
            seed: with the sample's id and the row, decides all noise.
            on_step: called after each step with (row, Step of all samples, latents (B, ...)); what it returns, unless
                None, replaces the latents (`log_prob` stays that of the sampled ones).
            batch_size: rows that go through the network together.
            ids: name the samples' random streams; 0 ... B - 1 by default.
            call: keywords of `__call__`.
        """
        kernel = kernel or ddim(1.0)
        ids = list(range(len(cond)) if ids is None else ids)
        x = self.start(cond, steps, seed, ids, **call)
        grid = self.grid(steps, **call)
        latents, log_probs, stochastic = [x], [], []
        for row in range(grid.steps):
            chunks = [slice(first, first + batch_size) for first in range(0, len(x), batch_size)]
            made = _concatenate([self.step(x[rows], row, cond[rows], steps, kernel, **call) for rows in chunks])
            noise = _noise(x, [generator(seed, "noise", i, row) for i in ids]) if made.q.std.any() else 0 * x
            x = made.q.sample(noise).to(self.dtype)
            log_probs.append(made.q.log_prob(x))
            if on_step is not None:
                replaced = on_step(row, made, x)
                x = x if replaced is None else replaced.to(self.dtype)
            latents.append(x)
            stochastic += [row] if made.q.std.any() else []
        return Trajectory(torch.stack(latents, 1), torch.stack(log_probs, 1), tuple(stochastic), cond)

    def decode(self, latents: Tensor, batch_size: int = 16, **call: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, ...), by the pipeline's own unpacking, scaling and decoder.

        Differentiable where gradients are on.
        """
        images = []
        for first in range(0, len(latents), batch_size):
            chunk = latents[first : first + batch_size]
            pipe = self._copy(rows=[])
            told = self._tell(pipe, self._blank()[[0] * len(chunk)]) | self._give(pipe, chunk)
            images.append(self._run(pipe, 1, {**told, **call, "output_type": "pt"}))
        return torch.cat(images)

    @torch.no_grad()
    def generate(
        self,
        cond: Cond,
        steps: int = 20,
        kernel: Kernel | str = "native",
        seed: int = 0,
        batch_size: int = 16,
        **call: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], by a kernel or by the scheduler's own solver.

        `native` is bit for bit what the pipeline itself makes of the same starting noise.
        """
        if isinstance(kernel, Kernel):
            return self.decode(self.rollout(cond, steps, kernel, seed, batch_size=batch_size, **call).x[:, -1])
        if kernel != "native":
            raise DriverError(f"Expected a kernel or 'native' but got {kernel!r}.")
        images = []
        for first in range(0, len(cond), batch_size):
            chunk = cond[first : first + batch_size]
            draws = [generator(seed, "start", i) for i in range(first, first + len(chunk))]
            pipe = self._copy(rows=None)
            told = self._tell(pipe, chunk)
            images.append(self._run(pipe, steps, {**told, **call, "generator": draws, "output_type": "pt"}))
        return torch.cat(images)

    # How a pipeline is called

    def _known(self, call: dict[str, Any]) -> dict[str, Any]:
        if "num_inference_steps" in call:
            raise DriverError("Expected steps= in each call but got num_inference_steps.")
        unknown = [name for name in call if name not in self.accepts]
        if unknown:
            raise DriverError(
                f"{type(self.pipe).__name__} takes no {', '.join(unknown)}.{nearest(unknown[0], self.accepts)}"
            )
        return call

    def _copy(
        self,
        rows: int | Tensor | list[int] | None,
        on_output: Callable[[Tensor], None] | None = None,
        on_grid: Callable[[Any], None] | None = None,
    ) -> DiffusionPipeline:
        """A shallow copy of the pipeline whose loop sees the grid rows `rows`; None keeps the scheduler's own loop."""
        pipe = copy.copy(self.pipe)
        own = pipe.__dict__  # not setattr: that would write through to the shared config
        if rows == [] and self.family in NEEDS_A_STEP:
            rows = [0]
            own["unet"] = Idle(self.network)
        own["scheduler"] = (
            copy.deepcopy(self.pipe.scheduler) if rows is None else drive(self.pipe.scheduler, rows, on_output, on_grid)
        )
        if self.stays:
            made: Any = type(self.pipe)
            pipe.__class__ = on_device_of(made)
            own["_execution_device"] = next(self.network.parameters()).device
        own["_progress_bar_config"] = {"disable": True}
        own["maybe_free_model_hooks"] = lambda: None
        for name in ("safety_checker", "watermark"):
            if hasattr(pipe, name):
                own[name] = None
        return pipe

    def _tell(self, pipe: DiffusionPipeline, cond: Cond) -> dict[str, Any]:
        """Let the copy's `encode_prompt` answer from `cond`; returns the keywords of the call."""
        if not cond.encoded:
            return {"prompt": None, **cond.keywords()}
        numbers = itertools.count()
        pipe.__dict__["encode_prompt"] = lambda *args, **options: cond.call(next(numbers))
        return {"prompt": [""] * len(cond), **cond.keywords()}

    def _give(self, pipe: DiffusionPipeline, x: Tensor) -> dict[str, Any]:
        """Make the copy start from latents `x`, as its loop sees them; returns the keywords of the call."""
        x = x.to(self.dtype)
        if self.family not in PACKS_LATENTS:
            return {"latents": x}
        prepare = pipe.prepare_latents
        pipe.__dict__["prepare_latents"] = lambda *args, **options: (x, *prepare(*args, **options)[1:])
        return {}

    def _run(self, pipe: DiffusionPipeline, steps: int, call: dict[str, Any]) -> Tensor:
        """Call the copy; returns its first output."""
        return self.function(pipe, num_inference_steps=steps, **{**self.defaults, **self._known(call)})[0]

    def _schedule(self, steps: int, call: dict[str, Any]) -> Schedule:
        """Grid and start of a run, read once."""
        key = (steps, repr(sorted({**self.defaults, **call}.items())), repr(self.pipe.scheduler.config))
        if key not in self.schedules:
            seen: list[Schedule] = []
            pipe = self._copy(rows=[], on_grid=lambda scheduler: seen.append(Schedule.read(scheduler)))
            told = self._tell(pipe, self._blank())
            with torch.no_grad():
                self._run(pipe, steps, {**told, **call, "output_type": "latent"})
            self.schedules[key] = seen[-1]
        return self.schedules[key]


def _concatenate(steps: list[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]
    q = Gaussian(torch.cat([s.q.mean for s in steps]), steps[0].q.std)  # one row of the grid: one std
    return Step(torch.cat([s.x0 for s in steps]), torch.cat([s.eps for s in steps]), q)


def _noise(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Standard normal noise (B, ...), fp32, one stream per sample."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like.device)
