"""Training tiny_pick: tiny_clip fine-tuned on noisy preferences between tiny-sd's pictures.

Bradley-Terry as in PickScore (arXiv 2305.01569): P(a over b) = sigmoid(s_a - s_b), s = exp(logit_scale) cos. Of two
pictures of one prompt the verifier prefers the one with more facts right; a fifth of the labels is turned round, so
that the model is wrong in places, as models of human preferences are. Three siblings on the frozen tower, each a
weighting of the dimensions of cos learnt on its own bootstrap sample of the prompts, tell how sure it is.

The training is that of any scorer (`t2i_align/scorer_training`); `configs/scorer/tiny_pick.yaml` and
`tiny_pick_siblings.yaml` are this recipe as two runs of `t2i-align train`. Here the result is written in fp16.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from t2i_align.config import Settings, TrainConfig
from t2i_align.playground.clip import save_weights
from t2i_align.playground.data import pick_rows
from t2i_align.playground.judged import Judged, to_examples
from t2i_align.rewards.clip import CLIP
from t2i_align.rewards.heads import Cosine
from t2i_align.rewards.tiny import SIBLINGS
from t2i_align.rewards.tower import Tower
from t2i_align.scorer_training.blocks import ScorerBlock
from t2i_align.scorer_training.data import Examples, bootstrap
from t2i_align.scorer_training.method import ScorerTraining
from t2i_align.scorer_training.model import Model
from t2i_align.training import State, fit


class PickRecipe(Settings):
    """Everything that decides the shipped tiny_pick."""

    clip: str = Field("", description="sha256 of tiny_clip's weights; filled in by the command")
    teacher: str = Field("", description="sha256 of tiny-sd's UNet weights; filled in by the command")
    prompts: int = Field(640, gt=0, description="captions of the train split, six pictures each")
    label_noise: float = Field(0.2, ge=0, lt=0.5, description="share of labels turned round")
    noise: float = Field(0.04, ge=0, description="largest standard deviation of noise on a picture in [0, 1]")
    batch: int = Field(16, gt=0, description="prompts per update")
    scale: float = Field(8.0, gt=0, description="first exp(logit_scale): log-odds of preferences, not of retrieval")
    siblings: int = Field(3, gt=1, description="bootstrapped heads")
    train: TrainConfig = TrainConfig(
        steps=120,
        learning_rate=5e-5,
        schedule="cosine",
        warmup=10,
        weight_decay=0.05,
        precision="bf16",
        ema=0.98,
        checkpoint_every=50,
    )
    train_siblings: TrainConfig = TrainConfig(
        steps=60, learning_rate=0.05, schedule="cosine", weight_decay=0.0, checkpoint_every=30
    )


def train_pick(recipe: PickRecipe, clip: Path, samples: Judged, folder: Path, **options: Any) -> State:
    """Fine-tune the CLIP in `clip`, train the siblings, write `folder/tiny-pick`, fp16 (options: of `fit`).

    Where `minutes` stop it, the siblings, who see by the finished CLIP, have to wait.
    """
    seed, examples = recipe.train.seed, to_examples(samples)
    tower = CLIP(f"local-dir:{clip}").tower
    width = tower.text_features([""]).shape[1]
    model = Model(tower, Cosine(width, recipe.scale), ScorerBlock(train="full"))
    method = ScorerTraining(model, examples, ties="drop", noise=recipe.noise, label_noise=recipe.label_noise, seed=seed)
    rows = partial(pick_rows, len(examples), recipe.batch, seed)
    state = fit(method, lambda step: rows(step).tolist(), recipe.train, folder, **options)
    if state.step < recipe.train.steps:
        return state
    made = folder / "tiny-pick"
    with state.averaged():
        model.save(folder / "scorer", "tiny_pick", {"use": "tiny_clip", "options": {}}, "preferences")
        shutil.copytree(clip, made, ignore=shutil.ignore_patterns("card.json"), dirs_exist_ok=True)
        save_weights(model.network, made)
    tuned = CLIP(f"local-dir:{folder / 'scorer'}").tower
    resume = options.get("resume", False)
    heads = [train_sibling(recipe, tuned, examples, n, folder / "siblings", resume) for n in range(recipe.siblings)]
    save_file({"heads": torch.stack(heads).half()}, made / SIBLINGS)
    return state


def train_sibling(
    recipe: PickRecipe, tower: Tower, examples: Examples, number: int, folder: Path, resume: bool
) -> Tensor:
    """The weights (D,) that sibling `number` gives the dimensions of the cosine; its whole sample is one batch."""
    seed, width = recipe.train.seed, tower.text_features([""]).shape[1]
    model = Model(tower, Cosine(width, tower.scale, weighted=True), ScorerBlock(train="head", head="weighted"))
    method = ScorerTraining(model, examples, ties="drop", label_noise=recipe.label_noise, seed=seed)
    rows = bootstrap(examples, seed, number)
    fit(method, lambda step: rows, recipe.train_siblings, folder / str(number), resume=resume)
    return model.head.get_parameter("weight").detach()
