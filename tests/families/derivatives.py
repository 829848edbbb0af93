"""Derivatives of `predict` against differences, in float64 throughout."""

import torch
from torch.overrides import TorchFunctionMode

from tests.families.subject import Subject

DTYPE = torch.Tensor.dtype.__get__


class InFloat64(TorchFunctionMode):
    """A world in which float32 is float64: casts that networks make inside lose nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        result = function(*args, **kwargs)
        return torch.float32 if function == DTYPE and result is torch.float64 else result


def derivative(s: Subject, of_weights: bool, h: float = 1e-6) -> float:
    """Relative error of a directional derivative of `predict` against a central difference."""
    draw = torch.Generator().manual_seed(3)
    row = s.steps // 2
    x, twin = s.trajectory.x[:, row].double(), s.twin(torch.float64)
    weights = torch.randn(x.shape, generator=draw, dtype=x.dtype)
    inputs = list(twin.driver.network.parameters()) if of_weights else [x.requires_grad_()]
    directions = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in inputs]
    starts = [p.detach().clone() for p in inputs]

    def value() -> torch.Tensor:
        with InFloat64():
            return (weights * twin.driver.predict(x, row, twin.cond, s.steps)).sum()

    @torch.no_grad()
    def moved(length: float) -> float:
        for p, start, direction in zip(inputs, starts, directions, strict=True):
            p.copy_(start + length * direction)
        return float(value())

    gradients = torch.autograd.grad(value(), inputs, allow_unused=True)
    exact = sum(float((g * v).sum()) for g, v in zip(gradients, directions, strict=True) if g is not None)
    return abs((moved(h) - moved(-h)) / (2 * h) - exact) / abs(exact)
