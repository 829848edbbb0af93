"""Families whose network attends over text and image together, from SD3 on; all of them match flows."""

import diffusers as d
import torch

from tests.families import text
from tests.families.parts import (
    PIXELS,
    SMALL,
    WITHOUT_TEXT,
    Family,
    both,
    flow,
    kl,
    masked,
    nothing,
    ones,
    positive,
    shifted,
)

SD3_NAMES = [f"{kind}{n}" for n in ("", "_2", "_3") for kind in ("tokenizer", "text_encoder")]
FLUX_NAMES = [f"{kind}{n}" for n in ("", "_2") for kind in ("tokenizer", "text_encoder")]
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}


def sd3_parts():
    transformer = d.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return {"transformer": transformer, "scheduler": flow(shift=3.0), "vae": shifted()}


def sd3(**call):
    """Three real text encoders."""
    texts = [*text.clip(16, 32), *text.clip(16, 32), *text.t5(32)]
    pipe = d.StableDiffusion3Pipeline(**sd3_parts(), **dict(zip(SD3_NAMES, texts, strict=True)))
    return Family(pipe, None, {"guidance_scale": 5.0, "max_sequence_length": 16, **PIXELS})


def sd3_skip():
    """Skip-layer guidance on the middle rows of the grid."""
    pipe = d.StableDiffusion3Pipeline(**sd3_parts(), **nothing(*SD3_NAMES))
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}
    return Family(pipe, both(32, pooled_prompt_embeds=64), {"guidance_scale": 5.0, **skip, **PIXELS})


def sd3_pag():
    pipe = d.StableDiffusion3PAGPipeline(**sd3_parts(), **nothing(*SD3_NAMES), pag_applied_layers=["blocks.0"])
    return Family(pipe, both(32, pooled_prompt_embeds=64), {"guidance_scale": 5.0, "pag_scale": 2.0, **PIXELS})


def flux_transformer(guided):
    return d.FluxTransformer2DModel(**FLUX, pooled_projection_dim=32, guidance_embeds=guided)


def flux(guided=True, pipeline=d.FluxPipeline):
    """Without text encoders."""
    transformer = flux_transformer(guided)
    scheduler = flow(use_dynamic_shifting=guided)
    pipe = pipeline(transformer=transformer, scheduler=scheduler, vae=shifted(1), **nothing(*FLUX_NAMES))
    return Family(pipe, positive(32, pooled_prompt_embeds=32), {"guidance_scale": 3.5, **SMALL})


def flux_dev():
    texts = dict(zip(FLUX_NAMES, [*text.clip(), *text.t5()], strict=True))
    transformer, scheduler = flux_transformer(guided=True), flow(use_dynamic_shifting=True)
    pipe = d.FluxPipeline(transformer=transformer, scheduler=scheduler, vae=shifted(1), **texts)
    return Family(pipe, None, {"guidance_scale": 3.5, "max_sequence_length": 16, **SMALL})


def flux_schnell():
    return flux(guided=False)


def flux_true_cfg():
    made = flux()
    return made._replace(embeds=both(32, pooled_prompt_embeds=32), call=made.call | {"true_cfg_scale": 4.0})


def flux_kontext():
    """The editing model, without an image to edit."""
    made = flux(pipeline=d.FluxKontextPipeline)
    return made._replace(call=made.call | {"max_area": 256, "_auto_resize": False})


def flux2_parts(guided):
    transformer = d.Flux2Transformer2DModel(
        **(FLUX | {"joint_attention_dim": 16, "axes_dims_rope": [4, 4, 4, 4]}),
        timestep_guidance_channels=256,
        guidance_embeds=guided,
    )
    vae = d.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {"transformer": transformer, "vae": vae, "scheduler": flow(use_dynamic_shifting=True), **WITHOUT_TEXT}


def flux2_klein():
    return Family(d.Flux2KleinPipeline(**flux2_parts(guided=False)), both(16), {"guidance_scale": 4.0, **SMALL})


def flux2_klein_kv():
    """The distilled model whose steps share keys and values of given images; without images here."""
    pipe = d.Flux2KleinKVPipeline(**flux2_parts(guided=False))
    return Family(pipe, positive(16), dict(SMALL))


def flux2():
    return Family(d.Flux2Pipeline(**flux2_parts(guided=True)), positive(16), {"guidance_scale": 4.0, **SMALL})


def chroma():
    transformer = d.ChromaTransformer2DModel(
        **FLUX, approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16
    )
    pipe = d.ChromaPipeline(transformer=transformer, vae=shifted(1), scheduler=flow(), **WITHOUT_TEXT)
    return Family(pipe, masked(32), {"guidance_scale": 4.0, **SMALL})


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
    pipe = d.AuraFlowPipeline(transformer=transformer, vae=kl(), scheduler=flow(), **WITHOUT_TEXT)
    return Family(pipe, masked(32), {"guidance_scale": 4.0, **SMALL})


def hidream():
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    names = [f"{kind}{n}" for n in ("", "_2", "_3", "_4") for kind in ("tokenizer", "text_encoder")]
    pipe = d.HiDreamImagePipeline(transformer=transformer, vae=shifted(), scheduler=flow(), **nothing(*names))
    pipe.default_sample_size = 8  # it scales any size to this many latents, in area

    def embeds(rows):
        given = {"prompt_embeds_t5": ones(rows, 7)[..., None] * torch.linspace(-1, 1, 32)}
        given["prompt_embeds_llama3"] = torch.stack([both(16)(rows)["prompt_embeds"]] * 2)  # (layers, B, length, width)
        given["pooled_prompt_embeds"] = both(64, 1)(rows)["prompt_embeds"][:, 0]
        return given | {f"negative_{name}": value - 1 for name, value in given.items()}

    # Outside of training mode diffusers runs the experts under no_grad; the rest of the network must not be in it.
    return Family(pipe, embeds, {"guidance_scale": 5.0, **PIXELS}, training="MOEFeedForwardSwiGLU")
