"""How diffusers pipelines are loaded and driven; the driver loads torch and diffusers on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from t2i_align.pipelines.loading import PipelineError, call_keywords, card_of, check_call, load_pipeline

if TYPE_CHECKING:
    from t2i_align.pipelines.driver import Driver
    from t2i_align.pipelines.kernels import Gaussian, Kernel, cps, dance_sde, ddim, flow_sde, ode, per_dim

_KERNELS = ("Gaussian", "Kernel", "cps", "dance_sde", "ddim", "flow_sde", "ode", "per_dim")
_LAZY = {"Driver": "t2i_align.pipelines.driver", **dict.fromkeys(_KERNELS, "t2i_align.pipelines.kernels")}
__all__ = [
    "Driver",
    "Gaussian",
    "Kernel",
    "PipelineError",
    "call_keywords",
    "card_of",
    "check_call",
    "cps",
    "dance_sde",
    "ddim",
    "flow_sde",
    "load_pipeline",
    "ode",
    "per_dim",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
