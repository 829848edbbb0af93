"""Further families of one joint sequence of text and image."""

import diffusers as d
import torch

from tests.families import text
from tests.families.flow import FLUX
from tests.families.parts import (
    PIXELS,
    SMALL,
    WITHOUT_TEXT,
    Family,
    both,
    flow,
    kl,
    masked,
    ones,
    positive,
    qwen_vae,
    randn,
    shifted,
)

QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def bria():
    transformer = d.BriaTransformer2DModel(
        **(FLUX | {"in_channels": 16, "attention_head_dim": 8}) | {"axes_dims_rope": [0, 4, 4]}
    )
    pipe = d.BriaPipeline(transformer=transformer, vae=kl(), scheduler=flow(), **WITHOUT_TEXT)
    return Family(pipe, both(32), {"guidance_scale": 4.0, **SMALL})


def ovis():
    transformer = d.OvisImageTransformer2DModel(**FLUX, out_channels=4)
    pipe = d.OvisImagePipeline(transformer=transformer, vae=shifted(1), scheduler=flow(), **WITHOUT_TEXT)
    return Family(pipe, both(32), {"guidance_scale": 4.0, "negative_prompt": None, **SMALL})


def longcat():
    transformer = d.LongCatImageTransformer2DModel(
        **(FLUX | {"in_channels": 64, "joint_attention_dim": 16}), pooled_projection_dim=16
    )
    tokenizer, encoder = text.qwen25_vl()
    pipe = d.LongCatImagePipeline(
        transformer=transformer,
        vae=shifted(16),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_processor=None,
    )
    pipe.tokenizer_max_length = 16
    call = {"guidance_scale": 4.0, "negative_prompt": "", "enable_prompt_rewrite": False, **SMALL}
    return Family(pipe, None, call)


def krea2():
    transformer = d.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    pipe = d.Krea2Pipeline(
        transformer=transformer, vae=qwen_vae(), scheduler=flow(use_dynamic_shifting=True), **WITHOUT_TEXT
    )

    def embeds(rows):
        given = {"prompt_embeds": randn(rows, 7, 2, 16), "prompt_embeds_mask": ones(rows, 7, torch.bool)}
        return given | {
            "negative_prompt_embeds": given["prompt_embeds"] - 1,
            "negative_prompt_embeds_mask": given["prompt_embeds_mask"],
        }

    return Family(pipe, embeds, {"guidance_scale": 4.0, **PIXELS})


def nucleus():
    transformer = d.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
    )
    pipe = d.NucleusMoEImagePipeline(
        transformer=transformer, vae=qwen_vae(), scheduler=flow(), text_encoder=None, processor=None
    )
    return Family(pipe, masked(16, torch.long, "prompt_embeds_mask"), {"guidance_scale": 4.0, **PIXELS})


def qwen21():
    transformer = d.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    processor, encoder = text.qwen_vl_processor(), None
    pipe = d.QwenImage21Pipeline(
        transformer=transformer, vae=qwen_vae(), scheduler=flow(), text_encoder=encoder, processor=processor
    )
    return Family(pipe, masked(16, torch.long, "prompt_embeds_mask"), {"true_cfg_scale": 4.0, **PIXELS})


def glm():
    transformer = d.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=8,
    )
    pipe = d.GlmImagePipeline(
        tokenizer=None,
        processor=None,
        text_encoder=None,
        vision_language_encoder=None,
        vae=kl(latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True, time_shift_type="linear"),
    )

    def embeds(rows):
        return both(16)(rows) | {"prior_token_ids": torch.arange(64).remainder(8).expand(rows, -1)}

    return Family(pipe, embeds, {"guidance_scale": 4.0, **PIXELS})


def cogview3():
    transformer = d.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    pipe = d.CogView3PlusPipeline(
        transformer=transformer, vae=kl(), scheduler=d.CogVideoXDDIMScheduler(), **WITHOUT_TEXT
    )
    return Family(pipe, both(32, 16), {"guidance_scale": 4.0, **SMALL})


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
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = d.CogView4Pipeline(transformer=transformer, vae=kl(), scheduler=scheduler, **WITHOUT_TEXT)
    return Family(pipe, both(32, 16), {"guidance_scale": 4.0, **PIXELS})


def qwen():
    tokenizer, encoder = text.qwen25_vl()
    pipe = d.QwenImagePipeline(
        transformer=d.QwenImageTransformer2DModel(**QWEN, guidance_embeds=False),
        vae=qwen_vae(),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return Family(pipe, None, {"true_cfg_scale": 4.0, "negative_prompt": " ", **PIXELS})


def z_image_parts():
    transformer = d.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.fill_(1.0)  # diffusers leaves them uninitialised
    return {"transformer": transformer, "vae": shifted(16), "scheduler": flow()}


def z_image():
    tokenizer, encoder = text.qwen3()
    pipe = d.ZImagePipeline(**z_image_parts(), text_encoder=encoder, tokenizer=tokenizer)
    return Family(pipe, None, {"guidance_scale": 4.0, "max_sequence_length": 64, **PIXELS})


def z_image_turbo():
    """Without guidance; embeddings are a list of tensors."""
    pipe = d.ZImagePipeline(**z_image_parts(), **WITHOUT_TEXT)

    def embeds(rows):
        return {name: list(values) for name, values in positive(16)(rows).items()}

    return Family(pipe, embeds, {"guidance_scale": 0.0, **PIXELS})
