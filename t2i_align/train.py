"""`fit()`: the only training loop. A method collects a batch and yields loss terms; everything else is here.

Every random number is keyed by (seed, step), so a run that was stopped and resumed ends with the same weights, bit
for bit on a CPU, as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from t2i_align.config import TrainConfig
from t2i_align.errors import T2IError
from t2i_align.keys import generator, key
from t2i_align.progress import Progress


class TrainingError(T2IError):
    """A run that cannot go on; the last checkpoint is kept."""


class Term(NamedTuple):
    """One summand of the loss (a scalar with its graph) and what to log of it."""

    loss: Tensor
    stats: Mapping[str, Tensor | float]


@dataclass(frozen=True)
class Ctx:
    """What a method receives besides its data: `update` counts the optimiser updates on one collected batch."""

    seed: int
    step: int
    device: torch.device
    update: int = 0

    def generator(self, *parts: int | str) -> torch.Generator:
        """A generator keyed by this run, this step and `parts`."""
        return generator(self.seed, "step", self.step, *parts)

    def round_generator(self, *parts: int | str) -> torch.Generator:
        """The same, keyed by the step at which the batch was collected."""
        return generator(self.seed, "round", self.step - self.update, *parts)


class Method(nn.Module):
    """A training method: the parameters that require gradients are what `fit` trains and checkpoints."""

    @property
    def updates(self) -> int:
        """Optimiser updates on each collected batch."""
        return 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights: numbers, strings and tensors in dicts and lists."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""

    def collect(self, ctx: Ctx, rows: Any) -> Any:
        """Turn a row batch into what `losses` needs, without gradients."""
        return rows

    def losses(self, ctx: Ctx, batch: Any) -> Iterator[Term]:
        """Yield loss terms; each is backpropagated before the next is asked for, so one graph is in memory."""
        raise NotImplementedError


@dataclass
class State:
    """Everything a run needs to go on: trained weights, their average, optimiser, step, seconds spent."""

    method: Method
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, method: Method, config: TrainConfig) -> State:
        """The state before the first update. Raises TrainingError where nothing is to be trained."""
        weights = {name: p for name, p in method.named_parameters() if p.requires_grad}
        if not weights:
            raise TrainingError(f"{type(method).__name__} has no parameter that requires gradients: nothing to train.")
        optimizer = torch.optim.AdamW(
            weights.values(), config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True
        )
        average = {name: p.detach().clone() for name, p in weights.items()} if config.ema else None
        return cls(method, weights, optimizer, average)

    def save(self, path: Path) -> None:
        """Write atomically: a kill at any moment leaves the old file or the new one, never half of one."""
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state(),
        }
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote. Raises TrainingError for a damaged or foreign file."""
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
            saved = content["weights"]
        except Exception as error:
            raise TrainingError(
                f"The checkpoint {path} cannot be read ({error}); delete it to use an older one."
            ) from error
        if {n: p.shape for n, p in saved.items()} != {n: p.shape for n, p in self.weights.items()}:
            raise TrainingError(
                f"The checkpoint {path} was written for a network with other weights; use another folder."
            )
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_(saved[name])
        if self.average is not None:
            for name, mean in self.average.items():
                mean.copy_((content["average"] or saved)[name])
        self.optimizer.load_state_dict(content["optimizer"])
        self.method.restore(content["method"])
        self.step, self.seconds = content["step"], content["seconds"]

    def update_average(self, decay: float) -> None:
        """Move the averaged weights towards the current ones; the first steps use a shorter memory."""
        assert self.average is not None
        decay = min(decay, (1 + self.step) / (10 + self.step))
        current = [p.detach() for p in self.weights.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the method for the length of the block."""
        if self.average is None:
            yield
            return
        mine = {name: p.detach().clone() for name, p in self.weights.items()}
        try:
            _assign(self.weights, self.average)
            yield
        finally:
            _assign(self.weights, mine)


@dataclass
class Metrics:
    """`metrics.jsonl`: one row per `log_every` updates, means over them."""

    path: Path
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, stats: Mapping[str, Tensor | float]) -> None:
        for name, value in stats.items():
            number = float(value.detach().float().mean()) if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step: int, **extra: float) -> dict[str, float]:
        row = {"step": step} | {name: self.sums[name] / self.counts[name] for name in self.sums} | extra
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: _short(value) for name, value in row.items()}) + "\n")
        self.sums.clear()
        self.counts.clear()
        return row

    def forget_after(self, step: int) -> None:
        """Drop rows later than `step`, which a resumed run will write again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update `step`: a pure function, so that a resume needs no scheduler state."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    start = config.steps * (1 - config.decay)
    progress = min(1.0, max(0.0, (step - start) / max(1.0, config.steps - start)))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    method: Method,
    data: Callable[[int], Any],
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    device: torch.device | str = "cpu",
) -> State:
    """Train `method` and return its final state (already loaded into `method`; see `State.averaged`).

    Args:
        method: what to train.
        data: row batch of an update, a pure function of the step.
        config: the loop's settings.
        folder: run folder: `checkpoints/step-N.pt`, `metrics.jsonl`.
        resume: go on from the newest checkpoint of `folder`, if there is one.
        minutes: stop (with a checkpoint) once the run has trained this long, earlier sessions counted in.
        device: where batches are computed; the caller places the method.

    Raises:
        TrainingError: the folder holds another run, the checkpoint is unusable, or the loss is not finite.
    """
    folder = Path(folder)
    state, metrics = State.start(method, config), Metrics(folder / "metrics.jsonl")
    checkpoints = _checkpoints(folder)
    if checkpoints and not resume:
        raise TrainingError(f"{folder} already holds a run; resume it or choose another folder.")
    if checkpoints:
        state.load(checkpoints[-1])
    metrics.forget_after(state.step)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for half in (folder / "checkpoints").glob("*.tmp"):
        half.unlink()  # a kill came while it was written
    method.train()
    with Progress(config.steps, "training", start=state.step) as progress, _deferred_interrupt() as interrupted:
        batch, saved = None, state.step
        while state.step < config.steps:
            started = time.perf_counter()
            ctx = Ctx(config.seed, state.step, torch.device(device), state.step % method.updates)
            if ctx.update == 0:  # only here can a run be resumed: batches are not saved
                if minutes is not None and state.seconds >= 60 * minutes:
                    break
                batch = _collect(method, data, ctx, config)
            _update(method, batch, ctx, config, state, metrics)
            state.step += 1
            state.seconds += time.perf_counter() - started
            if state.step % config.log_every == 0:
                row = metrics.write(state.step, seconds=state.seconds)
                progress.update(state.step, loss=row["loss"])
            if state.step % method.updates == 0 and (interrupted or state.step >= saved + config.checkpoint_every):
                _checkpoint(folder, state, config.keep)
                saved = state.step
            if interrupted and state.step == saved:
                raise KeyboardInterrupt
    _checkpoint(folder, state, config.keep)
    method.eval()
    return state


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Let Ctrl-C wait for the end of an update: it fills the list instead; a second one stops at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _collect(method: Method, data: Callable[[int], Any], ctx: Ctx, config: TrainConfig) -> Any:
    """The batch of the next updates."""
    torch.manual_seed(key(config.seed, "collect", ctx.step))
    with torch.no_grad(), _autocast(ctx, config):
        return method.collect(ctx, data(ctx.step // method.updates))


def _autocast(ctx: Ctx, config: TrainConfig) -> torch.autocast:
    return torch.autocast(ctx.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _update(method: Method, batch: Any, ctx: Ctx, config: TrainConfig, state: State, metrics: Metrics) -> None:
    """One optimiser update: backpropagate each term, clip, step, average."""
    torch.manual_seed(key(config.seed, "update", state.step))  # for the random numbers of layers such as dropout
    state.optimizer.zero_grad()  # an update that was cut short may have left gradients
    total = 0.0
    with _autocast(ctx, config):
        for term in method.losses(ctx, batch):
            term.loss.backward()
            total += float(term.loss.detach())
            metrics.add(term.stats)
    norm = nn.utils.clip_grad_norm_(state.weights.values(), config.max_norm or math.inf, foreach=True)
    if not math.isfinite(total) or not torch.isfinite(norm):
        raise TrainingError(
            f"The loss of update {state.step} is {total} (gradient norm {float(norm)}): lower the learning rate or "
            "look at the data; the last checkpoint is kept."
        )
    rate = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    if config.ema:
        state.update_average(config.ema)
    metrics.add({"loss": total, "gradient_norm": norm, "learning_rate": rate})


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def _checkpoint(folder: Path, state: State, keep: int) -> None:
    state.save(folder / "checkpoints" / f"step-{state.step:08d}.pt")
    for old in _checkpoints(folder)[:-keep]:
        old.unlink()


def _assign(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(values[name])


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
