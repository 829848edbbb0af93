"""Which pipelines' loops use the index of their step for more than the progress bar."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

# Loops that use the index only when one of these keywords has another value than this.
IDLE_AT: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": {"skip_guidance_layers": None},
    "Lumina2Pipeline": {"cfg_trunc_ratio": 1.0},
}
_RANGE = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}
_BOOKKEEPING = ("num_warmup_steps", "callback")  # names in tests around the progress bar and callbacks


def needs_index(pipeline: type, call: Mapping[str, Any]) -> bool:
    """Whether a pipeline's loop reads the index of its step under these keywords of `__call__`.

    Samples at different rows then need calls of their own.
    """
    if not _reads_index(inspect.unwrap(pipeline.__call__)):
        return False
    accepts = inspect.signature(pipeline.__call__).parameters
    idle = IDLE_AT.get(pipeline.__name__) or (_RANGE if "control_guidance_start" in accepts else None)
    if idle is None:
        return True
    return any(call.get(name, accepts[name].default) not in (value, [value]) for name, value in idle.items())


@cache
def _reads_index(function: Callable[..., Any]) -> bool:
    """Whether the body of a `for i, t in enumerate(...)` loop reads i, progress bar and callbacks left out."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return True  # no source to look at: one call per row is always right
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For) and isinstance(node.target, ast.Tuple)]
    for loop in loops:
        index, counted = loop.target.elts[0], loop.iter  # type: ignore[attr-defined]
        enumerates = isinstance(counted, ast.Call) and getattr(counted.func, "id", "") == "enumerate"
        if enumerates and isinstance(index, ast.Name) and any(_reads(loop.body, index.id)):
            return True
    return False


def _reads(nodes: list[Any], name: str) -> Iterator[bool]:
    for node in nodes:
        if isinstance(node, ast.If) and any(word in ast.unparse(node.test) for word in _BOOKKEEPING):
            continue
        if isinstance(node, ast.Name) and node.id == name:
            yield True
        yield from _reads(list(ast.iter_child_nodes(node)), name)
