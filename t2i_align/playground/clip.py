"""Training tiny_clip: an `open_clip` CLIP of 1.8 M parameters that learns the playground's pictures and captions.

Symmetric InfoNCE (CLIP, arXiv 2103.00020) in which every picture also meets captions that differ from its own by one
false fact (hard negatives, as NegCLIP has them, arXiv 2210.01936). A caption that happens to be true of another picture
of the batch is no negative of it. Part of the pictures went through tiny-sd's autoencoder with disturbed latents, and
all get some noise, so that generated pictures are not foreign to the tower.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from open_clip.model import CLIP
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from t2i_align.config import Settings, TrainConfig
from t2i_align.data.images import to_uint8
from t2i_align.keys import generator, key
from t2i_align.playground.data import ScenePool, pick_rows
from t2i_align.playground.measure import false_caption
from t2i_align.playground.tokenizer import build_tokenizer
from t2i_align.progress import Progress
from t2i_align.runs import write_text
from t2i_align.scorer_training.method import disturb
from t2i_align.training import Ctx, Method, State, Term, fit

CONTEXT = 16  # tokens; the longest caption of the grammar takes 14
WEIGHTS = "open_clip_model.safetensors"  # the name that open_clip looks for first


class CLIPRecipe(Settings):
    """Everything that decides the shipped tiny_clip."""

    vae: str = Field("", description="sha256 of the autoencoder's weights; filled in by the command")
    scenes: int = Field(40_000, gt=0, description="rendered training scenes")
    decoded: float = Field(0.4, ge=0, le=1, description="share of them that went through the autoencoder")
    disturbance: float = Field(0.4, ge=0, description="largest standard deviation of noise on their latents")
    noise: float = Field(0.06, ge=0, description="largest standard deviation of noise on a picture in [0, 1]")
    batch: int = Field(96, gt=1)
    negatives: int = Field(2, ge=0, description="captions with one false fact per picture")
    width: int = Field(16, gt=0, description="of the ResNet's stem; a multiple of 2")
    train: TrainConfig = TrainConfig(
        steps=2400,
        learning_rate=1.5e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.05,
        precision="bf16",
        ema=0.998,
        checkpoint_every=100,
    )


def clip_config(width: int, vocabulary: int) -> dict[str, Any]:
    """The content of `open_clip_config.json`: a ResNet on 64x64 pictures, two layers of text transformer."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "quick_gelu": False,
            "vision_cfg": {"image_size": 64, "layers": [1, 2, 2, 1], "width": width, "head_width": 64},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocabulary,
                "width": 128,
                "heads": 4,
                "layers": 2,
                "pool_type": "eos",
                "eos_id": 1,
                "hf_tokenizer_name": "playground",  # for a `local-dir:` the tokenizer of that folder
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"},
    }


class ContrastiveTraining(Method):
    """Match pictures with their captions."""

    def __init__(self, model: CLIP, pool: ScenePool, recipe: CLIPRecipe) -> None:
        super().__init__()
        self.model, self.pool, self.recipe = model, pool, recipe
        self.captions = [scene.descriptions() for scene in pool.scenes]
        self.true = [frozenset(map(str, captions)) for captions in self.captions]
        self.tokens = Tokens()

    def collect(self, ctx: Ctx, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, 64, 64), token ids (B + negatives, CONTEXT), and which texts are true of which picture."""
        images = disturb(self.pool.images(rows) / 2 + 0.5, self.recipe.noise, ctx.generator("noise"))
        rng = random.Random(key(ctx.seed, "captions", ctx.step))
        said = [rng.choice(self.captions[row]) for row in rows.tolist()]
        false = [false_caption(caption, rng)[0] for _ in range(self.recipe.negatives) for caption in said]
        texts = [str(caption) for caption in said + false]
        true = torch.tensor([[text in self.true[row] for text in texts] for row in rows.tolist()])
        return normalise(images).to(ctx.device), self.tokens(texts).to(ctx.device), true.to(ctx.device)

    def losses(self, ctx: Ctx, batch: tuple[Tensor, Tensor, Tensor]) -> Iterator[Term]:
        images, tokens, true = batch
        image = self.model.encode_image(images, normalize=True).float()
        text = self.model.encode_text(tokens, normalize=True).float()
        logits = self.model.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, T)
        own = torch.eye(*true.shape, dtype=torch.bool, device=true.device)
        logits = logits.masked_fill(true & ~own, -torch.inf)
        targets = torch.arange(len(images), device=true.device)
        to_text = F.cross_entropy(logits, targets)
        to_image = F.cross_entropy(logits[:, : len(images)].T, targets)
        right = (logits.argmax(1) == targets).float().mean()
        yield Term((to_text + to_image) / 2, {"to_text": to_text, "to_image": to_image, "right": right})


class Tokens:
    """Texts -> token ids (B, CONTEXT), remembered by text."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        new = list(dict.fromkeys(text for text in texts if text not in self.known))
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
            self.known |= dict(zip(new, ids.input_ids, strict=True))
        return torch.stack([self.known[text] for text in texts])


def normalise(images: Tensor) -> Tensor:
    """The tower's own preprocessing of 64x64 pictures in [0, 1]."""
    return (images - 0.5) / 0.25


@torch.no_grad()
def decode_scenes(vae: AutoencoderKL, pool: ScenePool, scenes: int, disturbance: float, seed: int) -> None:
    """Replace the first `scenes` pictures of the pool by what the autoencoder makes of their disturbed latents."""
    with Progress(scenes, "decoding scenes") as progress:
        for first in range(0, scenes, 64):
            rows = slice(first, min(first + 64, scenes))
            rng = generator(seed, "disturbance", first)
            with torch.autocast("cpu", torch.bfloat16):
                z = vae.encode(pool.images(rows)).latent_dist.mean
                sd = disturbance * torch.rand(len(z), 1, 1, 1, generator=rng)
                pixels = vae.decode(z + sd * torch.randn(z.shape, generator=rng)).sample
            pool.pixels[rows] = to_uint8(pixels.float() / 2 + 0.5)
            progress.update(rows.stop)


def train_clip(recipe: CLIPRecipe, vae: AutoencoderKL, folder: Path, **options: Any) -> State:
    """Train by the recipe and write `folder/tiny-clip`, fp16, with the averaged weights (options: of `fit`)."""
    seed = recipe.train.seed
    torch.manual_seed(seed)
    config = clip_config(recipe.width, len(build_tokenizer()))
    model = CLIP(**config["model_cfg"])
    pool = ScenePool(recipe.scenes, seed)
    decode_scenes(vae, pool, int(recipe.decoded * len(pool)), recipe.disturbance, seed)
    method = ContrastiveTraining(model, pool, recipe)
    rows = partial(pick_rows, len(pool), recipe.batch, seed)
    state = fit(method, rows, recipe.train, folder, **options)
    with state.averaged():
        batches = (method.collect(Ctx(seed, -1 - n, torch.device("cpu")), rows(n))[0] for n in range(100))
        update_bn(batches, model.visual)  # batch norm's statistics belong to the averaged weights
        save_clip(model.eval(), config, folder / "tiny-clip")
    return state


def save_clip(model: CLIP, config: dict[str, Any], folder: Path) -> None:
    """Write a folder that open_clip opens as `local-dir:`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    write_text(folder / "open_clip_config.json", json.dumps(config, indent=1) + "\n")
    build_tokenizer().save_pretrained(folder)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights of a CLIP in fp16 under the name that open_clip looks for."""
    weights = {name: p.half() if p.is_floating_point() else p for name, p in model.state_dict().items()}
    save_file({name: p.contiguous() for name, p in weights.items()}, folder / WEIGHTS, {"format": "pt"})
