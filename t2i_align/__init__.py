"""t2i-align: score, steer and fine-tune text-to-image diffusion models with human-preference rewards.

Heavy libraries load on first use: `import t2i_align` itself takes a few milliseconds.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align._version import VERSION as __version__

_LAZY = {
    "Prompts": "t2i_align.prompts",
    "Scorer": "t2i_align.rewards",
    "Scores": "t2i_align.rewards",
    "T2IError": "t2i_align.errors",
    "evaluate": "t2i_align.evaluation",
    "generate": "t2i_align.generation",
    "load_pipeline": "t2i_align.pipelines",
    "load_reward": "t2i_align.rewards",
    "steer": "t2i_align.steering",
    "train": "t2i_align.training.run",
}
__all__ = [
    "Prompts",
    "Scorer",
    "Scores",
    "T2IError",
    "__version__",
    "evaluate",
    "generate",
    "load_pipeline",
    "load_reward",
    "steer",
    "train",
]

if TYPE_CHECKING:
    from t2i_align.errors import T2IError
    from t2i_align.evaluation import evaluate
    from t2i_align.generation import generate
    from t2i_align.pipelines import load_pipeline
    from t2i_align.prompts import Prompts
    from t2i_align.rewards import Scorer, Scores, load_reward
    from t2i_align.steering import steer
    from t2i_align.training.run import train

for _link in ("rewards", "pipelines"):
    if not (Path(__file__).parent / _link / "__init__.py").is_file():
        raise ImportError(
            f"t2i_align/{_link} should be a link to ../{_link} but is not: this checkout lost its symbolic links "
            "(Windows or a ZIP download); clone with `git clone -c core.symlinks=true`, or `pip install` the package."
        )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 't2i_align' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
