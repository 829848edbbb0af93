"""Families close to video models: latents of five dimensions, guiders with a state of their own."""

import diffusers as d
import torch

from tests.families.parts import PIXELS, Family, flow, kl, masked, ones, randn


def hunyuan_image(guided=False):
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
        guidance_embeds=guided,
    )
    vae = d.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        sample_size=32,
    )
    none = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2")}
    names = () if guided else ("guider", "ocr_guider")
    guiders = {name: d.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=0) for name in names}
    pipe = d.HunyuanImagePipeline(transformer=transformer, vae=vae, scheduler=flow(shift=7.0), **none, **guiders)

    def embeds(rows):
        given = masked(32, torch.long, "prompt_embeds_mask")(rows)
        mask = {name: ones(rows, 7, torch.long) for name in ("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2")}
        return (
            given | {"prompt_embeds_2": randn(rows, 7, 32), "negative_prompt_embeds_2": randn(rows, 7, 32) - 1} | mask
        )

    cannot = {} if guided else {"solver": "its guidance carries momentum from step to step; a single step has none"}
    return Family(pipe, embeds, {"distilled_guidance_scale": 3.5, **PIXELS}, cannot=cannot)


def hunyuan_image_distilled():
    return hunyuan_image(guided=True)


def kandinsky5():
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    )
    none = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2")}
    pipe = d.Kandinsky5T2IPipeline(transformer=transformer, vae=kl(), scheduler=flow(), **none)
    pipe.resolutions = [(32, 32)]

    def embeds(rows):
        given = {"prompt_embeds_qwen": randn(rows, 7, 16), "prompt_embeds_clip": randn(rows, 16)}
        return given | {f"negative_{k}": v - 1 for k, v in given.items()}

    return Family(
        pipe,
        embeds,
        {
            "guidance_scale": 4.0,
            **PIXELS,
            "prompt_cu_seqlens": torch.tensor([0, 7]),
            "negative_prompt_cu_seqlens": torch.tensor([0, 7]),
        },
    )
