"""Alias, folder or object -> a diffusers pipeline, and the call settings that suit it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import t2i_align
from t2i_align.config import nearest
from t2i_align.errors import T2IError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

WEIGHTS = Path(t2i_align.__file__).parent / "playground" / "weights"
ALIASES = {"tiny-sd": WEIGHTS / "tiny-sd"}


class PipelineError(T2IError):
    """A pipeline that cannot be loaded."""


def find_pipeline(name: str | Path) -> Path:
    """The folder of an alias or path, checked without loading anything.

    Raises:
        PipelineError: neither an alias nor a folder with a `model_index.json`.
    """
    folder = ALIASES.get(str(name), Path(name))
    try:
        if (folder / "model_index.json").is_file():
            return folder
    except OSError as error:
        raise PipelineError(f"Unknown pipeline {str(name)!r:.80}: {error.strerror}.") from error
    if str(name) in ALIASES:
        raise PipelineError(
            f"The weights of {str(name)!r} are missing from {folder}; reinstall t2i-align, or make them with "
            "`t2i-align playground train vae` and `t2i-align playground train sd`."
        )
    if folder.is_dir():
        raise PipelineError(f"Expected a diffusers pipeline folder but {folder} has no model_index.json.")
    raise PipelineError(
        f"Unknown pipeline {str(name)!r}.{nearest(str(name), ALIASES)} Expected {', '.join(ALIASES)} or a folder that "
        "`DiffusionPipeline.save_pretrained` wrote."
    )


def load_pipeline(
    pipeline: str | Path | DiffusionPipeline, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Open a text-to-image pipeline.

    Args:
        pipeline: an alias (`tiny-sd`), a folder that diffusers wrote, or a pipeline, which is returned as it is.
        device: where its networks go.
        dtype: their number type; float32 by default.

    Raises:
        PipelineError: unknown, or without weights; raised before anything is loaded.
    """
    from diffusers import DiffusionPipeline

    if isinstance(pipeline, DiffusionPipeline):
        return pipeline
    if not isinstance(pipeline, (str, Path)):
        raise PipelineError(
            f"Expected a pipeline to be an alias, a folder or a DiffusionPipeline but got {pipeline!r:.80}."
        )
    import torch
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    folder = find_pipeline(pipeline)
    bars = [bar for bar in (diffusers_logging, transformers_logging) if bar.is_progress_bar_enabled()]
    for bar in bars:
        bar.disable_progress_bar()  # it would draw over ours
    try:
        loaded = DiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PipelineError(f"Cannot open the pipeline {folder}: {' '.join(str(error).split())}.") from error
    finally:
        for bar in bars:
            bar.enable_progress_bar()
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(device)


def card_of(pipeline: str | Path | DiffusionPipeline) -> dict[str, Any]:
    """The `card.json` beside a pipeline's weights, or {}; for an object, of the folder that it was loaded from.

    Raises:
        PipelineError: no such pipeline, or a card that is not JSON.
    """
    if isinstance(pipeline, (str, Path)):
        folder = find_pipeline(pipeline)
    else:
        folder = Path(pipeline.config.get("_name_or_path") or "nowhere")
    card = folder / "card.json"
    try:
        return json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
    except ValueError as error:
        raise PipelineError(f"The card {card} is not JSON: {error}.") from error


def call_defaults(pipeline: str | Path | DiffusionPipeline) -> dict[str, Any]:
    """Keywords of `__call__` that suit a pipeline (steps, guidance), from its card."""
    return card_of(pipeline).get("defaults", {})


def call_keywords(
    pipeline: str | Path | DiffusionPipeline, steps: int | None = None, guidance: float | None = None
) -> dict[str, Any]:
    """Keywords for a pipeline's `__call__`: what is given, else what its card says."""
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    return call_defaults(pipeline) | {name: value for name, value in given.items() if value is not None}


def check_call(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> None:
    """Refuse keywords that a pipeline would ignore, and more steps than its scheduler has.

    Raises:
        PipelineError: with the nearest keyword.
    """
    known = [name for name in inspect.signature(type(pipe).__call__).parameters if name not in ("self", "kwargs")]
    for name in call:
        if name not in known:
            raise PipelineError(f"{type(pipe).__name__} takes no {name!r}.{nearest(name, known)}")
    most = pipe.scheduler.config.get("num_train_timesteps")
    if most and (call.get("num_inference_steps") or 1) > most:
        raise PipelineError(f"Expected at most {most} steps but got {call['num_inference_steps']}.")
