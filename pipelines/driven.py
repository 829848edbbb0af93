"""A scheduler of the pipeline's own class that shows its loop the rows we choose and hands us the guided output."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_align.pipelines.grid import Grid, Point, SchedulerError, read_grid

Shown = list[tuple[int, Tensor]]  # what a loop sees: pairs (index, timestep)
Selection = Callable[[Tensor], Shown]  # the grid's timesteps (N,) -> what is shown of them


class Schedule(NamedTuple):
    """The noise levels of a run, the factor from unit noise to its first latent, the number type of its latents."""

    grid: Grid
    start_factor: float
    dtype: torch.dtype = torch.float32

    @classmethod
    def read(cls, scheduler: Any) -> Schedule:
        """Of a driven scheduler whose full timesteps are set.

        Euler-type schedulers start at their own k-diffusion scale (a property); the grid is variance-preserving.
        """
        grid, initial = read_grid(scheduler), getattr(type(scheduler).__base__, "init_noise_sigma", None)
        if grid.linear or not isinstance(initial, property) or initial.fget is None:
            return cls(grid, 1.0)
        return cls(grid, float(initial.fget(scheduler)) * float(grid.alpha[0]))


def no_rows(t: Tensor) -> Shown:
    """Show the loop nothing."""
    return []


def show(at: int | Tensor | Point) -> Selection:
    """Show the loop one row, one row per sample (B,), or a point off the grid (one, or one per sample)."""
    if isinstance(at, Point):
        return lambda t: [(int(at.row.max()), _per_sample(at.t.to(t.device)))]
    if isinstance(at, Tensor) and at.ndim:
        return lambda t: [(int(at.max()), _per_sample(t[at.to(t.device)]))]
    return lambda t: [(int(at), t[int(at)])]


def _per_sample(t: Tensor) -> Tensor:
    return t.as_subclass(StepsPerSample) if t.ndim else t


class Timesteps(Tensor):
    """All timesteps (N,) of a run, of which iteration shows a loop only the chosen ones.

    Length and indexing are those of the whole run, for loops that look at them.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain
    shown: Shown

    def __iter__(self) -> Iterator[Tensor]:
        """The chosen timesteps."""
        return iter([t for _, t in self.shown])


def enumerate_shown(iterable: Any, start: int = 0) -> Any:
    """`enumerate` that gives the chosen timesteps of a run their index in the whole run."""
    return iter(iterable.shown) if isinstance(iterable, Timesteps) else builtins.enumerate(iterable, start)


@cache
def indexed_call(pipeline: type) -> Any:
    """A pipeline class's `__call__`, without the `no_grad` around it, whose loop sees the true index of each step.

    Loops are written `for i, t in enumerate(timesteps)`; some use i (SD3's skip-layer guidance, Lumina2's
    `cfg_trunc_ratio`, a ControlNet's range). The function is rebuilt over the same code with one more global name.
    """
    function: Any = inspect.unwrap(pipeline.__call__)
    names = {**function.__globals__, "enumerate": enumerate_shown}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@cache
def on_device_of(pipeline: Any) -> Any:
    """A pipeline class that is told its execution device.

    diffusers finds it anew in every call by walking through all modules, which takes longer than all the rest that a
    call does outside the network.
    """
    told = {"_execution_device": None, "device": None, "__module__": pipeline.__module__}
    return type(pipeline.__name__, (pipeline,), told)


class Idle:
    """A network that does nothing: everything is the real one's, but a call returns zeros."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, sample: Tensor, *args: Any, **options: Any) -> tuple[Tensor]:
        """Zeros of the latent's shape."""
        return (sample.new_zeros(sample.shape),)


class StepsPerSample(Tensor):
    """One timestep per sample: `expand` tiles (B,) to (kB,), so that guidance, which doubles the batch, works."""

    def expand(self, *shape: Any) -> Tensor:  # type: ignore[override]
        """Like `Tensor.expand`, but a vector grows to a multiple of its length by repetition."""
        wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if self.ndim == 1 and len(wanted) == 1 and wanted[0] != len(self) and wanted[0] % len(self) == 0:
            return self.repeat(wanted[0] // len(self))
        return super().expand(*shape)


def keep_last(scheduler: Any) -> list[Tensor]:
    """Make a scheduler keep the latents of its last step in the list that is returned."""
    kept: list[Tensor] = []
    original = scheduler.step

    @wraps(original)  # pipelines look at its signature
    def step(*args: Any, **options: Any) -> Any:
        output = original(*args, **options)
        kept[:] = [output[0]]
        return output

    scheduler.__dict__["step"] = step
    return kept


def drive(
    scheduler: Any,
    selection: Selection,
    on_output: Callable[[Tensor], None] | None = None,
    on_grid: Callable[[Any], None] | None = None,
) -> Any:
    """A scheduler of the given one's own class whose loop sees only chosen timesteps and whose `step` is ours.

    Args:
        scheduler: the original; it is not written to.
        selection: which timesteps the loop sees.
        on_output: receives the guided output of each step.
        on_grid: receives the scheduler after it has set its full timesteps.
    """
    base: Any = type(scheduler)
    made = _driven_class(base)
    driven = made.__new__(made)
    driven.__dict__.update(scheduler.__dict__, _selection=selection, _on_output=on_output, _on_grid=on_grid)
    return driven


@cache
def _driven_class(base: Any) -> Any:
    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        base.set_timesteps(self, *args, **options)
        if self._on_grid is not None:
            self._on_grid(self)
        t = read_grid(self).t.to(self.timesteps.device)
        self.timesteps = t.as_subclass(Timesteps)
        self.timesteps.shown = self._selection(t)
        self._left = len(self.timesteps.shown)

    def step(self: Any, output: Tensor, t: Any, sample: Tensor, *args: Any, return_dict: bool = True, **_: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise SchedulerError(
                "Expected the pipeline's loop to run over the scheduler's timesteps but it made its own copy of them; "
                "it cannot be driven."
            )
        if self._on_output is not None:
            self._on_output(output)
        return SimpleNamespace(prev_sample=sample) if return_dict else (sample, sample)

    set_timesteps.__signature__ = inspect.signature(base.set_timesteps)  # type: ignore[attr-defined]
    methods = {
        "order": 1,
        "init_noise_sigma": 1.0,  # latents are given at the grid's own scale
        "set_timesteps": set_timesteps,
        "set_begin_index": lambda self, begin_index=0: None,
        "scale_model_input": lambda self, sample, timestep=None: sample,
        "step": step,
    }
    return type(f"Driven{base.__name__}", (base,), methods)
