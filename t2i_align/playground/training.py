"""The playground's trainings as jobs: run folder in, model and `card.json` out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL

from t2i_align.config import Settings, load_config
from t2i_align.errors import T2IError
from t2i_align.pipelines import load_pipeline
from t2i_align.pipelines.loading import find_pipeline
from t2i_align.playground.clip import WEIGHTS, CLIPRecipe, train_clip
from t2i_align.playground.diffusion import DiffusionRecipe, train_diffusion
from t2i_align.playground.judged import GUIDANCE, PICTURES, STEPS, Judged, preference_samples
from t2i_align.playground.measure import MEASURING_SEED, measure_pipeline, measure_verifier, round_trip
from t2i_align.playground.pick import PickRecipe, train_pick
from t2i_align.playground.proxies import measure_captions, measure_proxy, mistakes
from t2i_align.playground.turbo import TurboRecipe, train_turbo
from t2i_align.playground.vae import VAERecipe, train_vae
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.tiny import TinyCLIP, TinyPick
from t2i_align.runs import environment, open_folder, read_jsonl, write_text
from t2i_align.training import State

T = TypeVar("T", bound=Settings)

DEFAULTS: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": GUIDANCE,
}  # of tiny-sd, written into its card
TURBO_DEFAULTS: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}
UNET = "diffusion_pytorch_model.safetensors"


class Job(NamedTuple):
    """What every training is told: run folder, changes to the recipe, when to stop, what to do with an older run."""

    out: Path
    config: Path | None = None
    overrides: Sequence[str] = ()
    minutes: float | None = None
    resume: bool = False
    overwrite: bool = False

    def recipe(self, kind: type[T], **digests: str) -> T:
        """The recipe with its changes, and with the digests of what it starts from."""
        return load_config(kind, self.config, self.overrides).model_copy(update=digests)

    def open(self, recipe: Settings) -> Path:
        """The run folder."""
        return open_folder(self.out, recipe, resume=self.resume, overwrite=self.overwrite)

    def options(self) -> dict[str, Any]:
        """What `fit` needs to know."""
        return {"minutes": self.minutes, "resume": self.resume}


def run_vae(job: Job, measure: int) -> None:
    """Train the autoencoder into `out/vae`, with `out/vae/card.json`, and measure it on so many scenes."""
    recipe = job.recipe(VAERecipe)
    folder = job.open(recipe)
    state = train_vae(recipe, folder, **job.options())
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)  # as saved: averaged and standardised
    metrics = {"verifier_after_round_trip": measure_round_trip(vae, measure)} if measure else {}
    _write_card(folder / "vae", folder, recipe, state, metrics=metrics)


def measure_round_trip(vae: AutoencoderKL, scenes: int) -> dict[str, dict[str, float | None]]:
    """The verifier's table on scenes that were encoded and decoded."""
    return measure_verifier(scenes, change=round_trip(vae.eval()))


def run_sd(job: Job, vae: Path, measure: int) -> None:
    """Train text encoder and UNet on the latents of `vae` into `out/tiny-sd`, measure it, write its card and grids."""
    if not (vae / "config.json").is_file():
        raise T2IError(
            f"Expected {vae} to be the folder of a trained autoencoder; make one with `playground train vae`."
        )
    recipe = job.recipe(DiffusionRecipe, vae=_digest(vae / UNET))
    folder = job.open(recipe)
    autoencoder = AutoencoderKL.from_pretrained(vae, dtype=torch.float32)
    state = train_diffusion(recipe, autoencoder, folder, **job.options())
    made = folder / "tiny-sd"
    metrics: dict[str, Any] = {}
    if measure:
        table = measure_pipeline(load_pipeline(made), measure, grid=folder, **DEFAULTS)
        metrics = {"gold": table, "prompts_per_split": measure}
    card = vae / "card.json"
    if card.is_file():
        metrics["vae"] = json.loads(card.read_text(encoding="utf-8"))
        (made / "vae" / "card.json").write_text(card.read_text(encoding="utf-8"), encoding="utf-8")
    _write_card(made, folder, recipe, state, defaults=DEFAULTS, prompts="playground", metrics=metrics)


def run_clip(job: Job, vae: Path, measure: int) -> None:
    """Train tiny_clip into `out/tiny-clip`, measure it on drawn scenes and on tiny-sd's pictures, write its card."""
    recipe = job.recipe(CLIPRecipe, vae=_digest(vae / UNET))
    folder = job.open(recipe)
    state = train_clip(recipe, AutoencoderKL.from_pretrained(vae, dtype=torch.float32), folder, **job.options())
    made = folder / "tiny-clip"
    scorer = TinyCLIP(folder=made)
    metrics = _measure_proxy(scorer, folder, measure) | {"captions": measure_captions(scorer)} if measure else {}
    _write_card(made, folder, recipe, state, metrics=metrics)


def run_pick(job: Job, clip: Path, measure: int) -> None:
    """Draw tiny-sd's pictures, train tiny_pick on them into `out/tiny-pick`, measure it, write its card.

    A run that `minutes` stops has no model yet: siblings are trained on the finished CLIP.
    """
    teacher = find_pipeline("tiny-sd")
    recipe = job.recipe(PickRecipe, clip=_digest(clip / WEIGHTS), teacher=_digest(teacher / "unet" / UNET))
    folder = job.open(recipe)
    samples = preference_samples(recipe.prompts, recipe.train.seed, "train", folder / "samples")
    state = train_pick(recipe, clip, samples, folder, **job.options())
    if state.step < recipe.train.steps:
        return
    made = folder / "tiny-pick"
    metrics = _measure_proxy(TinyPick(made), folder, measure) if measure else {}
    _write_card(made, folder, recipe, state, metrics=metrics)


def run_turbo(job: Job, measure: int) -> None:
    """Distil tiny-sd into `out/tiny-turbo`, measure it, write its card and grids."""
    teacher = find_pipeline("tiny-sd")
    recipe = job.recipe(TurboRecipe, teacher=_digest(teacher / "unet" / UNET))
    folder = job.open(recipe)
    state = train_turbo(recipe, load_pipeline(teacher), folder, **job.options())
    made = folder / "tiny-turbo"
    metrics: dict[str, Any] = {}
    if measure:
        table = measure_pipeline(load_pipeline(made), measure, grid=folder, **TURBO_DEFAULTS)
        metrics = {"gold": table, "prompts_per_split": measure}
    _write_card(made, folder, recipe, state, defaults=TURBO_DEFAULTS, prompts="playground", metrics=metrics)


def heldout_samples(folder: Path, prompts: int) -> Judged:
    """tiny-sd's pictures of held-out prompts, judged by the verifier; drawn where the folder does not have them."""
    return preference_samples(prompts, MEASURING_SEED, "heldout", folder)


def _measure_proxy(scorer: Scorer, folder: Path, prompts: int) -> dict[str, Any]:
    samples = heldout_samples(folder / "judged", prompts)
    return {
        "prompts": prompts,
        "pictures_per_prompt": PICTURES,
        "agreement_with_gold": measure_proxy(scorer, samples),
        "mistakes": mistakes(scorer, samples, sheet=folder / "mistakes.png"),
    }


def _digest(weights: Path) -> str:
    """SHA-256 of a weights file. Raises T2IError where there is none."""
    if not weights.is_file():
        raise T2IError(f"Expected the weights {weights}; train that part first with `t2i-align playground train`.")
    return sha256(weights.read_bytes()).hexdigest()


def _write_card(model: Path, run: Path, recipe: Settings, state: State, **more: Any) -> None:
    """What a model is and how it came to be."""
    rows = read_jsonl(run / "metrics.jsonl")
    last = rows[-1] if rows else {}
    curve = [row for index, row in enumerate(rows) if index % max(1, len(rows) // 20) == 0]
    card = {
        "steps": state.step,
        "minutes": round(state.seconds / 60, 1),
        "losses": last,
        "curve": [{name: row[name] for name in ("step", "loss")} for row in curve],
        "recipe": recipe.model_dump(mode="json"),
        "commit": _commit(),
        "environment": environment(),
        "license": "Apache-2.0",
        **more,
    }
    write_text(model / "card.json", json.dumps(card, indent=1) + "\n")


def _commit() -> str:
    """The commit of the checkout the code runs from, marked if files were changed since; or `unknown`."""
    try:
        words = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
