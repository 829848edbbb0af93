"""Pictures by a pipeline with their gold scores: what the preference model learns from and proxies are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2i_align.generation import generate_samples
from t2i_align.playground.world import Split, sample_scene
from t2i_align.progress import Progress
from t2i_align.prompts import Prompts
from t2i_align.rewards.verifier import report
from t2i_align.scorer_training.data import Examples

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CHUNK = 16  # prompts per file
PICTURES, STEPS, GUIDANCE = 8, 25, 1.5  # of a held-out prompt, as a user of tiny-sd would draw them


class Style(NamedTuple):
    """How some pictures of a prompt are drawn."""

    steps: int
    guidance: float
    pictures: int


STYLES = (Style(12, 1.5, 2), Style(12, 3.0, 1), Style(8, 1.0, 3))  # pictures that differ in what is wrong with them


class Judged(NamedTuple):
    """P prompts with K pictures each: `pixels` (P, K, 64, 64, 3) uint8, `gold` (P, K) in [0, 1]."""

    prompts: list[str]
    pixels: NDArray[np.uint8]
    gold: NDArray[np.float32]

    def images(self, rows: slice | list[int] | Tensor) -> Tensor:
        """Pictures of some prompts: (P, K, 3, 64, 64) in [0, 1]."""
        pixels = torch.from_numpy(self.pixels[rows.numpy() if isinstance(rows, Tensor) else rows])
        return pixels.permute(0, 1, 4, 2, 3).contiguous().float() / 255


def to_examples(judged: Judged) -> Examples:
    """Rankings of the pictures of each prompt by gold."""
    count, number = judged.gold.shape
    images = tuple(tuple(range(row * number, (row + 1) * number)) for row in range(count))
    merits = tuple(map(tuple, judged.gold.astype(float).tolist()))
    return Examples(tuple(judged.prompts), images, merits, list(judged.pixels.reshape(-1, *judged.pixels.shape[2:])))


def preference_samples(prompts: int, seed: int, split: Split, folder: Path) -> Judged:
    """tiny-sd's pictures of a split's captions: of the train split in `STYLES`, of the held-out one as users draw."""
    from t2i_align.pipelines import load_pipeline

    styles = STYLES if split == "train" else (Style(STEPS, GUIDANCE, PICTURES),)
    return judge_samples(load_pipeline("tiny-sd"), distinct_prompts(prompts, seed, split), styles, seed, folder)


def distinct_prompts(n: int, seed: int, split: Split) -> list[str]:
    """The first `n` different captions of the scenes of a split."""
    prompts: dict[str, None] = {}
    index = 0
    while len(prompts) < n:
        prompts[str(sample_scene(seed, index, split).caption)] = None
        index += 1
    return list(prompts)


def judge_samples(
    pipe: DiffusionPipeline, prompts: Sequence[str], styles: Sequence[Style], seed: int, folder: Path
) -> Judged:
    """Draw pictures of every prompt and score them by the verifier.

    The folder keeps one `.npz` file for 16 prompts; those already there are not drawn again unless they are of other
    prompts, so that a stopped job goes on where it was. A folder serves one set of styles and one seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels, gold = [], []
    with Progress(len(prompts), "drawing and judging samples") as progress:
        for first in range(0, len(prompts), CHUNK):
            path, some = folder / f"{first:05d}.npz", list(prompts[first : first + CHUNK])
            if not _has(path, some):
                _write(path, some, *_judge(pipe, some, styles, seed))
            with np.load(path) as saved:
                pixels.append(saved["pixels"])
                gold.append(saved["gold"])
            progress.update(first + len(gold[-1]))
    return Judged(list(prompts), np.concatenate(pixels), np.concatenate(gold))


def _judge(
    pipe: DiffusionPipeline, prompts: list[str], styles: Sequence[Style], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    number = sum(style.pictures for style in styles)
    pixels = np.empty((len(prompts), number, 64, 64, 3), np.uint8)
    gold = np.empty((len(prompts), number), np.float32)
    first = 0
    for style in styles:
        jobs = [(row, first + i) for row in range(len(prompts)) for i in range(style.pictures)]
        call: dict[str, Any] = {"num_inference_steps": style.steps, "guidance_scale": style.guidance}
        fast = torch.backends.cpu.get_cpu_capability() == "AVX512"  # others emulate bf16, six times slower than fp32
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            samples = list(generate_samples(pipe, Prompts(tuple(prompts)), jobs, seed=seed, batch_size=64, **call))
        for sample in samples:
            picture = np.asarray(sample.image)
            pixels[sample.row, sample.particle] = picture
            gold[sample.row, sample.particle] = report(picture, sample.prompt).score
        first += style.pictures
    return pixels, gold


def _has(path: Path, prompts: list[str]) -> bool:
    """Whether a file has the pictures of these prompts."""
    if not path.exists():
        return False
    with np.load(path) as saved:
        return "prompts" in saved and saved["prompts"].tolist() == prompts


def _write(path: Path, prompts: list[str], pixels: NDArray[np.uint8], gold: NDArray[np.float32]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, prompts=np.array(prompts), pixels=pixels, gold=gold)
    temporary.replace(path)
