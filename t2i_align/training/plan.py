"""What a run will cost, from its config, one small round and one batch of an evaluation: calls, memory, hours."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2i_align.arms import parameters
from t2i_align.data.images import tensor_to_pil
from t2i_align.methods.base import OnPolicy, Rollout
from t2i_align.pipelines.driver import Driver
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer
from t2i_align.rewards.features import extract_features, networks_of
from t2i_align.training.distributed import ALONE
from t2i_align.training.honest import is_due
from t2i_align.training.method import Ctx
from t2i_align.training.precision import autocast
from t2i_align.training.run import Parts

GIB = 2**30


class Memory(NamedTuple):
    """Bytes: what is there all the time, what a round keeps, and the larger of the two peaks within a round."""

    weights: int
    training: int  # gradients, moments, average, frozen copies
    round: int  # latents, log-probs and images
    activations: int  # of a loss term and its backward pass, or the decoder's features

    @property
    def total(self) -> int:
        """Peak, without what the libraries take."""
        return sum(self)


class Plan(NamedTuple):
    """Images and rows that go through the network in a round (guidance counts double), and what a run takes."""

    rounds: int
    images: int
    drawn: int  # network rows of drawing and of reference passes
    trained: int  # network rows with a backward pass
    memory: Memory
    seconds: float  # a round
    evaluations: int
    evaluated: int  # network rows of all evaluations: their images, and chains for the KL to the base
    evaluation_seconds: float  # an evaluation, on average

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return (self.rounds * self.seconds + self.evaluations * self.evaluation_seconds) / 3600

    def rows(self) -> list[dict[str, str]]:
        """For people."""
        m = self.memory
        said = {
            "rounds": f"{self.rounds}",
            "images per round": f"{self.images}",
            "network rows per round": f"{self.drawn} drawing, {self.trained} training (guidance counts double)",
            "network rows of evaluations": f"{self.evaluated}",
            "memory": f"about {m.total / GIB:.2f} GiB: weights {m.weights / GIB:.2f}, training state "
            f"{m.training / GIB:.2f}, a round {m.round / GIB:.2f}, activations {m.activations / GIB:.2f}",
            "time": f"about {self.hours:.2g} hours: {self.rounds} rounds of {self.seconds:.3g} s, {self.evaluations} "
            f"evaluations of {self.evaluation_seconds:.3g} s",
        }
        return [{"what": name, "value": text} for name, text in said.items()]


def make_plan(parts: Parts) -> Plan:
    """Draw and backpropagate as few images as fill a batch, and scale up; weights are not changed.

    Of evaluations see `evaluations`.

    Activations are the tensors that are there at a time while loss terms are backpropagated, or the largest input and
    output of a layer while images are decoded; they grow with the batch, which is measured in full.
    """
    config, method = parts.config, parts.method
    s = method.settings
    prompts = min(config.prompts.per_round, max(1, s.batch_size // s.group))
    share = prompts / config.prompts.per_round
    method.settings = s.model_copy(update={"minibatches": 1, "epochs": 1})
    ctx = Ctx(config.train.seed, config.train.steps, parts.device, 0, ALONE)  # past a warm-up
    table = parts.pool.draw(config.train.seed, 0, prompts)
    try:
        with counted(method.policy.network) as drawn, largest_layer(parts.pipe) as decoded, torch.no_grad():
            method.collect(ctx, table)  # the first call is slower
            once = drawn[0]
            started = time.perf_counter()
            with autocast(parts.device, config.train):
                batch = method.collect(ctx, table)
            drawing = time.perf_counter() - started
        with autocast(parts.device, config.train):
            update = largest_update(method, ctx, batch)
            with counted(method.policy.network) as trained:
                started = time.perf_counter()
                backpropagate(method, ctx, batch)
                training = time.perf_counter() - started
    finally:
        method.settings = s
        method.zero_grad()
    images = config.prompts.per_round * s.group
    kept = sum(map(bytes_of, tensors_of(batch)))
    number, evaluated, looking = evaluations(parts)
    return Plan(
        rounds=config.train.steps // method.updates,
        images=images,
        drawn=round(once / share),
        trained=round(s.epochs * trained[0] / share),
        memory=Memory(*standing(parts), round(kept / share), max(update, decoded[0])),
        seconds=(drawing + s.epochs * training) / share,
        evaluations=number,
        evaluated=evaluated,
        evaluation_seconds=looking / number,
    )


@torch.no_grad()
def evaluations(parts: Parts) -> tuple[int, int, float]:
    """How many evaluations a run makes unless it stops early, the network rows of all, and their seconds.

    One denoising step of a batch, decoding and all scores are measured, and scaled up. The first evaluation needs no
    KL where it is the base's; elsewhere the base's pictures are drawn beside it.
    """
    config, method, held = parts.config, parts.method, parts.held_out
    e, s, call = config.evaluate, method.settings, dict(parts.call)
    steps = call.pop("num_inference_steps", 50)
    every = range(0, config.train.steps + 1, method.updates)
    number = sum(is_due(step, e.every, method.updates, config.train.steps) for step in every)
    x, chain_rows, chain_seconds = first_step(method, method.tools.driver, held[: s.batch_size], s.steps)
    chain_steps = steps_of_kl(method, x[:1])
    some, driver = held.repeat(e.images)[: e.batch_size], Driver(parts.pipe, **call)  # with guidance of its own
    first_step(method, driver, some, steps)  # the first call is slower
    started = time.perf_counter()
    x, rows, seconds = first_step(method, driver, some, steps)
    pictures = [tensor_to_pil(image) for image in driver.decode(x, e.batch_size)]
    for scorer in parts.judges.scorers.values():
        scorer.scores(pictures, some).total.cpu()
    if parts.judges.features is not None:
        extract_features(pictures, parts.judges.features).cpu()
    rest = (time.perf_counter() - started) / len(some) - seconds
    elsewhere = config.policy.start is not None
    images = len(held) * e.images * (number + elsewhere)
    image_steps = images * driver.grid(steps).steps
    chain_steps *= min(e.kl_images, len(held)) * (number - 1 + elsewhere)
    total = image_steps * seconds + chain_steps * chain_seconds + images * rest
    return number, round(image_steps * rows + chain_steps * chain_rows), total


def first_step(method: OnPolicy, driver: Driver, prompts: Prompts, steps: int) -> tuple[Tensor, float, float]:
    """Starting latents (B, ...), and network rows and seconds of a sample's first denoising step."""
    cond = driver.encode(method.as_used(prompts))
    x = driver.start(cond, steps, batch_size=len(cond))
    with counted(method.policy.network) as rows:
        started = time.perf_counter()
        driver.predict(x, 0, cond, steps).cpu()
        seconds = time.perf_counter() - started
    return x, rows[0] / len(x), seconds / len(x)


def steps_of_kl(method: OnPolicy, x: Tensor) -> int:
    """Denoising steps by which `drift_from_base` takes a chain: the policy's, and the base's where they have noise."""
    grid, x = method.tools.driver.grid(method.settings.steps), x.float()
    levels = [grid.level(row, x) for row in range(grid.steps + 1)]
    return grid.steps + sum(bool(method.kernel(x, x, *pair).std.any()) for pair in pairwise(levels))


def standing(parts: Parts) -> tuple[int, int]:
    """Bytes of all weights, and of the training state."""
    scorers: list[Scorer] = list(parts.judges.scorers.values())
    networks = [network for scorer in scorers for network in scorer.networks()]
    networks += parts.method.networks()
    if (exact := parts.method.tools.driver.exact_vae) is not None:  # in fp32, beside the pipeline's
        networks.append(exact)
    if parts.judges.features is not None:
        networks += networks_of(parts.judges.features)
    every = {id(p): p for p in parameters(parts.pipe)}
    every |= {id(p): p for network in networks for p in network.parameters()}
    weights = sum(bytes_of(p) for p in every.values())
    policy, train = parts.method.policy, parts.config.train
    trained = policy.trainable()
    moments = 2 if train.optimizer == "adamw_8bit" else 8
    copies = 1 + bool(train.ema) + 2 * bool(train.elastic_reset) + parts.method.averages  # the gradient is one
    state = sum(p.numel() * (copies * p.element_size() + moments) for p in trained)
    frozen = sum(bytes_of(p) for p in trained) if policy.weights.kind == "full" else 0
    return weights, state + frozen


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a collected batch; conditions and scores are small beside them."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Rollout):
        yield from (batch.traj.x, batch.traj.log_prob)
        yield from (tensor for tensor in (batch.means, batch.previews) if tensor is not None)
    elif isinstance(batch, tuple):
        for part in batch:
            yield from tensors_of(part)


def bytes_of(tensor: Tensor) -> int:
    """Of its values."""
    return tensor.numel() * tensor.element_size()


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Count the rows that go through a network."""
    rows = [0]

    def count(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = (*args, *options.values())
        batches = [x for x in given if (x.ndim > 1 if isinstance(x, Tensor) else is_list_of_tensors(x))]
        rows[0] += len(batches[0])

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def is_list_of_tensors(value: Any) -> bool:
    """Whether a network is given its samples one by one, as Z-Image's is."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(x, Tensor) for x in value)


@contextmanager
def largest_layer(pipe: Any) -> Iterator[list[int]]:
    """The most bytes that one layer of a pipeline's networks reads and writes."""
    most = [0]

    def measure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in (*args, output) if isinstance(value, Tensor)]
        most[0] = max(most[0], sum(map(bytes_of, tensors)))

    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    leaves = [layer for part in parts for layer in part.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(measure) for layer in leaves]
    try:
        yield most
    finally:
        for handle in handles:
            handle.remove()


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made within and not yet gone, and the most of them at any time: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}  # views and results in place are of these
        for storage in storages(made):
            if storage._cdata not in given:
                self._count(storage)
        return made

    def _count(self, storage: UntypedStorage) -> None:
        if storage._cdata in self.seen:
            return
        self.seen[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, number: int) -> None:
        self.live -= self.seen.pop(number)


def storages(value: Any) -> list[UntypedStorage]:
    """Of all tensors in a value."""
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def largest_update(method: OnPolicy, ctx: Ctx, batch: Any) -> int:
    """Backpropagate a batch's loss terms; the most bytes of tensors that are there at a time.

    What autograd keeps is among them, and what a backward pass computes again; weights and their gradients are not.
    """
    for p in method.policy.trainable():
        p.grad = torch.zeros_like(p)
    with LiveTensors() as tensors:
        backpropagate(method, ctx, batch)
    return tensors.peak


def backpropagate(method: OnPolicy, ctx: Ctx, batch: Any) -> None:
    """All loss terms of a batch, one by one."""
    for term in method.losses(ctx, batch):
        term.loss.backward()
