"""Families that are also told a control image per sample, on a range of rows or on all."""

import diffusers as d
import torch

from tests.families.dit import sana_transformer
from tests.families.flow import FLUX, FLUX_NAMES, flux_transformer
from tests.families.joint import QWEN, z_image_parts
from tests.families.parts import (
    DDIM,
    PIXELS,
    SMALL,
    WITHOUT_TEXT,
    Family,
    both,
    dc,
    flow,
    kl,
    masked,
    nothing,
    positive,
    qwen_vae,
    randn,
    shifted,
)
from tests.families.unet import EULER, SD_UNET, SDXL_UNET, TWO_TEXTS, UNCHECKED, sdxl_embeds, unet

DRAWN = {"solver": "the autoencoder draws the control image's latents, in either run its own"}
RANGE = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}


def controlnet(options):
    return d.ControlNetModel(**options, conditioning_embedding_out_channels=(4, 4))


def filled(network):
    """ControlNets start at zero output; at random weights they control something."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return network


def with_image(embeds, name="control_image", size=32):
    """A control image for every row."""
    return lambda rows: embeds(rows) | {name: randn(rows, 3, size, size).sigmoid()}


def sd_controlnet():
    pipe = d.StableDiffusionControlNetPipeline(
        vae=kl(),
        unet=unet(SD_UNET),
        controlnet=filled(controlnet(SD_UNET)),
        scheduler=d.DDIMScheduler(**DDIM),
        **WITHOUT_TEXT,
        **UNCHECKED,
    )
    return Family(pipe, with_image(both(32), "image"), {"guidance_scale": 5.0, **PIXELS, **RANGE})


def sd_controlnet_pag():
    pipe = d.StableDiffusionControlNetPAGPipeline(
        vae=kl(),
        unet=unet(SD_UNET),
        controlnet=filled(controlnet(SD_UNET)),
        scheduler=d.DDIMScheduler(**DDIM),
        **WITHOUT_TEXT,
        **UNCHECKED,
    )
    return Family(pipe, with_image(both(32), "image"), {"guidance_scale": 5.0, "pag_scale": 2.0, **PIXELS, **RANGE})


def sdxl_controlnet():
    pipe = d.StableDiffusionXLControlNetPipeline(
        vae=kl(),
        unet=unet(SDXL_UNET),
        controlnet=filled(controlnet(SDXL_UNET)),
        scheduler=d.EulerDiscreteScheduler(**EULER, timestep_spacing="leading"),
        add_watermarker=False,
        **TWO_TEXTS,
    )
    return Family(pipe, with_image(sdxl_embeds(), "image"), {"guidance_scale": 5.0, **PIXELS, **RANGE})


def flux_controlnet():
    network = d.FluxControlNetModel(**FLUX, pooled_projection_dim=32, guidance_embeds=True)
    pipe = d.FluxControlNetPipeline(
        transformer=flux_transformer(guided=True),
        controlnet=filled(network),
        scheduler=flow(),
        vae=shifted(1),
        **nothing(*FLUX_NAMES),
    )
    embeds = with_image(positive(32, pooled_prompt_embeds=32), size=16)
    return Family(pipe, embeds, {"guidance_scale": 3.5, **SMALL, **RANGE}, cannot=DRAWN)


def flux_control():
    """The control image rides in the latents' channels."""
    transformer = d.FluxTransformer2DModel(
        **(FLUX | {"in_channels": 8}), out_channels=4, pooled_projection_dim=32, guidance_embeds=True
    )
    pipe = d.FluxControlPipeline(transformer=transformer, scheduler=flow(), vae=shifted(1), **nothing(*FLUX_NAMES))
    embeds = with_image(positive(32, pooled_prompt_embeds=32), size=16)
    return Family(pipe, embeds, {"guidance_scale": 3.5, **SMALL}, cannot=DRAWN)


def qwen_controlnet():
    transformer = d.QwenImageTransformer2DModel(**QWEN, guidance_embeds=False)
    network = d.QwenImageControlNetModel(**(QWEN | {"num_layers": 1}))
    pipe = d.QwenImageControlNetPipeline(
        transformer=transformer, controlnet=filled(network), vae=qwen_vae(), scheduler=flow(), **WITHOUT_TEXT
    )
    embeds = with_image(masked(16, torch.long, "prompt_embeds_mask"))
    return Family(pipe, embeds, {"true_cfg_scale": 4.0, **PIXELS, **RANGE}, cannot=DRAWN)


def z_image_controlnet():
    parts = z_image_parts()
    network = d.ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=16,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    network = d.ZImageControlNetModel.from_transformer(filled(network), parts["transformer"])
    pipe = d.ZImageControlNetPipeline(**parts, controlnet=network, **WITHOUT_TEXT)

    def embeds(rows):
        listed = {name: list(values) for name, values in both(16)(rows).items()}
        return with_image(lambda rows: listed)(rows)

    reason = (
        "diffusers' ZImageControlNetModel lacks the gradient_checkpointing attribute that it reads with gradients on"
    )
    cannot = dict.fromkeys(("replay", "bf16", "fp16", "d/dx", "d/dw"), reason)
    return Family(pipe, embeds, {"guidance_scale": 4.0, **PIXELS}, cannot=cannot)


def sana_controlnet():
    network = d.SanaControlNetModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=32,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=8,
    )
    pipe = d.SanaControlNetPipeline(
        transformer=sana_transformer(),
        controlnet=filled(network),
        vae=dc(),
        scheduler=flow(shift=7.0),
        **WITHOUT_TEXT,
    )
    embeds = with_image(masked(8, torch.long))
    return Family(
        pipe, embeds, {"guidance_scale": 4.0, **PIXELS, "use_resolution_binning": False, "negative_prompt": None}
    )


def sdxl_controlnet_union():
    network = d.ControlNetUnionModel(
        **SDXL_UNET,
        conditioning_embedding_out_channels=(4, 4),
        num_trans_channel=2,
        num_trans_head=1,
        num_proj_channel=2,
    )
    pipe = d.StableDiffusionXLControlNetUnionPipeline(
        vae=kl(),
        unet=unet(SDXL_UNET),
        controlnet=filled(network),
        scheduler=d.EulerDiscreteScheduler(**EULER, timestep_spacing="leading"),
        add_watermarker=False,
        **TWO_TEXTS,
    )
    return Family(pipe, with_image(sdxl_embeds()), {"guidance_scale": 5.0, "control_mode": 1, **PIXELS, **RANGE})
