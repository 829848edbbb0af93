"""Weight files of published scorers: where they come from, whether they are here, and how they are read.

A file is named by hub repository, or by address, and file name; it is looked for in the hub's cache, or in
`~/.cache/t2i_align/weights` (or `$T2I_ALIGN_CACHE/weights`) for what is not on the hub. Nothing is ever downloaded
here, and nothing is unpickled that could run code.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from t2i_align.rewards.expression import RewardError


class WeightFile(NamedTuple):
    """A published file.

    `repo`: hub repository. `url`: address, for what is not on the hub. `revision`: branch, tag or commit of the
    repository. `sha256`: of the file as published, or its first digits, where they are known.
    """

    file: str
    repo: str = ""
    url: str = ""
    revision: str = "main"
    sha256: str = ""

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return f"{self.repo}/{self.file}" if self.repo else self.url

    def find(self) -> Path | None:
        """The file on this machine, or None."""
        from huggingface_hub import try_to_load_from_cache

        if not self.repo:
            path = weights_folder() / self.file
            return path if path.is_file() else None
        found = try_to_load_from_cache(self.repo, self.file, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def missing(self) -> str | None:
        """How to get it where it is not here, or None."""
        return missing_files([self])

    def facts(self) -> dict[str, str]:
        """What a person may want to check: source, place, commit of the hub, and the hash of what is there."""
        path = self.find()
        if path is None:
            return {"file": self.source, "download": _command([self])}
        commit = {"commit": path.parent.name} if self.repo else {}
        digest = sha256(path)
        differs = "" if digest.startswith(self.sha256) else f", but that of the published file is {self.sha256}"
        return {"file": self.source, "path": str(path), **commit, "sha256": digest + differs}


def missing_files(files: Sequence[WeightFile]) -> str | None:
    """How to get the files that are not on this machine, or None."""
    absent = [file for file in files if file.find() is None]
    return absent_weights(_command(absent)) if absent else None


ABSENT, END = "its weights are not on this machine; download them with `", "`."


def absent_weights(command: str) -> str:
    """The sentence about weights that a command downloads."""
    return f"{ABSENT}{command}{END}"


def join_missing(*found: str | None) -> str | None:
    """What several parts of a scorer lack, in one sentence where commands download all of it; None if nothing."""
    lacking = [text for text in found if text is not None]
    if len(lacking) > 1 and all(text.startswith(ABSENT) for text in lacking):
        return absent_weights(" && ".join(text.removeprefix(ABSENT).removesuffix(END) for text in lacking))
    return " ".join(lacking) or None


def _command(files: Sequence[WeightFile]) -> str:
    """The command line that downloads files to where they are looked for."""
    commands = [f"curl -fL --create-dirs -o '{weights_folder() / f.file}' '{f.url}'" for f in files if not f.repo]
    for repo, revision in dict.fromkeys((file.repo, file.revision) for file in files if file.repo):
        names = " ".join(file.file for file in files if (file.repo, file.revision) == (repo, revision))
        commands.append(f"hf download {repo} {names}" + ("" if revision == "main" else f" --revision {revision}"))
    return " && ".join(commands)


def weights_folder() -> Path:
    """Where files that are not on the hub are kept."""
    return Path(os.environ.get("T2I_ALIGN_CACHE") or Path.home() / ".cache" / "t2i_align") / "weights"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def find_weights(given: str | Path, published: WeightFile, scorer: str, beside: Sequence[WeightFile] = ()) -> Path:
    """The file a scorer reads.

    Args:
        given: a local file, a folder that has a file of the published name, or "" for the published file.
        published: what it is when nothing is given.
        scorer: whose it is, for messages.
        beside: published files that are read from the same folder.

    Raises:
        RewardError: it is not here; the message has the command that downloads it.
    """
    if not given:
        if missing := missing_files([published, *beside]):
            raise RewardError(f"The scorer {scorer!r} cannot be used: {missing}")
        return Path(published.find() or "")
    path = Path(given)
    path = path / published.file if path.is_dir() else path
    for file in (path, *(path.parent / other.file for other in beside)):
        if not file.is_file():
            raise RewardError(f"Expected the weights of {scorer!r} in {file}, but there is no such file.")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a PyTorch file, read with `weights_only=True`.

    A mapping under the key `state_dict` is opened.

    Raises:
        RewardError: damaged, not a mapping of tensors, or a file that would have to run code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RewardError(
            f"The file {path} holds more than tensors, and reading it could run code: convert it to safetensors with "
            "the project that published it."
        ) from error
    except Exception as error:  # of a damaged file: zip, EOF, safetensors and more errors
        raise RewardError(f"Cannot read the weights {path}: {' '.join(str(error).split())}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"Expected {path} to be a mapping of names to tensors but got something else.")
    return state


def load_strictly(module: torch.nn.Module, state: dict[str, Tensor], path: Path, ignored: tuple[str, ...] = ()) -> None:
    """Load every tensor of a file into a module that wants exactly these, whatever their number type.

    Args:
        module: what is filled.
        state: names to tensors.
        path: where they come from, for messages.
        ignored: endings of names that the module does not want.

    Raises:
        RewardError: names that are missing or too many, or other shapes.
    """
    wanted = {name: value for name, value in state.items() if not name.endswith(ignored or ("\0",))}
    try:
        module.load_state_dict(wanted, strict=True)
    except RuntimeError as error:
        raise RewardError(f"The weights {path} are not those of this scorer: {' '.join(str(error).split())}") from error
