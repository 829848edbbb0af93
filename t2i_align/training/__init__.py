"""Training: one loop (`loop.fit`), what a method gives it, and runs described by a config (`run.train`)."""

from t2i_align.training.checkpoints import State
from t2i_align.training.distributed import World
from t2i_align.training.loop import Observer, fit, learning_rate
from t2i_align.training.method import Ctx, Method, Term, TrainingError

__all__ = [
    "Ctx",
    "Method",
    "Observer",
    "State",
    "Term",
    "TrainingError",
    "World",
    "fit",
    "learning_rate",
]
