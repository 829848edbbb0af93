"""Rendered scenes as training data: drawn once, held as uint8 arrays, picked by (seed, step)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from t2i_align.keys import generator
from t2i_align.playground.world import SIZE, Scene, sample_scene
from t2i_align.progress import Progress


class ScenePool:
    """The first `n` scenes of the train split of data set `seed`, with their pictures and captions."""

    def __init__(self, n: int, seed: int) -> None:
        self.scenes: list[Scene] = []
        self.pixels = np.empty((n, SIZE, SIZE, 3), np.uint8)
        with Progress(n, "drawing scenes") as progress:
            for index in range(n):
                self.scenes.append(sample_scene(seed, index))
                self.pixels[index] = np.asarray(self.scenes[-1].render())
                if index % 500 == 499 or index == n - 1:
                    progress.update(index + 1)

    def __len__(self) -> int:
        return len(self.scenes)

    def images(self, rows: Tensor | slice) -> Tensor:
        """Pictures of `rows` as the VAE takes them: (B, 3, 64, 64) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels[rows if isinstance(rows, slice) else rows.numpy()])
        return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

    def captions(self) -> list[str]:
        """The caption of every scene."""
        return [str(scene.caption) for scene in self.scenes]


def pick_rows(pool: int, batch: int, seed: int, step: int) -> Tensor:
    """The rows (batch,) that update `step` trains on: each epoch of the pool is one keyed permutation."""
    first = step * batch
    rows: list[int] = []
    while len(rows) < batch:
        epoch, offset = divmod(first + len(rows), pool)
        order = torch.randperm(pool, generator=generator(seed, "epoch", epoch))
        rows += order[offset : offset + batch - len(rows)].tolist()
    return torch.tensor(rows)
