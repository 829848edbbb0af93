"""Inference-time steering: one method a file, all on one context, none that writes to the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.config import find_class, load_config
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
    """The class behind a name of `METHODS`, or behind `package.module:Class`.

    Raises:
        SteeringError: no such method; the message has the nearest name and the list.
    """
    return find_class(name, METHODS, "steering method", "t2i_align.steering.base:Steering", SteeringError)


def load_method(method: str | Steering, **options: Any) -> Steering:
    """A steering method by name, or by `package.module:Class`, with its settings.

    Raises:
        SteeringError: no such method; the message has the nearest name and the list.
        ConfigError: settings that it has not.
    """
    if isinstance(method, Steering):
        return method.model_copy(update=options)
    return load_config(method_class(method), options)


def method_name(method: Steering) -> str:
    """The name that `method_class` finds a method's class by: that of `METHODS`, or `package.module:Class`."""
    known = {path: name for name, path in METHODS.items()}
    path = f"{type(method).__module__}:{type(method).__name__}"
    return known.get(path, path)


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
        reward: what `load_reward` takes; one that is opened here goes where the pipeline computes.
        method: a name of `METHODS`, `package.module:Class`, or a method with its settings.
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
    named = isinstance(pipeline, (str, Path))
    opened = None if named else load_pipeline(pipeline)
    made_here = isinstance(reward, (str, Path, Mapping))  # a user's Scorer stays where it is
    place = opened._execution_device if opened is not None and made_here else None
    judge = load_reward(reward, place, base=str(pipeline) if named else None)
    judge.check([], table)
    check_gradient(chosen, judge)  # functions of scorers may have none of their own
    keywords = call_keywords(pipeline, steps, guidance) | (call or {})
    rows = keywords.pop("num_inference_steps", STEPS)
    pipe = opened or load_pipeline(pipeline)
    ctx = Ctx(Driver(pipe, **keywords), judge, rows, None if kernel is None else load_kernel(kernel), seed, max_batch)
    if decoder is not None:
        ctx.decoder = Driver(preview_pipeline(pipe, decoder), **keywords)
    return chosen(ctx, table)
