"""A preference set that is drawn: scenes of the playground, ranked by the verifier, which is exact on them."""

from __future__ import annotations

from pathlib import Path

from t2i_align.data.preferences import Preferences, Ranking
from t2i_align.playground.world import sample_scenes
from t2i_align.rewards import load_reward

IMAGES = 4  # of a prompt: its own scene, and three that no other prompt ranks


def draw_preferences(folder: Path, prompts: int, seed: int = 0) -> Preferences:
    """Draw held-out scenes into a folder; a prompt ranks its own and three others by the share of facts that hold."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = list(sample_scenes(prompts * IMAGES, seed, "heldout"))
    pictures = [scene.render() for scene in scenes]
    files = [folder / f"{number:05d}.png" for number in range(len(scenes))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    gold = load_reward("verifier")
    rankings = []
    for first in range(0, len(scenes), IMAGES):
        prompt, rows = str(scenes[first].caption), range(first, first + IMAGES)
        merits = gold.scores([pictures[row] for row in rows], prompt).total.tolist()
        rankings.append(Ranking(prompt, tuple(str(files[row]) for row in rows), tuple(merits)))
    return Preferences(tuple(rankings))
