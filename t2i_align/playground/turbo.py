"""Training tiny-turbo: tiny-sd in one network call.

Knowledge distillation from noise-picture pairs (Luhman & Luhman, arXiv 2101.02388): the teacher draws from keyed noise
with guidance, by DPM-Solver++ (arXiv 2211.01095); a UNet of 4.2 M parameters, cut out of the teacher's, learns to
reach the same latents at once. Guidance is part of what it learns: it is called without.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from t2i_align.config import Settings, TrainConfig
from t2i_align.keys import generator
from t2i_align.playground.data import pick_rows
from t2i_align.playground.world import sample_scene
from t2i_align.progress import Progress
from t2i_align.training import Ctx, Method, State, Term, fit

CHUNK = 512  # pairs per file
LATENT = (8, 8, 8)


class TurboRecipe(Settings):
    """Everything that decides the shipped tiny-turbo."""

    teacher: str = Field("", description="sha256 of the teacher's UNet weights; filled in by the command")
    pairs: int = Field(16_384, gt=0, description="pictures the teacher draws")
    steps: int = Field(6, gt=0, description="of the teacher, two network calls each")
    guidance: float = Field(1.5, ge=1, description="of the teacher")
    batch: int = Field(64, gt=0)
    huber: float = Field(0.3, gt=0, description="error per latent at which the loss turns from square to linear")
    train: TrainConfig = TrainConfig(
        steps=1600,
        learning_rate=6e-4,
        schedule="cosine",
        warmup=100,
        precision="bf16",
        ema=0.998,
        checkpoint_every=100,
    )


def build_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The student: the teacher without its middle block and with half its inner level, started from its weights."""
    config = teacher.config
    outer, inner = config.block_out_channels
    student = UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=(outer, inner // 2),
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        mid_block_type=None,
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=(config.attention_head_dim, config.attention_head_dim // 2),  # heads: half of them inside
    )
    theirs = teacher.state_dict()
    weights = {name: _cut(name, theirs[name], new.shape, inner) for name, new in student.state_dict().items()}
    student.load_state_dict(weights)
    return student


def _cut(name: str, weight: Tensor, shape: torch.Size, inner: int) -> Tensor:
    """The part of a teacher's weight that the student's layer has room for: the first channels of every group."""
    kept = [torch.arange(size) for size in shape]
    layer = name.split(".")[-2]
    side = 0 if layer == "norm1" else 1
    joined = name.startswith("up_blocks.") and layer in ("norm1", "conv1", "conv_shortcut") and weight.ndim > side
    if joined and weight.shape[side] != shape[side]:
        # What comes from below, `inner` channels, lies beside a skip connection.
        skip = shape[side] - inner // 2
        kept[side] = torch.cat([torch.arange(inner // 2), inner + torch.arange(skip)])
    elif name.endswith((".ff.net.0.proj.weight", ".ff.net.0.proj.bias")):  # values and gates in one layer
        half = shape[0] // 2
        kept[0] = torch.cat([torch.arange(half), weight.shape[0] // 2 + torch.arange(half)])
    for side, rows in enumerate(kept):
        weight = weight.index_select(side, rows)
    return weight.clone()


class Pairs(NamedTuple):
    """What the teacher drew: captions, latents (N, 8, 8, 8), and the seed of the noise they came from."""

    captions: list[str]
    latents: Tensor
    seed: int


def pair_noise(seed: int, rows: list[int]) -> Tensor:
    """Standard normal noise of pairs: (B, 8, 8, 8)."""
    return torch.stack([torch.randn(LATENT, generator=generator(seed, "pair", row)) for row in rows])


def draw_pairs(teacher: StableDiffusionPipeline, recipe: TurboRecipe, folder: Path) -> Pairs:
    """Let the teacher draw; files of 512 pairs that the folder already holds are not drawn again."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = recipe.train.seed
    captions = [str(sample_scene(seed, row).caption) for row in range(recipe.pairs)]
    solver = DPMSolverMultistepScheduler.from_config(teacher.scheduler.config, algorithm_type="dpmsolver++")
    pipe = StableDiffusionPipeline(**{**teacher.components, "scheduler": solver}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    latents = []
    with Progress(recipe.pairs, "drawing pairs") as progress:
        for first in range(0, recipe.pairs, CHUNK):
            rows = list(range(first, min(first + CHUNK, recipe.pairs)))
            path = folder / f"{first:06d}.safetensors"
            if not path.exists():
                drawn = torch.cat([_draw(pipe, recipe, captions, rows[i : i + 64]) for i in range(0, len(rows), 64)])
                temporary = path.with_suffix(".tmp")
                save_file({"latents": drawn.half()}, temporary)
                temporary.replace(path)
            latents.append(load_file(path)["latents"].float())
            progress.update(first + len(rows))
    return Pairs(captions, torch.cat(latents), seed)


def _draw(pipe: StableDiffusionPipeline, recipe: TurboRecipe, captions: list[str], rows: list[int]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return pipe(
            [captions[row] for row in rows],
            latents=pair_noise(recipe.train.seed, rows),
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            output_type="latent",
        ).images.float()


class Distillation(Method):
    """From the noise of a pair to its latents, in the last timestep's v-prediction."""

    def __init__(
        self, unet: UNet2DConditionModel, teacher: StableDiffusionPipeline, pairs: Pairs, recipe: TurboRecipe
    ) -> None:
        super().__init__()
        self.unet, self.pairs, self.huber = unet, pairs, recipe.huber
        self.scheduler = one_step_scheduler(teacher.scheduler)
        self.text, self.rows = encode_captions(teacher, pairs.captions)

    def collect(self, ctx: Ctx, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, teacher's latents, text states of a batch."""
        noise, text = pair_noise(self.pairs.seed, rows.tolist()), self.text[self.rows[rows]]
        return noise.to(ctx.device), self.pairs.latents[rows].to(ctx.device), text.to(ctx.device)

    def losses(self, ctx: Ctx, batch: tuple[Tensor, Tensor, Tensor]) -> Iterator[Term]:
        noise, latents, text = batch
        t = self.scheduler.config.num_train_timesteps - 1
        alpha = self.scheduler.alphas_cumprod[t].sqrt()
        v = self.unet(noise, t, text).sample.float()
        error = alpha * noise - (1 - alpha**2).sqrt() * v - latents  # of x0
        loss = F.huber_loss(error, torch.zeros_like(error), delta=self.huber) / self.huber
        yield Term(loss, {"mse": error.square().mean()})


def one_step_scheduler(scheduler: DDIMScheduler) -> DDIMScheduler:
    """The teacher's noise schedule; its one step ends at x0 itself, not at the noise level of timestep 0."""
    return DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)


@torch.no_grad()
def encode_captions(teacher: StableDiffusionPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Text states of the different captions (U, context, D), and the row of each caption among them (N,)."""
    unique = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    texts = list(unique)
    tokens = teacher.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    states = [teacher.text_encoder(part).last_hidden_state for part in tokens.split(256)]
    return torch.cat(states), torch.tensor([unique[caption] for caption in captions])


def train_turbo(recipe: TurboRecipe, teacher: StableDiffusionPipeline, folder: Path, **options: Any) -> State:
    """Draw pairs, train by the recipe, write `folder/tiny-turbo`, fp16, weights averaged (options: of `fit`)."""
    seed = recipe.train.seed
    torch.manual_seed(seed)
    unet = build_student(teacher.unet)
    unet.set_attn_processor(AttnProcessor())  # plain matmuls: on a CPU faster here than fused attention
    pairs = draw_pairs(teacher, recipe, folder / "pairs")
    method = Distillation(unet, teacher, pairs, recipe)
    rows = partial(pick_rows, len(pairs.captions), recipe.batch, seed)
    state = fit(method, rows, recipe.train, folder, **options)
    with state.averaged():
        parts = {**teacher.components, "unet": unet.half(), "scheduler": method.scheduler}
        for network in (teacher.vae, teacher.text_encoder):
            network.half()
        made = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        made.save_pretrained(folder / "tiny-turbo", safe_serialization=True)
    return state
