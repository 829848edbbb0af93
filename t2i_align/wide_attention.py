"""Fused attention of few tokens in fp32 on a CPU, also where activations are computed again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

HALVES = (torch.bfloat16, torch.float16)
FEW = 512  # tokens of a query; from about as many on, bf16 is faster
_OPEN = threading.local()  # `depth`: how many WideAttention contexts are open


class WideAttention(TorchFunctionMode):
    """In this context, fused attention of few tokens on a CPU computes in fp32 what it would in bf16 or fp16.

    Its backward pass in bf16 is up to six times slower there (torch 2.14) and took two fifths of an update of tiny-sd;
    `benchmarks/training.py` measures it. With gradients or without: a replay has to meet what sampling computed.
    """

    def __enter__(self) -> WideAttention:
        _OPEN.depth = getattr(_OPEN, "depth", 0) + 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _OPEN.depth -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of every torch function that is called in the context."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        number = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        if number not in HALVES or query.shape[-2] >= FEW:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            out = func(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
        return out.to(number)


def wide(value: Any) -> Any:
    """A tensor of floating-point numbers in fp32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def recomputed(
    function: Callable[..., Any], *args: Any, under: AbstractContextManager[Any] | None = None, **options: Any
) -> Any:
    """`function(*args, **options)`, whose activations are not kept: the backward pass computes them again.

    It does so with attention as it is now, and in the context `under`: a backward pass is outside of both.
    """
    if torch.compiler.is_compiling():  # the compiler traces the second pass with the first
        return checkpoint(function, *args, use_reentrant=False, **options)
    again = SecondPass(getattr(_OPEN, "depth", 0) > 0, under or nullcontext())
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **options)


class SecondPass:
    """The context of a second pass, which can be entered for a third: attention as it was in the first, and another."""

    def __init__(self, widened: bool, under: AbstractContextManager[Any]) -> None:
        self.widened, self.under, self.entered = widened, under, ExitStack()

    def __enter__(self) -> None:
        if self.widened:
            self.entered.enter_context(WideAttention())
        self.entered.enter_context(self.under)

    def __exit__(self, *error: object) -> None:
        self.entered.close()
