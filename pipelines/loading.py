"""Alias, folder or object -> a diffusers pipeline, and the call settings that suit it."""

from __future__ import annotations

import json
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
    if (folder / "model_index.json").is_file():
        return folder
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
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    folder = find_pipeline(pipeline)
    bars = [bar for bar in (diffusers_logging, transformers_logging) if bar.is_progress_bar_enabled()]
    for bar in bars:
        bar.disable_progress_bar()  # it would draw over ours
    try:
        loaded = DiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    finally:
        for bar in bars:
            bar.enable_progress_bar()
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(device)


def card_of(pipeline: str | Path) -> dict[str, Any]:
    """The `card.json` beside a pipeline's weights, or {}."""
    card = find_pipeline(pipeline) / "card.json"
    return json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}


def call_defaults(pipeline: str | Path) -> dict[str, Any]:
    """Keywords of `__call__` that suit a pipeline (steps, guidance), from its card."""
    return card_of(pipeline).get("defaults", {})
