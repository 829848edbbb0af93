"""A preference set that is drawn: scenes of the playground, ranked by the verifier, which is exact on them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from t2i_align.data.preferences import Preferences, Ranking
from t2i_align.playground.world import Split, sample_scenes
from t2i_align.rewards import load_reward

IMAGES = 4  # of a prompt: its own scene, and three that no other prompt ranks


def draw_rankings(
    prompts: int, seed: int = 0, split: Split = "heldout", images: int = IMAGES
) -> list[tuple[str, list[Image.Image], list[float]]]:
    """Prompts, each with its own and other scenes, and the share of the prompt's facts that hold in each."""
    scenes = list(sample_scenes(prompts * images, seed, split))
    gold = load_reward("verifier")
    found = []
    for first in range(0, len(scenes), images):
        prompt, pictures = str(scenes[first].caption), [scene.render() for scene in scenes[first : first + images]]
        found.append((prompt, pictures, gold.scores(pictures, prompt).total.tolist()))
    return found


def draw_preferences(folder: Path, prompts: int, seed: int = 0) -> Preferences:
    """Draw held-out scenes into a folder; a prompt ranks its own and three others by the share of facts that hold."""
    folder.mkdir(parents=True, exist_ok=True)
    rankings = []
    for number, (prompt, pictures, merits) in enumerate(draw_rankings(prompts, seed)):
        files = [folder / f"{number * IMAGES + n:05d}.png" for n in range(len(pictures))]
        for picture, file in zip(pictures, files, strict=True):
            picture.save(file)
        rankings.append(Ranking(prompt, tuple(map(str, files)), tuple(merits)))
    return Preferences(tuple(rankings))
