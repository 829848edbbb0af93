"""How a pipeline is called: on a shallow copy, told what to encode, where to start and which timesteps to see."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import CacheMixin, DiffusionPipeline
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.errors import T2IError
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driven import Idle, Schedule, Selection, drive, indexed_call, no_rows, on_device_of
from t2i_align.pipelines.grid import prediction_type, scheduler_kind

# Encode their control image with torch's global generator: no two calls see the same one.
UNKEYED = {"StableDiffusion3ControlNetPipeline", "HunyuanDiTControlNetPipeline", "CogView4ControlPipeline"}
# What must be known of single families; everything else goes through `__call__` as it is.
ONE_TIMESTEP = {
    "AuraFlowPipeline",
    "HunyuanDiTPAGPipeline",
    "HunyuanDiTPipeline",
    "Kandinsky5T2IPipeline",
    "PRXPipeline",
    "PRXPixelPipeline",
    "ZImagePipeline",
}  # their loops turn t into one number: batches are grouped by row
PACKS_LATENTS = {
    "Flux2KleinPipeline",
    "Flux2KleinKVPipeline",
    "Flux2Pipeline",
}  # take other latents than their loops step
SECOND_AXIS = {"HiDreamImagePipeline": 4}  # samples lie along the second axis of tensors with so many dimensions
STEP_ALONE: dict[str, dict[str, Any]] = {"QwenImage21Pipeline": {"use_kv_cache": False}}  # no features of earlier steps
# Modules that cut gradients unless they are in training mode.
TRAINS_ONLY = {"HiDreamImagePipeline": "MOEFeedForwardSwiGLU"}
NEEDS_A_STEP = {"LatentConsistencyModelPipeline"}  # cannot finish a loop of no steps


class DriverError(T2IError):
    """A pipeline that cannot be driven, or a call it cannot serve."""


class Caller:
    """A pipeline and the keywords of every call."""

    any_cond: Cond | None
    schedules: dict[tuple[int, str, str], Schedule]

    def __init__(self, pipe: DiffusionPipeline, **call: Any) -> None:
        made: Any = type(pipe)
        self.function = indexed_call(made)
        self.accepts = inspect.signature(self.function).parameters
        needed = [name for name in ("scheduler", "encode_prompt", "prepare_latents") if not hasattr(pipe, name)]
        needed += [f"a {name}= argument" for name in ("prompt", "latents") if name not in self.accepts]
        if needed:
            raise DriverError(f"Expected a pipeline with {', '.join(needed)} but {type(pipe).__name__} has none.")
        if type(pipe).__name__ in UNKEYED:
            raise DriverError(
                f"Expected a pipeline whose calls can be repeated but {type(pipe).__name__} draws its control latents "
                "from torch's global generator."
            )
        scheduler_kind(pipe.scheduler)
        self.family = type(pipe).__name__
        self.pipe, self.any_cond, self.schedules = pipe, None, {}
        self.defaults = self._known(call)
        self.one_timestep, self.second_axis = self.family in ONE_TIMESTEP, SECOND_AXIS.get(self.family, 0)
        # Guiders keep momentum from step to step: every call gets fresh ones.
        self.guiders = [name for name, part in pipe.components.items() if isinstance(part, BaseGuidance)]
        self.freed: tuple[str, ...] = ()
        self.exact_vae: nn.Module | None = None
        # An offloaded pipeline computes elsewhere than its weights lie, and keeps finding out where on its own.
        self.stays = pipe._execution_device == next(self.network.parameters()).device

    @property
    def network(self) -> nn.Module:
        """The denoiser: the pipeline's unet or transformer."""
        for name in ("unet", "transformer", "denoiser"):
            if getattr(self.pipe, name, None) is not None:
                return getattr(self.pipe, name)
        raise DriverError(f"Expected {self.family} to have a unet or a transformer but it has neither.")

    @property
    def dtype(self) -> torch.dtype:
        """The number type the network computes in."""
        return self.network.dtype  # type: ignore[return-value]

    @property
    def prediction(self) -> str:
        """What the network predicts: `epsilon`, `v_prediction`, `sample` or `flow`."""
        return prediction_type(self.pipe.scheduler)

    def _known(self, call: dict[str, Any]) -> dict[str, Any]:
        if "num_inference_steps" in call:
            raise DriverError("Expected steps= in each call but got num_inference_steps.")
        unknown = [name for name in call if name not in self.accepts]
        if unknown:
            raise DriverError(f"{self.family} takes no {', '.join(unknown)}.{nearest(unknown[0], self.accepts)}")
        return call

    def _copy(
        self,
        selection: Selection | None,
        on_output: Callable[[Tensor], None] | None = None,
        on_grid: Callable[[Any], None] | None = None,
    ) -> DiffusionPipeline:
        """A shallow copy of the pipeline whose loop sees the timesteps of a selection; None: the scheduler's own."""
        pipe = copy.copy(self.pipe)
        own = pipe.__dict__  # not setattr: that would write through to the shared config
        if selection is no_rows and self.family in NEEDS_A_STEP:
            own["unet"] = Idle(self.network)
            selection = _first_row
        if selection is None:
            own["scheduler"] = copy.deepcopy(self.pipe.scheduler)
        else:
            own["scheduler"] = drive(self.pipe.scheduler, selection, on_output, on_grid)
        if self.stays:
            made: Any = type(self.pipe)
            pipe.__class__ = on_device_of(made)
            own["_execution_device"] = own["device"] = next(self.network.parameters()).device
        for name in self.guiders:
            own[name] = getattr(self.pipe, name).new()
        own["progress_bar"] = _silent
        own["maybe_free_model_hooks"] = lambda: None
        for name in ("safety_checker", "watermark"):
            if hasattr(pipe, name):
                own[name] = None
        return pipe

    def _tell(self, pipe: DiffusionPipeline, cond: Cond) -> dict[str, Any]:
        """Let the copy's `encode_prompt` answer from `cond`; returns the keywords of the call."""
        told = {**self._draws(len(cond)), **cond.keywords()}
        if not cond.encoded:
            return {"prompt": None, **told}
        numbers = itertools.count()
        pipe.__dict__["encode_prompt"] = lambda *args, **options: cond.call(next(numbers))
        return {"prompt": [""] * len(cond), **told}

    def _draws(self, rows: int) -> dict[str, Any]:
        """Generators for what a pipeline draws in passing, which must not move torch's global one.

        A control image is encoded with noise: the same for every row, or it would depend on the row's place.
        """
        if "generator" not in self.accepts:
            return {}
        if "image" in self.accepts or "control_image" in self.accepts:
            return {"generator": [torch.Generator().manual_seed(0) for _ in range(rows)]}
        return {"generator": torch.Generator()}

    def _give(self, pipe: DiffusionPipeline, x: Tensor) -> dict[str, Any]:
        """Make the copy start from latents `x`, as its loop sees them; returns the keywords of the call."""
        if self.family not in PACKS_LATENTS:
            return {"latents": x}
        prepare = pipe.prepare_latents
        pipe.__dict__["prepare_latents"] = lambda *args, **options: (x, *prepare(*args, **options)[1:])
        return {}

    def _run(self, pipe: DiffusionPipeline, steps: int, call: dict[str, Any]) -> Tensor:
        """Call the copy; returns its first output."""
        network = self.network
        if isinstance(network, CacheMixin) and network.is_cache_enabled:
            raise DriverError(
                f"Expected no active cache on the denoiser of {self.family}, as calls would see each other's features: "
                "call its disable_cache() first."
            )
        return self.function(pipe, num_inference_steps=steps, **{**self.defaults, **self._known(call)})[0]

    def _schedule(self, steps: int, call: dict[str, Any]) -> Schedule:
        """Grid and start of a run, read once."""
        key = (steps, repr(sorted({**self.defaults, **call}.items())), repr(self.pipe.scheduler.config))
        if key not in self.schedules:
            seen: list[Schedule] = []
            pipe = self._copy(no_rows, on_grid=lambda scheduler: seen.append(Schedule.read(scheduler)))
            with torch.no_grad():
                x = self._first_latents(pipe, self._blank(), steps, call)
            self.schedules[key] = seen[-1]._replace(dtype=x.dtype)
        return self.schedules[key]

    def _first_latents(self, pipe: DiffusionPipeline, cond: Cond, steps: int, call: dict[str, Any]) -> Tensor:
        """What the copy's own `prepare_latents` makes, as its loop would see it."""
        made: list[Any] = []
        prepare = pipe.prepare_latents

        def record(*args: Any, **options: Any) -> Any:
            made.append(prepare(*args, **options))
            return made[-1]

        pipe.__dict__["prepare_latents"] = record
        self._run(pipe, steps, {**self._tell(pipe, cond), **call, "output_type": "latent"})
        (x,) = made
        return x[0] if isinstance(x, tuple) else x

    def _blank(self) -> Cond:
        """Some condition, for calls in which the network is not run."""
        raise NotImplementedError

    def _check_differentiable(self, x: Tensor) -> None:
        if not torch.is_grad_enabled() or (self.stays and self.family not in TRAINS_ONLY):
            return
        if not x.requires_grad and not any(p.requires_grad for p in self.network.parameters()):
            return
        cut = TRAINS_ONLY.get(self.family)
        if any(type(module).__name__ == cut and not module.training for module in self.network.modules()):
            raise DriverError(
                f"Expected the {cut} modules of {self.family} in training mode for gradients, which they cut "
                "otherwise: call train() on each, or call under torch.no_grad()."
            )
        if not self.stays:
            raise DriverError(
                f"Expected {self.family} to stay on its device in calls with gradients but it is offloaded: load it "
                "without offload, or call under torch.no_grad()."
            )

    def _release(self) -> None:
        """After a run of an offloaded pipeline: let its hooks move the networks off the device."""
        if not self.stays:
            self.pipe.maybe_free_model_hooks()


def _first_row(t: Tensor) -> list[tuple[int, Tensor]]:
    return [(0, t[0])]


class _Silence:
    """A progress bar that shows nothing."""

    def update(self, n: int = 1) -> None:
        pass


def _silent(iterable: Any = None, total: int | None = None) -> Any:
    return _nothing() if iterable is None else iterable


@contextmanager
def _nothing() -> Iterator[_Silence]:
    yield _Silence()
