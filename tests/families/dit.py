"""Families whose network is a diffusion transformer with cross-attention or a joint sequence."""

import diffusers as d
import torch

from tests.families import text
from tests.families.parts import (
    DDIM,
    PIXELS,
    RAW,
    SMALL,
    WITHOUT_TEXT,
    Family,
    dc,
    flow,
    kl,
    masked,
    ones,
    shifted,
)

UNBINNED = {"use_resolution_binning": False}


def pixart_transformer(**more):
    return d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_type="ada_norm_single",
        **more,
    )


def pixart_sigma():
    tokenizer, encoder = text.t5()
    pipe = d.PixArtSigmaPipeline(
        transformer=pixart_transformer(),
        vae=kl(),
        scheduler=d.DPMSolverMultistepScheduler(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"guidance_scale": 4.0, **SMALL, **UNBINNED, "clean_caption": False, "max_sequence_length": 16}
    return Family(pipe, None, call)


def pixart_alpha():
    pipe = d.PixArtAlphaPipeline(
        transformer=pixart_transformer(), vae=kl(), scheduler=d.DPMSolverMultistepScheduler(), **WITHOUT_TEXT
    )
    return Family(pipe, masked(32), {"guidance_scale": 4.0, **SMALL, **UNBINNED, "negative_prompt": None})


def pixart_sigma_pag():
    pipe = d.PixArtSigmaPAGPipeline(
        transformer=pixart_transformer(),
        vae=kl(),
        scheduler=d.DPMSolverMultistepScheduler(),
        pag_applied_layers=["blocks.1"],
        **WITHOUT_TEXT,
    )
    call = {"guidance_scale": 4.0, "pag_scale": 2.0, **SMALL, **UNBINNED, "negative_prompt": None}
    return Family(pipe, masked(32), call)


def hunyuan_dit(pipeline=d.HunyuanDiTPipeline, **more):
    transformer = d.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        text_len=7,
        text_len_t5=7,
    )
    pipe = pipeline(
        transformer=transformer,
        vae=kl(),
        scheduler=d.DDPMScheduler(**{k: v for k, v in DDIM.items() if k != "set_alpha_to_one"}),
        text_encoder_2=None,
        tokenizer_2=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **WITHOUT_TEXT,
        **more,
    )

    def embeds(rows):
        second = {f"{name}_2": value * 0.5 for name, value in masked(32)(rows).items()}
        second |= {name: ones(rows, 7) for name in ("prompt_attention_mask_2", "negative_prompt_attention_mask_2")}
        return masked(32)(rows) | second

    return Family(pipe, embeds, {"guidance_scale": 4.0, **SMALL, **UNBINNED})


def hunyuan_dit_pag():
    made = hunyuan_dit(d.HunyuanDiTPAGPipeline, pag_applied_layers=["blocks.1"])
    return made._replace(call=made.call | {"pag_scale": 2.0})


def sana_transformer(**more):
    return d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=32,  # in a narrow head all ReLUs may be off, where linear attention is discontinuous
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=32,
        **more,
    )


def sana():
    tokenizer, encoder = text.gemma2()
    pipe = d.SanaPipeline(
        transformer=sana_transformer(),
        vae=dc(),
        scheduler=flow(shift=7.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"guidance_scale": 4.0, **PIXELS, **UNBINNED, "complex_human_instruction": None, "max_sequence_length": 16}
    return Family(pipe, None, call)


def sana_pag():
    pipe = d.SanaPAGPipeline(
        transformer=sana_transformer(),
        vae=dc(),
        scheduler=flow(shift=7.0),
        pag_applied_layers=["blocks.0"],
        **WITHOUT_TEXT,
    )
    call = {"guidance_scale": 4.0, "pag_scale": 2.0, **PIXELS, **UNBINNED, "negative_prompt": None}
    return Family(pipe, masked(8, torch.long), call)


def lumina2_transformer():
    return d.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )


def lumina2():
    tokenizer, encoder = text.gemma2()
    pipe = d.Lumina2Pipeline(
        transformer=lumina2_transformer(),
        vae=shifted(),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"guidance_scale": 4.0, **PIXELS, "system_prompt": "draw", "max_sequence_length": 64}
    return Family(pipe, None, call)


def lumina2_truncated():
    """Guidance on the first half of the rows alone."""
    pipe = d.Lumina2Pipeline(transformer=lumina2_transformer(), vae=shifted(), scheduler=flow(), **WITHOUT_TEXT)
    return Family(pipe, masked(8, torch.bool), {"guidance_scale": 4.0, "cfg_trunc_ratio": 0.5, **PIXELS})


def prx_transformer(**size):
    return d.PRXTransformer2DModel(
        **size, context_in_dim=8, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2]
    )


def prx():
    """Without guidance, which in diffusers works for one prompt at a time."""
    transformer = prx_transformer(patch_size=1, in_channels=4)
    pipe = d.PRXPipeline(transformer=transformer, vae=shifted(), scheduler=flow(), **WITHOUT_TEXT)
    return Family(pipe, masked(8, torch.bool), {"guidance_scale": 1.0, **PIXELS, **UNBINNED})


def lumina():
    transformer = d.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=8,
    )
    pipe = d.LuminaPipeline(transformer=transformer, vae=kl(), scheduler=flow(), **WITHOUT_TEXT)
    return Family(pipe, masked(8, torch.bool), {"guidance_scale": 4.0, **PIXELS})


def prx_pixel():
    """Without an autoencoder: latents are pixels."""
    transformer = prx_transformer(patch_size=4, in_channels=3)
    pipe = d.PRXPixelPipeline(transformer=transformer, scheduler=flow(), **WITHOUT_TEXT)
    call = {"guidance_scale": 1.0, **PIXELS, **UNBINNED}
    return Family(pipe, masked(8, torch.bool), call, cannot={"decode": RAW})
