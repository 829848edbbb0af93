"""Checkpoints: everything a run needs to go on, written whole or not at all, verified when read."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.config import TrainConfig
from t2i_align.shards import dealt, is_shard, own, to_write
from t2i_align.training.elastic import ElasticReset
from t2i_align.training.method import Method, TrainingError

FREE = ("steps", "checkpoint_every", "keep", "log_every")  # settings that may change when a run goes on
BEST = "best.pt"
AGAIN = "delete it to go on from an older one, if any, or from the start"
WITHOUT = "delete it and resume, to keep the best of the evaluations whose weights are left"


class State:
    """A run: trained weights, their average, optimiser, loss scale, step, seconds spent.

    The average (EMA) that a run keeps has its home here, whatever is trained; `Policy.update_average` is for methods
    that need an averaged policy as a forward path.

    Args:
        method: its parameters that require gradients are trained.
        config: the loop's settings.

    Raises:
        TrainingError: nothing is to be trained, or the optimiser is not installed.
    """

    def __init__(self, method: Method, config: TrainConfig) -> None:
        self.method, self.config = method, config
        self.weights: dict[str, nn.Parameter] = {name: p for name, p in method.named_parameters() if p.requires_grad}
        if not self.weights:
            raise TrainingError(f"{type(method).__name__} has no parameter that requires gradients: nothing to train.")
        self.optimizer = make_optimizer(self.weights, config)
        place = next(iter(self.weights.values())).device.type
        # Gradients of means over many numbers are too small for fp16, also where only the frozen weights are in it.
        half = config.precision == "fp16" or any(p.dtype == torch.float16 for p in method.parameters())
        self.scaler = torch.amp.GradScaler(place, enabled=half)
        self.average: dict[str, Tensor] | None = None
        if config.ema:
            self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        self.elastic: ElasticReset | None = None
        if config.elastic_reset:
            self.elastic = ElasticReset(self.weights, config.elastic_reset, config.elastic_decay)
        self.step, self.seconds = 0, 0.0
        self.written: Path | None = None  # the last checkpoint

    @property
    def sharded(self) -> bool:
        """Whether weights lie in shards over the processes: all of them must save then, and evaluate."""
        return any(map(is_shard, self.weights.values()))

    def save(self, path: Path, write: bool = True) -> None:
        """Write atomically: a kill at any moment leaves the old file or the new one, never half of one.

        Args:
            path: of the file.
            write: whether this process writes; others help to gather what is in shards.

        Raises:
            TrainingError: it cannot be written; what was there before is as it was.
        """
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "weights": {name: to_write(p.detach(), write) for name, p in self.weights.items()},
            "average": self.average and {name: to_write(mean, write) for name, mean in self.average.items()},
            "optimizer": self._moments(write),
            "scaler": self.scaler.state_dict(),
            "elastic": None if self.elastic is None else self.elastic.state(),
            "method": self.method.state(),
            "method_name": type(self.method).__name__,
            "config": self.config.model_dump(mode="json"),
        }
        if not write:
            return
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            why = " ".join(str(error).split())
            raise TrainingError(
                f"The checkpoint {path} cannot be written ({why:.200}); earlier ones are kept: make room, then resume."
            ) from error

    def load(self, path: Path) -> None:
        """Restore what `save` wrote. Raises TrainingError for a damaged or foreign file."""
        content = read_checkpoint(path)
        self._refuse_foreign(path, content)
        saved = content["weights"]
        assign(self.weights, saved)
        if self.average is not None:
            assign(self.average, content["average"] or saved)
        self._load_moments(content["optimizer"])
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        if self.elastic is not None:
            self.elastic.restore(content["elastic"])
        self.method.restore(content["method"])
        self.step, self.seconds = content["step"], content["seconds"]

    def _moments(self, write: bool) -> dict[str, Any]:
        """The optimiser's state, as `to_write` makes it."""
        state = self.optimizer.state_dict()
        moments = {
            index: {n: to_write(value, write) if isinstance(value, Tensor) else value for n, value in values.items()}
            for index, values in state["state"].items()
        }
        return state | {"state": moments}

    def _load_moments(self, state: dict[str, Any]) -> None:
        parameters = list(self.weights.values())
        moments = {
            index: {
                name: dealt(value, parameters[index]) if isinstance(value, Tensor) and value.ndim else value
                for name, value in values.items()
            }
            for index, values in state["state"].items()
        }
        self.optimizer.load_state_dict(state | {"state": moments})

    def load_weights(self, path: Path, step: int, advice: str = WITHOUT) -> None:
        """Take the weights and the average of the checkpoint of a step, and nothing else of it.

        Raises:
            TrainingError: it cannot be read, or is of another step or run; `advice` says what to do.
        """
        content = read_checkpoint(path, advice)
        self._refuse_foreign(path, content)
        if content["step"] != step:
            raise TrainingError(f"Expected {path} to be of update {step} but it is of {content['step']}: {advice}.")
        assign(self.weights, content["weights"])
        if self.average is not None:
            assign(self.average, content["average"])

    def _refuse_foreign(self, path: Path, content: dict[str, Any]) -> None:
        mine, saved = self.weights, content["weights"]
        name = content.get("method_name", type(self.method).__name__)
        if name != type(self.method).__name__:
            raise TrainingError(
                f"The checkpoint {path} was written by {name}, not {type(self.method).__name__}; use another folder."
            )
        if {n: p.shape for n, p in saved.items()} != {n: p.shape for n, p in mine.items()}:
            raise TrainingError(
                f"The checkpoint {path} was written for a network with other weights; use another folder."
            )
        config = self.config.model_dump(mode="json")
        before = content.get("config", config)
        changed = [key for key, value in config.items() if key not in FREE and before.get(key, value) != value]
        if changed:
            raise TrainingError(
                f"The checkpoint {path} was written with other settings ({', '.join(changed)}): repeat them, or use "
                "another folder."
            )

    def update_average(self, decay: float) -> None:
        """Move the averaged weights towards the current ones; the first steps use a shorter memory."""
        assert self.average is not None
        decay = min(decay, (1 + self.step) / (10 + self.step))
        current = [own(p) for p in self.weights.values()]
        torch._foreach_lerp_([own(mean) for mean in self.average.values()], current, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights, if the run keeps any, into the method for the length of the block.

        They change places, so that no further copy is made: `average` has the trained weights meanwhile.
        """
        means = self.average or {}
        pairs: list[tuple[Tensor, Tensor]] = [(self.weights[name], mean) for name, mean in means.items()]
        done: list[tuple[Tensor, Tensor]] = []
        try:
            for pair in pairs:
                exchange(*pair)
                done.append(pair)
            yield
        finally:
            for pair in done:
                exchange(*pair)


def make_optimizer(weights: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit form. Raises TrainingError where bitsandbytes is missing."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            weights.values(), config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(
            "The optimizer adamw_8bit needs bitsandbytes: install it with `pip install 't2i-align[bnb]'`, or use adamw."
        ) from error
    return AdamW8bit(weights.values(), config.learning_rate, config.betas, weight_decay=config.weight_decay)


def read_checkpoint(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """The content of a checkpoint, its checksums verified.

    Raises:
        TrainingError: a damaged file, or another's; `advice` says what to do.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a CRC-32 of every record, and does not look at them
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
        content = torch.load(path, weights_only=True, map_location="cpu")
        missing = {"step", "seconds", "weights", "average", "optimizer", "method"} - set(content)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:
        why = " ".join(str(error).split())
        raise TrainingError(f"The checkpoint {path} cannot be read ({why:.200}); {advice}.") from error
    return content


def step_of(path: Path) -> int | None:
    """The step of a checkpoint; None for one that is missing, damaged or another's."""
    try:
        return int(read_checkpoint(path)["step"])
    except TrainingError:
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint of a run folder, by its name; 0 without one."""
    found = checkpoints(folder)
    return int(found[-1].stem.rpartition("-")[2]) if found else 0


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / "checkpoints" / f"step-{step:08d}.pt"


def write_checkpoint(folder: Path, state: State, write: bool = True) -> None:
    """Write the checkpoint of a step, then delete the oldest beyond the number to keep; `write`: see `State.save`.

    What was written of this step before is not written again.
    """
    path = checkpoint_path(folder, state.step)
    if state.written == path:
        return
    state.save(path, write)
    state.written = path
    for old in checkpoints(folder)[: -state.config.keep] if write else ():
        old.unlink()


def write_best(folder: Path, state: State, write: bool = True) -> None:
    """Write the checkpoint of a step and keep it as `best.pt`; `write`: see `State.save`.

    Raises:
        TrainingError: it cannot be written.
    """
    write_checkpoint(folder, state, write)  # a run must not resume from before its best weights
    if write:
        _name_best(checkpoint_path(folder, state.step))


def keep_as_best(folder: Path, step: int) -> bool:
    """Make `best.pt` of the checkpoint of a step; False where that is gone."""
    path = checkpoint_path(folder, step)
    if step_of(path) != step:
        return False
    _name_best(path)
    return True


def _name_best(path: Path) -> None:
    """Give a checkpoint a second name, `best.pt`, which it keeps when the first is deleted."""
    best = path.with_name(BEST)
    temporary = best.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        temporary.replace(best)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"Cannot write {best} ({error}); earlier ones are kept: make room, then resume.") from error
    temporary.unlink(missing_ok=True)  # where both are one file already, replacing does nothing


def exchange(one: Tensor, other: Tensor) -> None:
    """Swap the values of two tensors alike; of those in shards each process its part."""
    a, b = own(one), own(other)
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def assign(weights: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Copy values into weights of the same names."""
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(values[name] if is_shard(values[name]) else dealt(values[name], p))
