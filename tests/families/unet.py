"""Families whose network is a UNet."""

import diffusers as d
import torch

from tests.families import text
from tests.families.parts import BETAS, DDIM, RAW, SMALL, Family, both, kl, nothing, positive

TWO_TEXTS = nothing("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
UNCHECKED = nothing("safety_checker", "feature_extractor") | {"requires_safety_checker": False}
EULER = {**BETAS, "steps_offset": 1}

SD_UNET = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 2,
}
SDXL_UNET = {
    "block_out_channels": (2, 4),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 80,
    "cross_attention_dim": 64,
    "norm_num_groups": 1,
}


def unet(options, **more):
    ups = ("CrossAttnUpBlock2D", "UpBlock2D")
    return d.UNet2DConditionModel(**options, sample_size=16, up_block_types=ups, **more)


def sdxl_embeds():
    return both(64, pooled_prompt_embeds=32)


def sd(scheduler=None, pipeline=d.StableDiffusionPipeline, **call):
    """Without text encoders."""
    pipe = pipeline(
        vae=kl(),
        unet=unet(SD_UNET),
        scheduler=scheduler or d.DDIMScheduler(**DDIM),
        text_encoder=None,
        tokenizer=None,
        **UNCHECKED,
    )
    return Family(pipe, both(32), {"guidance_scale": 5.0} | call)


def sd_text(**checks):
    tokenizer, encoder = text.clip()
    scheduler = d.DDIMScheduler(**DDIM)
    pipe = d.StableDiffusionPipeline(
        vae=kl(),
        unet=unet(SD_UNET),
        scheduler=scheduler,
        text_encoder=encoder,
        tokenizer=tokenizer,
        **(UNCHECKED | checks),
    )
    return Family(pipe, None, {"guidance_scale": 5.0})


def sd_safety():
    checker, extractor = text.safety_checker()
    return sd_text(safety_checker=checker, feature_extractor=extractor, requires_safety_checker=True)


def v_prediction():
    return sd(d.DDIMScheduler(**DDIM, prediction_type="v_prediction"))


def sd_pndm():
    return sd(d.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1))


def sd_pag():
    return sd(pipeline=d.StableDiffusionPAGPipeline, pag_scale=2.0)


def sdxl(scheduler=None, pipeline=d.StableDiffusionXLPipeline, vae=None, network=None, **call):
    """Without text encoders."""
    scheduler = scheduler or d.EulerDiscreteScheduler(**EULER, timestep_spacing="leading")
    pipe = pipeline(
        vae=vae or kl(),
        unet=network or unet(SDXL_UNET),
        scheduler=scheduler,
        add_watermarker=False,
        **TWO_TEXTS,
    )
    return Family(pipe, sdxl_embeds(), {"guidance_scale": 5.0} | call)


def sdxl_text():
    first, second = text.clip(), text.clip(projection=32)
    pipe = d.StableDiffusionXLPipeline(
        vae=kl(),
        unet=unet(SDXL_UNET),
        scheduler=d.EulerDiscreteScheduler(**EULER, timestep_spacing="leading"),
        tokenizer=first[0],
        text_encoder=first[1],
        tokenizer_2=second[0],
        text_encoder_2=second[1],
        add_watermarker=False,
    )
    return Family(pipe, None, {"guidance_scale": 5.0})


def sdxl_upcast():
    """In float16, with an autoencoder that must decode in float32."""
    made = sdxl(vae=kl(force_upcast=True))
    made.pipe.unet.half()
    made.pipe.vae.half()
    return made._replace(cannot={"solver": "float16 rounds to 1e-3"})


def sdxl_turbo(steps=4):
    scheduler = d.EulerAncestralDiscreteScheduler(**EULER, timestep_spacing="trailing")
    return sdxl(scheduler, guidance_scale=0.0)._replace(steps=steps)


def sdxl_turbo_1():
    return sdxl_turbo(1)


def sdxl_pag():
    return sdxl(pipeline=d.StableDiffusionXLPAGPipeline, pag_scale=2.0)


def sdxl_lcm():
    """SDXL distilled with an embedded guidance scale."""
    network = unet(SDXL_UNET, time_cond_proj_dim=16)
    return sdxl(d.LCMScheduler(**DDIM), network=network)


def kolors(pipeline=d.KolorsPipeline, **call):
    """SDXL's network with one language model for its text."""
    scheduler = d.EulerDiscreteScheduler(**EULER, timestep_spacing="leading")
    pipe = pipeline(vae=kl(), unet=unet(SDXL_UNET), scheduler=scheduler, text_encoder=None, tokenizer=None)
    return Family(pipe, sdxl_embeds(), {"guidance_scale": 5.0} | call)


def kolors_pag():
    return kolors(d.KolorsPAGPipeline, pag_scale=2.0)


def lcm():
    network = unet(SD_UNET, time_cond_proj_dim=32)
    pipe = d.LatentConsistencyModelPipeline(
        vae=kl(), unet=network, scheduler=d.LCMScheduler(**DDIM), text_encoder=None, tokenizer=None, **UNCHECKED
    )
    cannot = {"solver": "its loop needs an LCM scheduler, which adds noise in every step"}
    return Family(pipe, positive(32), {"guidance_scale": 8.5}, cannot=cannot)


def kandinsky3():
    network = d.Kandinsky3UNet(
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    movq = d.VQModel(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=8,
        vq_embed_dim=4,
    )
    pipe = d.Kandinsky3Pipeline(
        unet=network, movq=movq, scheduler=d.DDPMScheduler(**BETAS), text_encoder=None, tokenizer=None
    )

    def embeds(rows):
        masks = {name: torch.ones(rows, 7) for name in ("attention_mask", "negative_attention_mask")}
        return both(32)(rows) | masks

    cannot = {
        "decode": RAW,
        "solver": "its loop does not scale the network's input, as diffusers' own Euler needs",
    }
    return Family(pipe, embeds, {"guidance_scale": 3.0, **SMALL}, cannot=cannot)
