"""`fit()`: the only training loop. A method collects a batch and yields loss terms; everything else is here.

Every random number is keyed by (seed, step), so a run that was stopped and resumed ends with the same weights, bit
for bit on a CPU, as one that was not.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.config import TrainConfig
from t2i_align.keys import key
from t2i_align.progress import Progress
from t2i_align.shards import whole
from t2i_align.training.checkpoints import State, checkpoints, write_checkpoint
from t2i_align.training.distributed import ALONE, World
from t2i_align.training.health import Health
from t2i_align.training.method import Ctx, Method, TrainingError
from t2i_align.training.metrics import Metrics, read
from t2i_align.training.precision import autocast

SHOWN = ("reward", "kl", "clipped", "invalid", "images_per_second", "loss")  # beside the progress bar


class Observer:
    """What looks at a run from outside: nothing that it does changes the weights."""

    def look(self, state: State) -> bool:
        """Called between rounds, in all processes, at least once for every step it could care for; True ends the run.

        A resumed run comes to some steps a second time.
        """
        return False

    def row(self, row: dict[str, float]) -> None:
        """Receives each row of the metrics, in the first process."""

    @property
    def shown(self) -> dict[str, float]:
        """Numbers that belong beside the progress bar."""
        return {}


def fit(
    method: Method,
    data: Callable[[int], Any],
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    device: torch.device | str = "cpu",
    world: World = ALONE,
    observer: Observer | None = None,
) -> State:
    """Train `method` and return its final state (already loaded into `method`; see `State.averaged`).

    Args:
        method: what to train.
        data: row batch of a round, a pure function of its number.
        config: the loop's settings.
        folder: run folder: `checkpoints/step-N.pt`, `metrics.jsonl`.
        resume: go on from the newest checkpoint of `folder`, if there is one.
        minutes: stop (with a checkpoint) once the run has trained this long, earlier sessions counted in.
        device: where batches are computed; the caller places the method.
        world: the processes that train together.
        observer: see there.

    Raises:
        TrainingError: the folder holds another run, a checkpoint is unusable or cannot be written, or the run is broken
            (see `Health`).
    """
    folder, observer = Path(folder), observer or Observer()
    state, metrics, health = State(method, config), Metrics(folder / "metrics.jsonl", world), Health(method.clip)
    _open(state, folder, resume, world)
    metrics.forget_after(state.step)
    method.train()
    batch, saved, tally = None, state.step, Tally()

    def write_row() -> dict[str, float]:
        row = metrics.write(state.step, seconds=state.seconds, **tally.rates())
        if world.first:
            observer.row(row)
        return row

    with Progress(config.steps, "training", state.step, world.first) as progress, _deferred_interrupt() as received:
        while True:
            ctx = Ctx(config.seed, state.step, torch.device(device), state.step % method.updates, world)
            if ctx.update == 0:  # only here can a run be resumed: batches are not saved
                interrupted = world.total(len(received)) > 0
                late = minutes is not None and world.total(state.seconds) >= 60 * minutes * world.count
                if interrupted or state.step >= saved + config.checkpoint_every:
                    world.once(lambda: write_checkpoint(folder, state, world.first), state.sharded)
                    saved = state.step
                if interrupted:
                    if world.first:
                        print(f"stopped at update {state.step} of {config.steps}; --resume goes on", file=sys.stderr)
                    raise KeyboardInterrupt
                if observer.look(state) or late or state.step >= config.steps:
                    break
            elif state.step >= config.steps:
                break
            started = time.perf_counter()
            if ctx.update == 0:
                batch = _collect(method, data, ctx, config)
                report = method.report(batch)
                metrics.add(report)
                health.round(state.step, report)
                tally.images += report.get("images", 0)
            _update(method, batch, ctx, config, state, metrics, health)
            state.step += 1
            spent = time.perf_counter() - started
            state.seconds += spent
            tally.seconds += spent
            if state.step % config.log_every == 0:
                shown = observer.shown | write_row()
                tally = Tally()
                progress.update(state.step, **beside(shown))
    if tally.seconds:  # of updates after the last row
        write_row()
    if saved != state.step or world.once(lambda: not checkpoints(folder)):
        world.once(lambda: write_checkpoint(folder, state, world.first), state.sharded)
    method.eval()
    return state


def beside(row: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a row that belong beside the progress bar; `invalid` only where it is not 0."""
    return {name: row[name] for name in SHOWN if name in row and (name != "invalid" or row[name] > 0)}


class Tally:
    """Images drawn and seconds spent since the last row of the metrics."""

    def __init__(self) -> None:
        self.images, self.seconds = 0.0, 0.0

    def rates(self) -> dict[str, float]:
        """Images per second, of methods that draw any."""
        return {"images_per_second": self.images / self.seconds} if self.images else {}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update `step`: a pure function, so that a resume needs no scheduler state."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    start = config.steps * (1 - config.decay)
    progress = min(1.0, max(0.0, (step - start) / max(1.0, config.steps - start)))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def _open(state: State, folder: Path, resume: bool, world: World) -> None:
    """Make the folder ready and load the newest checkpoint, if there is one."""
    found = checkpoints(folder)
    if found and not resume:
        raise TrainingError(f"{folder} already holds a run; resume it or choose another folder.")
    if found:
        state.load(found[-1])
        if world.first:
            print(f"going on at update {state.step} of {state.config.steps}", file=sys.stderr)

    def clear() -> None:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for half in (folder / "checkpoints").glob("*.tmp"):
            half.unlink()  # a kill came while it was written

    world.once(clear)


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Let Ctrl-C, and the SIGTERM of a cluster, wait for the end of a round: they fill the list instead.

    A second Ctrl-C stops at once. A second SIGTERM does not: launchers pass on the one that their processes had too.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's


def _collect(method: Method, data: Callable[[int], Any], ctx: Ctx, config: TrainConfig) -> Any:
    """The batch of the next updates."""
    torch.manual_seed(key(config.seed, "collect", ctx.step))
    with torch.no_grad(), autocast(ctx.device, config):
        return method.collect(ctx, data(ctx.step // method.updates))


def _update(
    method: Method, batch: Any, ctx: Ctx, config: TrainConfig, state: State, metrics: Metrics, health: Health
) -> None:
    """One optimiser update: backpropagate each term, sum over processes, clip, step, average."""
    torch.manual_seed(key(config.seed, "update", state.step))  # for the random numbers of layers such as dropout
    state.optimizer.zero_grad()  # an update that was cut short may have left gradients
    losses, scaler = list[Tensor](), state.scaler
    with autocast(ctx.device, config):
        for term in method.losses(ctx, batch):
            health.term(ctx, term.stats)
            scaler.scale(term.loss).backward()
            method.check_term()
            losses.append(term.loss.detach())
            metrics.add(term.stats)
    health.check_terms()  # numbers are read once per update, since each reading waits for the device
    total = 0.0
    for loss in read(losses):
        total += loss
    total, terms = ctx.world.total(total), ctx.world.total(len(losses))
    if terms:  # else there is nothing to learn from in any process
        ctx.world.sum_gradients(state.weights.values())
        scaler.scale(torch.zeros((), device=ctx.device))  # it has no scale yet where this process had no term
        scaler.unscale_(state.optimizer)
    norm = whole(nn.utils.clip_grad_norm_(state.weights.values(), config.max_norm or math.inf, foreach=True))
    health.update(state.step, total, float(norm), scaler.get_scale() if scaler.is_enabled() else None)
    rate = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    if terms:
        scaler.step(state.optimizer)
        scaler.update()
    state.optimizer.zero_grad()  # rounds, evaluations and checkpoints need the room
    if config.ema:
        state.update_average(config.ema)
    if state.elastic is not None:
        state.elastic.follow()
        if state.elastic.due(state.step + 1, method.updates):
            state.elastic.reset(state.optimizer)
    metrics.add({"loss": total, "gradient_norm": norm, "learning_rate": rate})
    metrics.settle()
