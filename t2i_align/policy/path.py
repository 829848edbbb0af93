"""Which weights a network's forward pass uses: one switch per network, shared by all its policies.

A forward path is a list of dictionary entries: peft layers look up their active adapters in their `__dict__`, modules
their parameters in `_parameters`. A context exchanges those entries and puts the former ones back, and so changes the
forward pass and nothing else: peft's own `set_adapter` and `disable_adapters` also flip `requires_grad`, after which a
backward pass silently gives no gradients (and they take 40 ms for SDXL's 560 layers, this 0.2 ms). Weights are
exchanged as objects and never overwritten, so a graph built under one path stays right after the path has changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.errors import T2IError
from t2i_align.wide_attention import recomputed

Settings = list[tuple[dict[str, Any], str, Any]]  # (namespace, key, value)


class PolicyError(T2IError):
    """A network that cannot be trained as asked, or a policy context used where it must not be."""


def exchange(settings: Settings) -> Settings:
    """Put the values in and return the former ones. Raises KeyError for an entry that is not there."""
    former = [(entries, key, entries[key]) for entries, key, _ in settings]
    for entries, key, value in settings:
        entries[key] = value
    return former


class Switch:
    """The forward path of one network: what is in force, and the lock that whoever changes it holds."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.path: Settings | None = None  # None: the network's own, outside any context
        self.home: Settings = []  # puts the network's own path back, while a context is open

    @contextmanager
    def use(self, path: Settings) -> Iterator[None]:
        """Make `path` the forward path for the length of the block; other threads wait for their turn."""
        with self.lock:
            outer, former = self.path, exchange(path)
            try:
                self.path, self.home = path, self.home if outer is not None else former
                yield
            finally:
                exchange(former)
                self.path = outer

    def refuse_open(self, what: str) -> None:
        """Raise PolicyError where a context is open."""
        if self.path is not None:
            raise PolicyError(
                f"Expected {what} outside of reference(), averaged() and adapter() but such a context is open: compute "
                "in the block, leave it, then go on."
            )

    def refuse_backward(self, gradient: Tensor) -> None:
        """A hook of trainable parameters: a gradient that arrives within a context is refused."""
        self.refuse_open("a backward pass")

    def checkpointed(self, module: Any, *args: Any, **options: Any) -> Any:
        """Run a block of the network without keeping its activations; they are computed again, under the same path."""
        return recomputed(module, *args, under=Again(self, self.path), **options)


class Again:
    """A context that puts back the forward path of a checkpointed pass for its recomputation, which is a part of the
    backward pass and so comes after the policy's context has been left.

    It takes no lock: the thread that waits for the backward pass may hold it, and autograd computes in others.
    """

    def __init__(self, switch: Switch, path: Settings | None) -> None:
        self.switch, self.path = switch, path
        self.former: Settings = []
        self.outer: Settings | None = None

    def __enter__(self) -> None:
        self.outer, self.former = self.switch.path, []
        if self.outer is not self.path:
            self.former = exchange(self.switch.home if self.path is None else self.path)
            self.switch.path = self.path

    def __exit__(self, *error: object) -> None:
        exchange(self.former)
        self.switch.path = self.outer


@torch.no_grad()
def lerp(means: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """Move `means` towards `values` by `weight`, in place."""
    torch._foreach_lerp_([mean.detach() for mean in means], [value.detach() for value in values], weight)


_SWITCHES: weakref.WeakKeyDictionary[nn.Module, Switch] = weakref.WeakKeyDictionary()


def switch_of(network: nn.Module) -> Switch:
    """The one switch of a network."""
    return _SWITCHES.setdefault(network, Switch())
