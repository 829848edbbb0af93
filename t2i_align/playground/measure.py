"""What the playground's parts can do, in numbers: the verifier on known scenes, a pipeline by the verifier."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from t2i_align.data.images import contact_sheet
from t2i_align.generation import generate_samples
from t2i_align.keys import key
from t2i_align.playground.grammar import BACKGROUNDS, COLOURS, KINDS, NUMBERS, RELATIONS, SHAPES, Caption, Fact
from t2i_align.playground.world import SPLITS, sample_scenes
from t2i_align.progress import Progress
from t2i_align.prompts import Prompts
from t2i_align.rewards.verifier import report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MEASURING_SEED = 20_000  # scenes and captions of measurements, apart from the training seeds


def measure_pipeline(
    pipe: DiffusionPipeline,
    prompts: int = 500,
    seed: int = MEASURING_SEED,
    grid: Path | None = None,
    **call: Any,
) -> list[dict[str, Any]]:
    """Mean gold reward by split and kind of prompt, one image a prompt.

    Args:
        pipe: a text-to-image pipeline.
        prompts: prompts per split, in the world's own mix of kinds.
        seed: of prompts and images.
        grid: folder for a picture grid per split.
        call: keywords of the pipeline's `__call__`.

    Returns:
        rows with `split`, `kind`, `prompts`, `gold` (mean fraction of facts), `all_facts` (share of perfect images)
        and the share of facts that hold by sort (`object`, `count`, `relation`, `background`).
    """
    rows = []
    for split in SPLITS:
        captions = [scene.caption for scene in sample_scenes(prompts, seed, split)]
        table = Prompts(tuple(str(caption) for caption in captions))
        jobs = [(row, 0) for row in range(len(table))]
        reports, shown = [], []
        with Progress(prompts, f"measuring on {split} prompts") as progress:
            for sample in generate_samples(pipe, table, jobs, seed=seed, batch_size=50, **call):
                reports.append(report(np.asarray(sample.image), sample.prompt))
                shown.append(sample.image)
                progress.advance()
        if grid is not None:
            contact_sheet(shown[:48], 12, zoom=2).save(grid / f"{split}.png")
        for kind in (*KINDS, "all"):
            mine = [r for r, caption in zip(reports, captions, strict=True) if kind in (caption.kind, "all")]
            if mine:
                rows.append({"split": split, "kind": kind, "prompts": len(mine)} | _rates(mine))
    return rows


def _rates(reports: list[Any]) -> dict[str, float | None]:
    rates: dict[str, float | None] = {
        "gold": fmean(r.score for r in reports),
        "all_facts": fmean(r.score == 1 for r in reports),
    }
    for sort in ("object", "count", "relation", "background"):
        checks = [holds for r in reports for fact, holds in r.checks if fact.kind == sort]
        rates[sort] = fmean(checks) if checks else None
    return rates


def measure_verifier(
    scenes: int = 5000,
    seed: int = MEASURING_SEED,
    change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
) -> dict[str, dict[str, float | None]]:
    """The verifier's confusion table on rendered scenes, half of each split.

    For each sort of fact: `right`, the share of true facts it finds to hold, and `false_accept`, the share of facts
    that were changed into false ones and still found to hold. `all` sums them up.

    Args:
        scenes: how many.
        seed: of the scenes.
        change: applied to each picture (noise, a round trip through an autoencoder).
    """
    right: dict[str, list[bool]] = {}
    accepted: dict[str, list[bool]] = {}
    with Progress(scenes, "measuring the verifier") as progress:
        for split in SPLITS:
            number = (scenes + (split == "train")) // 2
            for index, scene in enumerate(sample_scenes(number, seed, split)):
                pixels = np.asarray(scene.render())
                pixels = pixels if change is None else change(pixels)
                for fact, holds in report(pixels, str(scene.caption)).checks:
                    right.setdefault(fact.kind, []).append(holds)
                false, changed = false_caption(scene.caption, random.Random(key(seed, split, index)))
                wrong = [holds for fact, holds in report(pixels, str(false)).checks if fact in changed]
                accepted.setdefault(changed[0].kind, []).append(any(wrong))
                progress.advance()
    table: dict[str, dict[str, float | None]] = {}
    for sort, found in right.items():
        share = fmean(accepted[sort]) if sort in accepted else None
        table[sort] = {"right": fmean(found), "false_accept": share, "facts": len(found)}
    every = [holds for values in right.values() for holds in values]
    wrong = [holds for values in accepted.values() for holds in values]
    table["all"] = {"right": fmean(every), "false_accept": fmean(wrong), "facts": len(every)}
    return table


def false_caption(caption: Caption, rng: random.Random) -> tuple[Caption, list[Fact]]:
    """The caption with one thing said of it changed, and the facts of the new one that are false of its scene."""
    choices = ["colour", "shape"]
    choices += ["number"] if caption.kind == "group" else []
    choices += ["relation"] if caption.relation else []
    choices += ["background"] if caption.background else []
    what = rng.choice(choices)
    if what in ("colour", "shape"):
        at = rng.randrange(len(caption.things))
        options = COLOURS if what == "colour" else SHAPES
        others = [
            thing for value in options if (thing := caption.things[at]._replace(**{what: value})) not in caption.things
        ]
        things = list(caption.things)
        things[at] = rng.choice(others)
        false = replace(caption, things=tuple(things))
    elif what == "number":
        false = replace(caption, number=rng.choice([n for n in NUMBERS if n != caption.number]))
    elif what == "relation":
        false = replace(caption, relation=rng.choice([r for r in RELATIONS if r != caption.relation]))
    else:
        false = replace(caption, background=rng.choice([b for b in BACKGROUNDS if b != caption.background]))
    kind = "object" if what in ("colour", "shape") else "count" if what == "number" else what
    return false, [fact for fact in false.facts() if fact not in caption.facts() and fact.kind == kind]


def noise(sd: float, seed: int = 0) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Add Gaussian noise of standard deviation `sd` in units of 1/255."""
    rng = np.random.default_rng(seed)

    def change(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.clip(pixels + rng.normal(0, sd, pixels.shape), 0, 255).round().astype(np.uint8)

    return change


def round_trip(
    vae: Any,
    before: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Encode and decode by an autoencoder, after `before`."""
    import torch

    from t2i_align.data.images import pil_to_tensor, to_uint8

    @torch.no_grad()
    def change(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        pixels = pixels if before is None else before(pixels)
        image = pil_to_tensor(Image.fromarray(pixels))[None] * 2 - 1
        return to_uint8(vae.decode(vae.encode(image).latent_dist.mean).sample / 2 + 0.5)[0]

    return change
