"""The playground's trainings as jobs: run folder in, model and `card.json` out."""

from __future__ import annotations

import json
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from t2i_align.config import Settings, load_config
from t2i_align.errors import T2IError
from t2i_align.pipelines import load_pipeline
from t2i_align.playground.diffusion import DiffusionRecipe, train_diffusion
from t2i_align.playground.measure import measure_pipeline, measure_verifier, round_trip
from t2i_align.playground.vae import VAERecipe, train_vae
from t2i_align.runs import environment, open_folder, read_jsonl, write_text
from t2i_align.train import State

DEFAULTS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 1.5}  # of tiny-sd, written into its card


def run_vae(
    out: Path,
    config: Path | None,
    overrides: list[str],
    *,
    minutes: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train the autoencoder into `out/vae`, with `out/vae/card.json`."""
    recipe = load_config(VAERecipe, config, overrides)
    folder = open_folder(out, recipe, resume=resume, overwrite=overwrite)
    state = train_vae(recipe, folder, minutes=minutes, resume=resume)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)  # as saved: averaged and standardised
    _write_card(folder / "vae", folder, recipe, state, metrics={"verifier_after_round_trip": measure_round_trip(vae)})


def measure_round_trip(vae: AutoencoderKL, scenes: int = 400) -> dict[str, dict[str, float | None]]:
    """The verifier's table on scenes that were encoded and decoded."""
    return measure_verifier(scenes, change=round_trip(vae.eval()))


def run_sd(
    out: Path,
    config: Path | None,
    overrides: list[str],
    vae: Path,
    measure: int,
    *,
    minutes: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train text encoder and UNet on the latents of `vae` into `out/tiny-sd`, measure it, write its card and grids."""
    recipe = load_config(DiffusionRecipe, config, overrides)
    if not (vae / "config.json").is_file():
        raise T2IError(
            f"Expected {vae} to be the folder of a trained autoencoder; make one with `playground train vae`."
        )
    weights = vae / "diffusion_pytorch_model.safetensors"
    recipe = recipe.model_copy(update={"vae": sha256(weights.read_bytes()).hexdigest()})
    folder = open_folder(out, recipe, resume=resume, overwrite=overwrite)
    autoencoder = AutoencoderKL.from_pretrained(vae, dtype=torch.float32)
    state = train_diffusion(recipe, autoencoder, folder, minutes=minutes, resume=resume)
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
