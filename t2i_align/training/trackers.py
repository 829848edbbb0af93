"""Numbers of a run for TensorBoard and Weights & Biases, besides `metrics.jsonl`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_align.runs import write_text
from t2i_align.training.blocks import RunConfig

WANDB_ID = "wandb-id.txt"  # in the run folder


class Trackers:
    """Where numbers go; nothing is opened before the first one.

    Args:
        config: of the run.
        folder: of the run; None for a process that writes nothing.
    """

    def __init__(self, config: RunConfig, folder: Path | None) -> None:
        self.config, self.folder = config, folder
        self.writer: Any = None
        self.run: Any = None

    def write(self, step: float, row: Mapping[str, float], group: str) -> None:
        """Log the numbers of a row under `group/name`."""
        numbers = {f"{group}/{name}": value for name, value in row.items() if name != "step"}
        if self.folder is None:
            return
        if self.config.log.tensorboard:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # Events of a session that went further than its last checkpoint are hidden.
                self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=int(step))
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, int(step))
        if self.config.log.wandb is not None:
            if self.run is None:
                import wandb

                self.run = wandb.init(
                    project=self.config.log.wandb,
                    dir=str(self.folder),
                    name=self.folder.name,
                    config=self.config.model_dump(mode="json"),
                    id=wandb_id(self.folder),
                    resume="allow",
                )
            self.run.log(numbers, step=int(step))

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


def wandb_id(folder: Path) -> str:
    """The id of a run folder at Weights & Biases, without which a resumed run would be a new one there."""
    path = folder / WANDB_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()
