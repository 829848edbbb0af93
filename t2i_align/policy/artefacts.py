"""What a policy leaves on disk, and how it is opened again.

- LoRA of a denoiser whose pipeline has `load_lora_weights`: `pytorch_lora_weights.safetensors` with alpha / rank
  multiplied into B, so that readers that know no alpha get the policy's image. Where a division does not give B back
  bit for bit (no power of two), `policy.safetensors` holds the weights as they are. Of a UNet `kohya.safetensors`, too:
  the same under the names that ComfyUI, A1111 and kohya's scripts read.
- LoRA of other pipelines and components: peft's `adapter_model.safetensors` and `adapter_config.json`.
- Full weights: a pipeline folder.

Each with `policy.json`, which `Policy.load` reads, and a card. A folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor, nn

from t2i_align.pipelines.catalog import CARD, call_defaults, card_of
from t2i_align.policy.card import card
from t2i_align.policy.lora import Layers, lora_config
from t2i_align.policy.path import PolicyError

NOTE = "policy.json"
PORTABLE, PEFT, EXACT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "policy.safetensors"
KOHYA = "kohya.safetensors"
PREFIX = {PEFT: "base_model.model.", EXACT: ""}


def is_portable(pipe: DiffusionPipeline, component: str, network: nn.Module) -> bool:
    """Whether the pipeline's own `load_lora_weights` opens a LoRA of this component."""
    if not isinstance(pipe, LoraBaseMixin) or not isinstance(network, PeftAdapterMixin):
        return False
    complete = set(pipe._lora_loadable_modules) <= set(pipe.components)  # or it stumbles over what is not there
    return complete and component in ("unet", "transformer")


def describe(pipe: DiffusionPipeline, component: str, network: nn.Module, kind: str, averaged: bool) -> dict[str, Any]:
    """What `policy.json` says of any policy; `kind` is `lora` or `full`."""
    return {
        "format": 1,
        "kind": kind,
        "pipeline": type(pipe).__name__,
        "component": component,
        "network": type(network).__name__,
        "base": str(pipe.config.get("_name_or_path") or "") or None,
        "dtype": str(next(network.parameters()).dtype),
        "averaged": averaged,
    }


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once the block has ended well.

    Raises:
        PolicyError: `folder` holds files that no policy wrote.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / NOTE).is_file() or not any(folder.iterdir()))):
        raise PolicyError(f"Expected {folder} to be new, empty or written by Policy.save: choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    for left in leftovers(folder, "new"):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        temporary.replace(folder)
        for left in (old, *leftovers(folder, "old")):  # only now: one may be all that is left of the folder
            shutil.rmtree(left, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(folder: Path, kind: str) -> list[Path]:
    """The temporary folders beside a folder that processes left which are gone, or an earlier one of this number."""
    left = []
    for path in folder.parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(folder.name)}\.(\d+)\.{kind}", path.name)
        if found and (int(found[1]) == os.getpid() or _is_gone(int(found[1]))):
            left.append(path)
    return left


def _is_gone(process: int) -> bool:
    """Whether no process has this number; False where asking is not safe."""
    if os.name != "posix":  # signal 0 is Ctrl-C elsewhere
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's
        return False
    return False


def write_lora(
    folder: Path,
    pipe: DiffusionPipeline,
    network: nn.Module,
    note: dict[str, Any],
    layers: Layers,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Write the weights of an adapter (`adapter_weights`) in number type `dtype`, its note and its card."""
    portable = is_portable(pipe, note["component"], network)
    config = lora_config(layers)
    note |= {"rank": config.r, "alpha": config.lora_alpha, "targets": sorted(layers)}
    note["other_layers"] = {path: pair for path, pair in layers.items() if pair != (config.r, config.lora_alpha)}
    note["weights"] = PORTABLE if portable else PEFT
    values = {key: value.detach().float().cpu().contiguous() for key, value in weights.items()}
    if portable:
        folded = times_scale(values, layers)
        back = times_scale(folded, layers, -1)
        if dtype == torch.float32 and not all(torch.equal(back[key], values[key]) for key in values):
            save_file(values, folder / EXACT)
            note["weights"] = EXACT
        saved = {key: value.to(dtype) for key, value in folded.items()}
        type(pipe).save_lora_weights(folder, **{f"{note['component']}_lora_layers": saved})
        if note["component"] == "unet":  # transformers have other names there for each family
            named = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in saved.items()})
            save_file({key: value.contiguous() for key, value in named.items()}, folder / KOHYA)
    else:
        config.base_model_name_or_path = note["base"]
        config.save_pretrained(folder)
        save_file({PREFIX[PEFT] + key: value.to(dtype) for key, value in values.items()}, folder / PEFT)
    write_note(folder, pipe, note, portable)


def write_full(folder: Path, pipe: DiffusionPipeline, note: dict[str, Any]) -> None:
    """Write the whole pipeline with the weights that its network has now, and how it is called, as the base is."""
    pipe.save_pretrained(folder)
    known = {name: value for name, value in card_of(pipe).items() if name == "prompts"}
    if defaults := call_defaults(pipe):
        known["defaults"] = defaults
    if known:
        (folder / CARD).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    write_note(folder, pipe, note)


def write_note(folder: Path, pipe: DiffusionPipeline, note: Mapping[str, Any], portable: bool = False) -> None:
    """`policy.json` and the card."""
    (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(type(pipe), note, portable), encoding="utf-8")


def times_scale(weights: Mapping[str, Tensor], layers: Layers, power: int = 1) -> dict[str, Tensor]:
    """The weights with (alpha / rank) ** power multiplied into every B; power is 1 or -1."""
    scaled = dict(weights)
    for path, (rank, alpha) in layers.items():
        b = weights[f"{path}.lora_B.weight"]
        scaled[f"{path}.lora_B.weight"] = b * (alpha / rank) if power > 0 else b / (alpha / rank)
    return scaled


def read_note(folder: str | Path) -> dict[str, Any]:
    """The `policy.json` of a folder. Raises PolicyError for a folder that `Policy.save` did not write."""
    try:
        note = json.loads((Path(folder) / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"Expected {folder} to be a folder that Policy.save wrote but its {NOTE} cannot be read ({error}); another "
            "LoRA is opened by Policy.lora(pipe, start=...)."
        ) from error
    if not isinstance(note, dict) or note.get("format") != 1:
        raise PolicyError(f"Expected {folder}/{NOTE} to have format 1 but it has not: open it with a newer t2i-align.")
    return note
