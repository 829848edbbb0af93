"""Inference-time steering: one method a file, all on one context, none that writes to the pipeline."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.config import load_config, nearest
from t2i_align.prompts import Prompts
from t2i_align.rewards import load_reward
from t2i_align.steering.base import STEPS, Cost, Ctx, Steered, Steering, SteeringError
from t2i_align.steering.checks import check_columns, check_gradient

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "METHODS",
    "Cost",
    "Ctx",
    "Steered",
    "Steering",
    "SteeringError",
    "check_gradient",
    "load_method",
    "method_name",
    "steer",
]

METHODS = {
    "best_of_n": "t2i_align.steering.best_of_n:BestOfN",
    "fk": "t2i_align.steering.fk:FK",
    "das": "t2i_align.steering.das:DAS",
    "guidance": "t2i_align.steering.guidance:Guidance",
    "svdd": "t2i_align.steering.svdd:SVDD",
    "reno": "t2i_align.steering.reno:ReNO",
    "dno": "t2i_align.steering.dno:DNO",
    "noise_search": "t2i_align.steering.noise_search:NoiseSearch",
    "chain": "t2i_align.steering.chain:Chain",
}


def method_class(name: str) -> type[Steering]:
    """The class behind a name of `METHODS`. Raises SteeringError with the nearest name and the list."""
    known = name.lower().replace("-", "_")
    if known not in METHODS:
        raise SteeringError(
            f"Unknown steering method {name!r}.{nearest(known, METHODS)} Available: {', '.join(METHODS)}."
        )
    module, _, attribute = METHODS[known].partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_method(method: str | Steering, **options: Any) -> Steering:
    """A steering method by name, with its settings.

    Raises:
        SteeringError: no such method; the message has the nearest name and the list.
        ConfigError: settings that it has not.
    """
    if isinstance(method, Steering):
        return method.model_copy(update=options)
    return load_config(method_class(method), options)


def method_name(method: Steering) -> str:
    """The name of a method's class in `METHODS`. Raises SteeringError for one that is not there."""
    known = {path: name for name, path in METHODS.items()}
    path = f"{type(method).__module__}:{type(method).__name__}"
    if path not in known:
        raise SteeringError(f"Expected a method among {', '.join(METHODS)} but got a {type(method).__name__}.")
    return known[path]


def steer(
    pipeline: str | Path | DiffusionPipeline,
    prompts: str | Sequence[str] | Prompts,
    reward: Any,
    method: str | Steering = "fk",
    *,
    steps: int | None = None,
    guidance: float | None = None,
    kernel: str | Any | None = None,
    seed: int = 0,
    max_batch: int = 16,
    decoder: Any = None,
    call: dict[str, Any] | None = None,
    **options: Any,
) -> Steered:
    """Steer a pipeline's samples by a reward.

    Args:
        pipeline: what `load_pipeline` takes; a name is opened on the CPU, an open pipeline is used where it lies.
        prompts: one text or many; all are steered together.
        reward: what `load_reward` takes; a name is opened on the CPU.
        method: a name of `METHODS`, or a method with its settings.
        steps: denoising steps; if None those of the table of models or of the pipeline's card, else 20.
        guidance: guidance scale; if None that of the table of models or of the pipeline's card, else diffusers' own.
        kernel: of the reverse steps, `ddim(1.0)` or the like; the method's own default if None.
        seed: decides the result.
        max_batch: samples that go through the network together.
        decoder: a small autoencoder for the rewards along the way: a folder, a hub id such as `madebyollin/taesd`, or
            the module; what is returned is decoded by the pipeline's own.
        call: other keywords of the pipeline's `__call__`.
        options: settings of the method (`particles=8`).

    Raises:
        T2IError: an unknown method, setting, pipeline or reward, or a reward that cannot serve the method; before
            weights are loaded where that can be known.
    """
    from t2i_align.pipelines import Driver, call_keywords, load_kernel, load_pipeline, preview_pipeline

    chosen, table = load_method(method, **options), Prompts.of(prompts)
    check_gradient(chosen, reward)
    check_columns(reward, table)
    judge = load_reward(reward, base=str(pipeline) if isinstance(pipeline, (str, Path)) else None)
    judge.check([], table)
    check_gradient(chosen, judge)  # functions of scorers may have none of their own
    keywords = call_keywords(pipeline, steps, guidance) | (call or {})
    rows = keywords.pop("num_inference_steps", STEPS)
    pipe = load_pipeline(pipeline)
    ctx = Ctx(Driver(pipe, **keywords), judge, rows, None if kernel is None else load_kernel(kernel), seed, max_batch)
    if decoder is not None:
        ctx.decoder = Driver(preview_pipeline(pipe, decoder), **keywords).decode
    return chosen(ctx, table)
