"""A scheduler of the pipeline's own class that shows its loop the rows we choose and hands us the guided output."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from t2i_align.pipelines.grid import Grid, read_grid


class Schedule(NamedTuple):
    """The noise levels of a run, and the factor from unit noise to its first latent."""

    grid: Grid
    start_factor: float

    @classmethod
    def read(cls, scheduler: Any) -> Schedule:
        """Of a driven scheduler whose full timesteps are set.

        Euler-type schedulers start at their own k-diffusion scale (a property); the grid is variance-preserving.
        """
        grid, initial = read_grid(scheduler), getattr(type(scheduler).__base__, "init_noise_sigma", None)
        if grid.linear or not isinstance(initial, property) or initial.fget is None:
            return cls(grid, 1.0)
        return cls(grid, float(initial.fget(scheduler)) * float(grid.alpha[0]))


@cache
def on_device_of(pipeline: Any) -> Any:
    """A pipeline class that is told its execution device.

    diffusers finds it anew in every call by walking through all modules, which takes longer than all the rest that a
    call does outside the network.
    """
    return type(pipeline.__name__, (pipeline,), {"_execution_device": None, "__module__": pipeline.__module__})


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


def drive(
    scheduler: Any,
    rows: int | Tensor | list[int],
    on_output: Callable[[Tensor], None] | None = None,
    on_grid: Callable[[Any], None] | None = None,
) -> Any:
    """A scheduler of the given one's own class whose loop sees only `rows` of the grid and whose `step` is ours.

    Args:
        scheduler: the original; it is not written to.
        rows: a row, one row per sample (B,), or a list of rows ([] for none).
        on_output: receives the guided output of each step.
        on_grid: receives the scheduler after it has set its full timesteps.
    """
    base: Any = type(scheduler)
    made = _driven_class(base)
    driven = made.__new__(made)
    driven.__dict__.update(scheduler.__dict__, _rows=rows, _on_output=on_output, _on_grid=on_grid)
    return driven


@cache
def _driven_class(base: Any) -> Any:
    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        base.set_timesteps(self, *args, **options)
        if self._on_grid is not None:
            self._on_grid(self)
        t = read_grid(self).t.to(self.timesteps.device)
        if isinstance(self._rows, Tensor) and self._rows.ndim:
            self.timesteps = [t[self._rows.to(t.device)].as_subclass(StepsPerSample)]
        else:
            self.timesteps = t[self._rows if isinstance(self._rows, list) else [int(self._rows)]]

    def step(self: Any, output: Tensor, t: Any, sample: Tensor, *args: Any, return_dict: bool = True, **_: Any) -> Any:
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
