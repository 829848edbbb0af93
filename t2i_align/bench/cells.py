"""What benches of training runs share: cells that go on where an earlier call stopped, and a file for each result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from t2i_align.errors import T2IError
from t2i_align.training.blocks import RunConfig
from t2i_align.training.checkpoints import checkpoints, read_checkpoint
from t2i_align.training.run import Trained, train

Result = dict[str, Any]


class Cell(Protocol):
    """A training run; `label` names a try of other settings."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def images(self) -> int: ...

    def config(self, out: Path) -> RunConfig: ...


@dataclass
class Runs:
    """Runs of cells and their results.

    `out`: folder of the results; `work`: of the runs; `prompts`: that results are judged on; `minutes`: that a call may
    take.
    """

    out: Path
    work: Path
    prompts: int = 200
    minutes: float = 20.0
    began: float = field(default_factory=time.monotonic, kw_only=True)

    @property
    def left(self) -> float:
        """Minutes of this call."""
        return self.minutes - (time.monotonic() - self.began) / 60

    def path(self, cell: Cell) -> Path:
        """The result of a cell; tries lie apart from the bench's own cells."""
        return self.out / ("tuning" if cell.label else "") / cell.name / "result.json"

    def progress(self, cell: Cell) -> str:
        """How far a cell is, in a word or two."""
        if self.path(cell).is_file():
            return "done"
        found = checkpoints(self.work / cell.name)
        if not found:
            return "to do"
        return f"at update {read_checkpoint(found[-1])['step']} of {cell.config(self.work / cell.name).train.steps}"

    def run(self, cell: Any) -> Result | None:
        """The result of a cell, from its file or by going on with its run; None if time was up before."""
        raise NotImplementedError

    def all_of(self, wanted: Sequence[Cell]) -> list[Result]:
        """The results of cells, one after the other, as far as the time goes."""
        results = []
        for number, cell in enumerate(wanted, start=1):
            print(f"[{number}/{len(wanted)}] {cell.name}", file=sys.stderr, flush=True)
            result = self.run(cell)
            if result is None:
                print("time is up: call again to go on", file=sys.stderr)
                break
            results.append(result)
        return results

    def done(self, cells: Sequence[Cell]) -> list[Result]:
        """The results that there are."""
        return [self.known(self.path(cell), cell) for cell in cells if self.path(cell).is_file()]

    def known(self, path: Path, cell: Cell | None = None) -> Result:
        """A result from its file. Raises T2IError for one of other settings."""
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"prompts": self.prompts} | ({} if cell is None else {"budget": cell.images})
        if any(result[name] != value for name, value in wanted.items()):
            raise T2IError(f"{path} is of a bench with other prompts or images: choose another --out.")
        return result

    def trained(self, config: RunConfig) -> Trained:
        """Train for what is left of this call's minutes."""
        found = checkpoints(config.folder)
        spent = read_checkpoint(found[-1])["seconds"] / 60 if found else 0.0
        done = train(config, resume=True, minutes=spent + max(0.0, self.left))
        print(f"{config.folder.name}: {done.step} of {config.train.steps} updates", file=sys.stderr, flush=True)
        return done
