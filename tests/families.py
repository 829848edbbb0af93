"""Pipeline families for the driver's contract tests: real diffusers classes at tiny random size.

Each entry makes (pipeline, embeddings for B rows, keywords of every call).
"""

from collections.abc import Callable
from typing import NamedTuple

import diffusers as d
import torch

from t2i_align.pipelines.toy import Mixture, toy_pipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


class Family(NamedTuple):
    pipe: d.DiffusionPipeline
    embeds: Callable[[int], dict]
    call: dict


def kl(channels=4, **more):
    options = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return d.AutoencoderKL(**(options | more))


def shifted(channels=4):
    return kl(channels, shift_factor=0.06, scaling_factor=1.5)


def randn(rows, *shape):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(7))


def ones(rows, length, dtype=torch.float32):
    return torch.ones(rows, length, dtype=dtype)


def both(width, length=7):
    """Embeddings of both branches of guidance."""
    return lambda b: {"prompt_embeds": randn(b, length, width), "negative_prompt_embeds": randn(b, length, width) - 1}


def masked(width, dtype=torch.float32, **more):
    """The same with attention masks."""
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return lambda b: both(width)(b) | {name: ones(b, 7, dtype) for name in masks} | more


def sd(scheduler=None, **call):
    unet = d.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = d.StableDiffusionPipeline(
        vae=kl(), unet=unet, scheduler=scheduler or d.DDIMScheduler(**DDIM), requires_safety_checker=False, **none
    )
    return Family(pipe, both(32), {"guidance_scale": 5.0} | call)


def sdxl(scheduler=None, **call):
    unet = d.UNet2DConditionModel(
        block_out_channels=(2, 4),
        layers_per_block=2,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=1,
    )
    scheduler = scheduler or d.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = d.StableDiffusionXLPipeline(vae=kl(), unet=unet, scheduler=scheduler, add_watermarker=False, **none)

    def embeds(b):
        pooled = {"pooled_prompt_embeds": randn(b, 32), "negative_pooled_prompt_embeds": randn(b, 32) - 1}
        return both(64)(b) | pooled

    return Family(pipe, embeds, {"guidance_scale": 5.0} | call)


def sdxl_turbo():
    scheduler = d.EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="trailing")
    return sdxl(scheduler, guidance_scale=0.0)


def sd3():
    transformer = d.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    none = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = d.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=shifted(), **none)

    def embeds(b):
        pooled = {"pooled_prompt_embeds": randn(b, 64), "negative_pooled_prompt_embeds": randn(b, 64) - 1}
        return both(32)(b) | pooled

    return Family(pipe, embeds, {"guidance_scale": 5.0, "height": 32, "width": 32})


def flux(guided=True):
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guided,
    )
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided)
    pipe = d.FluxPipeline(transformer=transformer, scheduler=scheduler, vae=shifted(1), **none)

    def embeds(b):
        return {"prompt_embeds": randn(b, 7, 32), "pooled_prompt_embeds": randn(b, 32)}

    return Family(pipe, embeds, {"guidance_scale": 3.5, "height": 16, "width": 16})


def qwen():
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe = d.QwenImagePipeline(transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None)
    masks = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    embeds = lambda b: both(16)(b) | {name: ones(b, 7, torch.long) for name in masks}  # noqa: E731
    return Family(pipe, embeds, {"true_cfg_scale": 4.0, "height": 32, "width": 32})


def sana():
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = d.SanaPipeline(transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None)
    call = {"guidance_scale": 4.0, "height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None}
    return Family(pipe, masked(8, torch.long), call)


def pixart_sigma():
    transformer = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    scheduler = d.DPMSolverMultistepScheduler()
    pipe = d.PixArtSigmaPipeline(
        transformer=transformer, vae=kl(), scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    call = {"guidance_scale": 4.0, "height": 16, "width": 16, "use_resolution_binning": False, "negative_prompt": None}
    return Family(pipe, masked(32), call)


def lumina2():
    transformer = d.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe = d.Lumina2Pipeline(
        transformer=transformer, vae=shifted(), scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    return Family(pipe, masked(8, torch.bool), {"guidance_scale": 4.0, "height": 32, "width": 32})


def chroma():
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe = d.ChromaPipeline(
        transformer=transformer, vae=shifted(1), scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    return Family(pipe, masked(32), {"guidance_scale": 4.0, "height": 16, "width": 16})


def cogview4():
    transformer = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    shifting = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "use_dynamic_shifting": True}
    scheduler = d.FlowMatchEulerDiscreteScheduler(**shifting, time_shift_type="linear")
    pipe = d.CogView4Pipeline(transformer=transformer, vae=kl(), scheduler=scheduler, text_encoder=None, tokenizer=None)
    return Family(pipe, both(32, 16), {"guidance_scale": 4.0, "height": 32, "width": 32})


def z_image():
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.fill_(1.0)
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe = d.ZImagePipeline(
        transformer=transformer, vae=shifted(16), scheduler=scheduler, text_encoder=None, tokenizer=None
    )

    def embeds(b):
        return {name: list(values) for name, values in both(16)(b).items()}

    return Family(pipe, embeds, {"guidance_scale": 4.0, "height": 32, "width": 32})


def aura_flow():
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe = d.AuraFlowPipeline(transformer=transformer, vae=kl(), scheduler=scheduler, text_encoder=None, tokenizer=None)
    return Family(pipe, masked(32), {"guidance_scale": 4.0, "height": 16, "width": 16})


def flux2_klein():
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    vae = d.AutoencoderKLFlux2(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = d.Flux2KleinPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    return Family(pipe, both(16), {"guidance_scale": 4.0, "height": 16, "width": 16})


def lcm():
    unet = d.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
        time_cond_proj_dim=32,
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = d.LatentConsistencyModelPipeline(
        vae=kl(), unet=unet, scheduler=d.LCMScheduler(**DDIM), requires_safety_checker=False, **none
    )
    return Family(pipe, lambda b: {"prompt_embeds": randn(b, 7, 32)}, {"guidance_scale": 8.5})


def v_prediction():
    return sd(d.DDIMScheduler(**DDIM, prediction_type="v_prediction"))


def flux_schnell():
    return flux(guided=False)


def toy(flow=False):
    mixture = Mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-2.0] * 3, [1.0] * 3]), torch.tensor([0.5, 0.8]))
    embeds = lambda b: {"prompt_embeds": torch.arange(b) / 2}  # noqa: E731
    return Family(toy_pipeline(mixture, flow, size=2), embeds, {"guidance_scale": 2.0})


def toy_flow():
    return toy(flow=True)


FAMILIES = {
    "toy": toy,
    "toy-flow": toy_flow,
    "sd": sd,
    "sd2": v_prediction,
    "sdxl": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "sd3": sd3,
    "flux-dev": flux,
    "flux-schnell": flux_schnell,
    "qwen-image": qwen,
    "sana": sana,
    "pixart-sigma": pixart_sigma,
    "lumina2": lumina2,
    "chroma": chroma,
    "cogview4": cogview4,
    "z-image": z_image,
    "aura-flow": aura_flow,
    "flux2-klein": flux2_klein,
    "lcm": lcm,
}
