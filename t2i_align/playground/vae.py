"""Training the playground's autoencoder: f8 `AutoencoderKL`, 8 latent channels, about 1 M parameters.

Loss: L1 + 2 MSE + a small KL (nats per latent dimension). After training each latent channel is brought to mean 0
and standard deviation 1 over the world by folding the affine map into the two 1x1 convolutions around the latent, so
that one scaling factor, 1.0, fits all channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor

from t2i_align.config import Settings, TrainConfig
from t2i_align.playground.data import ScenePool, pick_rows
from t2i_align.training import Ctx, Method, State, Term, fit


class VAERecipe(Settings):
    """Everything that decides the shipped autoencoder."""

    scenes: int = Field(20_000, gt=0, description="rendered training scenes")
    batch: int = Field(32, gt=0)
    kl: float = Field(3e-4, ge=0, description="weight of the KL in nats per latent dimension")
    train: TrainConfig = TrainConfig(
        steps=4500, learning_rate=2e-3, schedule="cosine", warmup=100, weight_decay=0.0, precision="bf16", ema=0.998
    )


def build_vae() -> AutoencoderKL:
    """The untrained network: (3, 64, 64) <-> (8, 8, 8)."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 64, 64],
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


class VAETraining(Method):
    """Reconstruct scenes through a sampled latent."""

    def __init__(self, vae: AutoencoderKL, pool: ScenePool, kl: float) -> None:
        super().__init__()
        self.vae, self.pool, self.kl = vae, pool, kl

    def collect(self, ctx: Ctx, rows: Tensor) -> Tensor:
        return self.pool.images(rows).to(ctx.device)

    def losses(self, ctx: Ctx, batch: Tensor) -> Iterator[Term]:
        posterior = self.vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=ctx.generator("latent")).to(ctx.device)
        error = self.vae.decode(posterior.mean + posterior.std * noise).sample.float() - batch
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        l1, mse = error.abs().mean(), error.square().mean()
        yield Term(l1 + 2 * mse + self.kl * kl, {"l1": l1, "mse": mse, "kl": kl})


@torch.no_grad()
def standardise(vae: AutoencoderKL, pool: ScenePool, scenes: int = 4096) -> None:
    """Fold per-channel mean and standard deviation of the latents into `quant_conv` and `post_quant_conv`."""
    z = encode(vae, pool, scenes)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / std
    inner.bias[channels:] -= 2 * std.log()  # the log-variances of the same, rescaled, channels
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, pool: ScenePool, scenes: int) -> Tensor:
    """Latent means of the first `scenes` scenes of the pool, or of all: (scenes, 8, 8, 8), fp32."""
    means, scenes = [], min(scenes, len(pool))
    for first in range(0, scenes, 64):
        with torch.autocast("cpu", torch.bfloat16):
            means.append(vae.encode(pool.images(slice(first, min(first + 64, scenes)))).latent_dist.mean.float())
    return torch.cat(means)


def train_vae(recipe: VAERecipe, folder: Path, **options: Any) -> State:
    """Train by the recipe, standardise, and write `folder/vae` (options: `resume`, `minutes` of `fit`)."""
    torch.manual_seed(recipe.train.seed)
    vae = build_vae()
    pool = ScenePool(recipe.scenes, recipe.train.seed)
    method = VAETraining(vae, pool, recipe.kl)
    state = fit(
        method,
        lambda step: pick_rows(len(pool), recipe.batch, recipe.train.seed, step),
        recipe.train,
        folder,
        **options,
    )
    with state.averaged():
        standardise(vae, pool)
        vae.save_pretrained(folder / "vae")
    return state
