"""What pipeline families at tiny random size are put together from: autoencoders, schedulers, ready embeddings."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import diffusers as d
import torch

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PROMPTS = ("a red circle", "two green stars on a dark blue sky", "a cat")
PIXELS = {"height": 32, "width": 32}
SMALL = {"height": 16, "width": 16}


class Family(NamedTuple):
    """A pipeline and how to call it.

    `embeds` makes ready embeddings (and other keywords) for B rows; None where the pipeline has real tokenizers and
    text encoders. `call`: keywords of every call. `steps`: of a run.
    `training`: class of the submodules that must be in training mode. `cannot`: promise -> why it cannot be kept.
    """

    pipe: d.DiffusionPipeline
    embeds: Callable[[int], dict] | None
    call: dict
    steps: int = 4
    training: str = ""
    cannot: Mapping[str, str] = MappingProxyType({})


def nothing(*names):
    """Components that are left out."""
    return dict.fromkeys(names)


RAW = "its output_type='pt' leaves images in [-1, 1] and beyond"
WITHOUT_TEXT = nothing("text_encoder", "tokenizer")


def kl(channels=4, **more):
    options = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 32,
        "force_upcast": False,
    }
    return d.AutoencoderKL(**(options | more))


def shifted(channels=4):
    return kl(channels, shift_factor=0.06, scaling_factor=1.5)


def dc():
    """Sana's deep-compression autoencoder."""
    blocks = ("ResBlock", "EfficientViTBlock")
    halves = {
        "block_types": blocks,
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    return d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in halves.items()},
    )


def qwen_vae():
    """The video autoencoder of Qwen-Image, which others use too."""
    return d.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def flow(**options):
    return d.FlowMatchEulerDiscreteScheduler(**options)


def randn(rows, *shape):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(7))


def ones(rows, length, dtype=torch.float32):
    return torch.ones(rows, length, dtype=dtype)


def both(width, length=7, **pooled):
    """Embeddings of both branches of guidance, (B, length, width); `pooled`: more names and their widths."""

    def embeds(rows):
        given = {"prompt_embeds": randn(rows, length, width)}
        given |= {name: randn(rows, size) for name, size in pooled.items()}
        return given | {f"negative_{name}": value - 1 for name, value in given.items()}

    return embeds


def positive(width, length=7, **pooled):
    """The same for pipelines that take no negative prompt."""
    return lambda rows: {k: v for k, v in both(width, length, **pooled)(rows).items() if not k.startswith("negative_")}


def masked(width, dtype=torch.float32, mask="prompt_attention_mask"):
    """The same with attention masks."""
    return lambda rows: both(width)(rows) | {name: ones(rows, 7, dtype) for name in (mask, f"negative_{mask}")}
