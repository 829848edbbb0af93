"""How diffusers pipelines are loaded and driven; the driver loads torch and diffusers on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2i_align.pipelines.catalog import call_defaults, call_keywords, card_of, check_call
    from t2i_align.pipelines.driver import Driver
    from t2i_align.pipelines.kernels import Gaussian, Kernel, cps, dance_sde, ddim, flow_sde, load_kernel, ode, per_dim
    from t2i_align.pipelines.loading import load_pipeline, preview_pipeline
    from t2i_align.pipelines.models import PipelineError

_CATALOG = ("call_defaults", "call_keywords", "card_of", "check_call")
_KERNELS = ("Gaussian", "Kernel", "cps", "dance_sde", "ddim", "flow_sde", "load_kernel", "ode", "per_dim")
_LAZY = {
    "Driver": "t2i_align.pipelines.driver",
    "PipelineError": "t2i_align.pipelines.models",
    "load_pipeline": "t2i_align.pipelines.loading",
    "preview_pipeline": "t2i_align.pipelines.loading",
    **dict.fromkeys(_CATALOG, "t2i_align.pipelines.catalog"),
    **dict.fromkeys(_KERNELS, "t2i_align.pipelines.kernels"),
}
__all__ = [
    "Driver",
    "Gaussian",
    "Kernel",
    "PipelineError",
    "call_defaults",
    "call_keywords",
    "card_of",
    "check_call",
    "cps",
    "dance_sde",
    "ddim",
    "flow_sde",
    "load_kernel",
    "load_pipeline",
    "ode",
    "per_dim",
    "preview_pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
