"""What a pipeline folder holds: its components, which of their weights are whole, and in which variants."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from t2i_align.pipelines.models import PipelineError

INDEX = "model_index.json"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}  # files that can run code when they are opened
SHARD = re.compile(r"-\d{5}-of-\d{5}")


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline folder.

    Raises:
        PipelineError: it is not a JSON object.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PipelineError(f"Cannot open the pipeline {folder}: its {INDEX} is not JSON ({error}).") from error
    if not isinstance(index, dict):
        raise PipelineError(f"Cannot open the pipeline {folder}: its {INDEX} is not a JSON object.")
    return index


def variants_of(folder: Path, skip: Collection[str] = ()) -> dict[str, set[str]]:
    """The weights of each network of a pipeline folder: {component: variants}, "" for the plain files.

    A component that lacks its folder or all of its weights, or some of their shards, has an empty set; tokenizers,
    schedulers and the components in `skip` are left out.

    Raises:
        PipelineError: a component's weights are there as pickles alone.
    """
    found: dict[str, set[str]] = {}
    for name, kind in read_index(folder).items():
        if not _is_component(kind) or name in skip:
            continue
        place = folder / name
        if not place.is_dir():
            if not (folder / "config.json").is_file():  # a repository of one network may keep it at its top
                found[name] = set()
            continue
        files = {file.name for file in place.iterdir() if file.is_file()}
        tensors = {file for file in files if file.endswith(".safetensors")}
        pickles = sorted(file for file in files if Path(file).suffix in PICKLED)
        if pickles and not tensors:
            raise pickled(f"The {name} of {folder}", folder, pickles[0])
        if tensors or "config.json" in files:
            lacking = _shards(place) - tensors
            found[name] = {variant_of(file) for file in tensors} - {variant_of(file) for file in lacking}
    return found


def pickled(what: str, source: str | Path, file: str = "") -> PipelineError:
    """The refusal of weights that are pickles."""
    shown = f" ({file})" if file else ""
    return PipelineError(
        f"{what} has no safetensors, only pickled weights{shown}, which can run code and are never opened: convert "
        f"them where you trust them by `DiffusionPipeline.from_pretrained({str(source)!r}, "
        "use_safetensors=False).save_pretrained(DIR)` and pass DIR."
    )


def variant_of(file: str) -> str:
    """`model.fp16-00001-of-00002.safetensors` -> `fp16`; "" for the plain file."""
    return SHARD.sub("", file.removesuffix(".safetensors")).partition(".")[2]


def shown_variants(variants: Collection[str]) -> str:
    """Variants for a message."""
    return ", ".join(repr(variant) for variant in sorted(variants) if variant) or "none"


def choose_variant(folder: Path, wanted: str | None, preferred: str | None, skip: Collection[str] = ()) -> str | None:
    """Which files to open: `wanted` if given, else `preferred` where the folder has it, else what it has.

    Raises:
        PipelineError: incomplete weights, or none of the variant that is wanted.
    """
    found = variants_of(folder, skip)
    missing = [name for name, variants in found.items() if not variants]
    if missing:
        raise PipelineError(f"The pipeline {folder} is incomplete: it lacks the weights of {', '.join(missing)}.")
    every = sorted({variant for variants in found.values() for variant in variants})
    usable = [v for v in every if all(variants & {v, ""} for variants in found.values())]
    if wanted is not None:
        if wanted not in usable:
            raise PipelineError(
                f"The pipeline {folder} has no weights of the variant {wanted!r}; it has {shown_variants(usable)}."
            )
        return wanted
    for variant in (preferred or "", "", *usable):
        if variant in usable:
            return variant or None
    if every:
        raise PipelineError(f"The components of {folder} have no variant in common: {', '.join(every)}.")
    return None


def _is_component(kind: Any) -> bool:
    """Whether an entry of the index names a library and a class."""
    return isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, str) for part in kind)


def _shards(place: Path) -> set[str]:
    """Every file that the indices of sharded weights in a folder name."""
    names: set[str] = set()
    for index in place.glob("*.safetensors.index*.json"):
        names.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return names
