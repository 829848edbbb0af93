"""Training tiny_pick: tiny_clip fine-tuned on noisy preferences between tiny-sd's pictures.

Bradley-Terry as in PickScore (arXiv 2305.01569): P(a over b) = sigmoid(s_a - s_b), s = exp(logit_scale) cos. Of two
pictures of one prompt the verifier prefers the one with more facts right; a fifth of the labels is turned round, so
that the model is wrong in places, as models of human preferences are. Three siblings on the frozen tower, each a
weighting of the dimensions of cos learnt on its own bootstrap sample of the prompts, tell how sure it is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.config import Settings, TrainConfig
from t2i_align.keys import generator
from t2i_align.playground.clip import Tokens, disturb, normalise, save_weights
from t2i_align.playground.data import pick_rows
from t2i_align.playground.judged import Judged, Style
from t2i_align.rewards.tiny import SIBLINGS
from t2i_align.training import Ctx, Method, State, Term, fit

STYLES = (Style(12, 1.5, 2), Style(12, 3.0, 1), Style(8, 1.0, 3))  # pictures that differ in what is wrong with them


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


def noisy_labels(gold: Tensor, noise: float, seed: int) -> Tensor:
    """Preferences (P, K, K) in {-1, 0, 1}: +1 where picture i of a prompt is labelled better than j, 0 for ties.

    A share `noise` of the pairs is turned round: always the same pairs for a seed.
    """
    better = (gold[:, :, None] - gold[:, None, :]).sign()
    turned = torch.rand(better.shape, generator=generator(seed, "label noise")) < noise
    upper = torch.where(turned, -better, better).triu(1)
    return upper - upper.transpose(1, 2)


def bradley_terry(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood, summed over the pairs of each prompt, and how many pairs: both (..., P).

    Args:
        scores: (..., P, K).
        labels: (P, K, K) of `noisy_labels`.
    """
    margins = labels * (scores[..., :, None] - scores[..., None, :])
    counted = labels.triu(1) != 0
    return -(F.logsigmoid(margins) * counted).sum((-2, -1)), counted.sum((-2, -1))


class PreferenceTraining(Method):
    """Fine-tune the whole CLIP on pairs of pictures; batch norm keeps tiny_clip's statistics."""

    def __init__(self, model: CLIP, samples: Judged, recipe: PickRecipe) -> None:
        super().__init__()
        self.model, self.samples, self.noise = model, samples, recipe.noise
        self.labels = noisy_labels(torch.from_numpy(samples.gold), recipe.label_noise, recipe.train.seed)
        self.tokens = Tokens()

    def train(self, mode: bool = True) -> PreferenceTraining:
        super().train(mode)
        self.model.eval()
        return self

    def collect(self, ctx: Ctx, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B K, 3, 64, 64), token ids (B, context), labels (B, K, K)."""
        images = self.samples.images(rows).flatten(0, 1)
        images = normalise(disturb(images, self.noise, ctx.generator("noise")))
        tokens = self.tokens([self.samples.prompts[row] for row in rows.tolist()])
        return images.to(ctx.device), tokens.to(ctx.device), self.labels[rows].to(ctx.device)

    def losses(self, ctx: Ctx, batch: tuple[Tensor, Tensor, Tensor]) -> Iterator[Term]:
        images, tokens, labels = batch
        image = self.model.encode_image(images, normalize=True).float()
        text = self.model.encode_text(tokens, normalize=True).float()
        scores = self.model.logit_scale.exp() * torch.einsum("pkd,pd->pk", image.unflatten(0, labels.shape[:2]), text)
        loss, pairs = bradley_terry(scores, labels)
        margins = (labels * (scores[:, :, None] - scores[:, None, :]))[labels != 0]
        yield Term(loss.sum() / pairs.sum().clamp(min=1), {"agrees": (margins > 0).float().mean()})


class SiblingTraining(Method):
    """Learn the heads on frozen features, all prompts at once; each counts them as its bootstrap sample does."""

    def __init__(self, image: Tensor, text: Tensor, scale: float, labels: Tensor, recipe: PickRecipe) -> None:
        super().__init__()
        self.products, self.scale, self.labels = image * text[:, None], scale, labels  # (P, K, D)
        self.heads = nn.Parameter(torch.ones(recipe.siblings, text.shape[-1]))
        prompts = len(labels)
        drawn = [
            torch.randint(prompts, (prompts,), generator=generator(recipe.train.seed, "bootstrap", n))
            for n in range(recipe.siblings)
        ]
        self.counts = torch.stack([rows.bincount(minlength=prompts) for rows in drawn])  # (siblings, P)

    def losses(self, ctx: Ctx, batch: None) -> Iterator[Term]:
        scores = self.scale * torch.einsum("pkd,nd->npk", self.products, self.heads)
        loss, pairs = bradley_terry(scores, self.labels)
        yield Term((self.counts * loss).sum() / (self.counts * pairs).sum(), {"spread": scores.std(0).mean()})


@torch.no_grad()
def features(model: CLIP, samples: Judged) -> tuple[Tensor, Tensor]:
    """Unit vectors of all pictures (P, K, D) and prompts (P, D)."""
    image = [
        model.encode_image(normalise(samples.images(slice(first, first + 16)).flatten(0, 1)), normalize=True)
        for first in range(0, len(samples.prompts), 16)
    ]
    text = model.encode_text(Tokens()(samples.prompts), normalize=True)
    return torch.cat(image).unflatten(0, samples.gold.shape), text


def train_pick(recipe: PickRecipe, clip: Path, samples: Judged, folder: Path, **options: Any) -> State:
    """Fine-tune the CLIP in `clip`, train the siblings, write `folder/tiny-pick`, fp16 (options: of `fit`)."""
    seed = recipe.train.seed
    model = open_clip.create_model(f"local-dir:{clip}")
    nn.init.constant_(model.logit_scale, math.log(recipe.scale))
    method = PreferenceTraining(model, samples, recipe)
    rows = partial(pick_rows, len(samples.prompts), recipe.batch, seed)
    state = fit(method, rows, recipe.train, folder, **options)
    with state.averaged():
        image, text = features(model, samples)
        heads = SiblingTraining(image, text, float(model.logit_scale.exp().detach()), method.labels, recipe)
        fit(heads, lambda step: None, recipe.train_siblings, folder / "siblings", resume=options.get("resume", False))
        made = folder / "tiny-pick"
        shutil.copytree(clip, made, ignore=shutil.ignore_patterns("card.json"), dirs_exist_ok=True)
        save_weights(model, made)
        save_file({"heads": heads.heads.detach().half()}, made / SIBLINGS)
    return state
