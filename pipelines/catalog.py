"""What the name of a pipeline stands for: a folder or a hub id, its card, and the call settings that suit it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import t2i_align
from t2i_align.config import nearest
from t2i_align.pipelines.hub import absent, ask, is_hub_id, offline, snapshot
from t2i_align.pipelines.models import GUIDANCE, MODELS, PipelineError, find_model
from t2i_align.pipelines.weights import INDEX, read_index

CARD = "card.json"  # beside the weights: how a pipeline is called, what it was made of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WEIGHTS = Path(t2i_align.__file__).parent / "playground" / "weights"
ALIASES = {name: WEIGHTS / name for name in ("tiny-sd", "tiny-turbo")}  # shipped; published models are in models.py


def place_of(name: str | Path) -> Path | str:
    """The folder, or else the hub id, that a name stands for.

    Raises:
        PipelineError: neither an alias, nor a folder with a `model_index.json`, nor of the form of a hub id.
    """
    text = str(name)
    if text in MODELS:
        return MODELS[text].source
    folder = ALIASES.get(text, Path(text))
    try:
        if (folder / INDEX).is_file():
            return folder
    except OSError as error:
        raise PipelineError(f"Unknown pipeline {text!r:.80}: {error.strerror}.") from error
    if text in ALIASES:
        raise PipelineError(
            f"The weights of {text!r} are missing from {folder}; reinstall t2i-align, or make them with "
            "`t2i-align playground train vae` and `t2i-align playground train sd`."
        )
    if folder.is_dir():
        run = f": of a run take {folder / 'model'}" if (folder / "model" / INDEX).is_file() else ""
        run = f": of a run take --lora {folder / 'lora'}" if (folder / "lora").is_dir() else run
        raise PipelineError(f"Expected a diffusers pipeline folder but {folder} has no {INDEX}{run}.")
    if is_hub_id(text):
        return text
    known = [*ALIASES, *MODELS]
    raise PipelineError(
        f"Unknown pipeline {text!r}.{nearest(text, known)} Expected {', '.join(known)}, a hub id (organisation/name) "
        "or a folder that `DiffusionPipeline.save_pretrained` wrote."
    )


def find_pipeline(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an alias, hub id or path, found without loading or downloading anything.

    Raises:
        PipelineError: unknown, or a hub id that is not in the local cache.
    """
    place = place_of(name)
    if isinstance(place, Path):
        return place
    folder = _cached(place, revision)
    if folder is None:
        raise absent(place, "nothing is downloaded here")
    return folder


def check_pipeline(name: str | Path, revision: str | None = None) -> str | None:
    """Make sure that a pipeline can be had, without loading or downloading it; the hub id of one to download.

    Raises:
        PipelineError: unknown, or neither on this disk nor on a hub that can be reached.
    """
    place = place_of(name)
    if isinstance(place, Path) or _cached(place, revision):
        return None
    if why := offline():
        raise absent(place, why)
    ask(place, revision)
    return place


def _cached(repo: str, revision: str | None = None) -> Path | None:
    folder = snapshot(repo, revision)
    return folder if folder is not None and (folder / INDEX).is_file() else None


def pipeline_class(folder: Path) -> type[DiffusionPipeline] | None:
    """The diffusers class that a pipeline folder names; None if diffusers has none of that name."""
    import diffusers

    name = read_index(folder).get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def is_flow(folder: Path) -> bool | None:
    """Whether the scheduler in a pipeline folder is of flow matching; None where its config does not tell."""
    from t2i_align.pipelines.grid import is_linear_file

    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return is_linear_file(config) if isinstance(config, dict) else None


def name_of(pipeline: str | Path | DiffusionPipeline) -> str:
    """The name that was given, or that a pipeline was loaded by; "" for one that was put together."""
    if isinstance(pipeline, (str, Path)):
        return str(pipeline)
    return pipeline.config.get("_name_or_path") or ""


def _folder(pipeline: str | Path | DiffusionPipeline) -> Path | None:
    """The folder behind a pipeline, where it is on this disk."""
    if isinstance(pipeline, (str, Path)):
        place = place_of(pipeline)
    else:
        name = name_of(pipeline)
        place = Path(name) if (Path(name) / INDEX).is_file() or not is_hub_id(name) else name
    return place if isinstance(place, Path) else _cached(place)


def card_of(pipeline: str | Path | DiffusionPipeline) -> dict[str, Any]:
    """The `card.json` beside a pipeline's weights, or {}; for an object, of the folder that it was loaded from.

    Raises:
        PipelineError: no such pipeline, or a card that is not JSON.
    """
    folder = _folder(pipeline)
    if folder is None or not (folder / CARD).is_file():
        return {}
    try:
        return json.loads((folder / CARD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PipelineError(f"The card {folder / CARD} is not JSON: {error}.") from error


def call_defaults(pipeline: str | Path | DiffusionPipeline) -> dict[str, Any]:
    """Keywords of `__call__` that suit a pipeline (steps, guidance, size): the table of models, else its card, else {}.

    A folder without a card gets {}, whatever its weights look like: nothing is guessed.
    """
    model = find_model(name_of(pipeline))
    return dict(model.call) if model else card_of(pipeline).get("defaults", {})


def guidance_keyword(pipeline: str | Path | DiffusionPipeline) -> str:
    """The keyword of `__call__` that takes the guidance scale: `guidance_scale`, or `true_cfg_scale` (Qwen-Image)."""
    defaults = call_defaults(pipeline)
    for keyword in GUIDANCE:
        if keyword in defaults:
            return keyword
    if isinstance(pipeline, (str, Path)):
        folder = _folder(pipeline)
        kind = pipeline_class(folder) if folder else None
    else:
        kind = type(pipeline)
    taken = inspect.signature(kind.__call__).parameters if kind else {}
    wanting = "guidance_scale" not in taken or taken["guidance_scale"].default is None
    return "true_cfg_scale" if wanting and "true_cfg_scale" in taken else "guidance_scale"


def call_keywords(
    pipeline: str | Path | DiffusionPipeline, steps: int | None = None, guidance: float | None = None, **more: Any
) -> dict[str, Any]:
    """Keywords for a pipeline's `__call__`: what is given (not None), else its `call_defaults`."""
    given = {"num_inference_steps": steps, **more}
    if guidance is not None:
        given[guidance_keyword(pipeline)] = guidance
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


def steps_note(pipeline: str | Path | DiffusionPipeline, steps: int) -> str | None:
    """What to say to someone who asks more steps of a distilled model than it was made for."""
    name = name_of(pipeline)
    model = find_model(name)
    if model is None or model.few is None or steps <= model.few:
        return None
    meant = model.call["num_inference_steps"]
    return (
        f"{name} is distilled to {f'1 to {model.few}' if model.few > 1 else 1} steps: {steps} take {steps / meant:g} "
        f"times as long as the {meant} its authors use, and seldom look better."
    )
