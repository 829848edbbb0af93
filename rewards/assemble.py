"""Large networks put together from published tensors: made without weights, then given the file's own, to the last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import absent_weights, read_weights

Network = TypeVar("Network", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINTS = (  # of transformers, in one file or in shards named by an index
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def number_type(name: str, scorer: str) -> torch.dtype:
    """The torch type of an option.

    Raises:
        RewardError: not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise RewardError(f"Expected the dtype of {scorer!r} to be {', '.join(DTYPES)} but got {name!r}.")
    return DTYPES[name]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, or of all files that an index (`*.index.json`) names."""
    if not path.name.endswith(".index.json"):
        return read_weights(path)
    files = dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    return {name: value for file in files for name, value in read_weights(path.parent / file).items()}


def assemble(make: Callable[[], Network], state: Mapping[str, Tensor], what: str, dtype: torch.dtype) -> Network:
    """A frozen network in eval mode whose parameters are the given tensors: nothing is drawn, nothing is copied.

    Args:
        make: builds the network.
        state: its whole state dict.
        what: it is, for messages.
        dtype: of the parameters.

    Raises:
        RewardError: a key too many or too few, or another shape; they are named.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # buffers that no file has are computed
        network = make()
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or shapes:
        raise RewardError(
            f"These are not the weights of {what}: missing {_some(missing)}; unexpected {_some(unexpected)}; wrong "
            f"shapes {_some(shapes)}."
        )
    network.load_state_dict(dict(state), strict=True, assign=True)
    return network.to(dtype).eval().requires_grad_(False)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "none"


def find_folder(given: str, repo: str, files: Sequence[str]) -> Path | None:
    """The folder that has one of some files: `given`, or in the hub's cache if that is ""; or None."""
    from huggingface_hub import try_to_load_from_cache

    if given:
        return Path(given) if any((Path(given) / file).is_file() for file in files) else None
    found = (try_to_load_from_cache(repo, file) for file in files)
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def found_folder(given: str, repo: str, files: Sequence[str]) -> Path:
    """`find_folder` of what `missing_folders` did not miss."""
    folder = find_folder(given, repo, files)
    assert folder is not None
    return folder


def missing_folders(wanted: Mapping[str, tuple[str, Sequence[str]]], given: Mapping[str, str]) -> str | None:
    """How to get the folders of a scorer that are not here, or None.

    Args:
        wanted: option -> hub repository, and files of which one must be there.
        given: option -> local folder, where the user named one.
    """
    commands = []
    for option, (repo, files) in wanted.items():
        place = given.get(option, "")
        if find_folder(place, repo, files) is None:
            if place:
                return f"the folder {option}={place} has none of {', '.join(files)}."
            commands.append(f"hf download {repo}")
    return absent_weights(" && ".join(commands)) if commands else None


def weight_file(folder: Path) -> Path:
    """The weight file, or the index of its shards, of a transformers checkpoint."""
    return next(folder / name for name in CHECKPOINTS if (folder / name).is_file())
