"""Images that a person chose among, as denoising chains again: what per-step preference losses need.

`generate --kernel` keys every draw by seed, prompt and number, so the weights that drew an image draw its chain again.
The picture at its end is compared with the one on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from t2i_align.choices import read_choices
from t2i_align.data.images import open_image, to_uint8
from t2i_align.generation import chains
from t2i_align.jobs import image_name
from t2i_align.methods.base import Tools
from t2i_align.pipelines import load_kernel
from t2i_align.policy import Policy
from t2i_align.training.method import TrainingError
from t2i_align.trajectory import Trajectory

DRAWN_BY = "drawn_by"  # the adapter with the weights that drew the images
# Mean difference of pictures, in levels of 256, by number type of the network. Batches of other sizes round otherwise:
# by 1e-6 of a latent in fp32, which moves few pixels by a level, by 1e-2 in half precision.
SAME = {torch.float32: 0.5}
SAME_HALF = 6.0


class Replay:
    """The chains of a folder's images, drawn again.

    Args:
        folder: of `generate --kernel`, with a `choices.json`.
        policy: at its start; where the folder was drawn with the LoRA it starts from, that is kept as an adapter.
        tools: driver and keywords of the run, which draw as the folder was drawn (`checks.problems`).
        batch_size: images that go through the network together.
    """

    def __init__(self, folder: str | Path, policy: Policy, tools: Tools, batch_size: int) -> None:
        self.folder, self.choices = Path(folder), read_choices(folder)
        self.policy, self.tools, self.batch_size = policy, tools, batch_size
        self.compared: set[int] = set()  # rows whose pictures are known to be the same
        self.started = False
        if policy.weights.kind == "lora":
            lora = policy.adapters
            self.started = len(self.choices.job.lora) > len(lora.below)
            if self.started:
                policy.add_adapter(DRAWN_BY, like=lora.name)

    def drawn_by(self) -> AbstractContextManager[None]:
        """The weights that drew the images."""
        return self.policy.adapter(DRAWN_BY) if self.started else self.policy.reference()

    @torch.no_grad()
    def chains(self, rows: Sequence[int]) -> Trajectory:
        """The chains of all images of some rows, group-major.

        Raises:
            TrainingError: they do not end in the pictures on disk.
        """
        job, driver = self.choices.job, self.tools.driver
        assert job.kernel is not None
        assert job.steps is not None
        jobs = [(row, particle) for row in rows for particle in range(job.particles)]
        device = next(self.policy.network.parameters()).device.type
        with self.drawn_by(), torch.autocast(device, enabled=False):  # as `generate` draws
            traj = chains(
                driver,
                job.table(),
                jobs,
                steps=job.steps,
                kernel=load_kernel(job.kernel),
                seed=job.seed,
                shared_start=job.shared_start,
                batch_size=self.batch_size,
                **self.tools.call,
            )
        self.compare(rows, traj.x[:, -1])
        return traj

    def compare(self, rows: Sequence[int], latents: Tensor) -> None:
        """Compare pictures with those on disk, once in a session. Raises TrainingError where they differ."""
        group = self.choices.job.particles
        new = [place for place, row in enumerate(rows) if row not in self.compared]
        if not new:
            return
        images = to_uint8(self.tools.driver.decode(latents.unflatten(0, (len(rows), group))[new].flatten(0, 1)))
        files = [self.folder / image_name(rows[place], number) for place in new for number in range(group)]
        most = SAME.get(next(self.policy.network.parameters()).dtype, SAME_HALF)
        for image, file in zip(images, files, strict=True):
            saved = np.asarray(open_image(file))
            off = abs(saved.astype(int) - image).mean() if saved.shape == image.shape else float("inf")
            if not off <= most:
                raise TrainingError(
                    f"Drawn again, {file} comes out as another picture (off by {off:.3g} of 256 levels, {most:g} are "
                    "rounding): the pipeline, its LoRA or its settings are not those that drew it; draw the images "
                    "again and choose anew, or train from what drew them."
                )
        self.compared |= {rows[place] for place in new}
