"""Training tiny-sd: a `StableDiffusionPipeline` of 12 M parameters, its text encoder and UNet learnt together.

v-prediction (Salimans & Ho, arXiv 2202.00512, appendix D: v = alpha eps - sigma x0) on standardised 8x8x8 latents
with Stable Diffusion's scaled-linear betas. With epsilon prediction and min-SNR weights the steps at high noise,
where a picture's composition is decided, carry almost no weight on x0; the plain v loss weighs x0 by SNR + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2i_align.config import Settings, TrainConfig
from t2i_align.playground.data import ScenePool, pick_rows
from t2i_align.playground.tokenizer import CONTEXT, build_tokenizer
from t2i_align.playground.vae import encode
from t2i_align.training import Ctx, Method, State, Term, fit


class DiffusionRecipe(Settings):
    """Everything that decides the shipped tiny-sd."""

    vae: str = Field("", description="sha256 of the autoencoder's weights; filled in by the command")
    scenes: int = Field(60_000, gt=0, description="rendered training scenes")
    batch: int = Field(64, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty captions, for guidance")
    channels: tuple[int, ...] = Field((128, 192), description="UNet widths at 8x8, 4x4, ...")
    heads: int = Field(4, gt=0, description="attention heads of the UNet")
    train: TrainConfig = TrainConfig(
        steps=12_000,
        learning_rate=8e-4,
        schedule="cosine",
        decay=0.6,
        warmup=200,
        precision="bf16",
        ema=0.999,
        checkpoint_every=250,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: 3 layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(recipe: DiffusionRecipe) -> UNet2DConditionModel:
    """The untrained denoiser on (8, 8, 8) latents."""
    levels = len(recipe.channels)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D"] * levels,
        up_block_types=["CrossAttnUpBlock2D"] * levels,
        cross_attention_dim=128,
        attention_head_dim=recipe.heads,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # runs of few steps start at the noise of training, too (arXiv 2305.08891)
        prediction_type="v_prediction",
    )


class DiffusionTraining(Method):
    """Predict v from a noised latent, its timestep and its caption."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        latents: Tensor,
        captions: list[list[str]],
        caption_dropout: float,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, build_scheduler()
        self.latents, self.caption_dropout = latents, caption_dropout
        self.tokens = _tokenise(tokenizer, captions)  # (scenes, descriptions, CONTEXT)
        self.nothing = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def collect(self, ctx: Ctx, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng, size = ctx.generator("batch"), len(rows)
        x0 = self.latents[rows]
        eps = torch.randn(x0.shape, generator=rng)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=rng)
        said = torch.randint(self.tokens.shape[1], (size,), generator=rng)
        dropped = torch.rand(size, generator=rng) < self.caption_dropout
        tokens = torch.where(dropped[:, None], self.nothing, self.tokens[rows, said])
        return x0, eps, t, tokens

    def losses(self, ctx: Ctx, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Iterator[Term]:
        x0, eps, t, tokens = (part.to(ctx.device) for part in batch)
        x_t = self.scheduler.add_noise(x0, eps, t)
        v = self.unet(x_t, t, self.text_encoder(tokens).last_hidden_state).sample.float()
        error = (v - self.scheduler.get_velocity(x0, eps, t)).square().mean((1, 2, 3))  # (B,)
        noisy = t >= 500
        yield Term(error.mean(), {"error_noisy": error[noisy].mean(), "error_clear": error[~noisy].mean()})


def _tokenise(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> Tensor:
    """Token ids of every scene's descriptions, repeated to equal number: (scenes, descriptions, CONTEXT)."""
    known: dict[str, Tensor] = {}
    for text in dict.fromkeys(text for texts in captions for text in texts):
        known[text] = tokenizer(text, padding="max_length", return_tensors="pt").input_ids[0]
    most = max(len(texts) for texts in captions)
    return torch.stack([torch.stack([known[texts[i % len(texts)]] for i in range(most)]) for texts in captions])


def assemble(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The stock pipeline around the trained parts."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_diffusion(recipe: DiffusionRecipe, vae: AutoencoderKL, folder: Path, **options: Any) -> State:
    """Train by the recipe and write `folder/tiny-sd`, fp16, with the averaged weights (options: of `fit`)."""
    seed = recipe.train.seed
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    unet, text_encoder = build_unet(recipe), build_text_encoder(tokenizer)
    unet.set_attn_processor(AttnProcessor())  # plain matmuls: on a CPU a third faster here than fused attention
    pool = ScenePool(recipe.scenes, seed)
    latents = encode(vae, pool, len(pool))
    captions = [[str(caption) for caption in scene.descriptions()] for scene in pool.scenes]
    method = DiffusionTraining(unet, text_encoder, tokenizer, latents, captions, recipe.caption_dropout)
    state = fit(method, lambda step: pick_rows(len(pool), recipe.batch, seed, step), recipe.train, folder, **options)
    with state.averaged():
        pipe = assemble(vae, unet, text_encoder, tokenizer)
        for network in (vae, unet, text_encoder):
            network.half()
        pipe.save_pretrained(folder / "tiny-sd", safe_serialization=True)
    return state
